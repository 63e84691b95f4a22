"""Crops of volumes, resized trilinearly, on the GPU: one launch for all boxes, each way.

A program of the forward computes the same ``LANES`` positions in ``DEPTH`` layers of one crop, so
that it computes the coordinates of a box, a row and a column once. A program of the backward owns a
brick of voxels. It tests many boxes at once for overlap with the brick, and gathers the gradient
from the samples of those that overlap, in list order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.sampling import (
    is_usable,
    load_box,
    sample_axis,
    sample_position,
    taps,
    trilinear,
)
from fmkernels.kernels.tuning import launch_parameters
from fmkernels.kernels.voxels import to_storage

LANES, MIN_LANES = 128, 32  # positions per layer of a program of the forward
BRICK_Y, BRICK_X = 8, 16  # voxels of a program of the backward; as many along z as the block allows
BOXES = 128  # boxes tested at once
NARROW = 2**29  # samples per crop that int32 counts, even past the end as the backward does
# slack in samples for the float32 error of voxel -> sample, which grows with the sample count
MARGIN, MARGIN_PER_SAMPLE = tl.constexpr(1e-3), tl.constexpr(1e-6)
FLAT = tl.constexpr(1e-30)  # step, in voxels, below which all samples are at one position

_SIZES = (
    "K", "B", "D", "H", "W", "stride_b", "stride_c", "stride_z", "stride_y", "stride_x",
    "C", "d", "h", "w",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def crop_kernel(
    volumes,  # [B, C, D, H, W], with strides
    boxes,  # [K, 7] float32
    out,  # [K, C, d, h, w], written
    K, B, D, H, W, stride_b, stride_c, stride_z, stride_y, stride_x, C, d, h, w,
    window_low: tl.float64, window_scale: tl.float64,
    LANES: tl.constexpr, DEPTH: tl.constexpr, CLAMP_BOX: tl.constexpr, WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if volumes.dtype.element_ty == tl.float64 else tl.float32
    TYPE: tl.constexpr = out.dtype.element_ty
    low, scale = window_low.to(T), window_scale.to(T)
    plane = h.to(tl.int64 if WIDE else tl.int32) * w
    tiles = tl.cdiv(plane, LANES)  # per layer
    program, programs = tl.program_id(0), tiles * tl.cdiv(d, DEPTH)
    crop = (program // programs).to(tl.int32)
    tile = program - crop * programs
    chunk = (tile // tiles).to(tl.int32)
    lane = (tile - chunk * tiles) * LANES + tl.arange(0, LANES)
    inside = tl.minimum(lane, plane - 1)  # lanes past the end repeat the last position
    row = inside // w
    column = inside - row * w
    k = crop // C
    c = crop - k * C
    batch, start, end = load_box(boxes, k)
    target = out + crop.to(tl.int64) * d * plane + lane
    if is_usable(batch, start, end, B, D, H, W):
        z_origin, z_first, z_step, z_low, z_high = sample_axis(start[0], end[0], D, d, CLAMP_BOX)
        y_origin, y_first, y_step, y_low, y_high = sample_axis(start[1], end[1], H, h, CLAMP_BOX)
        x_origin, x_first, x_step, x_low, x_high = sample_axis(start[2], end[2], W, w, CLAMP_BOX)
        y, dy, fy = taps(sample_position(row, y_first, y_step, y_low, y_high), stride_y, T)
        x, dx, fx = taps(sample_position(column, x_first, x_step, x_low, x_high), stride_x, T)
        origin = volumes + batch.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c
        origin += z_origin.to(tl.int64) * stride_z + y_origin.to(tl.int64) * stride_y
        corner = origin + x_origin.to(tl.int64) * stride_x + (y + x)
        for j in tl.static_range(DEPTH):
            layer = chunk * DEPTH + j
            z = sample_position(tl.minimum(layer, d - 1), z_first, z_step, z_low, z_high)
            z, dz, fz = taps(z, stride_z, T)
            value = trilinear(corner + z, dz, dy, dx, fz, fy, fx, low, scale, WINDOW)
            tl.store(
                target + layer.to(tl.int64) * plane,
                to_storage(value, TYPE),
                (lane < plane) & (layer < d),
            )
    else:
        for j in tl.static_range(DEPTH):
            layer = chunk * DEPTH + j
            tl.store(
                target + layer.to(tl.int64) * plane,
                tl.zeros([LANES], TYPE),
                (lane < plane) & (layer < d),
            )


@triton.jit
def _may_touch(start, end, size, first, last):
    """Whether samples of a box may use any voxel from ``first`` to ``last`` along an axis."""
    edge = (size - 1).to(tl.float32)
    least = tl.minimum(tl.maximum(tl.floor(tl.minimum(start, end) - 0.5), 0.0), edge)
    most = tl.minimum(tl.maximum(tl.ceil(tl.maximum(start, end) - 0.5), 0.0), edge)
    return (least <= last.to(tl.float32)) & (most >= first.to(tl.float32))


@triton.jit
def _sample_range(voxel, samples, first, step, low, high):
    """The first sample that uses each voxel, or one before it, and the largest number of samples.

    Voxels are counted from the origin.
    """
    to_sample = 1.0 / step
    one, other = (voxel - 1.0 - first) * to_sample, (voxel + 1.0 - first) * to_sample
    margin = MARGIN + MARGIN_PER_SAMPLE * samples
    least = tl.floor(tl.minimum(one, other) - margin) + 1.0
    most = tl.ceil(tl.maximum(one, other) + margin) - 1.0
    # samples beyond an end use the voxel at the end
    last = (samples - 1).to(tl.float32)
    flat, at_low, at_high = tl.abs(step) < FLAT, voxel <= low, voxel >= high
    least = tl.where(flat | ((step > 0.0) & at_low) | ((step < 0.0) & at_high), 0.0, least)
    most = tl.where(flat | ((step > 0.0) & at_high) | ((step < 0.0) & at_low), last, most)
    least, most = tl.minimum(tl.maximum(least, 0.0), last), tl.minimum(most, last)
    count = tl.where((voxel < low) | (voxel > high), 0.0, most - least + 1.0)
    return least.to(tl.int32), tl.max(count, 0).to(tl.int32)


@triton.jit
def _weight(voxel, sample, samples, first, step, low, high, T: tl.constexpr):
    """The weight of each voxel in a sample; 0 if there is no such sample."""
    distance = tl.abs(sample_position(sample, first, step, low, high) - voxel)
    return tl.where(sample < samples, tl.maximum(1.0 - distance.to(T), 0.0), 0.0)


@triton.jit
def _gather(
    crop, z, y, x, start, end, D, H, W, d, h, w, total, CLAMP_BOX: tl.constexpr, INDEX: tl.constexpr
):
    """``total`` [Z, Y, X] plus the gradient of one crop [d, h, w] to the voxels at z, y and x."""
    T: tl.constexpr = total.dtype
    z_origin, z_first, z_step, z_low, z_high = sample_axis(start[0], end[0], D, d, CLAMP_BOX)
    y_origin, y_first, y_step, y_low, y_high = sample_axis(start[1], end[1], H, h, CLAMP_BOX)
    x_origin, x_first, x_step, x_low, x_high = sample_axis(start[2], end[2], W, w, CLAMP_BOX)
    z, y, x = z.to(tl.float32) - z_origin, y.to(tl.float32) - y_origin, x.to(tl.float32) - x_origin
    z_sample, z_most = _sample_range(z, d, z_first, z_step, z_low, z_high)
    y_least, y_most = _sample_range(y, h, y_first, y_step, y_low, y_high)
    x_least, x_most = _sample_range(x, w, x_first, x_step, x_low, x_high)
    for _ in range(0, z_most):
        z_weight = _weight(z, z_sample, d, z_first, z_step, z_low, z_high, T)[:, None]
        y_sample = y_least
        for _ in range(0, y_most):
            y_weight = _weight(y, y_sample, h, y_first, y_step, y_low, y_high, T)[None, :]
            line = (((z_sample.to(INDEX) * h)[:, None] + y_sample[None, :]) * w)[:, :, None]
            line_weight = (z_weight * y_weight)[:, :, None]
            x_sample = x_least
            for _ in range(0, x_most):
                x_weight = _weight(x, x_sample, w, x_first, x_step, x_low, x_high, T)
                weight = line_weight * x_weight[None, None, :]
                value = tl.load(crop + (line + x_sample[None, None, :]), weight > 0.0, other=0.0)
                total += value.to(T) * weight
                x_sample += 1
            y_sample += 1
        z_sample += 1
    return total


@triton.jit(do_not_specialize=_SIZES)
def crop_backward_kernel(
    grad_output,  # [K, C, d, h, w]
    boxes,  # [K, 7] float32
    volumes,  # [B, C, D, H, W], with strides, read to apply the window; or None
    out,  # [B, C, D, H, W], written: gradient to the volumes
    K, B, D, H, W, stride_b, stride_c, stride_z, stride_y, stride_x, C, d, h, w,
    window_low: tl.float64, window_high: tl.float64, window_scale: tl.float64,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, BOXES: tl.constexpr,
    CLAMP_BOX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    columns, rows, layers = tl.cdiv(W, X), tl.cdiv(H, Y), tl.cdiv(D, Z)
    program = tl.program_id(0)
    row = program // columns
    layer = row // rows
    volume = layer // layers
    b = volume // C
    c = volume - b * C
    z0, y0 = (layer - volume * layers) * Z, (row - layer * rows) * Y
    x0 = (program - row * columns) * X
    z, y, x = z0 + tl.arange(0, Z), y0 + tl.arange(0, Y), x0 + tl.arange(0, X)
    total = tl.zeros([Z, Y, X], T)
    for group in range(0, K, BOXES):
        candidate = group + tl.arange(0, BOXES)
        batch, start, end = load_box(boxes, candidate, candidate < K)
        hit = is_usable(batch, start, end, B, D, H, W) & (batch.to(tl.int32) == b)
        hit = hit & _may_touch(start[0], end[0], D, z0, z0 + (Z - 1))
        hit = hit & _may_touch(start[1], end[1], H, y0, y0 + (Y - 1))
        hit = hit & _may_touch(start[2], end[2], W, x0, x0 + (X - 1))
        k = tl.min(tl.where(hit, candidate, K), 0)
        while k < K:
            _, first, last = load_box(boxes, k)
            crop = grad_output + (k.to(tl.int64) * C + c) * d * h * w
            total = _gather(crop, z, y, x, first, last, D, H, W, d, h, w, total, CLAMP_BOX, INDEX)
            k = tl.min(tl.where(hit & (candidate > k), candidate, K), 0)
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    inside = (z < D) & (y < H) & (x < W)
    if volumes is not None:
        at = b.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c + z.to(tl.int64) * stride_z
        at += y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        voxel = tl.load(volumes + at, inside & (total != 0.0), other=0.0).to(T)
        within = (voxel >= window_low.to(T)) & (voxel <= window_high.to(T))
        total = tl.where(within, total * window_scale.to(T), 0.0)
    at = ((volume.to(tl.int64) * D + z) * H + y) * W + x
    tl.store(out + at, to_storage(total, out.dtype.element_ty), inside)


def crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    clamp_box: bool,
    window: Sequence[float] | None,
    crops: Tensor,
) -> None:
    """Write crops [K, C, d, h, w] of strided volumes [B, C, D, H, W] at contiguous boxes [K, 7]."""
    if not crops.numel():
        return
    B, C, D, H, W = volumes.shape
    K, _, d, h, w = crops.shape
    launch = launch_parameters("crop_and_resize3d", volumes.device)
    lanes = min(LANES, max(MIN_LANES, triton.next_power_of_2(h * w)))
    depth = launch.block // LANES
    programs = K * C * triton.cdiv(h * w, lanes) * triton.cdiv(d, depth)
    low, high = window or (0.0, 1.0)
    with torch.cuda.device_of(volumes):
        crop_kernel[(programs,)](
            volumes, boxes, crops, K, B, D, H, W, *volumes.stride(), C, d, h, w,
            low, 1 / (high - low),
            LANES=lanes, DEPTH=depth, CLAMP_BOX=clamp_box, WINDOW=window is not None,
            WIDE=h * w + lanes > 2**31, num_warps=max(1, launch.num_warps * lanes // LANES),
        )  # fmt: skip


def crop_and_resize3d_backward(
    grad_output: Tensor,
    boxes: Tensor,
    volumes: Tensor | None,
    clamp_box: bool,
    window: Sequence[float] | None,
    grad_volumes: Tensor,
) -> None:
    """Write the gradient to the volumes, contiguous. A window needs the volumes themselves."""
    if not grad_volumes.numel():
        return
    launch = launch_parameters("crop_and_resize3d_backward", grad_output.device)
    (B, C, D, H, W), (K, _, d, h, w) = grad_volumes.shape, grad_output.shape
    depth = launch.block // (BRICK_Y * BRICK_X)
    bricks = B * C * triton.cdiv(D, depth) * triton.cdiv(H, BRICK_Y) * triton.cdiv(W, BRICK_X)
    low, high = window or (0.0, 1.0)
    strides = (0, 0, 0, 0, 0) if volumes is None else volumes.stride()
    with torch.cuda.device_of(grad_output):
        crop_backward_kernel[(bricks,)](
            grad_output, boxes, volumes, grad_volumes, K, B, D, H, W, *strides, C, d, h, w,
            low, high, 1 / (high - low),
            Z=depth, Y=BRICK_Y, X=BRICK_X, BOXES=BOXES, CLAMP_BOX=clamp_box,
            WIDE=d * h * w >= NARROW, num_warps=launch.num_warps, **launch.register_limit,
        )  # fmt: skip
