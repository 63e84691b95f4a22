"""The same call over a sweep of sizes: how many variants does it compile?"""

from collections.abc import Iterator

import torch

from tests.plans.soft_target_focal_loss import total
from tests.support.driver import Case


def cases() -> Iterator[Case]:
    for n in (1, 2, 15, 16, 17, 1000, 1024, 4096, 99_991, 1 << 20):
        yield Case(f"{n} elements", total(torch.float32, torch.float32, inner=n), n)
