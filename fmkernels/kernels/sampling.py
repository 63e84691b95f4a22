"""How the volume ops sample: boxes, where samples lie along an axis, and the value between 8 voxels.

Coordinates are float32 whatever the voxels are, and are counted from a voxel at the start of the box, so that their
accuracy depends on the extent of the box and not on where it lies.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fmkernels.kernels.voxels import window_voxels

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_box(boxes, k, mask=None):
    """Row ``k`` of [K, 7] boxes: batch index, (z1, y1, x1), (z2, y2, x2); a batch index of -1 where masked."""
    row = boxes + k.to(tl.int64) * 7
    OTHER: tl.constexpr = None if mask is None else -1.0
    batch = tl.load(row, mask, other=OTHER)
    z1, y1, x1 = (
        tl.load(row + 1, mask, OTHER),
        tl.load(row + 2, mask, OTHER),
        tl.load(row + 3, mask, OTHER),
    )
    z2, y2, x2 = (
        tl.load(row + 4, mask, OTHER),
        tl.load(row + 5, mask, OTHER),
        tl.load(row + 6, mask, OTHER),
    )
    return batch, (z1, y1, x1), (z2, y2, x2)


@triton.jit
def is_usable(batch, start, end, B, D, H, W):
    """Whether a box lies in one of B volumes that hold a voxel, and its extents are finite."""
    usable = (batch >= 0) & (batch < B) & (D > 0) & (H > 0) & (W > 0)
    for axis in tl.static_range(3):
        usable = usable & (tl.abs(end[axis] - start[axis]) < INFINITY)
    return usable


@triton.jit
def quotient(a, n):
    """a / n for an int n > 0, exact where float32 has the result: the identity crop must not resample."""
    n = n.to(tl.float32)
    inverse = libdevice.fast_dividef(tl.full(n.shape, 1.0, tl.float32), n)
    estimate = a * inverse
    return tl.fma(tl.fma(-estimate, n, a), inverse, estimate)


@triton.jit
def place_samples(start, end, size, samples, CLAMP_BOX: tl.constexpr):
    """Origin, first, step, low, high along an axis of ``size`` > 0 voxels, whose centres lie at 0, 1, 2 ...

    Sample i lies at origin + clamp(first + i * step, low, high). All are float32; origin, low and high are whole
    numbers, those of voxels.
    """
    edge = (size - 1).to(tl.float32)
    start_floor = tl.floor(start)
    origin = tl.minimum(tl.maximum(start_floor, 0.0), edge)
    step = quotient(end - start, samples)
    first = tl.fma(step, 0.5, (start - origin) - 0.5)
    if CLAMP_BOX:
        end_floor = tl.floor(end)
        low = tl.maximum(start_floor + tl.where(start - start_floor > 0.5, 1.0, 0.0), 0.0)
        high = tl.minimum(end_floor - tl.where(end - end_floor > 0.5, 0.0, 1.0), edge)
        nearest = tl.floor(0.5 * start + 0.5 * end)
        nearest -= tl.where(
            end - nearest < nearest - start, 1.0, 0.0
        )  # the sum may have rounded up
        nearest = tl.minimum(tl.maximum(nearest, 0.0), edge)
        empty = low > high
        low = tl.where(empty, nearest, low) - origin
        high = tl.where(empty, nearest, high) - origin
    else:
        low = -origin
        high = edge - origin
    return origin, first, step, low, high


@triton.jit
def place(sample, first, step, low, high):
    """Where a sample lies, counted from the origin."""
    return tl.minimum(tl.maximum(tl.fma(sample.to(tl.float32), step, first), low), high)


@triton.jit
def taps(position, stride, T: tl.constexpr):
    """Offset of the voxel below, the way from there to the one above, and the weight of that.

    A position on a voxel has no way to go, so that nothing beyond the last voxel is read.
    """
    below = tl.floor(position)
    fraction = position - below
    return (
        below.to(tl.int64) * stride,
        tl.where(fraction > 0.0, stride, 0).to(tl.int64),
        fraction.to(T),
    )


@triton.jit
def _between(near, far, fraction, FINITE: tl.constexpr):
    value = near * (1.0 - fraction) + far * fraction
    if not FINITE:  # 0 * inf
        value = tl.where(fraction > 0.0, value, near)
    return value


@triton.jit
def _edge(pointer, way, fraction, low, scale, WINDOW: tl.constexpr):
    near, far = tl.load(pointer), tl.load(pointer + way)
    FINITE: tl.constexpr = WINDOW or near.dtype.is_int()
    if WINDOW:
        near, far = window_voxels(near, low, scale), window_voxels(far, low, scale)
    return _between(near.to(low.dtype), far.to(low.dtype), fraction, FINITE)


@triton.jit
def trilinear(corner, dz, dy, dx, fz, fy, fx, low, scale, WINDOW: tl.constexpr):
    """The value between the 8 voxels at corner, corner + dz, ..., in the type of low, the window applied to each."""
    FINITE: tl.constexpr = WINDOW or corner.dtype.element_ty.is_int()
    near = _edge(corner, dx, fx, low, scale, WINDOW)
    near = _between(near, _edge(corner + dy, dx, fx, low, scale, WINDOW), fy, FINITE)
    corner += dz
    far = _edge(corner, dx, fx, low, scale, WINDOW)
    far = _between(far, _edge(corner + dy, dx, fx, low, scale, WINDOW), fy, FINITE)
    return _between(near, far, fz, FINITE)
