"""Mixup of volumes, one sample after the other, in float64."""

import torch
from torch import Tensor

from reference.crop_and_resize3d import apply_window


def mixup3d(volumes, lam, index, *, donors=None, flips=None, window=None, dtype=None) -> Tensor:
    """out[b] = lam[b] f(volumes[b]) + (1 - lam[b]) f(donors[index[b]]), rounded for integer dtypes.

    f flips a volume by its own mask (1 = D, 2 = H, 4 = W) and applies the window. A voxel of weight
    0 does not show, even if it is not finite.
    """
    if donors is None:
        donors, donor_flips = volumes, flips
    else:
        flips, donor_flips = flips or (None, None)
    out = torch.zeros(volumes.shape, dtype=torch.float64, device=volumes.device)
    for b in range(len(volumes)):
        own = _source(volumes, flips, b, window)
        donor = _source(donors, donor_flips, int(index[b]), window)
        out[b] = _weighted(lam[b].double(), own) + _weighted(1 - lam[b].double(), donor)
    if dtype is None:
        dtype = torch.float32 if window and not volumes.is_floating_point() else volumes.dtype
    if not dtype.is_floating_point:
        out = out.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return out


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(weight != 0, weight * x, 0.0)


def _source(volumes: Tensor, flips: Tensor | None, row: int, window) -> Tensor:
    volume = volumes[row].double()
    mask = 0 if flips is None else int(flips[row])
    volume = volume.flip([axis for axis, bit in ((1, 1), (2, 2), (3, 4)) if mask & bit])
    return volume if window is None else apply_window(volume, window)
