"""Batched 3D mixup on the CPU: box of voxels after box, each mixed for all samples before the next.

The sources of a box are loaded once, flipped and windowed, into blocks that stay in a core's cache, and mixed from
there; nothing is stored before they all are, so that they may be overwritten. Where volumes are flipped in place, a box
goes together with its mirror images, which are boxes too: an axis is cut as seen from either of its ends.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmkernels.cpu.compiled import compiled, shared
from fmkernels.cpu.voxels import (
    INT16,
    ZEROS,
    elements,
    load_block,
    located,
    own_kind,
    store_block,
    window_of,
    window_voxel,
)
from fmkernels.dtypes import compute_dtype

BOX = 1024  # voxels of a box, at most
SCRATCH = (
    1 << 16
)  # voxels kept of a box, of all samples and mirror images, unless boxes would become too small
SMALLEST_BOX = 64
LEAST = 1 << 16  # voxels of all samples for which another thread is worth its while

_AS_THEY_LIE = {
    torch.float32,
    torch.float64,
    torch.int16,
}  # mixed from where they are, if nothing overwrites them
_NEVER = (0, 0, 0, 0)  # axes of volumes that are not flipped


@compiled
def _flip(masks, row):
    """The mask of a volume; no masks have no address."""
    return np.int64(elements(masks + row, 1, np.uint8)[0]) if masks else 0


@compiled
def _box(number, extents, longest):
    """Where box ``number`` begins along each axis, and its lengths along the last two.

    The first ``extents`` voxels of each axis are cut into boxes of 1 x 1 x ``longest``.
    """
    rest, i3 = divmod(number, -(-extents[3] // longest[1]))
    rest, i2 = divmod(rest, -(-extents[2] // longest[0]))
    i0, i1 = divmod(rest, extents[1])
    i2, i3 = i2 * longest[0], i3 * longest[1]
    return (i0, i1, i2, i3), (min(longest[0], extents[2] - i2), min(longest[1], extents[3] - i3))


@compiled
def _image(corner, lengths, sizes, axes, mask):
    """Where the mirror image of a box begins along each axis."""
    i0, i1, i2, i3 = corner
    if mask & axes[0]:
        i0 = sizes[0] - 1 - i0
    if mask & axes[1]:
        i1 = sizes[1] - 1 - i1
    if mask & axes[2]:
        i2 = sizes[2] - lengths[0] - i2
    if mask & axes[3]:
        i3 = sizes[3] - lengths[1] - i3
    return i0, i1, i2, i3


@compiled
def _place(row, corner, sizes):
    """Number of a voxel among those of all volumes."""
    place = row
    for axis in range(4):
        place = place * sizes[axis] + corner[axis]
    return place


@compiled
def _load_box(volumes, row, corner, lengths, sizes, axes, flip, block):
    """A box of a volume, its rows and the voxels of each in reverse where ``flip`` says so."""
    address, kind, _ = volumes
    start = _place(row, corner, sizes)
    rows, n = lengths if flip & (axes[2] | axes[3]) else (1, block.size)
    step = -1 if flip & axes[3] else 1
    for j in range(rows):
        i = (rows - 1 - j if flip & axes[2] else j) * n
        load_block(
            address, kind, start + (i + n - 1 if step < 0 else i), step, block[j * n : (j + 1) * n]
        )


@compiled
def _own_images(corner, lengths, sizes, axes):
    """The flips (a mask) of which a box is its own image."""
    image, mask = _image(corner, lengths, sizes, axes, 7), 0
    for axis in range(4):
        if image[axis] == corner[axis]:
            mask |= axes[axis]
    return mask


@compiled
def _mix(own, donor, share, window, block):
    """block = share * own + (1 - share) * donor, both windowed."""
    dtype = block.dtype.type
    windowed, low, scale = window[0], dtype(window[1]), dtype(window[2])
    rest = dtype(1) - share
    if windowed:
        for i in range(block.size):
            a, b = (
                window_voxel(dtype(own[i]), low, scale),
                window_voxel(dtype(donor[i]), low, scale),
            )
            block[i] = share * a + rest * b
    else:
        for i in range(block.size):
            block[i] = share * dtype(own[i]) + rest * dtype(donor[i])


@compiled
def _mix_boxes(
    first, last, volumes, donors, out, lam, index, batch, pool, cut, images, kept, window, zero
):
    """Boxes number ``first`` to ``last`` of all samples. Tensors are addresses, with the kind of their elements."""
    sizes, axes, extents, longest = cut
    partners, shares = elements(index, batch, np.int64), np.full(batch, zero)
    load_block(lam[0], lam[1], 0, 1, shares)
    alone = donors[0] == 0
    if alone:
        donors, pool = volumes, batch
    needed = np.full(pool, alone)
    for b in range(batch):
        needed[partners[b]] = True
    slots = np.cumsum(needed) - 1
    voxels = longest[0] * longest[1]
    sources = np.full((slots[-1] + 1 if kept else 0, images, voxels), zero)
    owns, mixed = np.full((images, voxels), zero), np.full(voxels, zero)
    compute, size = mixed.dtype, mixed.itemsize
    for number in range(first, last):
        corner, lengths = _box(number, extents, longest)
        n, same = lengths[0] * lengths[1], _own_images(corner, lengths, sizes, axes)
        if kept:
            for row in range(pool):
                flip = _flip(donors[2], row)
                for image in range(images if needed[row] else 0):
                    if not image & same:
                        place = _image(corner, lengths, sizes, axes, image ^ flip)
                        _load_box(
                            donors,
                            row,
                            place,
                            lengths,
                            sizes,
                            axes,
                            flip,
                            sources[slots[row], image, :n],
                        )
        for b in range(batch):
            if kept and not alone:
                flip = _flip(volumes[2], b)
                for image in range(images):
                    if not image & same:
                        place = _image(corner, lengths, sizes, axes, image ^ flip)
                        _load_box(volumes, b, place, lengths, sizes, axes, flip, owns[image, :n])
            for image in range(images):
                if image & same:
                    continue
                start = _place(b, _image(corner, lengths, sizes, axes, image), sizes)
                at_once = out[1] == own_kind(mixed)
                block = elements(out[0] + size * start, n, compute) if at_once else mixed[:n]
                if kept:
                    own = sources[b, image, :n] if alone else owns[image, :n]
                    _mix(own, sources[slots[partners[b]], image, :n], shares[b], window, block)
                else:
                    other = _place(partners[b], corner, sizes)
                    if volumes[1] == INT16:
                        own = elements(volumes[0] + 2 * start, n, np.int16)
                        _mix(
                            own,
                            elements(donors[0] + 2 * other, n, np.int16),
                            shares[b],
                            window,
                            block,
                        )
                    else:
                        own = elements(volumes[0] + size * start, n, compute)
                        _mix(
                            own,
                            elements(donors[0] + size * other, n, compute),
                            shares[b],
                            window,
                            block,
                        )
                if not at_once:
                    store_block(block, out[0], out[1], start)


@compiled
def _gradient_boxes(
    first,
    last,
    upstream,
    windowed,
    gradient,
    lam,
    index,
    batch,
    rows,
    cut,
    window,
    own,
    donor,
    zero,
):
    """Boxes number ``first`` to ``last`` of all sources. Tensors are addresses, with the kind of their elements."""
    sizes, axes, extents, longest = cut
    partners = elements(index, batch, np.int64)
    shares = np.full(batch, zero)
    load_block(lam[0], lam[1], 0, 1, shares)
    one = zero + shares.dtype.type(1)
    voxels = longest[0] * longest[1]
    totals, blocks = np.full(voxels, zero), np.full(voxels, zero)
    low, high, scale = (
        shares.dtype.type(window[0]),
        shares.dtype.type(window[1]),
        shares.dtype.type(window[2]),
    )
    for number in range(first, last):
        corner, lengths = _box(number, extents, longest)
        n = lengths[0] * lengths[1]
        total, block = totals[:n], blocks[:n]
        for row in range(rows):
            flip = _flip(gradient[2], row)
            place = _image(corner, lengths, sizes, axes, flip)
            total[:] = zero
            for b in range(-1 if own else 0, batch if donor else 0):
                if b < 0 or partners[b] == row:
                    _load_box(
                        upstream, row if b < 0 else b, place, lengths, sizes, axes, flip, block
                    )
                    share = shares[row] if b < 0 else one - shares[b]
                    for i in range(n):
                        total[i] += share * block[i]
            start = _place(row, corner, sizes)
            if windowed[0]:
                load_block(windowed[0], windowed[1], start, 1, block)
                for i in range(n):
                    total[i] = total[i] * scale if low <= block[i] <= high else zero
            store_block(total, gradient[0], gradient[1], start)


def _cut(
    sizes: tuple[int, ...], axes: tuple[int, ...], samples: int, images: bool
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """How volumes are cut: sizes, axes, extents and longest boxes as the loops take them, and the number of boxes.

    With images, boxes fill the first half of each axis along which volumes are flipped, unless they are as long as it.
    """
    span = max(SMALLEST_BOX, min(BOX, SCRATCH // (samples * (8 if images else 1))))
    width = min(sizes[3], span)
    height = min(sizes[2], span // width)
    extents = sizes
    if images:
        extents = tuple(
            (n + 1) // 2 if bit and n > length else n
            for n, bit, length in zip(sizes, axes, (1, 1, height, width), strict=True)
        )
    n0, n1, n2, n3 = extents
    return (sizes, axes, extents, (height, width)), n0 * n1 * -(-n2 // height) * -(-n3 // width)


def _check_index(index: Tensor, pool: int) -> None:
    partners = index.tolist()
    if partners and (min(partners) < 0 or max(partners) >= pool):
        raise ValueError(f"mixup3d: index must lie in [0, {pool}), got {partners}")


def _volumes(x: Tensor | None, flips: Tensor | None = None) -> tuple[int, int, int]:
    """As the loops take them: address, kind of the elements, address of the masks; 0 where there are none."""
    if x is None:
        return 0, 0, 0
    return *located(x), 0 if flips is None else flips.data_ptr()


def launch_mixup(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """As fmkernels.kernels.mixup3d.launch_mixup."""
    out = torch.empty_like(volumes, dtype=dtype)
    launch_mixup_into(volumes, donors, lam, index, flips, donor_flips, axes, window, out)
    return out


def launch_mixup_into(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    out: Tensor,
) -> None:
    """As fmkernels.kernels.mixup3d.launch_mixup_into."""
    batch = volumes.shape[0]
    pool = batch if donors is None else donors.shape[0]
    _check_index(index, pool)
    voxels = out.numel()
    if not voxels:
        return
    flipped = flips is not None or donor_flips is not None
    over = out.data_ptr() in (volumes.data_ptr(), None if donors is None else donors.data_ptr())
    images = flipped and over
    kept = flipped or over or volumes.dtype not in _AS_THEY_LIE
    sizes = tuple(volumes.shape[1:]) if flipped else (1, 1, 1, voxels // batch)
    own_axes = tuple(axes) if flipped else _NEVER
    cut, boxes = _cut(sizes, own_axes, batch, images)
    shared(
        _mix_boxes, boxes, LEAST * boxes // voxels, _volumes(volumes, flips), _volumes(donors, donor_flips),
        _volumes(out), located(lam), index.data_ptr(), batch, pool, cut, 8 if images else 1, kept,
        window_of(window), ZEROS[compute_dtype(volumes.dtype)],
    )  # fmt: skip


def launch_gradient(
    upstream: Tensor,
    windowed: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    sources: int,
    dtype: torch.dtype,
    own: bool,
    donor: bool,
) -> Tensor:
    """As fmkernels.kernels.mixup3d.launch_gradient."""
    gradient = upstream.new_empty((sources, *upstream.shape[1:]), dtype=dtype)
    voxels = gradient.numel()
    if not voxels:
        return gradient
    flipped = flips is not None
    sizes = tuple(upstream.shape[1:]) if flipped else (1, 1, 1, voxels // sources)
    own_axes = tuple(axes) if flipped else _NEVER
    cut, boxes = _cut(sizes, own_axes, sources, False)
    low, high = window or (0.0, 1.0)
    zero = ZEROS[compute_dtype(dtype)]
    shared(
        _gradient_boxes, boxes, LEAST * boxes // voxels, _volumes(upstream), _volumes(windowed),
        _volumes(gradient, flips), located(lam), index.data_ptr(), upstream.shape[0], sources, cut,
        (low, high, 1 / (high - low)), own, donor, zero,
    )  # fmt: skip
    return gradient
