"""The same over a sweep of sizes, to count the variants that it compiles."""

from collections.abc import Iterator

import torch

from tests.plans.group_norm3d import backward, forward
from tests.triton_checked.plan import Case

SIZES = [1, 2, 3, 5, 8, 10, 20, 40]


def cases() -> Iterator[Case]:
    for n in SIZES:
        for batch in (1, 2, 16):
            for last in (True, False):
                options = {"shape": (batch, 24, n, n, n), "last": last}
                yield Case(f"forward {options}", forward(torch.bfloat16, **options))
                yield Case(f"backward {options}", backward(torch.bfloat16, **options))
