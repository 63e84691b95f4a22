"""Launches of mixup3d: in and out of place, flips, window, every type, both gradients."""

from collections.abc import Callable, Iterator

import torch

from fmkernels.kernels import mixup3d as kernels
from tests.plans import alike
from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
I16, U8 = torch.int16, torch.uint8
WINDOW = (-1200.0, 600.0)
CHANNELS_FIRST, CHANNELS_LAST = (0, 1, 2, 4), (1, 2, 4, 0)
SHAPE = (8, 1, 16, 16, 64)


class Mixup:
    """Arguments of the launch functions for one batch of zeros."""

    def __init__(
        self, dtype, *, shape=SHAPE, flips=False, axes=CHANNELS_FIRST, window=None, donors=0
    ):
        batch = shape[0]
        self.volumes, self.axes, self.window = torch.zeros(shape, dtype=dtype), axes, window
        self.donors = torch.zeros((donors, *shape[1:]), dtype=dtype) if donors else None
        self.lam = torch.full((batch,), 0.5)  # at 1, donors are not read
        self.index = (torch.arange(batch) + 1) % (donors or batch)
        self.flips = torch.zeros(batch, dtype=torch.uint8) if flips else None
        self.donor_flips = torch.zeros(donors, dtype=torch.uint8) if flips and donors else None

    def arguments(self):
        mix = self.lam, self.index, self.flips, self.donor_flips, self.axes, self.window
        return self.volumes, self.donors, *mix

    def out_of_place(self, dtype):
        return lambda: launch("mixup3d", *self.arguments(), dtype=dtype)

    def in_place(self):
        return lambda: kernels.mixup3d(*self.arguments(), self.volumes, self.donors is None)

    def into_donors(self):
        return lambda: kernels.mixup3d(*self.arguments(), self.donors, True)

    def backward(self, as_volumes, as_donors):
        grad_output, input = torch.zeros_like(self.volumes), self.volumes if self.window else None
        common = grad_output, input, self.lam, self.index, self.flips, self.axes, self.window
        options = {"rows": len(grad_output), "dtype": grad_output.dtype}
        return lambda: launch("mixup3d_backward", *common, as_volumes, as_donors, **options)


def case(name: str, call, shape=SHAPE, min_bytes: float | None = None) -> Case:
    return Case(name, call, torch.Size(shape).numel(), min_bytes)


def cases() -> Iterator[Case]:
    for dtype in (F32, BF16, I16, U8):
        name = str(dtype).removeprefix("torch.")
        min_bytes = 2 * dtype.itemsize
        mixed = case(f"in place {name}", Mixup(dtype).in_place(), min_bytes=min_bytes)
        yield alike(mixed, dtype != F32)
    yield alike(case("in place float64", Mixup(F64).in_place(), min_bytes=16))
    flipped = Mixup(F64, flips=True)
    yield case("out of place, flips float64", flipped.out_of_place(F64), min_bytes=16)
    yield alike(case("out of place float32", Mixup(F32).out_of_place(F32), min_bytes=8))
    flipped = Mixup(F32, flips=True)
    yield alike(case("out of place, flips float32", flipped.out_of_place(F32), min_bytes=8))
    windowed = Mixup(I16, window=WINDOW)
    yield alike(case("window int16 bfloat16", windowed.out_of_place(BF16), min_bytes=4))
    yield case(
        "window, flips int16 bfloat16",
        Mixup(I16, flips=True, window=WINDOW).out_of_place(BF16),
        min_bytes=4,
    )
    flipped = Mixup(I16, flips=True, window=WINDOW)
    yield alike(case("window, flips int16 float32", flipped.out_of_place(F32), min_bytes=6))
    yield case("donors, in place float32", Mixup(F32, donors=5).in_place(), min_bytes=10.5)
    into = Mixup(F32, donors=8).into_donors()
    yield alike(case("into the donors float32", into, min_bytes=12))
    last = (8, 64, 64, 64, 4)
    flipped = Mixup(F32, shape=last, flips=True, axes=CHANNELS_LAST)
    yield alike(case("channels last, flips float32", flipped.out_of_place(F32), last))
    odd = (8, 1, 33, 31, 35)
    yield case(
        "odd size, flips int16 bfloat16",
        Mixup(I16, shape=odd, flips=True, window=WINDOW).out_of_place(BF16),
        odd,
    )
    yield case("odd size, in place float32", Mixup(F32, shape=odd).in_place(), odd)
    for batch in (1, 4096):
        shape = (batch, 1, 8, 16, 16)
        mixed = case(f"in place, batch of {batch}", Mixup(F32, shape=shape).in_place(), shape)
        yield alike(mixed, batch == 1)
    yield alike(case("backward float32", Mixup(F32).backward(True, True), min_bytes=8))
    yield case(
        "backward, window, flips bfloat16",
        Mixup(BF16, flips=True, window=WINDOW).backward(True, True),
        min_bytes=6,
    )
    given = Mixup(F32, donors=8)
    yield alike(case("backward to volumes float32", given.backward(True, False), min_bytes=8))
    yield alike(case("backward to donors float32", given.backward(False, True), min_bytes=8))


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    mixup = Mixup(F32)
    return {
        "mixup3d": (mixup.out_of_place(F32), ("VECTORS",)),
        "mixup3d_in_place": (mixup.in_place(), ("VECTORS", "SAMPLES")),
    }
