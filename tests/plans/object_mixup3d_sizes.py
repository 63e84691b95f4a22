"""The same over a sweep of sizes and numbers of boxes, to count the variants."""

from collections.abc import Iterator

import torch

from tests.plans.object_mixup3d import Objects
from tests.triton_checked.plan import Case

SIZES = [(1, 1, 1), (3, 5, 7), (16, 16, 16), (17, 31, 33), (96, 96, 96), (160, 160, 160)]


def cases() -> Iterator[Case]:
    for size in SIZES:
        for pairs in (1, 16, 100):
            for shape in ((1, 3, *size), (16, 1, *size)):
                objects = Objects(torch.float32, shape=shape, pairs=pairs)
                yield objects.in_place(f"in place {shape} {pairs}")
                yield objects.new(f"new {shape} {pairs}", torch.float32)
