"""Flip, then permute back, one voxel at a time."""

import itertools

import torch
from torch import Tensor

from reference.apply_symmetry import PERMUTATIONS


def undo_symmetry(volumes, code) -> Tensor:
    """The voxel at position i goes to position o with o[p[axis]] = i[axis] or its mirror."""
    axes = PERMUTATIONS[code // 8]
    shape = volumes.shape[-3:]
    result = torch.empty_like(volumes)
    for place in itertools.product(*map(range, shape)):
        old = [0, 0, 0]
        for i, axis in enumerate(axes):
            old[axis] = shape[i] - 1 - place[i] if code >> i & 1 else place[i]
        result[(..., *old)] = volumes[(..., *place)]
    return result
