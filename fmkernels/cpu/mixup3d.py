"""Batched 3D mixup on the CPU: box by box, each mixed for all samples before the next.

Sources that are flipped, overwritten or of other dtypes than the loops compute with are first
copied, flipped, into blocks that stay in a core's cache. All sources of a box are loaded before any
result is stored, so that ``out`` may be the donors.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fmkernels.cpu.compiled import INT16, njit, parallel_for, subroutine
from fmkernels.cpu.voxels import (
    elements,
    empty,
    load_block,
    load_reversed,
    own_kind,
    part,
    store_block,
    window_of,
    window_voxel,
    zero_of,
)

BOX = 1024  # voxels of a box, at most
SCRATCH = 1 << 16  # voxels of a box in all samples, unless boxes become too small
MIN_BOX = 64
GRAIN_SIZE = 1 << 18  # voxels of all samples

_DIRECT = {torch.float32, torch.float64, torch.int16}  # can be mixed without a copy


@subroutine
def _flip(masks, row):
    """The flip mask of a volume; 0 where there are none."""
    return np.int64(elements(masks[0] + row, 1, np.uint8)[0]) if masks[0] else 0


@subroutine
def _box(number, sizes, longest):
    """The first voxel of box ``number`` on each axis, and its lengths along the last two.

    Volumes are cut into boxes of 1 x 1 x ``longest``.
    """
    rest, i3 = divmod(number, -(-sizes[3] // longest[1]))
    rest, i2 = divmod(rest, -(-sizes[2] // longest[0]))
    i0, i1 = divmod(rest, sizes[1])
    i2, i3 = i2 * longest[0], i3 * longest[1]
    return (i0, i1, i2, i3), (min(longest[0], sizes[2] - i2), min(longest[1], sizes[3] - i3))


@subroutine
def _offset(row, corner, sizes):
    """Number of a voxel among those of all volumes."""
    offset = row
    for axis in range(4):
        offset = offset * sizes[axis] + corner[axis]
    return offset


@subroutine
def _load_flipped(volumes, row, corner, lengths, sizes, axes, flip, block):
    """A box of the flipped volume."""
    address, dtype_code = volumes
    i0, i1, i2, i3 = corner
    if flip & axes[0]:
        i0 = sizes[0] - 1 - i0
    if flip & axes[1]:
        i1 = sizes[1] - 1 - i1
    if flip & axes[2]:
        i2 = sizes[2] - lengths[0] - i2
    if flip & axes[3]:
        i3 = sizes[3] - lengths[1] - i3
    start = _offset(row, (i0, i1, i2, i3), sizes)
    rows, n = lengths if flip & (axes[2] | axes[3]) else (1, block.size)
    for j in range(rows):
        first, row = start + (rows - 1 - j if flip & axes[2] else j) * n, part(block, j * n, n)
        if flip & axes[3]:
            load_reversed(address, dtype_code, first + n - 1, row)
        else:
            load_block(address, dtype_code, first, row)


@subroutine
def _mix(own, other, lam, window, block):
    """block = lam * own + (1 - lam) * other, both windowed; no trace of one of weight 0."""
    dtype = block.dtype.type
    windowed, low, scale = window[0], dtype(window[1]), dtype(window[2])
    weight, zero = dtype(1) - lam, dtype(0)
    if windowed:
        for i in range(block.size):
            a = window_voxel(dtype(own[i]), low, scale)
            b = window_voxel(dtype(other[i]), low, scale)
            block[i] = (lam * a if lam != zero else zero) + (weight * b if weight != zero else zero)
    else:
        for i in range(block.size):
            a, b = dtype(own[i]), dtype(other[i])
            block[i] = (lam * a if lam != zero else zero) + (weight * b if weight != zero else zero)


@njit
def _mix_boxes(
    first, last, volumes, donors, out, lam, index, flips, donor_flips, batch, num_donors, separate,
    cut, copied, window, zero,
):  # fmt: skip
    """Mix boxes number ``first`` to ``last`` of all samples.

    Args:
        volumes: (address, dtype code), as are all tensors.
        index: int64 [batch].
        flips: uint8 [batch]; ``donor_flips``, [num_donors]; either may be missing.
        separate: whether the donors are not the volumes.
        copied: whether sources are copied before they are mixed.
        zero: of the dtype to compute with.
    """
    sizes, axes, longest = cut
    index, weights = elements(index[0], batch, np.int64), empty(batch, zero)
    load_block(lam[0], lam[1], 0, weights)
    slots, count = empty(num_donors, np.int64), 0  # of donors that are used, else -1
    for row in range(num_donors):
        slots[row] = -1 if separate else 0
    for b in range(batch):
        slots[index[b]] = 0
    for row in range(num_donors):
        if slots[row] == 0:
            slots[row] = count
            count += 1
    voxels = longest[0] * longest[1]
    others = empty(count * voxels if copied else 0, zero)
    own, mixed = empty(voxels, zero), empty(voxels, zero)
    dtype, itemsize = mixed.dtype, mixed.itemsize
    for number in range(first, last):
        corner, lengths = _box(number, sizes, longest)
        n = lengths[0] * lengths[1]
        if copied:
            for row in range(num_donors):
                if slots[row] >= 0:
                    flip, block = _flip(donor_flips, row), part(others, slots[row] * voxels, n)
                    _load_flipped(donors, row, corner, lengths, sizes, axes, flip, block)
        for b in range(batch):
            start, donor = _offset(b, corner, sizes), _offset(index[b], corner, sizes)
            at_once = out[1] == own_kind(mixed)
            block = elements(out[0] + itemsize * start, n, dtype) if at_once else part(mixed, 0, n)
            if copied:
                if separate:
                    flip = _flip(flips, b)
                    _load_flipped(volumes, b, corner, lengths, sizes, axes, flip, part(own, 0, n))
                x = part(own, 0, n) if separate else part(others, slots[b] * voxels, n)
                _mix(x, part(others, slots[index[b]] * voxels, n), weights[b], window, block)
            elif volumes[1] == INT16:
                x = elements(volumes[0] + 2 * start, n, np.int16)
                _mix(x, elements(donors[0] + 2 * donor, n, np.int16), weights[b], window, block)
            else:
                y = elements(volumes[0] + itemsize * start, n, dtype)
                _mix(y, elements(donors[0] + itemsize * donor, n, dtype), weights[b], window, block)
            if not at_once:
                store_block(block, out[0], out[1], start)


@njit
def _differentiate_boxes(
    first, last, grad_output, input, grad_input, lam, index, flips, batch, rows, cut, low, high,
    scale, as_volumes, as_donors, zero,
):  # fmt: skip
    """Write boxes number ``first`` to ``last`` of the gradient to all rows of the input.

    ``input`` is missing where there was no window.
    """
    sizes, axes, longest = cut
    index, weights = elements(index[0], batch, np.int64), empty(batch, zero)
    load_block(lam[0], lam[1], 0, weights)
    dtype = weights.dtype.type
    low, high, scale = dtype(low), dtype(high), dtype(scale)
    totals, blocks = empty(longest[0] * longest[1], zero), empty(longest[0] * longest[1], zero)
    for number in range(first, last):
        corner, lengths = _box(number, sizes, longest)
        n = lengths[0] * lengths[1]
        total, block = part(totals, 0, n), part(blocks, 0, n)
        for row in range(rows):
            flip = _flip(flips, row)
            for i in range(n):
                total[i] = zero
            for b in range(-1 if as_volumes else 0, batch if as_donors else 0):
                if b >= 0 and index[b] != row:
                    continue
                weight = weights[row] if b < 0 else dtype(1) - weights[b]
                if weight != zero:
                    sample = row if b < 0 else b
                    _load_flipped(grad_output, sample, corner, lengths, sizes, axes, flip, block)
                    for i in range(n):
                        total[i] += weight * block[i]
            start = _offset(row, corner, sizes)
            if input[0]:
                load_block(input[0], input[1], start, block)
                for i in range(n):
                    total[i] = total[i] * scale if low <= block[i] <= high else zero
            store_block(total, grad_input[0], grad_input[1], start)


@lru_cache
def _cut(
    shape: torch.Size, axes: tuple[int, ...], flipped: bool
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """How [rows, n0, n1, n2, n3] are cut: (sizes, axes, longest box), and the number of boxes."""
    rows = shape[0]
    sizes = tuple(shape[1:]) if flipped else (1, 1, 1, shape.numel() // rows)
    n0, n1, n2, n3 = sizes
    voxels = max(MIN_BOX, min(BOX, SCRATCH // rows))
    width = min(n3, voxels)
    height = min(n2, voxels // width)
    axes = axes if flipped else (0, 0, 0, 0)
    return (sizes, axes, (height, width)), n0 * n1 * -(-n2 // height) * -(-n3 // width)


def _check_values(lam: Tensor, index: Tensor, num_donors: int) -> None:
    weights, donors = lam.tolist(), index.tolist()
    if any([weight < 0 or weight > 1 for weight in weights]):  # NaN gives NaN
        raise ValueError(f"mixup3d: lam must lie in [0, 1], got {weights}")
    if donors and (min(donors) < 0 or max(donors) >= num_donors):
        raise ValueError(f"mixup3d: index must lie in [0, {num_donors}), got {donors}")


def mixup3d(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    out: Tensor,
    in_place: bool = False,
) -> None:
    """Write the mixed volumes, as fmkernels.kernels.mixup3d.mixup3d does."""
    separate = donors is not None
    if donors is None:
        donors, donor_flips = volumes, flips
    num_donors = donors.shape[0]
    _check_values(lam, index, num_donors)
    voxels = out.numel()
    if not voxels:
        return
    flipped = flips is not None or donor_flips is not None
    aliased = in_place or out.data_ptr() == volumes.data_ptr()  # else mixing is not vectorized
    cut, boxes = _cut(out.shape, tuple(axes), flipped)
    parallel_for(
        _mix_boxes, boxes, GRAIN_SIZE * boxes // voxels,
        (volumes, donors, out, lam, index, flips, donor_flips), volumes.shape[0], num_donors,
        separate, cut, flipped or aliased or volumes.dtype not in _DIRECT, window_of(window),
        zero_of(volumes),
    )  # fmt: skip


def mixup3d_backward(
    grad_output: Tensor,
    input: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    as_volumes: bool,
    as_donors: bool,
    grad_input: Tensor,
) -> None:
    """Write the gradient, as fmkernels.kernels.mixup3d.mixup3d_backward does."""
    voxels = grad_input.numel()
    if not voxels:
        return
    low, high = window or (0.0, 1.0)
    cut, boxes = _cut(grad_input.shape, tuple(axes), flips is not None)
    parallel_for(
        _differentiate_boxes, boxes, GRAIN_SIZE * boxes // voxels,
        (grad_output, input, grad_input, lam, index, flips), grad_output.shape[0],
        grad_input.shape[0], cut, low, high, 1 / (high - low), as_volumes, as_donors,
        zero_of(grad_input),
    )  # fmt: skip
