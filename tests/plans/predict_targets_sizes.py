"""The same over a sweep of sizes, to count the variants that it compiles."""

from collections.abc import Iterator

import torch

from tests.plans.predict_targets import call
from tests.triton_checked.plan import Case


def cases() -> Iterator[Case]:
    for size in (1, 2, 3, 4, 5, 8, 15, 16, 17, 20, 32, 33, 40, 64):
        yield Case(f"{size}^3", call(torch.float32, size))
