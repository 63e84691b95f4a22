"""Batched 3D mixup on the CPU: box of voxels after box, each mixed for all samples before the next.

What has to be copied, flipped or windowed is so a box at a time, which bounds the memory taken. In place, all that a
box reads is copied before anything is written to it. Where volumes are flipped, it goes together with its mirror
images, which are boxes too, because every axis is cut symmetrically.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmkernels.cpu.voxels import store, window_voxels
from fmkernels.dtypes import compute_dtype

BLOCK = 1 << 20  # voxels of all samples that each thread takes at a time: few calls, little memory
SMALLEST_BOX = 1 << 14  # voxels of one sample: with fewer, the calls cost more than the work

Box = tuple[tuple[int, int], ...]  # start and end along each axis of a volume


def _cuts(size: int, step: int) -> list[tuple[int, int]]:
    """range(size) in parts of at most ``step``; the mirror image of a part is a part."""
    if step >= size:
        return [(0, size)]
    half = [(i, min(i + step, size // 2)) for i in range(0, size // 2, step)]
    middle = [(size // 2, size // 2 + 1)] if size % 2 else []
    return half + middle + [(size - end, size - start) for start, end in reversed(half)]


def _mirrored(box: Box, flip: int, sizes: Sequence[int], axes: Sequence[int]) -> Box:
    return tuple(
        (size - end, size - start) if flip & bit else (start, end)
        for (start, end), size, bit in zip(box, sizes, axes, strict=True)
    )


def _orbits(sizes: Sequence[int], axes: Sequence[int], voxels: int, images: bool) -> Iterator[list[Box]]:
    """Boxes of about so many voxels that fill a volume: one by one, or each with its mirror images."""
    cuts, inner = [], 1
    for size, bit in zip(reversed(sizes), reversed(axes), strict=True):
        parts = _cuts(size, max(1, voxels // inner))
        cuts.insert(0, parts[: (len(parts) + 1) // 2] if images and bit else parts)
        inner *= size
    for box in itertools.product(*cuts):
        flips = range(8) if images else [0]
        yield list(dict.fromkeys(_mirrored(box, flip, sizes, axes) for flip in flips))


def _view(volume: Tensor, box: Box) -> Tensor:
    return volume[tuple(slice(start, end) for start, end in box)]


def _flipped(voxels: Tensor, flip: int, axes: Sequence[int]) -> Tensor:
    mirrored = [axis for axis, bit in enumerate(axes) if flip & bit]
    return voxels.flip(mirrored) if mirrored else voxels


@dataclass(frozen=True)
class _Sources:
    """Volumes as they are mixed: flipped by their masks, windowed, of type ``dtype``."""

    volumes: Tensor
    flips: Tensor | None
    axes: Sequence[int]
    window: Sequence[float] | None
    dtype: torch.dtype
    copy: bool  # they are overwritten while they are needed

    def part(self, row: int, box: Box) -> Tensor:
        """What lies in ``box`` of volume ``row``: a view of it where nothing is to be done."""
        volume = self.volumes[row]
        flip = 0 if self.flips is None else int(self.flips[row])
        view = _view(volume, _mirrored(box, flip, volume.shape, self.axes))
        part = _flipped(view, flip, self.axes)
        must_copy = part is view and (self.copy or self.window is not None)
        part = part.to(self.dtype, copy=must_copy)
        return part if self.window is None else window_voxels(part, self.window)


def _mix(own: Tensor, donor: Tensor, share: float, target: Tensor) -> None:
    if target.is_floating_point():
        torch.lerp(donor, own, share, out=target)
    else:
        store(torch.lerp(donor, own, share), target)


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
    shared = donors is None
    if shared:
        donors, donor_flips = volumes, flips
    shares, partners = lam.tolist(), index.tolist()
    if not all(0 <= row < len(donors) for row in partners):
        raise ValueError(f"mixup3d: index must lie in [0, {len(donors)}), got {partners}")
    if not out.numel():
        return
    flipped = flips is not None or donor_flips is not None
    if not flipped:
        volumes, donors, out, axes = (*(x.view(len(x), -1) for x in (volumes, donors, out)), [0])
    over_donors, over_volumes = (x.data_ptr() == out.data_ptr() for x in (donors, volumes))
    images = flipped and (over_donors or over_volumes)
    as_stored = window is None and out.dtype == volumes.dtype and out.is_floating_point()
    dtype = out.dtype if as_stored else compute_dtype(volumes.dtype)  # torch.lerp computes 16 bits in float32
    donor = _Sources(donors, donor_flips, axes, window, dtype, copy=over_donors)
    own = donor if shared else _Sources(volumes, flips, axes, window, dtype, copy=False)
    voxels = max(SMALLEST_BOX, BLOCK // len(out)) * torch.get_num_threads()
    for boxes in _orbits(out.shape[1:], axes, voxels, images):
        donor_parts = {(row, box): donor.part(row, box) for row in set(partners) for box in boxes}
        own_parts = {
            (row, box): donor_parts[row, box] if shared and (row, box) in donor_parts else own.part(row, box)
            for row in range(len(out))
            for box in boxes
        }
        for (row, box), part in own_parts.items():
            _mix(part, donor_parts[partners[row], box], shares[row], _view(out[row], box))


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
    if not gradient.numel():
        return gradient
    shares, partners = lam.tolist(), index.tolist()
    terms = [[(row, shares[row])] if own else [] for row in range(sources)]  # which result took how much of each source
    if donor:
        for sample, row in enumerate(partners):
            terms[row].append((sample, 1 - shares[sample]))
    sizes, masks = gradient.shape[1:], [0] * sources if flips is None else flips.tolist()
    voxels = max(SMALLEST_BOX, BLOCK // sources) * torch.get_num_threads()
    for (box,) in _orbits(sizes, axes, voxels, False):
        for row, mask in enumerate(masks):
            image = _mirrored(box, mask, sizes, axes)
            target = _view(gradient[row], box)
            total = torch.zeros_like(target, dtype=compute_dtype(gradient.dtype))
            for sample, share in terms[row]:
                total.add_(_view(upstream[sample], image).to(total.dtype), alpha=share)
            total = _flipped(total, mask, axes)
            if windowed is not None:
                (low, high), value = window, _view(windowed[row], box).to(total.dtype)
                total = torch.where((value >= low) & (value <= high), total.mul_(1 / (high - low)), 0)
            target.copy_(total)
    return gradient
