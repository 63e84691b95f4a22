"""Launches of object_mixup3d: in and out of place, donors given or the volumes, windows.

In place, every volume is one box that fills its tiles. Out of place, there are no boxes.
"""

from collections.abc import Callable, Iterator

import torch

from fmkernels.kernels import object_mixup3d as kernels
from tests.triton_checked.plan import Case

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
I16, U8 = torch.int16, torch.uint8
WINDOW = (-1200.0, 600.0)
CUBES = (4, 1, 16, 16, 16)
LARGE = (2, 1, 64, 64, 64)


class Objects:
    """Arguments of the launch functions. Box k is all of volume k; its donor is the next one."""

    def __init__(self, dtype, *, shape=CUBES, pairs=4, window=None, donors=None, donor_dtype=None):
        self.volumes = torch.empty(shape, dtype=dtype)
        self.donors = torch.empty(donors, dtype=donor_dtype or dtype) if donors else None
        self.boxes = torch.tensor(
            [[k, 0, 0, 0, *shape[2:]] for k in range(pairs)], dtype=torch.float32
        ).reshape(-1, 7)
        self.lam, self.windows = (
            torch.ones(pairs),
            (window if donor_dtype is None else None, window),
        )

    def arguments(self):
        donor_boxes = self.boxes.roll(1, 0)
        return self.volumes, self.donors, self.boxes, donor_boxes, self.lam, *self.windows

    def case(self, name: str, launch: Callable, last, min_bytes: float | None) -> Case:
        return Case(name, lambda: launch(*self.arguments(), last), self.volumes.numel(), min_bytes)

    def new(self, name: str, dtype: torch.dtype, min_bytes: float | None = None) -> Case:
        return self.case(name, kernels.launch_object_mixup, dtype, min_bytes)

    def in_place(self, name: str, min_bytes: float | None = None) -> Case:
        return self.case(name, kernels.launch_object_mixup_into, self.volumes, min_bytes)


def cases() -> Iterator[Case]:
    for dtype in (F32, BF16, I16, F64):
        name = str(dtype).removeprefix("torch.")
        min_bytes = 3 * dtype.itemsize
        yield Objects(dtype, donors=CUBES).in_place(f"in place, donors {name}", min_bytes)
    hounsfield = Objects(BF16, window=WINDOW, donors=CUBES, donor_dtype=I16)
    yield hounsfield.in_place("in place, donors int16 windowed bfloat16", 6)
    yield Objects(F32).in_place("in place float32", 12)
    yield Objects(F32, window=WINDOW).in_place("window, in place float32")
    yield Objects(F32, shape=LARGE, pairs=0).new("new, no box float32", F32, 8)
    yield Objects(I16, shape=LARGE, pairs=0, window=WINDOW).new(
        "new, no box, window int16 bfloat16", BF16, 4
    )
    yield Objects(I16, shape=LARGE, pairs=0, window=WINDOW).new(
        "new, no box, window int16 float32", F32, 6
    )
    yield Objects(F32, shape=(3, 2, 31, 33, 35), pairs=3).new("new, odd size float32", F32)
    yield Objects(F32, shape=(3000, 1, 2, 2, 2), pairs=3000).in_place("3000 boxes float32")
    yield Objects(U8, shape=(3, 1, 1024, 1024, 1024), pairs=3, donors=CUBES).in_place(
        "past 2^31 uint8"
    )
