"""Objects mixed with other objects, one pair of boxes after the other, in float64."""

import math

import torch
from torch import Tensor

from reference.crop_and_resize3d import crop_and_resize3d


def object_mixup3d(
    volumes, boxes, donor_boxes, lam, *, donors=None, window=None, dtype=None
) -> Tensor:
    """Voxels with centres in a target box become lam own + (1 - lam) donor, the donor cropped and resized to them.

    Both boxes are clipped to their volumes; a pair with a box that is empty, not finite or in no volume is left out.
    The window is not applied to volumes of another type than the donors'.
    """
    donors = volumes if donors is None else donors
    out = volumes.double().clone()
    own_window = window if donors.dtype == volumes.dtype else None
    if own_window:
        low, high = own_window
        out = ((out - low) / (high - low)).clamp(0, 1)
    for target, source, share in zip(boxes, donor_boxes, lam.double(), strict=True):
        target, source = _clip(target, volumes), _clip(source, donors)
        if target is None or source is None:
            continue
        batch, *bounds = target.tolist()
        axes = zip(bounds[:3], bounds[3:], volumes.shape[2:], strict=True)
        inside = [[i for i in range(size) if start <= i + 0.5 < end] for start, end, size in axes]
        if not all(inside):
            continue
        size = [len(voxels) for voxels in inside]
        donor = crop_and_resize3d(donors, source[None], size, window=window, dtype=torch.float64)[0]
        region = (int(batch), slice(None), *(slice(voxels[0], voxels[-1] + 1) for voxels in inside))
        out[region] = share * out[region] + (1 - share) * donor
    if dtype is None:
        dtype = torch.float32 if own_window and not volumes.is_floating_point() else volumes.dtype
    if not dtype.is_floating_point:
        out = out.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return out


def _clip(box: Tensor, volumes: Tensor) -> Tensor | None:
    """The part of a box that lies in its volume, None where there is none."""
    batch, *bounds = box.tolist()
    if not (0 <= batch < len(volumes) and all(map(math.isfinite, bounds))):
        return None
    sizes = [*volumes.shape[2:], *volumes.shape[2:]]
    bounds = [min(max(bound, 0.0), size) for bound, size in zip(bounds, sizes, strict=True)]
    if any(end <= start for start, end in zip(bounds[:3], bounds[3:], strict=True)):
        return None
    return torch.tensor([batch, *bounds], device=box.device)
