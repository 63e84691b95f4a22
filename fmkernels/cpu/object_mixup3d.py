"""Objects mixed with other objects, resized, on the CPU.

All targets are mixed before any is written, each in a patch of its own, so that nothing that is read has changed. Where
a target overlaps earlier ones it takes what it mixes from their patches, so that nothing is rounded in between. A part
owns planes of the volumes, and takes the pairs in the order of their list.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmkernels.cpu.compiled import compiled, shared
from fmkernels.cpu.sampling import box_of, new_axis, place, sample
from fmkernels.cpu.voxels import (
    ZEROS,
    elements,
    load_block,
    located,
    own_kind,
    store_block,
    window_block,
    window_of,
)
from fmkernels.dtypes import compute_dtype

BLOCK = 1 << 12  # voxels outside of boxes that pass through the nearest cache together
LEAST = 1 << 15  # voxels for which another thread is worth its while


@compiled
def _clip(box, shape, clipped):
    """The part of a box [7] that lies in its volume of [B, C, D, H, W]; whether it holds anything."""
    usable = 0 <= box[0] < shape[0]
    clipped[0] = box[0]
    for axis in range(3):
        start, end, size = np.float64(box[1 + axis]), np.float64(box[4 + axis]), shape[2 + axis]
        usable &= abs(start) < np.inf and abs(end) < np.inf
        start, end = min(max(start, 0.0), size), min(max(end, 0.0), size)
        usable &= start < end
        clipped[1 + axis], clipped[4 + axis] = start, end
    return usable


@compiled
def _plan(boxes, donor_boxes, shape, donor_shape, targets, sources):
    """What each pair mixes, and how many voxels all pairs together.

    targets [K, 8]: volume (-1 of a pair that changes nothing), the first voxels along z, y and x, the first beyond, the
    place of the patch. sources [K, 7]: the donor box, clipped.
    """
    voxels = 0
    clipped = np.empty(7)
    for k in range(len(targets)):
        target = targets[k]
        usable = _clip(box_of(boxes, k), shape, clipped)
        n = shape[1]
        for i in range(1, 7):
            target[i] = int(np.ceil(clipped[i] - 0.5)) if usable else 0
        for axis in range(3):
            n *= max(target[4 + axis] - target[1 + axis], 0)
        usable &= _clip(box_of(donor_boxes, k), donor_shape, sources[k]) and n > 0
        target[0], target[7] = int(clipped[0]) if usable else -1, voxels
        voxels += n if usable else 0
    return voxels


@compiled
def _row_of(target, c, z, y):
    """Where a row of the patch of a target begins."""
    d, h, w = target[4] - target[1], target[5] - target[2], target[6] - target[3]
    return target[7] + ((c * d + z - target[1]) * h + y - target[2]) * w


@compiled
def _layers(patches, target, c, first, last):
    """[last - first, h * w]: of the patch of a target, what lies in planes ``first`` to ``last`` of its volume."""
    h, w = target[5] - target[2], target[6] - target[3]
    start, n = _row_of(target, c, first, target[2]), last - first
    return patches[start : start + n * h * w].reshape(n, h * w)


@compiled
def _load_box(volumes, start, strides, window, line, box):
    """box [d, h, w] = the voxels from element ``start`` on, windowed."""
    (address, kind), (windowed, low, scale) = volumes, window
    as_it_is = kind == own_kind(line) and strides[4] == 1
    for i in range(box.shape[0]):
        for j in range(box.shape[1]):
            row = start + i * strides[2] + j * strides[3]
            if as_it_is:
                voxels = elements(address + line.itemsize * row, line.size, line.dtype)
            else:
                voxels = line
                load_block(address, kind, row, strides[4], line)
            for n in range(box.shape[2]):
                box[i, j, n] = voxels[n]
    if windowed:
        window_block(box.reshape(-1), low, scale)


@compiled
def _store_box(box, out, start, strides, line):
    """The voxels from element ``start`` on = box [d, h, w], rounded."""
    address, kind = out
    as_it_is = kind == own_kind(line) and strides[4] == 1
    for i in range(box.shape[0]):
        for j in range(box.shape[1]):
            row = start + i * strides[2] + j * strides[3]
            voxels = (
                elements(address + line.itemsize * row, line.size, line.dtype) if as_it_is else line
            )
            for n in range(box.shape[2]):
                voxels[n] = box[i, j, n]
            if strides[4] == 1 and not as_it_is:
                store_block(line, address, kind, row)
            elif not as_it_is:
                for n in range(line.size):
                    store_block(line[n : n + 1], address, kind, row + n * strides[4])


@compiled
def _take_earlier(targets, k, first, c, patches, own):
    """Put into ``own``, the layers of a target from ``first`` on, what earlier patches hold of it."""
    d, h, w = own.shape
    y, x = targets[k, 2], targets[k, 3]
    for j in range(k):
        b, z1, y1, x1, z2, y2, x2, _ = targets[j]
        left, right = max(x1, x), min(x2, x + w)
        if b == targets[k, 0] and left < right:
            for i in range(max(z1, first), min(z2, first + d)):
                for row in range(max(y1, y), min(y2, y + h)):
                    at = _row_of(targets[j], c, i, row) - x1
                    for n in range(left, right):
                        own[i - first, row - y, n - x] = patches[at + n]


@compiled
def _mixed(own, share, donor):
    """donor = share * own + (1 - share) * donor."""
    rest = donor.dtype.type(1) - share
    for i in range(donor.size):
        donor[i] = share * own[i] + rest * donor[i]


@compiled
def _mix(
    first, last, volumes, shape, strides, window, donors, donor_shape, donor_strides, donor_window, targets, sources,
    lam, patches,
):  # fmt: skip
    """Make the patches of planes ``first`` to ``last`` of all volumes. Tensors are addresses, with their kinds."""
    zero = patches.dtype.type(0)
    C, D = shape[1], shape[2]
    shares, line = np.full(len(targets), zero), np.full(shape[4], zero)
    load_block(lam[0], lam[1], 0, 1, shares)
    for k in range(len(targets)):
        b, z1, y1, x1, z2, y2, x2, _ = targets[k]
        begin, end = max(first - b * D, z1), min(last - b * D, z2)
        if b < 0 or begin >= end:
            continue
        z, y, x = new_axis(z2 - z1, zero), new_axis(y2 - y1, zero), new_axis(x2 - x1, zero)
        place(sources[k, 1], sources[k, 4], donor_shape[2], True, z)
        place(sources[k, 2], sources[k, 5], donor_shape[3], True, y)
        place(sources[k, 3], sources[k, 6], donor_shape[4], True, x)
        own = np.empty((end - begin, y2 - y1, x2 - x1), patches.dtype)
        for c in range(C):
            layers = _layers(patches, targets[k], c, begin, end)
            start = int(sources[k, 0]) * donor_strides[0] + c * donor_strides[1]
            sample(
                donors, start, donor_strides, donor_window, z, y, x, begin - z1, end - z1, layers
            )
            start = (
                b * strides[0]
                + c * strides[1]
                + begin * strides[2]
                + y1 * strides[3]
                + x1 * strides[4]
            )
            _load_box(volumes, start, strides, window, line[: x2 - x1], own)
            _take_earlier(targets, k, begin, c, patches, own)
            _mixed(own.reshape(-1), shares[k], layers.reshape(-1))


@compiled
def _write(first, last, out, shape, strides, targets, patches):
    """Write the patches into planes ``first`` to ``last`` of all volumes."""
    C, D = shape[1], shape[2]
    line = np.full(shape[4], patches.dtype.type(0))
    for target in targets:
        b, z1, y1, x1, z2, y2, x2, _ = target
        begin, end = max(first - b * D, z1), min(last - b * D, z2)
        if b < 0 or begin >= end:
            continue
        for c in range(C):
            start = (
                b * strides[0]
                + c * strides[1]
                + begin * strides[2]
                + y1 * strides[3]
                + x1 * strides[4]
            )
            layers = _layers(patches, target, c, begin, end).reshape(end - begin, y2 - y1, x2 - x1)
            _store_box(layers, out, start, strides, line[: x2 - x1])


@compiled
def _copy(first, last, volumes, out, window, size, block, zero):
    """out = volumes, windowed and rounded: blocks ``first`` to ``last``, as they lie in memory."""
    values = np.full(block, zero)
    for start in range(first * block, min(last * block, size), block):
        part = values[: min(block, size - start)]
        load_block(volumes[0], volumes[1], start, 1, part)
        if window[0]:
            window_block(part, window[1], window[2])
        store_block(part, out[0], out[1], start)


def launch_object_mixup(
    volumes: Tensor,
    donors: Tensor | None,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """As fmkernels.kernels.object_mixup3d.launch_object_mixup."""
    out = torch.empty_like(volumes, dtype=dtype)
    launch_object_mixup_into(volumes, donors, boxes, donor_boxes, lam, window, donor_window, out)
    return out


def launch_object_mixup_into(
    volumes: Tensor,
    donors: Tensor | None,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    out: Tensor,
) -> None:
    """As fmkernels.kernels.object_mixup3d.launch_object_mixup_into."""
    if not out.numel():
        return
    donors = volumes if donors is None else donors
    same = (
        volumes.data_ptr() == out.data_ptr()
        and volumes.stride() == out.stride()
        and volumes.dtype == out.dtype
    )
    unchanged = window is None and volumes.dtype == out.dtype
    if not (same if unchanged else _match(volumes, out)) and not (
        unchanged and _apart(volumes, out)
    ):
        dense = volumes.contiguous()
        out.copy_(
            launch_object_mixup(
                dense, donors, boxes, donor_boxes, lam, window, donor_window, out.dtype
            )
        )
        return
    K, shape, strides, zero = (
        boxes.shape[0],
        tuple(volumes.shape),
        volumes.stride(),
        ZEROS[compute_dtype(volumes.dtype)],
    )
    own, target, own_window = located(volumes), located(out), window_of(window)
    targets, sources = np.empty((K, 8), np.int64), np.empty((K, 7))
    donor_shape = tuple(donors.shape)
    voxels = _plan(boxes.data_ptr(), donor_boxes.data_ptr(), shape, donor_shape, targets, sources)
    patches = np.empty(voxels, zero.dtype)
    planes = shape[0] * shape[2]
    least = LEAST * planes // max(voxels, 1)
    shared(
        _mix, planes, least, own, shape, strides, own_window, located(donors), donor_shape, donors.stride(),
        window_of(donor_window), targets, sources, located(lam), patches,
    )  # fmt: skip
    if not unchanged:
        blocks = -(-out.numel() // BLOCK)
        shared(_copy, blocks, LEAST // BLOCK, own, target, own_window, out.numel(), BLOCK, zero)
    elif not same:
        out.copy_(volumes)
    shared(_write, planes, least, target, shape, out.stride(), targets, patches)


def _apart(volumes: Tensor, out: Tensor) -> bool:
    return volumes.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


def _match(volumes: Tensor, out: Tensor) -> bool:
    """Whether both have one layout, without gaps, and voxels that are the same or apart."""
    dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last_3d)
    alike = dense and volumes.stride() == out.stride()
    return alike and (volumes.data_ptr() == out.data_ptr() or _apart(volumes, out))
