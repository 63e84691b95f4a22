"""The same over a sweep of sizes, to count the variants that it compiles."""

from collections.abc import Iterator

import torch

from tests.plans.crop_and_resize3d import crop, gradient
from tests.triton_checked.plan import Case

SIZES = [
    (1, 1, 1),
    (2, 3, 4),
    (7, 7, 7),
    (8, 8, 8),
    (16, 16, 16),
    (5, 33, 17),
    (24, 24, 24),
    (3, 1, 200),
    (64, 64, 64),
]
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 16, 16, 16),
    (3, 2, 17, 31, 33),
    (8, 1, 64, 64, 64),
    (1, 4, 5, 1, 100),
]


def cases() -> Iterator[Case]:
    for size in SIZES:
        for shape in SHAPES:
            yield crop(f"crop {size} of {shape}", torch.float32, size=size, shape=shape)
            yield gradient(f"gradient {size} of {shape}", torch.float32, size=size, shape=shape)
