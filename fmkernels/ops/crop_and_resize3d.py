"""The ops behind crop_and_resize3d: schemas, fakes and autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels.ops.library import define, fake

_MODULE = "crop_and_resize3d"

define(
    "crop_and_resize3d",
    "(Tensor volumes, Tensor boxes, SymInt[] output_size, bool clamp_box, float[]? window, ScalarType dtype) -> Tensor",
    _MODULE,
    "launch_crop_and_resize3d",
)
define(
    "crop_and_resize3d_gradient",
    "(Tensor upstream, Tensor boxes, Tensor? windowed, SymInt[] shape, bool clamp_box, float[]? window, "
    "ScalarType dtype) -> Tensor",
    _MODULE,
    "launch_crop_and_resize3d_gradient",
)


@fake("crop_and_resize3d")
def _(volumes, boxes, output_size, clamp_box, window, dtype):
    return volumes.new_empty((boxes.shape[0], volumes.shape[1], *output_size), dtype=dtype)


@fake("crop_and_resize3d_gradient")
def _(upstream, boxes, windowed, shape, clamp_box, window, dtype):
    return upstream.new_empty(shape, dtype=dtype)


_ops = torch.ops.fmkernels


class _CropAndResize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, volumes, boxes, output_size, clamp_box, window, dtype):
        ctx.clamp_box, ctx.window = clamp_box, window
        ctx.shape, ctx.dtype = volumes.shape, volumes.dtype
        ctx.save_for_backward(boxes, volumes if window else None)
        return _ops.crop_and_resize3d(volumes, boxes, output_size, clamp_box, window, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        boxes, windowed = ctx.saved_tensors
        gradient = _ops.crop_and_resize3d_gradient(
            upstream.contiguous(), boxes, windowed, ctx.shape, ctx.clamp_box, ctx.window, ctx.dtype
        )
        return (gradient, *[None] * 5)


def crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    clamp_box: bool,
    window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The resized crops; boxes contiguous, see launch_crop_and_resize3d."""
    differentiable = volumes.requires_grad and torch.is_grad_enabled()
    function = _CropAndResize.apply if differentiable else _ops.crop_and_resize3d.default
    return function(volumes, boxes, output_size, clamp_box, window, dtype)
