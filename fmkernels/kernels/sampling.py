"""Sampling of volumes: boxes, sample positions along an axis, and the value between 8 voxels.

Coordinates are float32 for every voxel dtype. They are counted from a voxel near the box, the
origin, so that their accuracy depends on the extent of the box and not on its position.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fmkernels.kernels.voxels import window_voxels

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_box(boxes, k, mask=None):
    """Row ``k`` of boxes [K, 7]: batch index, (z1, y1, x1), (z2, y2, x2); -1 where masked."""
    row = boxes + k.to(tl.int64) * 7
    OTHER: tl.constexpr = None if mask is None else -1.0
    batch = tl.load(row, mask, other=OTHER)
    z1, y1 = tl.load(row + 1, mask, OTHER), tl.load(row + 2, mask, OTHER)
    x1, z2 = tl.load(row + 3, mask, OTHER), tl.load(row + 4, mask, OTHER)
    y2, x2 = tl.load(row + 5, mask, OTHER), tl.load(row + 6, mask, OTHER)
    return batch, (z1, y1, x1), (z2, y2, x2)


@triton.jit
def is_usable(batch, start, end, B, D, H, W):
    """Whether the box belongs to one of B volumes that are not empty, and has finite extents."""
    usable = (batch >= 0) & (batch < B) & (D > 0) & (H > 0) & (W > 0)
    for axis in tl.static_range(3):
        usable = usable & (tl.abs(end[axis] - start[axis]) < INFINITY)
    return usable


@triton.jit
def quotient(a, n):
    """a / n for an int n > 0, exact if float32 holds the result: identity crops do not resample."""
    n = n.to(tl.float32)
    inverse = libdevice.fast_dividef(tl.full(n.shape, 1.0, tl.float32), n)
    estimate = a * inverse
    return tl.fma(tl.fma(-estimate, n, a), inverse, estimate)


@triton.jit
def sample_axis(start, end, size, samples, CLAMP_BOX: tl.constexpr):
    """Origin, first, step, low, high of the samples along an axis of ``size`` > 0 voxels.

    Sample i lies at origin + clamp(first + i * step, low, high), where voxel centers are at 0, 1, 2
    ... All are float32; origin, low and high are whole numbers. Clamped positions are whole numbers
    or at least 0: the fraction of a tiny negative one would round to 1.
    """
    edge = (size - 1).to(tl.float32)
    start_floor = tl.floor(start)
    origin = start_floor if CLAMP_BOX else tl.floor(tl.minimum(start, end)) - 1.0
    origin = tl.minimum(tl.maximum(origin, 0.0), edge)
    step = quotient(end - start, samples)
    first = tl.fma(step, 0.5, (start - origin) - 0.5)
    if CLAMP_BOX:
        end_floor = tl.floor(end)
        low = tl.maximum(start_floor + tl.where(start - start_floor > 0.5, 1.0, 0.0), 0.0)
        high = tl.minimum(end_floor - tl.where(end - end_floor > 0.5, 0.0, 1.0), edge)
        nearest = tl.floor(0.5 * start + 0.5 * end)
        # the sum may have rounded up
        nearest -= tl.where(end - nearest < nearest - start, 1.0, 0.0)
        nearest = tl.minimum(tl.maximum(nearest, 0.0), edge)
        empty = low > high
        low = tl.where(empty, nearest, low) - origin
        high = tl.where(empty, nearest, high) - origin
    else:
        low = -origin
        high = edge - origin
    return origin, first, step, low, high


@triton.jit
def sample_position(sample, first, step, low, high):
    """The position of a sample, counted from the origin."""
    return tl.minimum(tl.maximum(tl.fma(sample.to(tl.float32), step, first), low), high)


@triton.jit
def nearest_voxel(sample, samples, start, end, origin, low, high):
    """The voxel nearest to a sample, the higher one of two, counted from the origin.

    Exact where float32 holds (sample + 1/2) (end - start), so that ties do not hang on rounding.
    """
    extent = (sample.to(tl.float32) + 0.5) * (end - start)
    position = quotient(extent, samples) + ((start - origin) - 0.5)
    position = tl.minimum(tl.maximum(position, low), high)
    below = tl.floor(position)
    return below + tl.where(position - below >= 0.5, 1.0, 0.0)


@triton.jit
def bilinear(plane, offset, dy, dx, fy, fx, low, scale, WINDOW: tl.constexpr):
    """The value between 4 windowed voxels of a plane, at offset, offset + dx, ... from its pointer.

    In the dtype of low. Voxels of weight 0 do not show: those that may not be finite are not read.
    """
    right, down = fx > 0.0, fy > 0.0
    near, far = plane + offset, (plane + dy) + offset
    if plane.dtype.element_ty.is_int():  # the voxel before instead; fewer predicates
        dx = tl.where(right, dx, 0)
        far = near + tl.where(down, dy, 0)
        near = tl.load(near), tl.load(near + dx)
        far = tl.load(far), tl.load(far + dx)
    else:
        near = tl.load(near), tl.load(near + dx, right, 0)
        far = tl.load(far, down, 0), tl.load(far + dx, right & down, 0)
    near = _along(near[0], near[1], fx, low, scale, WINDOW)
    return near * (1.0 - fy) + _along(far[0], far[1], fx, low, scale, WINDOW) * fy


@triton.jit
def _along(near, far, fraction, low, scale, WINDOW: tl.constexpr):
    if WINDOW:
        near, far = window_voxels(near, low, scale), window_voxels(far, low, scale)
    return near.to(low.dtype) * (1.0 - fraction) + far.to(low.dtype) * fraction


@triton.jit
def march(
    origin, offset, stride_z, stride_y, stride_x, z, fy, fx, near, far, sampled, usable,
    low, scale, NEAREST: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The value of a layer at ``z``, and what the next one, at a higher z, uses again.

    That is two planes of voxels sampled in y and x: ``near``, and ``far``, which is plane number
    ``sampled``. A layer that is not ``usable`` samples none.
    """
    below, above = tl.floor(z).to(tl.int32), tl.ceil(z).to(tl.int32)
    needed = tl.where(usable, above, sampled)
    while sampled < needed:
        sampled = tl.maximum(sampled + 1, below)
        near = far
        plane = origin + sampled.to(tl.int64) * stride_z
        if NEAREST:
            far = tl.load(plane + offset)
        else:
            far = bilinear(plane, offset, stride_y, stride_x, fy, fx, low, scale, WINDOW)
    value = far
    if not NEAREST:
        fz = (z - tl.floor(z)).to(low.dtype)
        weight = tl.where(fz > 0.0, fz, 1.0)
        value = near * (1.0 - weight) + far * weight
        if origin.dtype.element_ty.is_floating():  # 0 * inf
            value = tl.where(fz > 0.0, value, far)
    return value, near, far, sampled


