"""The type in which an op computes: float64 for float64 data, float32 for everything else."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
