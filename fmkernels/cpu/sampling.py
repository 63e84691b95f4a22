"""Sampling of volumes on the CPU: sample positions along an axis, and the values between voxels.

Interpolation goes axis by axis. A row of voxels is sampled along x once, however many samples along
y and z use it: the last two rows are kept, that of an even voxel and that of an odd one, and so are
the last two planes made of them.
"""

from typing import NamedTuple

import numpy as np

from fmkernels.cpu.compiled import subroutine
from fmkernels.cpu.voxels import (
    elements,
    empty,
    load_block,
    load_strided,
    own_kind,
    part,
    window_block,
)


class Axis(NamedTuple):
    """The voxels below and above each sample along an axis, and the weight of the voxel above.

    For a sample at a voxel center, both are that voxel and the weight is 0.
    """

    below: np.ndarray
    above: np.ndarray
    weight: np.ndarray


@subroutine
def new_axis(shape, zero):
    """An axis of ``shape`` samples, [n] or [K, n], to be filled by `sample_positions`."""
    return Axis(empty(shape, np.int32), empty(shape, np.int32), empty(shape, zero))


@subroutine
def axis_of(axes, k):
    """Row ``k`` of axes of [K, n] samples."""
    return Axis(axes.below[k], axes.above[k], axes.weight[k])


@subroutine
def sample_positions(start, end, size, clamp_box, axis):
    """Fill an axis with the samples of a box along ``size`` voxels with centers at 0, 1, 2 ..."""
    start, end, n = np.float64(start), np.float64(end), axis.weight.size
    low, high = 0.0, size - 1.0
    if clamp_box:
        low, high = max(np.ceil(start - 0.5), 0.0), min(np.ceil(end - 0.5) - 1.0, high)
        if low > high:
            low = high = min(max(np.floor((start + end) / 2), 0.0), size - 1.0)
    for i in range(n):
        position = min(max(start + (i + 0.5) * (end - start) / n - 0.5, low), high)
        below = np.floor(position)
        axis.below[i], axis.above[i] = below, np.ceil(position)
        axis.weight[i] = position - below
        if axis.weight[i] == 1:  # by rounding; 0 times the voxel below may be NaN
            axis.below[i], axis.weight[i] = axis.above[i], 0


@subroutine
def take_nearest(axis):
    """Move each sample to the voxel nearest to it, the higher one of two."""
    for i in range(axis.weight.size):
        if axis.weight[i] >= 0.5:
            axis.below[i] = axis.above[i]
        axis.above[i], axis.weight[i] = axis.below[i], 0


@subroutine
def boxes_of(boxes, count):
    """The array [count, 7] of boxes, which are given as (address, dtype code)."""
    return elements(boxes[0], (count, 7), np.float32)


@subroutine
def is_usable(box, shape):
    """Whether a box [7] lies in one of the volumes [B, C, D, H, W], and has finite extents."""
    usable = 0 <= box[0] < shape[0]
    for axis in range(3):
        usable &= abs(box[4 + axis] - box[1 + axis]) < np.inf and shape[2 + axis] > 0
    return usable


@subroutine
def load_row(address, kind, start, step, block):
    """block[i] = voxel start + i * step."""
    if step == 1:
        load_block(address, kind, start, block)
    else:
        load_strided(address, kind, start, step, block)


@subroutine
def _sample_plane(volumes, start, strides, window, y, x, line, rows, plane):
    """plane [h * w] = samples of the plane of voxels that begins with element ``start``."""
    (address, kind), (windowed, low, scale, _) = volumes, window
    readable = kind == own_kind(line) and strides[4] == 1 and not windowed
    left = min(x.below[0], x.below[-1])
    read = part(line, left, line.size - left)
    one, w = line.dtype.type(1), x.weight.size
    even = odd = -1
    for j in range(y.weight.size):
        for voxel in range(y.below[j], y.above[j] + 1):
            if voxel == (odd if voxel & 1 else even):
                continue
            odd, even = (voxel, even) if voxel & 1 else (odd, voxel)
            begin = start + voxel * strides[3]
            if readable:
                voxels = elements(address + line.itemsize * begin, line.size, line.dtype)
            else:
                voxels = line
                load_row(address, kind, begin + left * strides[4], strides[4], read)
                if windowed:
                    window_block(read, low, scale)
            for i in range(x.weight.size):
                near, weight = voxels[x.below[i]], x.weight[i]
                between = near * (one - weight) + voxels[x.above[i]] * weight
                rows[(voxel & 1) * w + i] = between if weight > 0 else near
        below, above, weight = (y.below[j] & 1) * w, (y.above[j] & 1) * w, y.weight[j]
        for i in range(x.weight.size):
            near = rows[below + i]
            between = near * (one - weight) + rows[above + i] * weight
            plane[j * w + i] = between if weight > 0 else near


@subroutine
def sample(volumes, start, strides, window, z, y, x, first, last, layers):
    """layers [(last - first) * h * w] = samples ``first`` to ``last`` along z.

    The channel that is sampled begins with element ``start``.
    """
    dtype, one = layers.dtype, layers.dtype.type(1)
    h, w = y.weight.size, x.weight.size
    line = empty(max(x.above[0], x.above[-1]) + 1, dtype)
    rows, planes = empty(2 * w, dtype), empty(2 * h * w, dtype)
    even = odd = -1
    for i in range(first, last):
        for voxel in range(z.below[i], z.above[i] + 1):
            if voxel == (odd if voxel & 1 else even):
                continue
            odd, even = (voxel, even) if voxel & 1 else (odd, voxel)
            plane, begin = part(planes, (voxel & 1) * h * w, h * w), start + voxel * strides[2]
            _sample_plane(volumes, begin, strides, window, y, x, line, rows, plane)
        below, above, weight = (z.below[i] & 1) * h * w, (z.above[i] & 1) * h * w, z.weight[i]
        for j in range(h * w):
            near = planes[below + j]
            between = near * (one - weight) + planes[above + j] * weight
            layers[(i - first) * h * w + j] = between if weight > 0 else near
