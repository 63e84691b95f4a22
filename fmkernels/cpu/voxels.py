"""What the volume ops do to voxels, in blocks that stay in a core's cache."""

from collections.abc import Sequence

import torch
from torch import Tensor


def window_voxels(voxels: Tensor, window: Sequence[float]) -> Tensor:
    """clamp((voxels - low) / (high - low), 0, 1), in place."""
    low, high = window
    return voxels.sub_(low).mul_(1 / (high - low)).clamp_(0, 1)


def store(values: Tensor, target: Tensor) -> None:
    """target = values, to nearest, ties to even; integers saturate, NaN becomes 0. Changes ``values``."""
    if not target.is_floating_point():
        limits = torch.iinfo(target.dtype)
        values = values.nan_to_num_(nan=0.0).round_().clamp_(limits.min, limits.max)
    target.copy_(values)
