"""Launches of crop_and_resize3d: types, both clamps, window, sizes of crops, backward.

The box is the volume and has at least as many samples as voxels, so that each must be moved once.
Large crops run the loop over layers, small ones are interpreted to count their bytes.
"""

from collections.abc import Callable, Iterator

import torch

from tests.plans import alike
from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
I16 = torch.int16
WINDOW = (-1200.0, 600.0)
CUBE, BRICKS = (24, 24, 24), (16, 16, 16)
LARGE = {"shape": (1, 8, 96, 96, 96), "size": (96, 96, 96), "trips": [(16, [1])]}
# 64 layers on 28 planes: 16 layers use 8 of them at the ends, 9 elsewhere
RESIZED = {"shape": (1, 32, 28, 28, 28), "size": (64, 64, 64), "trips": [(16, [8.5 / 16])]}
NO_BOX = {"shape": (1, 8, 128, 128, 128), "trips": [1, 16, 0, 0]}  # 4 layers at once


def launch_crop(volumes, boxes, size, clamp_box, nearest, window, dtype):
    return launch(
        "crop_and_resize3d", volumes, boxes, clamp_box, nearest, window,
        output_size=size, dtype=dtype,
    )  # fmt: skip


def crop_backward(grad_output, boxes, volumes, shape, clamp_box, window, dtype):
    return launch(
        "crop_and_resize3d_backward", grad_output, boxes, volumes, clamp_box, window,
        shape=shape, dtype=dtype,
    )  # fmt: skip


def whole(shape):
    return torch.tensor([[0.0, 0, 0, 0, *shape[2:]]])


def crop(
    name: str, dtype, result=None, *, window=None, clamp_box=True, size=CUBE, shape=(1, 1, *CUBE),
    nearest=False, trips=(),
) -> Case:  # fmt: skip
    volumes, boxes, result = torch.zeros(shape, dtype=dtype), whole(shape), result or dtype

    def call():
        return launch_crop(volumes, boxes, size, clamp_box, nearest, window, result)

    samples = torch.Size(shape[1:2] + size).numel()
    uses_every_voxel = all(n >= voxels for n, voxels in zip(size, shape[2:], strict=True))
    min_bytes = dtype.itemsize * volumes.numel() / samples + result.itemsize
    return Case(name, call, samples, round(min_bytes, 3) if uses_every_voxel else None, trips)


def gradient(
    name: str, dtype, *, window=None, clamp_box=True, size=BRICKS, shape=(1, 1, *BRICKS), trips=()
) -> Case:
    grad_output, boxes = torch.ones((1, shape[1], *size), dtype=dtype), whole(shape)
    windowed = torch.zeros(shape, dtype=dtype) if window else None

    def call():
        return crop_backward(grad_output, boxes, windowed, shape, clamp_box, window, dtype)

    min_bytes = (3 if window else 2) * dtype.itemsize if size == shape[2:] else None
    return Case(name, call, torch.Size(shape).numel(), min_bytes, trips)


def cases() -> Iterator[Case]:
    yield crop("crop float32", F32, **LARGE)
    yield alike(crop("crop bfloat16", BF16, **LARGE))
    yield crop("crop, window int16 bfloat16", I16, BF16, window=WINDOW, **LARGE)
    yield alike(crop("crop 28^3 to 64^3 float32", F32, **RESIZED))
    yield alike(crop("crop 28^3 to 64^3 bfloat16", BF16, **RESIZED))
    yield alike(crop("crop, nearest uint8", torch.uint8, nearest=True, **LARGE))
    yield crop("24^3 float32", F32)
    yield alike(crop("24^3 bfloat16", BF16))
    yield crop("24^3 float64", F64)
    yield alike(crop("24^3, window int16 bfloat16", I16, BF16, window=WINDOW))
    clamped = "24^3, clamped at the volume, window float32"
    yield alike(crop(clamped, F32, window=WINDOW, clamp_box=False))
    yield crop("24^3, nearest int16", I16, nearest=True)
    yield alike(crop("4^3 float32", F32, size=(4, 4, 4)))
    yield gradient("gradient where no box is float32", F32, **NO_BOX)
    yield gradient("gradient float32", F32)
    clamped = "gradient, clamped at the volume, window float16"
    yield alike(gradient(clamped, F16, window=WINDOW, clamp_box=False))
    yield gradient("gradient, window float64", F64, window=WINDOW, size=(16, 16, 8))


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    return {
        "crop_and_resize3d": (crop("crop", F32, size=(1, 64, 64)).call, ("LANES",)),
        "crop_and_resize3d_backward": (gradient("gradient", F32).call, ("Z", "Y", "X")),
    }
