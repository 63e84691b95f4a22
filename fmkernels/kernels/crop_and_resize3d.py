"""Crops of volumes, resized, on the GPU: one launch for all boxes, each way.

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

from fmkernels.kernels.launching import quick
from fmkernels.kernels.sampling import (
    is_usable,
    load_box,
    march,
    nearest_voxel,
    sample_axis,
    sample_position,
)
from fmkernels.kernels.tuning import launch_parameters
from fmkernels.kernels.voxels import to_storage

MIN_LANES = 32  # positions per layer of a program of the forward, at least
BRICK_Y, BRICK_X = 8, 16  # voxels of a program of the backward; as many along z as the block allows
BOXES = 128  # boxes tested at once
NARROW = 2**29  # samples per crop that int32 counts, even past the end as the backward does
# slack in samples for the float32 error of voxel -> sample, which grows with the sample count
MARGIN, MARGIN_PER_SAMPLE = tl.constexpr(1e-3), tl.constexpr(1e-6)
FLAT = tl.constexpr(1e-30)  # step, in voxels, below which all samples are at one position

_SIZES = (
    "K", "B", "D", "H", "W", "stride_b", "stride_c", "stride_z", "stride_y", "C", "d", "h", "w",
)  # fmt: skip


@triton.jit
def _position(sample, samples, start, end, axis, NEAREST: tl.constexpr):
    """Where a sample of a box [start, end) lies, counted from the origin of the axis."""
    if NEAREST:
        position = nearest_voxel(sample, samples, start, end, axis[0], axis[3], axis[4])
    else:
        position = sample_position(sample, axis[1], axis[2], axis[3], axis[4])
    return position


@quick
@triton.jit(do_not_specialize=(*_SIZES, "depth"), do_not_specialize_on_alignment=("stride_x",))
def fmkernels_crop_kernel(
    volumes,  # [B, C, D, H, W], with strides
    boxes,  # [K, 7] float32
    out,  # [K, C, d, h, w], written
    K, B, D, H, W, stride_b, stride_c, stride_z, stride_y, stride_x, C, d, h, w, depth,
    window_low: tl.float64, window_scale: tl.float64,
    LANES: tl.constexpr, CLAMP_BOX: tl.constexpr, NEAREST: tl.constexpr, WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if volumes.dtype.element_ty == tl.float64 else tl.float32
    STORED: tl.constexpr = volumes.dtype.element_ty
    VALUE: tl.constexpr = STORED if NEAREST else T
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    low, scale = window_low.to(T), window_scale.to(T)
    plane = h.to(INDEX) * w
    tiles = tl.cdiv(plane, LANES)  # per layer
    program, programs = tl.program_id(0), tiles * tl.cdiv(d, depth)
    crop = (program // programs).to(tl.int32)
    tile = program - crop * programs
    chunk = (tile // tiles).to(tl.int32)
    lane = tl.arange(0, LANES)
    position = (tile - chunk * tiles) * LANES
    lanes = plane - position  # may be more than LANES
    inside = position + tl.minimum(lane, lanes - 1)  # lanes past the end repeat the last position
    row = inside // w
    column = inside - row * w
    k = crop // C
    c = crop - k * C
    batch, start, end = load_box(boxes, k)
    first = chunk * depth
    layers = tl.minimum(depth, d - first)
    usable = is_usable(batch, start, end, B, D, H, W)
    # crops of unusable boxes sample no plane, and stay 0 where fz is finite
    batch = tl.where(usable, batch, 0.0)
    z_start, z_end = tl.where(usable, start[0], 0.0), tl.where(usable, end[0], 0.0)
    z_axis = sample_axis(z_start, z_end, D, d, CLAMP_BOX)
    y_axis = sample_axis(start[1], end[1], H, h, CLAMP_BOX)
    x_axis = sample_axis(start[2], end[2], W, w, CLAMP_BOX)
    y = _position(row, h, start[1], end[1], y_axis, NEAREST)
    x = _position(column, w, start[2], end[2], x_axis, NEAREST)
    y_below, x_below = tl.floor(y), tl.floor(x)
    fy, fx = (y - y_below).to(T), (x - x_below).to(T)
    offset = y_below.to(INDEX) * stride_y.to(INDEX) + x_below.to(INDEX) * stride_x
    origin = volumes + batch.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c
    origin += z_axis[0].to(tl.int64) * stride_z + y_axis[0].to(tl.int64) * stride_y
    origin += x_axis[0].to(tl.int64) * stride_x
    # layers in the order of increasing z, so that each plane is sampled once
    layer, along, to_next = first, 1, plane.to(tl.int64)
    if z_end < z_start:
        layer, along, to_next = first + layers - 1, -1, -to_next
    target = out + (crop.to(tl.int64) * d + layer) * plane + position
    near, far = tl.zeros([LANES], VALUE), tl.zeros([LANES], VALUE)
    sampled = z_axis[3].to(tl.int32) - 1  # the plane of voxels in far; near is the one before it
    for _ in range(0, layers):
        z = _position(layer, d, z_start, z_end, z_axis, NEAREST)
        value, near, far, sampled = march(
            origin, offset, stride_z, stride_y, stride_x, z, fy, fx, near, far, sampled, usable,
            low, scale, NEAREST, WINDOW,
        )  # fmt: skip
        if out.dtype.element_ty != VALUE:
            value = to_storage(value.to(T), out.dtype.element_ty)
        tl.store(target + lane, value, lane < lanes)
        layer += along
        target += to_next


@triton.jit
def _may_touch(start, end, size, first, last):
    """Whether samples of a box may use any voxel from ``first`` to ``last`` along an axis."""
    edge = (size - 1).to(tl.float32)
    least = tl.minimum(tl.maximum(tl.floor(tl.minimum(start, end) - 0.5), 0.0), edge)
    most = tl.minimum(tl.maximum(tl.ceil(tl.maximum(start, end) - 0.5), 0.0), edge)
    return (least <= last.to(tl.float32)) & (most >= first.to(tl.float32))


@triton.jit
def _touching(boxes, k, K, b, B, D, H, W, z, z_last, y, y_last, x, x_last):
    """Which of the boxes ``k`` lie in volume ``b`` and may use these voxels, first to last."""
    batch, start, end = load_box(boxes, k, k < K)
    touching = is_usable(batch, start, end, B, D, H, W) & (batch.to(tl.int32) == b)
    touching &= _may_touch(start[0], end[0], D, z, z_last)
    touching &= _may_touch(start[1], end[1], H, y, y_last)
    return touching & _may_touch(start[2], end[2], W, x, x_last)


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


@quick
@triton.jit(do_not_specialize=(*_SIZES, "stride_x", "bricks"))
def fmkernels_crop_backward_kernel(
    grad_output,  # [K, C, d, h, w]
    boxes,  # [K, 7] float32
    volumes,  # [B, C, D, H, W], with strides, read to apply the window; or None
    out,  # [B, C, D, H, W], written: gradient to the volumes
    K, B, D, H, W, stride_b, stride_c, stride_z, stride_y, stride_x, C, d, h, w, bricks,
    window_low: tl.float64, window_high: tl.float64, window_scale: tl.float64,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, BOXES: tl.constexpr,
    CLAMP_BOX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    columns, rows, layers = tl.cdiv(W, X), tl.cdiv(H, Y), tl.cdiv(D, Z * bricks)
    program = tl.program_id(0)
    row = program // columns
    layer = row // rows
    volume = layer // layers
    b = volume // C
    c = volume - b * C
    z0 = (layer - volume * layers) * (Z * bricks)
    y0, x0 = (row - layer * rows) * Y, (program - row * columns) * X
    z_stop, y_last, x_last = tl.minimum(z0 + Z * bricks, D), y0 + (Y - 1), x0 + (X - 1)
    candidate = tl.arange(0, BOXES)
    touched = K < 0  # few columns of bricks are; the others store zeros
    for group in range(0, K, BOXES):
        hit = _touching(
            boxes, group + candidate, K, b, B, D, H, W, z0, z_stop - 1, y0, y_last, x0, x_last
        )
        touched = touched | (tl.max(hit.to(tl.int32), 0) > 0)
    plane = H.to(tl.int64) * W
    target = out + (volume.to(tl.int64) * D + z0) * plane + y0.to(tl.int64) * W + x0
    y, x = tl.arange(0, Y), tl.arange(0, X)
    to_voxel = (y.to(tl.int64) * W)[:, None] + x[None, :]
    inside = (y < H - y0)[:, None] & (x < W - x0)[None, :]
    for _blank in range(tl.where(touched, z_stop, z0), z_stop):
        tl.store(target + to_voxel, tl.zeros([Y, X], out.dtype.element_ty), inside)
        target += plane
        z0 += 1
    y, x = y0 + y, x0 + x
    inside = ((y < H)[:, None] & (x < W)[None, :])[None, :, :]
    to_voxel = to_voxel[None, :, :] + (tl.arange(0, Z) * plane)[:, None, None]
    while z0 < z_stop:
        z = z0 + tl.arange(0, Z)
        total = tl.zeros([Z, Y, X], T)
        for group in range(0, K, BOXES):
            k = group + candidate
            hit = _touching(boxes, k, K, b, B, D, H, W, z0, z0 + (Z - 1), y0, y_last, x0, x_last)
            k = tl.min(tl.where(hit, k, K), 0)
            while k < K:
                _, start, end = load_box(boxes, k)
                crop = grad_output + (k.to(tl.int64) * C + c) * d * h * w
                total = _gather(
                    crop, z, y, x, start, end, D, H, W, d, h, w, total, CLAMP_BOX, INDEX
                )
                k = tl.min(tl.where(hit & (group + candidate > k), group + candidate, K), 0)
        if volumes is not None:
            at = b.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c
            at += (z.to(tl.int64) * stride_z)[:, None, None]
            at += (y.to(tl.int64) * stride_y)[None, :, None]
            at += (x.to(tl.int64) * stride_x)[None, None, :]
            used = (z < z_stop)[:, None, None] & inside & (total != 0.0)
            voxel = tl.load(volumes + at, used, other=0.0).to(T)
            within = (voxel >= window_low.to(T)) & (voxel <= window_high.to(T))
            total = tl.where(within, total * window_scale.to(T), 0.0)
        mask = (z < z_stop)[:, None, None] & inside
        tl.store(target + to_voxel, to_storage(total, out.dtype.element_ty), mask)
        target += plane * Z
        z0 += Z


def crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    clamp_box: bool,
    nearest: bool,
    window: Sequence[float] | None,
    crops: Tensor,
) -> None:
    """Write crops [K, C, d, h, w] of strided volumes [B, C, D, H, W] at contiguous boxes [K, 7]."""
    if not crops.numel():
        return
    B, C, D, H, W = volumes.shape
    K, _, d, h, w = crops.shape
    launch = launch_parameters("crop_and_resize3d", volumes.device)
    lanes = _lanes(h * w, launch.block)
    tiles = K * C * -(-h * w // lanes)  # per layer of all crops
    depth = launch.tiles(tiles * d * lanes)
    low, high = window or (0.0, 1.0)
    _, _, _, stride_y, stride_x = volumes.stride()
    with torch.cuda.device_of(volumes):
        fmkernels_crop_kernel[(tiles * -(-d // depth),)](
            volumes, boxes, crops, K, B, D, H, W, *volumes.stride(), C, d, h, w, depth,
            low, 1 / (high - low),
            LANES=lanes, CLAMP_BOX=clamp_box, NEAREST=nearest, WINDOW=window is not None,
            WIDE=max(h * w + lanes, H * stride_y + W * stride_x) > 2**31,
            num_warps=max(1, launch.num_warps * lanes // launch.block),
        )  # fmt: skip


def _lanes(positions: int, block: int) -> int:
    """Positions per program: a quarter where tiles of a block would leave many lanes idle."""
    quarter = block // 4
    if positions <= MIN_LANES:
        return MIN_LANES
    return block if 9 * -(-positions // quarter) >= 8 * 4 * -(-positions // block) else quarter


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
    if grad_volumes.dtype == torch.float64:
        depth //= 2  # the sums of a brick take registers
    columns = B * C * -(-H // BRICK_Y) * -(-W // BRICK_X)
    bricks = launch.tiles(columns * -(-D // depth) * launch.block)
    low, high = window or (0.0, 1.0)
    strides = (0, 0, 0, 0, 0) if volumes is None else volumes.stride()
    with torch.cuda.device_of(grad_output):
        fmkernels_crop_backward_kernel[(columns * -(-D // (depth * bricks)),)](
            grad_output, boxes, volumes, grad_volumes, K, B, D, H, W, *strides, C, d, h, w, bricks,
            low, high, 1 / (high - low),
            Z=depth, Y=BRICK_Y, X=BRICK_X, BOXES=BOXES, CLAMP_BOX=clamp_box,
            WIDE=d * h * w >= NARROW, num_warps=launch.num_warps, **launch.register_limit,
        )  # fmt: skip
