"""The same over a sweep of sizes, to count the variants that it compiles."""

from collections.abc import Iterator

import torch

from tests.plans.mixup3d import Mixup, case
from tests.triton_checked.plan import Case

SIZES = [
    (8, 8, 8),
    (16, 16, 16),
    (24, 40, 48),
    (48, 48, 48),
    (64, 64, 64),
    (80, 96, 112),
    (96, 96, 96),
    (1, 1, 4),
]
ODD_SIZES = [(1, 1, 1), (3, 5, 7), (17, 31, 33), (10, 10, 50), (9, 10, 102)]


def cases() -> Iterator[Case]:
    for size in SIZES + ODD_SIZES:
        shape = (8, 1, *size)
        kind = "odd" if size in ODD_SIZES else "even"
        yield case(f"in place, {kind} {size}", Mixup(torch.float32, shape=shape).in_place(), shape)
        flipped = Mixup(torch.float32, shape=shape, flips=True)
        yield case(f"flips, {kind} {size}", flipped.out_of_place(torch.float32), shape)
