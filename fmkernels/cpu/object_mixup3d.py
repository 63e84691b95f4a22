"""Objects mixed with other objects on the CPU, target box by target box, each as a patch of its own.

A donor is resized one axis after the other, by products with matrices of weights, which are made for all pairs at once.
Where a target overlaps earlier ones, it takes what it mixes from their patches, so that nothing is rounded in between;
the patches are written when all are made, so that nothing that is read has changed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.cpu.crop_and_resize3d import launch_crop_and_resize3d, products_are_exact
from fmkernels.cpu.voxels import store, window_voxels
from fmkernels.dtypes import compute_dtype

BLOCK = 1 << 18  # voxels that pass through the caches together
DENSE = 64  # voxels of an object along an axis: with more, most of a matrix would be zeros
GROUP = 1 << 8  # pairs whose matrices are made together

Region = tuple[int | slice, ...]  # of volumes [B, C, D, H, W]


class _Pair(NamedTuple):
    number: int
    target: Region
    source: Tensor  # [1, 7], the clipped donor box
    taken: Region  # voxels of the donors that have a share
    weights: tuple[Tensor, Tensor, Tensor] | None  # [n, m] for each axis; None for a large object


def _clipped(boxes: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boxes clipped to volumes of ``shape``, and which of them hold anything."""
    batch, bounds = boxes[:, :1], boxes[:, 1:]
    clipped = bounds.clamp(min=0).minimum(bounds.new_tensor([*shape[2:], *shape[2:]]))
    full = (clipped[:, 3:] > clipped[:, :3]).all(1) & bounds.isfinite().all(1)
    return torch.cat((batch, clipped), 1), full & (batch[:, 0] >= 0) & (batch[:, 0] < shape[0])


def _pairs(boxes: Tensor, donor_boxes: Tensor, shape: Sequence[int], donor_shape: Sequence[int], dtype: torch.dtype):
    """The pairs that are mixed, in order."""
    targets, usable = _clipped(boxes, shape)
    sources, full = _clipped(donor_boxes, donor_shape)
    begin, end = (targets[:, 1:].double() - 0.5).ceil().split(3, dim=1)
    numbers = (usable & full & (end > begin).all(1)).nonzero().flatten()
    for group in numbers.split(GROUP) if len(numbers) else ():
        yield from _group(group, targets[group, 0], begin[group], end[group], sources[group], dtype)


def _group(numbers: Tensor, rows: Tensor, begin: Tensor, end: Tensor, sources: Tensor, dtype: torch.dtype):
    n, start, stop = end - begin, sources[:, 1:4].double(), sources[:, 4:].double()  # [K, 3] all
    first, last = (start - 0.5).ceil(), (stop - 0.5).ceil() - 1
    middle = ((start + stop) / 2).floor()
    first, last = torch.where(first > last, middle, first), torch.where(first > last, middle, last)
    step = (stop - start) / n
    low = (start + 0.5 * step - 0.5).clamp(first, last).floor()  # of the voxels with a share
    high = (start + (n - 0.5) * step - 0.5).clamp(first, last).ceil()
    large = (torch.maximum(n, high - low + 1) > DENSE).any(1) | (not products_are_exact())
    large = large.tolist()
    most = min(DENSE, int(torch.maximum(n, high - low + 1).max()))
    places = torch.arange(most, dtype=torch.float64)
    positions = (start - 0.5)[:, :, None] + (places + 0.5) * step[:, :, None]
    positions = positions.clamp(first[:, :, None], last[:, :, None]) - low[:, :, None]
    weights = (positions[:, :, :, None] - places).abs_().neg_().add_(1).clamp_(min=0).to(dtype)  # [K, 3, most, most]
    extents = torch.stack((begin, end, low, high + 1)).long().permute(1, 0, 2).tolist()
    batches = zip(numbers.tolist(), rows.int().tolist(), sources[:, 0].int().tolist(), strict=True)
    for k, (number, row, donor_row) in enumerate(batches):
        begins, ends, lows, highs = extents[k]
        target = (row, slice(None), *map(slice, begins, ends))
        taken = (donor_row, slice(None), *map(slice, lows, highs))
        matrices = None
        if not large[k]:
            z, y, x = (weights[k, axis, : ends[axis] - begins[axis], : highs[axis] - lows[axis]] for axis in range(3))
            matrices = z, y, x
        yield _Pair(number, target, sources[k : k + 1], taken, matrices)


def _donor(pair: _Pair, donors: Tensor, window: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """[C, d, h, w]: the donor, resized to its target."""
    if pair.weights is not None:
        part = donors[pair.taken].to(dtype, copy=window is not None).contiguous()
        part = part if window is None else window_voxels(part, window)
        z, y, x = pair.weights
        part = torch.matmul(y, torch.matmul(part, x.T))  # [C, m, h, w]
        part = torch.matmul(z, part.flatten(2)).unflatten(2, part.shape[2:])
        if not donors.is_floating_point() or math.isfinite(part.sum()):
            return part
    size = [axis.stop - axis.start for axis in pair.target[2:]]
    return launch_crop_and_resize3d(donors, pair.source, size, True, window, dtype)[0]


def _overlaps(region: Region, earlier: Sequence[tuple[Region, Tensor]]) -> Iterator[tuple[Region, Tensor]]:
    """What earlier patches of the same volume hold of a region, and where in it, in order."""
    for other, patch in earlier:
        if all(a.start < b.stop and b.start < a.stop for a, b in zip(region[2:], other[2:], strict=True)):
            shared = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region[2:], other[2:], strict=True)]
            here, there = (
                (slice(None), *(slice(i - a.start, j - a.start) for (i, j), a in zip(shared, r[2:], strict=True)))
                for r in (region, other)
            )
            yield here, patch[there]


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
    donors = volumes if donors is None else donors
    compute, shares = compute_dtype(volumes.dtype), lam.tolist()
    patches: dict[int, list[tuple[Region, Tensor]]] = {}  # of each volume
    for pair in _pairs(boxes, donor_boxes, volumes.shape, donors.shape, compute):
        earlier, share = patches.setdefault(pair.target[0], []), shares[pair.number]
        overlaps = list(_overlaps(pair.target, earlier))
        own = volumes[pair.target].to(compute, copy=bool(overlaps) or window is not None)
        own = own if window is None else window_voxels(own, window)
        for here, patch in overlaps:
            own[here] = patch
        patch = _donor(pair, donors, donor_window, compute).mul_(1 - share).add_(own, alpha=share)
        earlier.append((pair.target, patch))
    _copy(volumes, window, out)
    for of_volume in patches.values():
        for region, patch in of_volume:
            store(patch, out[region])


def _copy(volumes: Tensor, window: Sequence[float] | None, out: Tensor) -> None:
    """out = volumes, windowed and rounded, block by block."""
    same = volumes.data_ptr() == out.data_ptr() and volumes.stride() == out.stride()
    if not same and volumes.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        volumes = volumes.clone()
    if window is None and volumes.dtype == out.dtype:
        if not same:
            out.copy_(volumes)
        return
    if volumes.is_contiguous() and out.is_contiguous():
        pieces = zip(volumes.view(-1).split(BLOCK), out.view(-1).split(BLOCK), strict=True)
    else:
        pieces = zip(volumes, out, strict=True)
    compute = compute_dtype(volumes.dtype)
    for piece, target in pieces:
        values = piece.to(compute, copy=True)
        store(values if window is None else window_voxels(values, window), target)
