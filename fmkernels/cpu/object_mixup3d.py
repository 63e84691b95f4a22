"""Objects mixed with other objects, resized, on the CPU.

All targets are mixed before any is written, each in a patch of its own, so that nothing that is
read has changed. A target that overlaps earlier ones reads the voxels that they share from their
patches, so that nothing is rounded in between. A task owns planes of the volumes and takes the
pairs in list order.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fmkernels.cpu.compiled import located, njit, parallel_for, subroutine
from fmkernels.cpu.sampling import boxes_of, load_row, new_axis, sample, sample_positions
from fmkernels.cpu.voxels import (
    elements,
    empty,
    load_block,
    own_kind,
    part,
    store_block,
    window_block,
    window_of,
    zero_of,
)

BLOCK = 1 << 12  # voxels outside of boxes per block
GRAIN_SIZE = 1 << 15  # minimum voxels per thread


@subroutine
def _clip(box, shape, clipped):
    """Clip a box [7] to its volume of [B, C, D, H, W]; whether anything is left."""
    usable = 0 <= box[0] < shape[0]
    clipped[0] = box[0]
    for axis in range(3):
        start, end, size = np.float64(box[1 + axis]), np.float64(box[4 + axis]), shape[2 + axis]
        usable &= abs(start) < np.inf and abs(end) < np.inf
        start, end = min(max(start, 0.0), size), min(max(end, 0.0), size)
        usable &= start < end
        clipped[1 + axis], clipped[4 + axis] = start, end
    return usable


@njit
def _plan(boxes, donor_boxes, shape, donor_shape, targets, sources):
    """Fill targets and sources; return the number of voxels of all patches.

    Boxes are addresses with dtype codes. targets [K, 8]: batch index (-1 for a pair that changes
    nothing), first voxels along z, y and x, end voxels, start of the patch. sources [K, 7]: the
    clipped donor boxes.
    """
    voxels, K = 0, len(targets)
    boxes, donor_boxes = boxes_of(boxes, K), boxes_of(donor_boxes, K)
    clipped = empty(7, np.float64)
    for k in range(K):
        target = targets[k]
        usable = _clip(boxes[k], shape, clipped)
        n = shape[1]
        for i in range(1, 7):
            target[i] = int(np.ceil(clipped[i] - 0.5)) if usable else 0
        for axis in range(3):
            n *= max(target[4 + axis] - target[1 + axis], 0)
        usable &= _clip(donor_boxes[k], donor_shape, sources[k]) and n > 0
        target[0], target[7] = int(clipped[0]) if usable else -1, voxels
        voxels += n if usable else 0
    return voxels


@subroutine
def _row_of(target, c, z, y):
    """The start of a row in the patch of a target."""
    d, h, w = target[4] - target[1], target[5] - target[2], target[6] - target[3]
    return target[7] + ((c * d + z - target[1]) * h + y - target[2]) * w


@subroutine
def _layers(patches, target, c, first, last):
    """Planes ``first`` to ``last`` of the patch of a target, [last - first, h, w]."""
    shape = last - first, target[5] - target[2], target[6] - target[3]
    return part(patches, _row_of(target, c, first, target[2]), shape)


@subroutine
def _load_box(volumes, start, strides, window, line, box):
    """box [d, h, w] = the voxels from element ``start`` on, windowed."""
    (address, kind), (windowed, low, scale, _) = volumes, window
    readable = kind == own_kind(line) and strides[4] == 1
    for i in range(box.shape[0]):
        for j in range(box.shape[1]):
            row = start + i * strides[2] + j * strides[3]
            if readable:
                voxels = elements(address + line.itemsize * row, line.size, line.dtype)
            else:
                voxels = line
                load_row(address, kind, row, strides[4], line)
            for n in range(box.shape[2]):
                box[i, j, n] = voxels[n]
    if windowed:
        window_block(part(box, 0, box.size), low, scale)


@subroutine
def _store_box(box, out, start, strides, line):
    """The voxels from element ``start`` on = box [d, h, w], rounded."""
    address, kind = out
    writable = kind == own_kind(line) and strides[4] == 1
    for i in range(box.shape[0]):
        for j in range(box.shape[1]):
            row = start + i * strides[2] + j * strides[3]
            voxels = line
            if writable:
                voxels = elements(address + line.itemsize * row, line.size, line.dtype)
            for n in range(box.shape[2]):
                voxels[n] = box[i, j, n]
            if strides[4] == 1 and not writable:
                store_block(line, address, kind, row)
            elif not writable:
                for n in range(line.size):
                    store_block(part(line, n, 1), address, kind, row + n * strides[4])


@subroutine
def _load_earlier(targets, k, first, c, patches, box):
    """Overwrite a box, the target from plane ``first`` on, with the voxels of earlier patches."""
    d, h, w = box.shape
    y, x = targets[k, 2], targets[k, 3]
    for j in range(k):
        b, z1, y1, x1, z2, y2, x2, _ = targets[j]
        left, right = max(x1, x), min(x2, x + w)
        if b == targets[k, 0] and left < right:
            for i in range(max(z1, first), min(z2, first + d)):
                for row in range(max(y1, y), min(y2, y + h)):
                    at = _row_of(targets[j], c, i, row) - x1
                    for n in range(left, right):
                        box[i - first, row - y, n - x] = patches[at + n]


@subroutine
def _mix_block(weight, target, donor):
    """donor = weight * target + (1 - weight) * donor; a factor of 0 hides NaN and infinities."""
    rest = donor.dtype.type(1) - weight
    if weight == 1:
        for i in range(donor.size):
            donor[i] = target[i]
    elif weight != 0:
        for i in range(donor.size):
            donor[i] = weight * target[i] + rest * donor[i]


@subroutine
def _start(target, c, z, strides):
    """The element at the first voxel of plane z of a target."""
    plane = target[0] * strides[0] + c * strides[1] + z * strides[2]
    return plane + target[2] * strides[3] + target[3] * strides[4]


@njit
def _mix(
    first, last, volumes, donors, lam, shape, strides, window, donor_shape, donor_strides,
    donor_window, targets, sources, patches,
):  # fmt: skip
    """Mix planes ``first`` to ``last`` of all volumes into the patches.

    ``volumes``, ``donors`` and ``lam`` are addresses with dtype codes.
    """
    zero = patches.dtype.type(0)
    weights = empty(len(targets), zero)
    load_block(lam[0], lam[1], 0, weights)
    C, D = shape[1], shape[2]
    line = empty(shape[4], zero)
    for k in range(len(targets)):
        b, z1, y1, x1, z2, y2, x2, _ = targets[k]
        begin, end = max(first - b * D, z1), min(last - b * D, z2)
        if b < 0 or begin >= end:
            continue
        z, y, x = new_axis(z2 - z1, zero), new_axis(y2 - y1, zero), new_axis(x2 - x1, zero)
        sample_positions(sources[k, 1], sources[k, 4], donor_shape[2], True, z)
        sample_positions(sources[k, 2], sources[k, 5], donor_shape[3], True, y)
        sample_positions(sources[k, 3], sources[k, 6], donor_shape[4], True, x)
        target = empty((end - begin, y2 - y1, x2 - x1), zero)
        for c in range(C):
            layers = _layers(patches, targets[k], c, begin, end)
            flat = part(layers, 0, layers.size)
            start = int(sources[k, 0]) * donor_strides[0] + c * donor_strides[1]
            sample(donors, start, donor_strides, donor_window, z, y, x, begin - z1, end - z1, flat)
            start = _start(targets[k], c, begin, strides)
            _load_box(volumes, start, strides, window, part(line, 0, x2 - x1), target)
            _load_earlier(targets, k, begin, c, patches, target)
            _mix_block(weights[k], part(target, 0, target.size), flat)


@njit
def _write(first, last, out, shape, strides, targets, patches):
    """Write the patches into planes ``first`` to ``last`` of all volumes."""
    C, D = shape[1], shape[2]
    line = empty(shape[4], patches.dtype.type(0))
    for k in range(len(targets)):
        target = targets[k]
        b, z1, z2, x1, x2 = target[0], target[1], target[4], target[3], target[6]
        begin, end = max(first - b * D, z1), min(last - b * D, z2)
        if b < 0 or begin >= end:
            continue
        for c in range(C):
            layers = _layers(patches, target, c, begin, end)
            start = _start(target, c, begin, strides)
            _store_box(layers, out, start, strides, part(line, 0, x2 - x1))


@njit
def _copy(first, last, volumes, out, window, size, block, zero):
    """out = volumes, windowed and rounded: blocks ``first`` to ``last`` in memory order."""
    values = empty(block, zero)
    for number in range(first, last):
        start = number * block
        voxels = part(values, 0, min(block, size - start))
        load_block(volumes[0], volumes[1], start, voxels)
        if window[0]:
            window_block(voxels, window[1], window[2])
        store_block(voxels, out[0], out[1], start)


def object_mixup3d(
    volumes: Tensor,
    donors: Tensor | None,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    out: Tensor,
    in_place: bool = False,
    overlap: bool = False,
) -> None:
    """As fmkernels.kernels.object_mixup3d.object_mixup3d; overlap with the donors costs nothing."""
    if not out.numel():
        return
    donors = volumes if donors is None else donors
    K, shape, zero = boxes.shape[0], tuple(volumes.shape), zero_of(volumes)
    targets, sources = np.empty((K, 8), np.int64), np.empty((K, 7))
    donor_shape = tuple(donors.shape)
    wrong = [weight for weight in lam.tolist() if weight < 0 or weight > 1]  # NaN gives NaN
    if wrong:
        raise ValueError(f"object_mixup3d: lam must be in [0, 1], got {wrong[0]}")
    voxels = _plan(*located(boxes, donor_boxes), shape, donor_shape, targets, sources)
    patches = np.empty(voxels, zero.dtype)
    planes = shape[0] * shape[2]
    grain_size = GRAIN_SIZE * planes // max(voxels, 1)
    parallel_for(
        _mix, planes, grain_size, (volumes, donors, lam), shape, volumes.stride(),
        window_of(window), donor_shape, donors.stride(), window_of(donor_window), targets, sources,
        patches,
    )  # fmt: skip
    if window is not None or not (out.is_floating_point() or volumes.dtype == out.dtype):
        blocks = -(-out.numel() // BLOCK)
        parallel_for(
            _copy, blocks, GRAIN_SIZE // BLOCK, (volumes, out), window_of(window), out.numel(),
            BLOCK, zero,
        )  # fmt: skip
    elif not in_place:
        out.copy_(volumes)  # which rounds to floats as we do, but not to integers
    parallel_for(_write, planes, grain_size, (out,), shape, out.stride(), targets, patches)
