"""A scan on its voxel grid: voxels to world and back, resampling, patches.

Arrays are z, y, x and hold Hounsfield units (HU) as int16; world points are x, y, z in mm, LPS. Box
coordinates are in voxels: voxel i covers [i, i + 1).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.sparse

from fmkernels.focalmix.data.tables import diameters

_Number = TypeVar("_Number", float, np.ndarray)

AIR = -1024
"""HU of air: the minimum of a resampled scan, and the value of a patch outside its scan."""


def index_to_box(index: _Number) -> _Number:
    """Voxel indices, integer at voxel centers, as box coordinates."""
    return index + 0.5


def box_to_index(coordinates: _Number) -> _Number:
    """Box coordinates as voxel indices, integer at voxel centers: the inverse of `index_to_box`."""
    return coordinates - 0.5


@dataclass(frozen=True, eq=False)
class Volume:
    """The voxels of a scan and their grid, which is aligned with the axes of the scan.

    A flipped scan stays flipped: its `direction` says so.
    """

    voxels: np.ndarray
    """int16 [D, H, W], HU; a read-only ``np.memmap`` if it comes from the cache."""
    spacing: tuple[float, ...]
    """Millimeters between voxels along z, y, x."""
    origin: tuple[float, ...]
    """World x, y, z of the center of voxel (0, 0, 0)."""
    direction: tuple[tuple[float, ...], ...]
    """3 x 3, by rows; column j is the world direction of the grid axis x, y, z (orthonormal)."""

    def from_world(self, points: np.ndarray) -> np.ndarray:
        """World points [n, 3] (x, y, z) as box coordinates float64 [n, 3] (z, y, x)."""
        offset = np.asarray(points, dtype=np.float64).reshape(-1, 3) - self.origin
        return index_to_box((offset @ np.linalg.inv(self.direction).T)[:, ::-1] / self.spacing)

    def to_world(self, coordinates: np.ndarray) -> np.ndarray:
        """Box coordinates [n, 3] (z, y, x) as world points float64 [n, 3] (x, y, z)."""
        index = box_to_index(np.asarray(coordinates, dtype=np.float64).reshape(-1, 3))
        return (index * self.spacing)[:, ::-1] @ np.transpose(self.direction) + self.origin

    def boxes(self, findings: np.ndarray) -> np.ndarray:
        """The bounding boxes of findings, which are spheres.

        Args:
            findings: [n, 4]: world x, y, z, diameter, in mm; see `tables.diameters`.

        Returns:
            float32 [n, 6]: z1, y1, x1, z2, y2, x2 in box coordinates, not clipped to the grid.
        """
        findings = np.asarray(findings, dtype=np.float64).reshape(-1, 4)
        center = self.from_world(findings[:, :3])
        half = diameters(findings)[:, None] / 2 / self.spacing
        return np.concatenate([center - half, center + half], axis=1).astype(np.float32)


def reoriented(volume: Volume) -> Volume:
    """A view of a scan whose axes run as nearly as possible to S, P, L (z, y, x).

    Its slices look as radiologists show them, however the scan is stored.
    """
    direction = np.array(volume.direction)
    orders = [list(order) for order in itertools.permutations(range(3))]
    # the grid axis that runs along each of the world axes x, y, z
    order = max(orders, key=lambda order: np.abs(direction[range(3), order]).sum())
    signs = np.sign(direction[range(3), order])
    voxels = volume.voxels.transpose([2 - axis for axis in order[::-1]])
    first = np.zeros(3)
    for axis, sign in zip(order, signs, strict=True):
        if sign < 0:
            first[2 - axis] = volume.voxels.shape[2 - axis] - 1
    (origin,) = volume.to_world(index_to_box(first)).tolist()
    return Volume(
        voxels[tuple(slice(None, None, int(sign)) for sign in signs[::-1])],
        tuple(volume.spacing[2 - axis] for axis in order[::-1]),
        tuple(origin),
        tuple(map(tuple, (direction[:, order] * signs).tolist())),
    )


def boxes_on(target: Volume, boxes: np.ndarray, source: Volume) -> np.ndarray:
    """Boxes [n, 6] of one grid as float64 boxes of another one with the same axes in any order."""
    corners = target.from_world(source.to_world(boxes)).reshape(-1, 2, 3)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def cut_patch(
    voxels: np.ndarray,
    corner: Sequence[int] | np.ndarray,
    size: Sequence[int],
    flipped: Sequence[bool] | np.ndarray = (False, False, False),
    axes: Sequence[int] = (0, 1, 2),
) -> np.ndarray:
    """Copy a patch out of a scan, with `AIR` where the patch extends beyond the scan.

    Args:
        voxels: int16 [D, H, W].
        corner: index of the first voxel of the patch, z, y, x; may be negative.
        size: shape of the patch.
        flipped: the axes along which the patch is flipped after the cut.
        axes: which axis of the scan each axis of the patch is; others than z, y, x need a cube.

    Returns:
        int16 array of shape ``size``, contiguous.
    """
    patch = np.full(tuple(size), AIR, dtype=np.int16)
    unflipped = patch[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
    unflipped = unflipped.transpose(np.argsort(axes))
    begin = np.maximum(corner, 0)
    end = np.maximum(np.minimum(np.add(corner, size), voxels.shape), begin)
    source, target = (
        tuple(map(slice, begin - offset, end - offset)) for offset in (0, np.asarray(corner))
    )
    unflipped[target] = voxels[source]
    return patch


def resampled_shape(
    shape: Sequence[int], old: Sequence[float], new: Sequence[float]
) -> tuple[int, ...]:
    """The shape of a scan once it is resampled from the ``old`` spacing to the ``new`` one."""
    axes = zip(shape, old, new, strict=True)
    return tuple(max(1, math.ceil(length * a / b - 1e-6)) for length, a, b in axes)


def resample(volume: Volume, spacing: Sequence[float]) -> Volume:
    """Resample a scan to exactly ``spacing`` (z, y, x, mm), along its own axes.

    Interpolation is linear. Where an axis gets coarser, the triangle is widened to the new spacing,
    so that voxels are averaged and not skipped (antialiasing). The new grid begins at the same
    outer corner as the old one and covers it completely; its last voxel may extend beyond the old
    grid by less than a voxel. Edge voxels are repeated outside the scan. Values below `AIR`, which
    LUNA16 uses as padding, become `AIR`.
    """
    shape = resampled_shape(volume.voxels.shape, volume.spacing, spacing)
    ratios = [new / old for new, old in zip(spacing, volume.spacing, strict=True)]
    z, y, x = map(_triangle_weights, volume.voxels.shape, shape, ratios)
    in_plane = np.empty((len(volume.voxels), *shape[1:]), dtype=np.float32)
    for row, slice_ in zip(in_plane, volume.voxels, strict=True):
        columns = y @ np.maximum(slice_, AIR, dtype=np.float32)
        row[:] = (x @ columns.T).T
    voxels = np.empty(shape, dtype=np.int16)
    for row in range(shape[1]):
        voxels[:, row] = np.rint(z @ in_plane[:, row])
    first = index_to_box(np.zeros(3)) * ratios  # center of the new voxel (0, 0, 0) on the old grid
    (origin,) = volume.to_world(first).tolist()
    return Volume(voxels, tuple(map(float, spacing)), tuple(origin), volume.direction)


def _triangle_weights(old_length: int, new_length: int, ratio: float) -> scipy.sparse.csr_matrix:
    """float32 [new, old]: weights of linear interpolation; ``ratio``: new spacing / old spacing."""
    centers = box_to_index(index_to_box(np.arange(new_length)) * ratio)
    width = max(ratio, 1.0)
    reach = math.ceil(width)
    columns = np.floor(centers)[:, None].astype(np.int64) + np.arange(1 - reach, reach + 1)
    values = np.maximum(0, 1 - np.abs(columns - centers[:, None]) / width) * (
        (columns >= 0) & (columns < old_length)
    )
    values /= values.sum(axis=1, keepdims=True)
    rows, taps = np.nonzero(values)
    triplets = (values[rows, taps].astype(np.float32), (rows, columns[rows, taps]))
    return scipy.sparse.csr_matrix(triplets, shape=(new_length, old_length))
