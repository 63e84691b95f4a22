"""Anchor boxes of the 3D detector, box coding relative to them, and intersection over union.

Boxes are (z1, y1, x1, z2, y2, x2), voxel units, half-open, voxel i covering [i, i + 1). Anchors are
centered at (i + 1/2) * stride on each axis, so that flipping a patch whose size is a multiple of
the stride maps anchors onto anchors. Flat lists of anchors run over levels, anchors of a cell,
z, y, x, which is the order of ``torch.cat([logits.flatten(1) for logits in levels], 1)``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmkernels.focalmix.config import Config

MAX_LOG_SCALE = math.log(16.0)  # a decoded box is at most 16 times as long as its anchor


@dataclass(frozen=True)
class Anchors:
    """Anchors of a feature pyramid.

    Args:
        strides: voxels between cells, one per level, fine to coarse.
        sizes: for each level, the (z, y, x) lengths in voxels of the anchors of a cell; the same
            number on every level.
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        lengths = [len(level) for level in self.sizes]
        if not self.strides or len(self.strides) != len(lengths) or len(set(lengths)) != 1:
            raise ValueError(
                "Anchors: expected one list of sizes per stride, all of one length, "
                f"got {len(self.strides)} strides and lists of length {lengths}"
            )

    @classmethod
    def from_mm(
        cls, strides: Sequence[int], diameters: Sequence[float], spacing: Sequence[float]
    ) -> "Anchors":
        """Cubes whose diameters are given in mm, level by level; spacing is z, y, x."""
        if not strides or not diameters or len(diameters) % len(strides):
            raise ValueError(
                "Anchors: expected the same number of diameters for every stride, "
                f"got {diameters} for {strides}"
            )
        per_level = len(diameters) // len(strides)
        cubes = [tuple(diameter / step for step in spacing) for diameter in diameters]
        levels = tuple(tuple(cubes[i : i + per_level]) for i in range(0, len(cubes), per_level))
        return cls(tuple(strides), levels)

    @classmethod
    def from_config(cls, config: Config) -> "Anchors":
        """The anchors of a configuration."""
        return cls.from_mm(config.strides, config.diameters, config.spacing)

    @property
    def per_cell(self) -> int:
        """Number of anchors in each cell of a level."""
        return len(self.sizes[0])

    def grids(self, patch_size: Sequence[int]) -> list[tuple[int, ...]]:
        """(D, H, W) of each level for a patch, whose sides must be multiples of every stride."""
        if any(side % stride for side in patch_size for stride in self.strides):
            raise ValueError(
                f"Anchors: patch_size: expected multiples of the strides {self.strides}, "
                f"got {tuple(patch_size)}"
            )
        return [tuple(side // stride for side in patch_size) for stride in self.strides]

    def boxes(self, patch_size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """All anchors of a patch, float32 ``[n, 6]``, in flat order; kept for the next call."""
        return _boxes(self, tuple(patch_size), device)


@functools.lru_cache(maxsize=8)
def _boxes(anchors: Anchors, patch_size: tuple[int, ...], device: torch.device | str) -> Tensor:
    levels = []
    grids = anchors.grids(patch_size)
    with torch.inference_mode(False):
        for stride, sizes, grid in zip(anchors.strides, anchors.sizes, grids, strict=True):
            axes = [
                (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * stride for n in grid
            ]
            centers = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).reshape(1, -1, 3)
            halves = constant(sizes, torch.float32, device).reshape(-1, 1, 3) / 2
            levels.append(torch.cat([centers - halves, centers + halves], -1).reshape(-1, 6))
        return torch.cat(levels)


@functools.lru_cache(maxsize=256)
def constant(values: tuple, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor that is copied to the device once: every such copy synchronizes with the host."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[..., 6]`` and ``[..., 6]``, broadcast.

    The result is float32 (float64 if a box is), since volumes overflow half precision. It is 0
    where both boxes are empty; a box whose ends are swapped is empty. NaN coordinates give NaN.
    """
    a, b = _at_least_float32(a), _at_least_float32(b)
    low, high = torch.maximum(a[..., :3], b[..., :3]), torch.minimum(a[..., 3:], b[..., 3:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = _volume(a) + _volume(b) - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def _volume(boxes: Tensor) -> Tensor:
    return (boxes[..., 3:] - boxes[..., :3]).clamp(min=0).prod(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas ``[..., 6]``: center offset / anchor length, then log(box length / anchor length)."""
    length = anchors[..., 3:] - anchors[..., :3]
    shift = (boxes[..., :3] + boxes[..., 3:] - anchors[..., :3] - anchors[..., 3:]) / 2 / length
    return torch.cat([shift, ((boxes[..., 3:] - boxes[..., :3]) / length).log()], -1)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of :func:`encode_boxes`; log lengths are limited to ``log(16)``."""
    length = anchors[..., 3:] - anchors[..., :3]
    center = (anchors[..., :3] + anchors[..., 3:]) / 2 + deltas[..., :3] * length
    half = deltas[..., 3:].clamp(max=MAX_LOG_SCALE).exp() * length / 2
    return torch.cat([center - half, center + half], -1)


def flat_deltas(levels: Sequence[Tensor]) -> Tensor:
    """Box deltas ``[B, n, 6]`` in flat order, from ``[B, A, 6, D, H, W]`` per level."""
    return torch.cat([level.movedim(2, -1).reshape(len(level), -1, 6) for level in levels], 1)
