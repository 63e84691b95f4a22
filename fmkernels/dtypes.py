"""The type in which an op computes: float64 for float64 data, float32 for everything else."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
