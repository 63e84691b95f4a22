"""Launches of crop_and_resize3d: types, both clamps, window, sizes of crops, backward.

The box is the volume and has as many samples as voxels, so that each must be moved once.
"""

from collections.abc import Callable, Iterator

import torch

from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
I16 = torch.int16
WINDOW = (-1200.0, 600.0)
CUBE, BRICKS = (24, 24, 24), (16, 16, 16)


def launch_crop(volumes, boxes, size, clamp_box, window, dtype):
    return launch(
        "crop_and_resize3d", volumes, boxes, clamp_box, window, output_size=size, dtype=dtype
    )


def crop_backward(grad_output, boxes, volumes, shape, clamp_box, window, dtype):
    return launch(
        "crop_and_resize3d_backward", grad_output, boxes, volumes, clamp_box, window,
        shape=shape, dtype=dtype,
    )  # fmt: skip


def whole(shape):
    return torch.tensor([[0.0, 0, 0, 0, *shape[2:]]])


def crop(
    name: str, dtype, result=None, *, window=None, clamp_box=True, size=CUBE, shape=(1, 1, *CUBE)
) -> Case:
    volumes, boxes, result = torch.zeros(shape, dtype=dtype), whole(shape), result or dtype

    def call():
        return launch_crop(volumes, boxes, size, clamp_box, window, result)

    samples = torch.Size(shape[1:2] + size).numel()
    min_bytes = dtype.itemsize + result.itemsize if size == shape[2:] else None
    return Case(name, call, samples, min_bytes)


def gradient(
    name: str, dtype, *, window=None, clamp_box=True, size=BRICKS, shape=(1, 1, *BRICKS)
) -> Case:
    grad_output, boxes = torch.ones((1, shape[1], *size), dtype=dtype), whole(shape)
    windowed = torch.zeros(shape, dtype=dtype) if window else None

    def call():
        return crop_backward(grad_output, boxes, windowed, shape, clamp_box, window, dtype)

    min_bytes = (3 if window else 2) * dtype.itemsize if size == shape[2:] else None
    return Case(name, call, torch.Size(shape).numel(), min_bytes)


def cases() -> Iterator[Case]:
    yield crop("crop float32", F32)
    yield crop("crop bfloat16", BF16)
    yield crop("crop float64", F64)
    yield crop("crop, window int16 bfloat16", I16, BF16, window=WINDOW)
    yield crop("crop, clamped at the volume, window float32", F32, window=WINDOW, clamp_box=False)
    yield crop("small crop float32", F32, size=(4, 4, 4))
    yield gradient("gradient float32", F32)
    yield gradient(
        "gradient, clamped at the volume, window float16", F16, window=WINDOW, clamp_box=False
    )
    yield gradient("gradient, window float64", F64, window=WINDOW, size=(16, 16, 8))


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    return {
        "crop_and_resize3d": (crop("crop", F32).call, ("DEPTH", "LANES")),
        "crop_and_resize3d_backward": (gradient("gradient", F32).call, ("Z", "Y", "X")),
    }
