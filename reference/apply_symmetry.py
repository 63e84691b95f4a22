"""Permute, then flip, one voxel at a time."""

import itertools

import torch
from torch import Tensor

PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def apply_symmetry(volumes, code) -> Tensor:
    """The voxel at new position i has old position o with o[p[axis]] = i[axis] or its mirror."""
    axes = PERMUTATIONS[code // 8]
    shape = volumes.shape[-3:]
    result = torch.empty(*volumes.shape[:-3], *(shape[axis] for axis in axes), dtype=volumes.dtype)
    for new in itertools.product(*map(range, result.shape[-3:])):
        old = [0, 0, 0]
        for i, axis in enumerate(axes):
            old[axis] = shape[axis] - 1 - new[i] if code >> i & 1 else new[i]
        result[(..., *new)] = volumes[(..., *old)]
    return result
