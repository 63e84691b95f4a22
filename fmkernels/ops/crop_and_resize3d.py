"""crop_and_resize3d: crop boxes out of volumes and resize them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.ops.checks import (
    MAX_AXIS,
    check_axes,
    check_boxes,
    check_integer,
    check_volumes,
    check_window,
    describe,
    result_dtype,
    varying_window,
)
from fmkernels.ops.library import functional_op, save_for_backward

_CLAMPS = ("box", "volume")
_MODES = ("trilinear", "nearest")


def crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    *,
    clamp: str = "box",
    mode: str = "trilinear",
    window: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Crop boxes out of volumes and resize each to one size by trilinear interpolation.

    Label maps are resized by taking the nearest voxel instead, ``mode="nearest"``.

    Along an axis of a box [start, end), with voxel centers at 0, 1, 2 ..., sample i of n lies at

    .. math::
        p_i = \mathrm{clamp}\left(\mathrm{start}
              + (i + \tfrac{1}{2}) \, \frac{\mathrm{end} - \mathrm{start}}{n} - \tfrac{1}{2},
              \; \mathrm{first}, \; \mathrm{last}\right)

    Its value is the mean of the 8 voxels around it, each with the weight
    ``(1 - |dz|) (1 - |dy|) (1 - |dx|)``. Coordinates are float32. Arithmetic on voxels is float32
    (float64 for float64 volumes).

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides;
            axes of at most 2^24 voxels.
        boxes: float32 [K, 7], (batch index, z1, y1, x1, z2, y2, x2) in voxels, half-open, voxel i
            covering [i, i + 1). Any numbers, also beyond the volume. A box gives zeros if it is not
            finite, if its extents are not finite in float32, or if its batch index is out of range.
        output_size: (d, h, w), each >= 1.
        clamp: "box": first and last are the first and the last voxel of the volume whose center
            lies in the box, as in a crop followed by a resize. Boxes that contain no voxel center,
            such as boxes smaller than a voxel, outside of the volume or with end <= start, use the
            voxel nearest to the box center. "volume": first and last are those of the volume, so
            that samples near a face of the box use voxels beyond it; with end < start the crop is
            mirrored.
        mode: "trilinear", or "nearest": the voxel at floor(p + 1/2) along each axis, of two at the
            same distance the higher one, with its value as it is. For label maps: no window, no
            gradient.
        window: (lo, hi), finite, lo < hi, applied to every voxel before the interpolation: v
            becomes clamp((v - lo) / (hi - lo), 0, 1). None keeps the values.
        dtype: dtype of the result, any of those of the volumes. By default that of the volumes,
            float32 for windowed integers. Integer results are rounded to nearest, ties to even, and
            saturate; NaN becomes 0.

    Returns:
        The crops, [K, C, d, h, w], contiguous.

    Gradients flow to the volumes, not to the boxes. They are gathered in the order of the boxes,
    without atomics, and are the same in every run. No value is read back to the host; a GPU needs
    one launch. A voxel that is not finite affects only the samples in which its weight is not
    exactly 0.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch, for integer boxes inside their volumes and clamp "box"::

        out = torch.cat([
            F.interpolate(volumes[b:b+1, :, z1:z2, y1:y2, x1:x2], output_size, mode="trilinear")
            for b, z1, y1, x1, z2, y2, x2 in boxes.int().tolist()
        ])

    clamp "volume" equals F.grid_sample with padding_mode="border" and align_corners=False, and
    inside of the volumes roi_align with aligned=True and one sample per bin. mode "nearest" equals
    F.interpolate with mode="nearest-exact".

    Source: He et al., Mask R-CNN, ICCV 2017 (RoIAlign, here for volumes).

    Example:
        >>> import torch
        >>> ramp = torch.arange(16.0).expand(1, 1, 1, 1, 16)
        >>> box = torch.tensor([[0.0, 0, 0, 8, 1, 1, 12]])
        >>> crop_and_resize3d(ramp, box, (1, 1, 8)).flatten().tolist()
        [8.0, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11.0]
        >>> crop_and_resize3d(ramp, box, (1, 1, 8), clamp="volume").flatten().tolist()
        [7.75, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11.25]
        >>> crop_and_resize3d(ramp, box, (1, 1, 8), mode="nearest").flatten().tolist()
        [8.0, 8.0, 9.0, 9.0, 10.0, 10.0, 11.0, 11.0]
    """
    name = "crop_and_resize3d"
    check_volumes(name, "volumes", volumes)
    check_axes(name, "volumes", volumes)
    check_boxes(name, "boxes", boxes, volumes.device)
    size = _check_output_size(name, output_size)
    if clamp not in _CLAMPS:
        raise ValueError(
            f"{name}: clamp must be one of {', '.join(map(repr, _CLAMPS))}, got {clamp!r}"
        )
    if mode not in _MODES:
        raise ValueError(
            f"{name}: mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}"
        )
    if mode == "nearest" and window is not None:
        raise ValueError(f"{name}: window must be None in mode 'nearest', got {describe(window)}")
    window = check_window(name, window)
    dtype = result_dtype(name, dtype, volumes, window)
    if torch.is_grad_enabled() and volumes.requires_grad:
        lost = "mode 'nearest'" if mode == "nearest" else dtype
        if mode == "nearest" or not dtype.is_floating_point:
            raise ValueError(
                f"{name}: no gradient through {lost} is offered, pass volumes detached"
            )
    bounds = varying_window(window)
    return crop_and_resize3d_op(
        volumes, boxes.contiguous(), clamp == "box", mode == "nearest", bounds,
        output_size=size, dtype=dtype,
    )  # fmt: skip


