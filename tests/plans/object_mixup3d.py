"""Launches of object_mixup3d: in and out of place, donors given or the volumes, windows.

In place, every volume is one box. Out of place, there are no boxes.
"""

from collections.abc import Callable, Iterator

import torch

from fmkernels.kernels.object_mixup3d import _mix_overlapping, object_mixup3d
from tests.plans import alike
from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
I16, U8 = torch.int16, torch.uint8
WINDOW = (-1200.0, 600.0)
CUBES = (4, 1, 16, 16, 16)
LARGE = (2, 1, 64, 64, 64)
OBJECTS = (8, 1, 128, 128, 128)


def march(layers: int):
    """Trips: one group of boxes is tested; of one tile, n layers need n + 1 planes of the donor."""
    return 1, (1, ((layers, (1 + 1 / layers,)),))


class Objects:
    """Arguments of the launcher. Box k is all of volume k; its donor is the next one."""

    def __init__(self, dtype, *, shape=CUBES, pairs=4, window=None, donors=None, donor_dtype=None):
        self.volumes = torch.empty(shape, dtype=dtype)
        donors = torch.empty(donors, dtype=donor_dtype or dtype) if donors else None
        boxes = torch.tensor(
            [[k, 0, 0, 0, *shape[2:]] for k in range(pairs)], dtype=torch.float32
        ).reshape(-1, 7)
        windows = (window if donor_dtype is None else None), window
        # not a weight of 0 or 1, for which less is read
        lam = torch.full((pairs,), 0.75)
        self.arguments = donors, boxes, boxes.roll(1, 0), lam, *windows

    def new(self, name: str, dtype: torch.dtype, min_bytes: float | None = None) -> Case:
        def call():
            return launch("object_mixup3d", self.volumes, *self.arguments, dtype=dtype)

        return Case(name, call, self.volumes.numel(), min_bytes)

    def in_place(self, name: str, min_bytes: float | None = None, trips=(), alone=True) -> Case:
        def call():
            overlap = self.arguments[0] is None
            object_mixup3d(self.volumes, *self.arguments, self.volumes, True, overlap)

        without = (_mix_overlapping,) if alone else ()
        return Case(name, call, self.volumes.numel(), min_bytes, trips, without)


def cases() -> Iterator[Case]:
    for dtype in (F32, BF16):
        objects = Objects(dtype, shape=OBJECTS, pairs=8, donors=OBJECTS)
        name = f"large, in place, donors {dtype}".replace("torch.", "")
        yield alike(objects.in_place(name, 3 * dtype.itemsize, march(64)), dtype == BF16)
    large = Objects(BF16, shape=OBJECTS, pairs=8, window=WINDOW, donors=OBJECTS, donor_dtype=I16)
    yield alike(large.in_place("large, in place, donors int16 windowed bfloat16", 6, march(64)))
    for dtype in (F32, BF16, I16, F64):
        name = str(dtype).removeprefix("torch.")
        min_bytes = 3 * dtype.itemsize
        mixed = Objects(dtype, donors=CUBES)
        case = mixed.in_place(f"in place, donors {name}", min_bytes, march(4))
        yield alike(case, dtype != F64)
    hounsfield = Objects(BF16, window=WINDOW, donors=CUBES, donor_dtype=I16)
    yield alike(hounsfield.in_place("in place, donors int16 windowed bfloat16", 6, march(4)))
    yield alike(Objects(F32).in_place("in place float32", 12))
    near = "near other boxes, in place float32"
    yield alike(Objects(F32, donors=CUBES).in_place(near, trips=(1, (2, ())), alone=False))
    yield alike(Objects(F32, window=WINDOW).in_place("window, in place float32"))
    yield alike(Objects(F32, shape=LARGE, pairs=0).new("new, no box float32", F32, 8))
    windowed = Objects(I16, shape=LARGE, pairs=0, window=WINDOW)
    yield alike(windowed.new("new, no box, window int16 bfloat16", BF16, 4))
    yield windowed.new("new, no box, window int16 float32", F32, 6)
    yield alike(Objects(F32, shape=(3, 2, 31, 33, 35), pairs=3).new("new, odd size float32", F32))
    many = Objects(F32, shape=(3000, 1, 2, 2, 2), pairs=3000)
    yield alike(many.in_place("3000 boxes float32"))
    yield Objects(U8, shape=(3, 1, 1024, 1024, 1024), pairs=3, donors=CUBES).in_place(
        "past 2^31 uint8"
    )


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    return {"object_mixup3d": (Objects(F32).new("new", F32).call, ("DEPTH", "LANES"))}


EXTRA_BYTES = {"in place float32": 4}  # donors are copied before they are overwritten