@triton.jit
def taps(position, stride, T: tl.constexpr):
    """Offset of the voxel below, the stride to the voxel above, and the weight of the latter.

    The stride is 0 at a voxel center, so that nothing beyond the last voxel is read.
    """
    below = tl.floor(position)
    fraction = position - below
    step = tl.where(fraction > 0.0, stride, 0).to(tl.int64)
    return below.to(tl.int64) * stride, step, fraction.to(T)


@triton.jit
def _between(near, far, fraction, FINITE: tl.constexpr):
    value = near * (1.0 - fraction) + far * fraction
    if not FINITE:  # 0 * inf
        value = tl.where(fraction > 0.0, value, near)
    return value


@triton.jit
def _edge(pointer, step, fraction, low, scale, WINDOW: tl.constexpr):
    near, far = tl.load(pointer), tl.load(pointer + step)
    FINITE: tl.constexpr = WINDOW or near.dtype.is_int()
    if WINDOW:
        near, far = window_voxels(near, low, scale), window_voxels(far, low, scale)
    return _between(near.to(low.dtype), far.to(low.dtype), fraction, FINITE)


@triton.jit
def trilinear(corner, dz, dy, dx, fz, fy, fx, low, scale, WINDOW: tl.constexpr):
    """The value between the 8 windowed voxels at corner, corner + dz, ..., in the dtype of low."""
    FINITE: tl.constexpr = WINDOW or corner.dtype.element_ty.is_int()
    near = _edge(corner, dx, fx, low, scale, WINDOW)
    near = _between(near, _edge(corner + dy, dx, fx, low, scale, WINDOW), fy, FINITE)
    corner += dz
    far = _edge(corner, dx, fx, low, scale, WINDOW)
    far = _between(far, _edge(corner + dy, dx, fx, low, scale, WINDOW), fy, FINITE)
    return _between(near, far, fz, FINITE)