def _check_output_size(name: str, output_size: Sequence[int]) -> list[int]:
    if not isinstance(output_size, (list, tuple)) or len(output_size) != 3:
        raise TypeError(
            f"{name}: output_size must be three ints (d, h, w), got {describe(output_size)}"
        )
    sizes = [
        check_integer(name, f"output_size {axis}", size)
        for axis, size in zip("dhw", output_size, strict=True)
    ]
    for axis, size in zip("dhw", sizes, strict=True):
        if not 1 <= size <= MAX_AXIS:
            raise ValueError(f"{name}: output_size {axis} must be in [1, {MAX_AXIS}], got {size}")
    return sizes


def _save(ctx, args, crops):
    volumes, boxes, ctx.clamp_box, ctx.nearest, ctx.window = args
    ctx.shape, ctx.dtype = volumes.shape, volumes.dtype
    save_for_backward(ctx, boxes, volumes if ctx.window is not None else None)


def _backward(ctx, grad_output):
    if ctx.nearest:
        raise RuntimeError("crop_and_resize3d: no gradient through mode 'nearest' is offered")
    boxes, volumes = ctx.saved_tensors
    grad_volumes = crop_and_resize3d_backward_op(
        grad_output.contiguous(), boxes, volumes, ctx.clamp_box, ctx.window,
        shape=ctx.shape, dtype=ctx.dtype,
    )  # fmt: skip
    return (grad_volumes,)


@functional_op(
    "crop_and_resize3d(Tensor volumes, Tensor boxes, bool clamp_box, bool nearest, "
    "float[]? window, *, SymInt[] output_size, ScalarType dtype) -> Tensor",
    save=_save,
    backward=_backward,
)
def crop_and_resize3d_op(volumes, boxes, clamp_box, nearest, window, *, output_size, dtype):
    return volumes.new_empty((boxes.shape[0], volumes.shape[1], *output_size), dtype=dtype)


@functional_op(
    "crop_and_resize3d_backward(Tensor grad_output, Tensor boxes, Tensor? volumes, bool clamp_box, "
    "float[]? window, *, SymInt[] shape, ScalarType dtype) -> Tensor"
)
def crop_and_resize3d_backward_op(grad_output, boxes, volumes, clamp_box, window, *, shape, dtype):
    return grad_output.new_empty(shape, dtype=dtype)
