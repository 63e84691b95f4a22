"""Synthetic chest CT in LUNA16's layout, for work on nodule detectors without the real scans.

A scan is made in two steps. ``Scene`` draws its contents from ``(seed, i)``: anatomy, vessels and
airways, nodules and other findings, in mm and independent of the voxel grid. ``render`` samples the
scene on the grid with partial-volume edges, adds quantum noise and applies the reconstruction
kernel. The annotations need the first step only.

Coordinates are the patient's, in mm: x to the left, y to the back, z to the head, 0 at the lowest
point of the lungs; world coordinates add the ``shift`` of the scan. Voxel arrays are z, y, x.
Radiodensities are Hounsfield units (HU).
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from tqdm import tqdm

from fmkernels.focalmix.data.tables import (
    FINDING_COLUMNS,
    first_column,
    write_findings,
    write_series,
)
from fmkernels.focalmix.data.workers import process_map
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.files import lock_folder

if TYPE_CHECKING:
    import SimpleITK as sitk

UID_ROOT = "2.25.57644333973914959500870776281786219965"
"""The root of all series uids, from a UUID: phantoms are never taken for the scans of a clinic."""
REVISION = 2
"""A part of every series uid. Any change of the images raises it: old and new scans never mix."""
ANNOTATIONS, EXCLUDED_TABLE, SERIES = (
    "annotations.csv",
    "annotations_excluded.csv",
    "seriesuids.csv",
)
SUBSETS = 10
TEST_SUBSET = 9
FIRST_TEST_INDEX = 10**6
"""The index of the first scan that is only tested; others have lower ones."""

HU_RANGE = (-2048, 3071)
PADDINGS = (-2048, -2000, -1024)  # values of scanners outside the reconstruction circle
AIR, FAT, AIRWAY_WALL, SKIN, SOFT, MUSCLE, LIVER, DISC = (
    -1000.0,
    -105.0,
    0.0,
    10.0,
    35.0,
    55.0,
    60.0,
    90.0,
)
TABLE, MARROW, CORTEX = -300.0, 190.0, 620.0


@dataclass(frozen=True)
class PhantomSize:
    """The geometry of a set's scans, their nodules, and the default number of scans."""

    matrix: int
    """Voxels per row and column."""
    slice_spacings: tuple[float, ...]
    """Slice spacings to draw from, in mm."""
    scans: int
    smallest: float
    """Diameter of the smallest nodules, in mm: about three voxels of a detector at this size."""
    typical: float
    """Median in mm of the lognormal distribution that diameters above the smallest come from."""


SIZES: dict[str, PhantomSize] = {
    "tiny": PhantomSize(matrix=96, slice_spacings=(3.0, 3.5), scans=20, smallest=6.0, typical=9.0),
    "demo": PhantomSize(
        matrix=192, slice_spacings=(2.0, 2.25, 2.5), scans=240, smallest=6.0, typical=9.0
    ),
    "luna16": PhantomSize(
        matrix=512,
        slice_spacings=(0.8, 1.0, 1.25, 1.25, 2.0, 2.5),
        scans=888,
        smallest=3.0,
        typical=6.4,
    ),
}


class Look(NamedTuple):
    """The appearance of a type of finding; pairs are ranges to draw from."""

    frequency: float
    hu: tuple[float, float]
    diameter: tuple[float, float] = (3.0, 30.0)  # mm
    margin: tuple[float, float] = (0.0, 0.0)  # width of the soft edge, mm
    opacity: float = 1.0
    core: tuple[float, float] = (0.0, 0.0)  # radius of the dense core / radius
    core_hu: tuple[float, float] = (0.0, 0.0)


NODULES = {
    "solid": Look(0.72, (-20, 95), margin=(0, 1.3)),
    "calcified": Look(0.05, (20, 120), core=(0.5, 0.9), core_hu=(200, 700)),
    "part-solid": Look(
        0.1, (-620, -420), (5.5, 30), (0.8, 2.5), 0.9, core=(0.35, 0.65), core_hu=(-40, 70)
    ),
    "ground-glass": Look(0.13, (-620, -420), (5.5, 30), (1, 3), 0.85),
}
EXCLUDED = {
    "micronodule": Look(0.34, (0, 100), (2.0, 2.9)),
    "granuloma": Look(0.16, (350, 900), (2.6, 5.5)),
    "faint": Look(0.14, (-690, -610), (4, 7), (1, 2.5), 0.8),
    "plaque": Look(0.18, (30, 400), (5, 11)),
    "scar": Look(0.18, (SOFT, SOFT), (6, 10)),
}


def series_uid(size: str, seed: int, index: int) -> str:
    """The series uid of scan ``index`` of a set."""
    digest = hashlib.sha256(f"{REVISION}/{size}/{seed}/{index}".encode()).hexdigest()
    return f"{UID_ROOT}.{10**17 + int(digest, 16) % (9 * 10**17)}"


def _smooth_max(a: NDArray, b: NDArray, width: float) -> NDArray:
    overlap = np.maximum(width - np.abs(a - b), 0)
    return np.maximum(a, b) + overlap * overlap * (0.25 / width)


def _chain(points: Sequence | NDArray, radius: float) -> NDArray[np.float64]:
    """Tubes of one radius along the points [n, 3]: rows of both ends and both radii, [n - 1, 8]."""
    points = np.asarray(points, dtype=np.float64)
    return np.column_stack((points[:-1], points[1:], np.full((len(points) - 1, 2), radius)))


class Surfaces(NamedTuple):
    """Signed distances in mm to the surfaces of the chest, negative inside."""

    body: NDArray
    wall: NDArray
    abdomen: NDArray
    heart: NDArray
    lung: NDArray


class Anatomy:
    """The shape of one chest."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.height = rng.uniform(215, 275)
        self.half_width = rng.uniform(116, 143)
        self.half_depth = self.half_width * rng.uniform(0.62, 0.76)
        self.power = rng.uniform(2.1, 2.7)  # exponent of the superellipse of the cross-section
        self.apex_power = rng.uniform(2.8, 4.2)
        self.muscle = rng.uniform(9, 19)
        self.fat = float(np.clip(rng.lognormal(2.6, 0.5), 5, 34))
        self.breast = rng.uniform(16, 45) if rng.random() < 0.45 else 0.0
        self.domes = (
            self.height * rng.uniform(0.22, 0.33),
            self.height * rng.uniform(0.15, 0.27),
        )  # right, left
        self.heart = (
            rng.uniform(14, 26),
            rng.uniform(-36, -29),
            self.height * rng.uniform(0.32, 0.4),
        )
        self.heart_scale = self.half_width * rng.uniform(0.85, 1.15) / 130
        self.heart_angle = rng.uniform(0.35, 0.75)
        self.stomach = (
            rng.uniform(48, 75),
            rng.uniform(-35, -15),
            self.domes[1] - rng.uniform(24, 34),
        )
        self.junction = rng.uniform(3, 9)
        self.fissure = rng.uniform(0.5, 0.65), rng.uniform(0.7, 1.0)  # relative height, slope
        self.vertebra = rng.uniform(22, 27)
        self.ripple = (
            rng.uniform(1.5, 4.5),
            *rng.uniform(0, 2 * np.pi, 3).tolist(),
        )  # amplitude, phases
        self.arch = self.height * rng.uniform(0.69, 0.73)
        self.carina = np.array([rng.uniform(-4, 2), 10.0, self.arch - rng.uniform(8, 15)])
        self.artery_roots = np.array(
            [[-42.0, 2.0, 0.55 * self.height], [38.0, 6.0, 0.585 * self.height]]
        )
        self.vein_roots = np.array(
            [[-36.0, 10.0, 0.48 * self.height], [38.0, 12.0, 0.49 * self.height]]
        )

    def _section(self, z: float | NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """At height z: scale of the lungs, scale of the chest wall, y of the center."""
        t = np.clip(z / self.height, 0, 1)
        lung = np.sqrt(np.maximum(1 - t**self.apex_power, 4e-3))
        return lung, 0.5 * (lung + 0.47 + np.sqrt((lung - 0.47) ** 2 + 0.02)), 12 * t**2

    def _reach(self, x: NDArray, y: NDArray) -> NDArray:
        """Radius of the widest outline in the direction of the unit vector (x, y)."""
        sides = (
            np.abs(x / self.half_width) ** self.power + np.abs(y / self.half_depth) ** self.power
        )
        return sides ** (-1 / self.power)

    def spine_y(self, z: float | NDArray) -> NDArray:
        """y of the centers of the vertebral bodies."""
        _, wall, middle = self._section(z)
        return middle + self.half_depth * (0.35 + 0.65 * wall) - 26

    def wall_points(self, angle: NDArray, z: NDArray, out: float | NDArray) -> NDArray:
        """Points [n, 3] ``out`` mm outside the chest wall; angle 0: back, positive: left."""
        _, wall, middle = self._section(z)
        x, y = np.sin(angle), np.cos(angle)
        radius = self._reach(x, y) * wall + out
        return np.stack(np.broadcast_arrays(x * radius, middle + y * radius, z), axis=-1)

    def surfaces(self, x: NDArray, y: NDArray, z: NDArray) -> Surfaces:
        """Distances at points, given by arrays that can be broadcast against each other."""
        body, wall, cavity = self.outlines(x, y, z)
        return Surfaces(body, wall, *self.organs(x, y, z, wall, cavity))

    def outlines(self, x: NDArray, y: NDArray, z: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Distances to body, chest wall, and the cavity of the lungs."""
        lung_scale, wall_scale, middle = self._section(z)
        amplitude, kx, ky, kz = self.ripple
        ripple = amplitude * np.sin(x / 31 + kx) * (np.sin(y / 27 + ky) * np.sin(z / 38 + kz))
        rho = np.sqrt(x * x + (y - middle) ** 2) + 1e-3
        across, back = x / rho, (y - middle) / rho
        reach = self._reach(across, back)
        cavity = rho - reach * lung_scale + ripple
        wall = rho - reach * wall_scale + ripple

        t = z / self.height
        across = across * across
        layers = (
            self.muscle
            + self.fat * (0.75 + 0.5 * across) * (1.15 - 0.35 * t)
            + 10 * np.maximum(back, 0)
        )
        layers += np.clip((t - 0.72) / 0.3, 0, 1) * (24 * across + 6)
        body = rho - reach * np.maximum(wall_scale, 0.9) - layers + 0.5 * ripple
        if self.breast:
            front = (
                (y + self.half_depth + self.muscle + 0.3 * self.breast) / (16 + self.breast)
            ) ** 2
            squared = (
                ((np.abs(x) - 0.58 * self.half_width) / 62) ** 2
                + front
                + ((z - 0.42 * self.height) / 62) ** 2
            )
            body = -_smooth_max(-body, (1 - np.sqrt(squared)) * 40, 20)
        return body, wall, cavity

    def organs(
        self, x: NDArray, y: NDArray, z: NDArray, wall: NDArray, cavity: NDArray
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Distances to abdomen, heart and lungs."""
        t = z / self.height
        left = 1 / (1 + np.exp(-x / 14))
        bowl = ((np.abs(x) - 0.46 * self.half_width) / 68) ** 2 + ((y + 24) / 86) ** 2
        dome = self.domes[0] * (1 - left) + self.domes[1] * left - 0.2 * self.height * bowl
        diaphragm = (np.maximum(dome, 4) - z) * 0.8

        hx, hy, hz = self.heart
        c, s = (
            math.cos(self.heart_angle) / self.heart_scale,
            math.sin(self.heart_angle) / self.heart_scale,
        )
        u, v = (x - hx) * c - (y - hy) * s, (x - hx) * s + (y - hy) * c
        w = (z - hz) / self.heart_scale + 0.35 * u
        heart = (np.sqrt((u / 60) ** 2 + (v / 45) ** 2 + (w / 54) ** 2) - 1) * 50
        _, _, middle = self._section(z)
        spine_y = self.spine_y(z)
        spine = (np.sqrt((x / 25) ** 2 + ((y - spine_y) / 21) ** 2) - 1) * 22
        aorta = np.sqrt((x - 21) ** 2 + (y - spine_y + 16) ** 2) - 14
        width = 24 + 9 * np.exp(-(((z - self.arch) / 30) ** 2))
        column = (np.sqrt((x / width) ** 2 + ((y + 4 - 0.3 * middle) / 46) ** 2) - 1) * 30
        junction = np.abs(x - 3 - 5 * np.sin(z / 40 + self.ripple[1])) - self.junction * (
            0.5 + 0.5 * t
        )
        mediastinum = functools.reduce(np.minimum, (spine, aorta, column, junction))
        lung = _smooth_max(
            _smooth_max(cavity, _smooth_max(-mediastinum, -heart, 12), 7), diaphragm, 5
        )
        return np.maximum(wall, -diaphragm), heart, lung

    def great_vessels(self) -> NDArray[np.float64]:
        """Tubes of aorta and branches, great veins, pulmonary trunk and left atrium."""
        h, arch = self.height, self.arch
        descent = np.linspace(arch - 6, -20, 12)
        paths = (
            (
                15,
                [
                    (-6, -26, 0.45 * h),
                    (-12, -30, arch - 18),
                    (0, -20, arch - 1),
                    (15, 6, arch),
                    (21, 30, arch - 6),
                ],
            ),
            (12, np.column_stack((np.full(12, 21.0), self.spine_y(descent) - 16, descent))),
            (5, [(-6, -16, arch), (-18, -12, 0.9 * h), (-24, -8, 1.1 * h)]),
            (4, [(6, -8, arch), (16, -8, 0.9 * h), (20, -6, 1.1 * h)]),
            (4.5, [(15, 6, arch), (26, 4, 0.9 * h), (42, 4, 1.0 * h)]),
            (9, [(-26, -20, 0.76 * h), (-30, -12, 0.45 * h)]),
            (6, [(-26, -28, 0.76 * h), (4, -30, 0.82 * h), (28, -26, 0.93 * h)]),
            (11, [(-25, -4, 0.34 * h), (-25, 6, -20)]),
            (14, [(18, -36, 0.46 * h), (14, -18, 0.56 * h)]),
            (
                10,
                [
                    self.artery_roots[0],
                    (-18, -4, 0.56 * h),
                    (14, -18, 0.56 * h),
                    self.artery_roots[1],
                ],
            ),
            (17, [(-13, 4, 0.46 * h), (0, 9, 0.47 * h), (13, 5, 0.47 * h)]),
            (8, [self.vein_roots[0], (0, 8, 0.47 * h), self.vein_roots[1]]),
        )
        return np.concatenate([_chain(path, radius) for radius, path in paths])

    def bones(self) -> NDArray[np.float64]:
        """Tubes of ribs, clavicles, scapulae and transverse processes."""
        h, tubes = self.height, []
        for side in (-1, 1):
            for k in range(12):
                angle = np.linspace(0.24, np.pi * (0.8 if k < 7 else 0.72 - 0.09 * (k - 7)), 22)
                fall = (18 + 11 * min(k, 6)) * (angle / np.pi) ** 1.3 * h / 245
                tubes.append(
                    _chain(self.wall_points(side * angle, h * (1 - 0.083 * k) - fall, 7), 4.2)
                )
            ends = self.wall_points(
                side * np.array([2.9, 2.2]), h * np.array([0.93, 0.99]), np.array([4, 26])
            )
            tubes.append(_chain(ends, 5.5))
            for t in np.linspace(0.5, 0.98, 40):
                angle = side * np.linspace(0.8 - 0.25 * t, 1.25, 5)
                tubes.append(_chain(self.wall_points(angle, np.full(5, t * h), 15 + 6 * t), 2.4))
            for z in np.arange(0, 1.1 * h, self.vertebra):
                y = self.spine_y(z)
                tubes.append(_chain([(side * 10, y + 20, z), (side * 36, y + 29, z + 4)], 4.5))
        return np.concatenate(tubes)


def grow_tree(
    rng: np.random.Generator, root: NDArray, tips: NDArray, radius: float
) -> NDArray[np.float64]:
    """Tubes of a tree from ``root`` to all tips [n, 3].

    A branch grows toward the center of its tips. A plane then splits the tips between two branches,
    and so on; each plane is perpendicular to the last. Radii follow Murray's law,
    r^3 = r1^3 + r2^3, with the number of tips.
    """
    count = len(tips)
    shares, noise = np.empty((count, 1)), np.empty((count, 3))
    for k in range(count - 1):  # of the branches that are split, depth first
        shares[k], noise[k] = rng.uniform(0.3, 0.5), rng.standard_normal(3)
    radii = np.array([radius * (served / count) ** (1 / 3) for served in range(count + 1)])
    tubes = np.empty((2 * count - 1, 8))
    # the branches of one level; each serves ``size`` of the tips, which are sorted by branch
    size, start, start_radius = np.array([count]), root[None], radii[-1:]
    normal = np.array([[0.0, 1.0, 0.2]])
    row, draw = np.zeros(1, np.intp), np.zeros(1, np.intp)  # of a branch in tubes and noise
    while len(size):
        branch = np.repeat(np.arange(len(size)), size)
        center = np.column_stack([np.bincount(branch, column) for column in tips.T])
        offset = center / size[:, None] - start
        split = size > 1
        spread = 0.05 * np.sqrt([vector.dot(vector) for vector in offset])[:, None]
        grown = offset * shares[draw] + spread * noise[draw]
        offset = np.where(split[:, None], grown, offset)
        end, end_radius = start + offset, radii[size]
        tubes[row] = np.column_stack((start, end, start_radius, end_radius))

        tips = tips[split[branch]]
        size, row, draw = size[split], row[split], draw[split]
        if not len(size):
            break
        end, end_radius = end[split], end_radius[split]
        plane = np.cross(offset[split], normal[split])
        branch, first = np.repeat(np.arange(len(size)), size), np.cumsum(size) - size
        side = ((tips - end[branch]) * plane[branch]).sum(axis=1)
        low, high = np.minimum.reduceat(side, first), np.maximum.reduceat(side, first)
        median = side[np.lexsort((side, branch))][first + size // 2 - 1]
        far = side > np.where((low <= 0) & (high > 0), 0, median)[branch]
        tips = tips[np.argsort(2 * branch + far, kind="stable")]
        near = size - np.add.reduceat(far, first, dtype=np.intp)

        def twins(near: NDArray, far: NDArray) -> NDArray:
            return np.stack((near, far), axis=1).reshape(-1, *near.shape[1:])

        row, draw = twins(row + 1, row + 2 * near), twins(draw + 1, draw + near)
        size, normal = twins(near, size - near), twins(plane, plane)
        start, start_radius = twins(end, end), twins(end_radius, end_radius)
    return tubes


_DIRECTIONS = np.random.default_rng(0).normal(size=(3, 4000))
_DIRECTIONS /= np.linalg.norm(_DIRECTIONS, axis=0)


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid with bumps, with the volume of a sphere of the given diameter."""

    center: NDArray
    diameter: float  # mm
    axes: NDArray  # [3, 3]: rows along the axes of the ellipsoid / their relative lengths
    bumps: NDArray  # [k, 4]: direction and relative height
    hu: float
    margin: float  # width of the soft edge, mm
    opacity: float
    core: float  # fraction of the radius with core_hu
    core_hu: float

    def _shape(self, x: NDArray, y: NDArray, z: NDArray) -> NDArray:
        squared = sum((a * x + b * y + c * z) ** 2 for a, b, c in self.axes.tolist())
        bumps = sum(
            h * np.exp(7 * (a * x + b * y + c * z - 1)) for a, b, c, h in self.bumps.tolist()
        )
        return (1 + bumps) / np.sqrt(squared + 1e-6)

    def radius(self, x: NDArray, y: NDArray, z: NDArray) -> NDArray:
        """Radius (mm) in the direction of the unit vector (x, y, z)."""
        volume = float((self._shape(*_DIRECTIONS) ** 3).mean())
        return self._shape(x, y, z) * (0.5 * self.diameter / math.cbrt(volume))


class Scene:
    """Scan ``index`` of a set without the noise.

    ``nodules`` and ``excluded`` are rows of x, y, z and diameter; vessels, airways and strands are
    tubes.
    """

    def __init__(self, size: str, seed: int, index: int) -> None:
        self.uid = series_uid(size, seed, index)
        self.noise_seed = (seed, index, 1)
        rng = np.random.default_rng((seed, index, 0))
        self.anatomy = Anatomy(rng)
        self._draw_scanner(rng, SIZES[size])
        self._draw_lung(rng)
        self._draw_trees(rng)
        self.lesions: list[Lesion] = []
        self.strands = np.zeros((0, 8))
        self.nodules, self.excluded = np.zeros((0, 4)), np.zeros((0, 4))
        self._draw_nodules(rng, SIZES[size])
        self._draw_excluded(rng)
        steps = np.arange(SIZES[size].matrix) - (SIZES[size].matrix - 1) / 2
        self.x = (self.view[0] + steps * self.pixel).astype(np.float32)
        self.y = (self.view[1] + steps * self.pixel).astype(np.float32)
        self.z = (np.arange(int((self.anatomy.height + 26) / self.slice)) * self.slice - 8).astype(
            np.float32
        )

    def _draw_scanner(self, rng: np.random.Generator, size: PhantomSize) -> None:
        view = float(np.clip(self.anatomy.half_width * rng.uniform(2.35, 2.75), 310, 380))
        self.pixel = round(view / size.matrix, 6)
        self.slice = size.slice_spacings[int(rng.random() * len(size.slice_spacings))]
        self.view = rng.uniform((-9, -3), (9, 15)).tolist()
        self.shift = np.round(rng.uniform((-25, -190, -420), (25, -20, -60)), 3)
        self.flipped = bool(rng.random() < 0.15)
        self.padding = int(rng.choice(PADDINGS)) if rng.random() < 0.4 else None
        self.table = bool(rng.random() < 0.8)
        self.sharpness = rng.uniform(0, 1.6)
        self.kernel = math.hypot(rng.uniform(0.55, 1.0) / self.pixel, 0.35)  # voxels
        self.noise = rng.lognormal(3.2, 0.5) * (1 + 0.6 * self.sharpness)
        self.slice_overlap = rng.uniform(0, 0.22)
        self.blood = rng.uniform(120, 300) if rng.random() < 0.3 else rng.uniform(32, 50)

    def _draw_lung(self, rng: np.random.Generator) -> None:
        age = rng.random()
        self.lung_hu = rng.uniform(-895, -825) - 25 * age
        self.lung_slope = rng.uniform(0.15, 0.75)
        self.grain = rng.uniform(10, 34)
        self.mottle = rng.uniform(6, 22)
        self.emphysema = max(0.0, rng.normal(-40, 60) + 80 * age)
        self.reticulation = max(0.0, rng.normal(-120, 140) + 120 * age)
        self.dependence = rng.uniform(10, 160)
        self.fissure_hu = rng.uniform(20, 130)
        a, b, h = self.anatomy.half_width, self.anatomy.half_depth, self.anatomy.height
        points = rng.uniform((-a, -b, 0), (a, b + 12, h), (60_000, 3))
        depth = -self.anatomy.surfaces(*points.T).lung
        self.points, self.depth = points[depth > 0], depth[depth > 0]

    def _draw_trees(self, rng: np.random.Generator) -> None:
        anatomy, caliber, count = self.anatomy, rng.uniform(6.5, 8.5), int(rng.uniform(500, 1300))
        top = (anatomy.carina[0], -2.0, 1.15 * anatomy.height)
        vessels, airways = (
            [anatomy.great_vessels()],
            [_chain([top, anatomy.carina], rng.uniform(7.5, 10))],
        )
        for side, artery, vein in zip(
            (-1, 1), anatomy.artery_roots, anatomy.vein_roots, strict=True
        ):
            inside = np.flatnonzero(
                (self.points[:, 0] * side > 0) & (self.depth > rng.uniform(2, 4))
            )
            weight = 1 + 3 * np.exp(-self.depth[inside] / 7)
            tips = self.points[
                rng.choice(inside, 2 * count, replace=False, p=weight / weight.sum())
            ]
            arteries = grow_tree(rng, artery, tips[:count], caliber)
            vessels += [arteries, grow_tree(rng, vein, tips[count:], 0.9 * caliber)]
            bronchi = arteries[arteries[:, 7] > rng.uniform(1.4, 2.2)]
            beside = np.array([0.0, 0.9, 0.35]) * rng.uniform(1.7, 1.95)  # in radii of the artery
            bronchi[:, :3] += bronchi[:, 6:7] * beside
            bronchi[:, 3:6] += bronchi[:, 7:] * beside
            bronchi[:, 6:] *= 0.72
            airways += [bronchi[anatomy.surfaces(*bronchi[:, 3:6].T).lung < -2]]
            airways += [_chain([anatomy.carina, artery + caliber * beside], 0.8 * caliber)]
        self.vessels, self.airways = np.concatenate(vessels), np.concatenate(airways)
        self.airway_walls = self.airways.copy()
        self.airway_walls[:, 6:] += 0.4 + 0.15 * self.airways[:, 6:]

    def _free_point(self, rng: np.random.Generator, radius: float, where: str) -> NDArray | None:
        """A free and visible point "inside" the lung, at the "pleura" or at a "vessel", or None."""
        taken = np.concatenate((self.nodules, self.excluded))
        tubes = np.concatenate((self.vessels, self.airway_walls))
        large = tubes[tubes[:, 6] > 0.45 * radius]
        low, high = (0.3 * radius, 0.85 * radius) if where == "pleura" else (radius + 1.5, np.inf)
        points = self.points[(self.depth > low) & (self.depth < high)]
        for _ in range(60 if len(points) else 0):
            center = points[rng.integers(len(points))]
            if where == "vessel":
                tube = self.vessels[rng.integers(len(self.vessels))]
                away = np.cross(tube[3:6] - tube[:3], rng.normal(size=3))
                away *= (tube[7] + 0.75 * radius) / (np.linalg.norm(away) + 1e-9)
                center = tube[:3] + rng.random() * (tube[3:6] - tube[:3]) + away
            along = large[:, 3:6] - large[:, :3]
            part = ((center - large[:, :3]) * along).sum(axis=1) / (
                (along * along).sum(axis=1) + 1e-9
            )
            gap = (
                np.linalg.norm(center - large[:, :3] - np.clip(part, 0, 1)[:, None] * along, axis=1)
                - large[:, 6]
            )
            apart = np.linalg.norm(taken[:, :3] - center, axis=1) - np.maximum(taken[:, 3], 10) / 2
            deep = -self.anatomy.surfaces(*center).lung > min(low, 0.8 * radius)
            if deep and (gap > 0.6 * radius).all() and (apart > 1.6 * radius + 3).all():
                return center
        return None

    def _add(
        self,
        rng: np.random.Generator,
        look: Look,
        center: NDArray,
        diameter: float,
        lengths: ArrayLike,
        bumps: NDArray | None = None,
        first: NDArray | None = None,
    ) -> None:
        """Add a lesion with random axes of these relative lengths, the first along ``first``."""
        rows = rng.normal(size=(3, 3))
        rows[0] = rows[0] if first is None else first
        axes = np.linalg.qr(rows.T)[0].T / np.asarray(lengths)[:, None]
        hu, margin, core, core_hu = (
            rng.uniform(*r) for r in (look.hu, look.margin, look.core, look.core_hu)
        )
        bumps = np.zeros((0, 4)) if bumps is None else bumps
        self.lesions.append(
            Lesion(center, diameter, axes, bumps, hu, margin, look.opacity, core, core_hu)
        )

    def _draw_nodules(self, rng: np.random.Generator, size: PhantomSize) -> None:
        for _ in range(0 if rng.random() < 0.32 else min(int(rng.geometric(0.5)), 8)):
            look = NODULES[
                rng.choice(list(NODULES), p=[look.frequency for look in NODULES.values()])
            ]
            low, high = max(look.diameter[0], size.smallest), look.diameter[1]
            diameter = 0.0
            while not low <= diameter <= high:
                diameter = rng.lognormal(math.log(size.typical), 0.52)
            center = self._free_point(
                rng, diameter / 2, rng.choice(["inside", "vessel", "pleura"], p=[0.45, 0.27, 0.28])
            )
            if center is None:
                continue
            directions = rng.normal(size=(7, 3))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            heights = rng.normal(0.1, 0.55, 7) * min(0.06 + 0.014 * diameter, 0.35)
            lengths = np.exp(rng.normal(0, 0.13, 3))
            self._add(rng, look, center, diameter, lengths, np.column_stack((directions, heights)))
            self.nodules = np.vstack((self.nodules, (*center, diameter)))
            if (
                diameter > 8
                and look.core_hu[1] < 100
                and look.opacity > 0.85
                and rng.random() < 0.4
            ):
                for out in rng.normal(size=(rng.integers(5, 13), 3)):
                    tip = center + out / np.linalg.norm(out) * diameter * rng.uniform(0.65, 1.0)
                    self.strands = np.vstack((self.strands, (*center, *tip, 0.16 * diameter, 0.25)))

    def _draw_excluded(self, rng: np.random.Generator) -> None:
        for _ in range(rng.poisson(5)):
            name = str(rng.choice(list(EXCLUDED), p=[look.frequency for look in EXCLUDED.values()]))
            look, plaque = EXCLUDED[name], name == "plaque"
            diameter = rng.uniform(*look.diameter)
            center = self._free_point(
                rng, 1.0 if plaque else diameter / 2, "pleura" if plaque else "inside"
            )
            if center is None:
                continue
            if name == "scar":
                path = np.cumsum(rng.normal(size=3) * 3 + rng.normal(0, 1.4, (5, 3)), axis=0)
                self.strands = np.vstack(
                    (self.strands, _chain(center + path - path[2], rng.uniform(0.7, 1.4)))
                )
            elif plaque:
                near = self.anatomy.surfaces(*(center + np.vstack((np.eye(3), -np.eye(3)))).T).lung
                self._add(
                    rng,
                    look,
                    center,
                    diameter,
                    (0.3, *rng.uniform(1.2, 2.2, 2)),
                    first=near[:3] - near[3:],
                )
            else:
                self._add(rng, look, center, diameter, np.exp(rng.normal(0, 0.12, 3)))
            known = diameter if name in ("granuloma", "faint") else -1.0
            self.excluded = np.vstack((self.excluded, (*center, known)))

    def to_world(self, findings: NDArray) -> NDArray:
        """Findings [n, 4] in world coordinates."""
        return findings + np.append(self.shift, 0.0)


def _cover(distance: NDArray, blur: float | NDArray) -> NDArray:
    """Fraction of a voxel of extent ``blur`` that lies within the surface."""
    return np.clip(0.5 - distance / blur, 0, 1)


def _blend(view: NDArray, cover: NDArray, hu: float | NDArray, brighten: bool = False) -> None:
    """Blend ``hu`` into the view; with ``brighten`` only where this raises it."""
    change = hu - view
    view += cover * (np.maximum(change, 0, out=change) if brighten else change)


def _texture(tile: NDArray, grain: float, *axes: NDArray) -> NDArray:
    """A periodic tile with a sample every ``grain`` mm, interpolated linearly at z, y, x."""
    for axis, positions in enumerate(axes):
        at = positions.ravel() / np.float32(grain)
        index = np.floor(at).astype(np.intp)
        low, tile = (tile.take(index + k, axis=axis, mode="wrap") for k in (0, 1))
        tile -= low
        tile *= (at - index).astype(np.float32).reshape(positions.shape)
        tile += low
    return tile


Box = tuple[slice, slice, slice]
CHUNK = 2**16
"""Voxels of tubes that are painted at once."""
BLOCK = (16, 16)
"""Slices and rows of tissue that are painted at once."""


@dataclass(frozen=True)
class Canvas:
    """Voxels to paint on, float32 HU [z, y, x], and the coordinates of their centers."""

    hu: NDArray
    z: NDArray
    y: NDArray
    x: NDArray
    pixel: float
    slice: float

    def corners(self, low: NDArray, high: NDArray) -> tuple[NDArray, NDArray]:
        """Indices of the first voxels between two corners, and their ends; all are x, y, z."""
        first = np.array([self.x[0], self.y[0], self.z[0]], np.float64)
        step = (self.pixel, self.pixel, self.slice)
        start, stop = np.ceil((low - first) / step), np.floor((high - first) / step) + 1
        size = self.hu.shape[::-1]
        return np.clip(start, 0, size).astype(np.intp), np.clip(stop, 0, size).astype(np.intp)

    def offsets(
        self, box: Box, point: Sequence[float] | NDArray
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Broadcastable x, y, z of the voxels of a box, relative to a point."""
        x, y, z = (np.float32(value) for value in point)
        return self.x[box[2]] - x, self.y[box[1]][:, None] - y, self.z[box[0]][:, None, None] - z

    def blur(self, z: NDArray, squared: NDArray) -> NDArray:
        """Extent of a voxel along a vector (., ., z) of that squared length."""
        flat = self.pixel**2
        return np.sqrt(flat + (self.slice**2 - flat) * (z * z) / (squared + 1e-6))

    def tubes(self, tubes: NDArray, hu: float, brighten: bool = False) -> None:
        """Paint tapered tubes [n, 8]; a tube thinner than a voxel fills a part of it."""
        tubes = tubes[tubes[:, 6] > 0.12 * self.pixel]
        reach = tubes[:, 6:7] + 0.51 * max(self.pixel, self.slice)
        start, stop = self.corners(
            np.minimum(tubes[:, :3], tubes[:, 3:6]) - reach,
            np.maximum(tubes[:, :3], tubes[:, 3:6]) + reach,
        )
        size = np.maximum(stop - start, 0)
        voxels = np.cumsum(size.prod(axis=1))
        parts = np.searchsorted(voxels, np.arange(CHUNK, voxels[-1:].sum(), CHUNK))
        latest = np.empty(self.hu.size, np.int32)
        for some in np.split(np.arange(len(tubes)), parts):
            voxel, cover = self._covers(tubes[some], start[some], size[some])
            while len(voxel):  # voxels of several tubes: one after the other
                order = np.arange(len(voxel), dtype=np.int32)
                latest[voxel[::-1]] = order[::-1]
                first = latest[voxel] == order
                view = self.hu.reshape(-1)
                now = view[voxel[first]]
                _blend(now, cover[first], hu, brighten)
                view[voxel[first]] = now
                voxel, cover = voxel[~first], cover[~first]

    def _covers(self, tubes: NDArray, start: NDArray, size: NDArray) -> tuple[NDArray, NDArray]:
        """Voxels that tubes cover, tube after tube: index into all voxels, covered fraction."""
        along = tubes[:, 3:6] - tubes[:, :3]
        dx, dy, dz = along.T
        scaled = along * (1 / (dx * dx + dy * dy + dz * dz + 1e-9))[:, None]
        # a row is the voxels of a tube's box with the same y and z
        rows = size[:, 1] * size[:, 2]
        tube = np.repeat(np.arange(len(tubes)), rows)
        iz, iy = np.divmod(np.arange(len(tube)) - (np.cumsum(rows) - rows)[tube], size[tube, 1])
        iz, iy, width = iz + start[tube, 2], iy + start[tube, 1], size[tube, 0]
        lines = np.hstack((tubes[:, :3], along, scaled)).T.astype(np.float32)
        x0, y0, z0, dx, dy, dz, ax, ay, az = lines[:, tube]
        y, z = self.y[iy] - y0, self.z[iz] - z0
        x0, ax, ay, az, dx, dy, dz, y, z = np.repeat(
            np.stack((x0, ax, y * ay, z * az, dx, dy, dz, y, z)), width, axis=1
        )
        row = np.repeat(np.arange(len(tube)), width)
        ix = np.arange(len(row)) + (start[tube, 0] - (np.cumsum(width) - width))[row]
        x = self.x[ix] - x0
        part = np.clip(x * ax + ay + az, 0, 1)
        z = z - part * dz
        squared = (x - part * dx) ** 2 + (y - part * dy) ** 2 + z * z
        start_radius, growth = np.stack((tubes[:, 6], tubes[:, 7] - tubes[:, 6])).astype(np.float32)
        reach = tubes[:, 6:].max(axis=1) + 0.51 * max(self.pixel, self.slice)
        near = np.flatnonzero(squared < np.repeat((reach * reach).astype(np.float32)[tube], width))
        z, squared, part, row = z[near], squared[near], part[near], row[near]
        blur = self.blur(z, squared)
        of = tube[row]
        radius = start_radius[of] + growth[of] * part
        cover = _cover(np.sqrt(squared) - radius, blur) * np.minimum(1, (2 * radius / blur) ** 2)
        return (iz * len(self.y) + iy)[row] * len(self.x) + ix[near], cover

    def lesion(self, lesion: Lesion) -> None:
        """Brighten the voxels of a lesion to its density."""
        reach = (
            lesion.radius(*_DIRECTIONS).max() + 0.75 * max(self.pixel, self.slice) + lesion.margin
        )
        corners = self.corners(lesion.center - reach, lesion.center + reach)
        columns, rows, slices = map(slice, *corners)
        box = slices, rows, columns
        x, y, z = self.offsets(box, lesion.center)
        squared = x * x + y * y + z * z
        distance = np.sqrt(squared) + 1e-4
        radius, blur = (
            lesion.radius(x / distance, y / distance, z / distance),
            self.blur(z, squared),
        )
        cover = lesion.opacity * _cover(distance - radius, blur + lesion.margin)
        _blend(self.hu[box], cover, lesion.hu, brighten=True)
        if lesion.core:
            _blend(
                self.hu[box],
                _cover(distance - lesion.core * radius, blur),
                lesion.core_hu,
                brighten=True,
            )

    def tissue(self, scene: Scene, tiles: Sequence[NDArray]) -> None:
        """Paint body, organs and lungs."""
        anatomy, pixel = scene.anatomy, self.pixel
        x, y, z = self.x, self.y[:, None], self.z[:, None, None]
        view = self.hu
        view[:] = AIR
        if scene.table:
            under = y - anatomy.half_depth - anatomy.muscle - anatomy.fat - 22 + x * x / 700
            _blend(
                view,
                _cover(np.abs(under) - 1, pixel) + _cover(np.abs(under - 22) - 1, pixel),
                TABLE,
            )
        # anything closer to a sample than the margin may reach the neighboring voxels
        rough = anatomy.surfaces(x[::4], y[::4], z[::4])
        margin = 12 * max(pixel, self.slice)
        heart = np.repeat((rough.heart < margin).any(axis=(0, 1)), 4)[: len(x)]
        near = np.repeat((rough.body < margin).any(axis=(0, 1)), 4)[: len(x)]
        columns = _range(near | heart)
        view, x, heart = view[:, :, columns], x[columns], heart[columns]
        if not len(x):
            return
        medium, coarse = (
            _texture(tile, grain, z, y, x)
            for tile, grain in zip(tiles[1:], (4.5, 17.0), strict=True)
        )
        body, wall, cavity = anatomy.outlines(x, y, z)
        _blend(view, _cover(body, pixel), FAT + 14 * medium)
        _blend(view, _cover(np.abs(body + 1) - 1, pixel), SKIN)
        bulk = anatomy.muscle * (1 + 0.35 * coarse) + 45 * np.clip(
            z / anatomy.height - 0.75, 0, 0.3
        )
        planes = np.clip(1.4 - 9 * np.abs(coarse), 0, 1)
        muscle = np.maximum(wall - bulk, body + 4)
        _blend(view, _cover(muscle, pixel), MUSCLE + 9 * medium - 120 * planes)

        columns = _range((wall < pixel).any(axis=(0, 1)) | heart)
        view, x = view[:, :, columns], x[columns]
        if not len(x):
            return
        medium, coarse, wall, cavity = (
            part[:, :, columns] for part in (medium, coarse, wall, cavity)
        )
        abdomen, heart, lungs = anatomy.organs(x, y, z, wall, cavity)
        mixed = FAT + (SOFT - FAT) * np.clip(0.5 + medium, 0, 1)
        _blend(view, _cover(wall, pixel), mixed)
        cover = _cover(abdomen, pixel)
        if cover.any():
            organs = np.where((x < 22 + 8 * coarse) | (x + y > 95), LIVER + 4 * medium, mixed)
            _blend(view, cover, organs)
            a, b, c = anatomy.stomach
            stomach = (
                np.sqrt(((x - a) / 36) ** 2 + ((y - b) / 30) ** 2 + ((z - c) / 20) ** 2) - 1
            ) * 22
            stomach = np.maximum(stomach, abdomen + 2)
            _blend(view, _cover(stomach, pixel), SOFT)
            _blend(view, _cover(np.maximum(stomach + 4, y - b), pixel), AIR)
        _blend(view, _cover(heart + 4, pixel), 0.5 * (scene.blood + 45) + 6 * medium)

        cover = _cover(lungs, pixel)
        columns = _range(cover.any(axis=(0, 1)))
        view, x = view[:, :, columns], x[columns]
        if not len(x):
            return
        medium, coarse, lungs, cover = (
            part[:, :, columns] for part in (medium, coarse, lungs, cover)
        )
        fine = _texture(tiles[0], 1.5, z, y, x)
        t = z / anatomy.height
        lung = (
            scene.lung_hu
            + scene.lung_slope * y
            + 30 * (0.5 - t)
            + scene.grain * fine
            + scene.mottle * coarse
        )
        lung -= scene.emphysema * np.clip(medium - 0.5, 0, 1.5) * np.clip(t, 0.2, 1)
        lung += (
            scene.reticulation * np.exp(lungs / 9 - (medium / 0.18) ** 2) * np.clip(1.2 - t, 0.2, 1)
        )
        lung += scene.dependence * np.exp(lungs / 5) * np.clip(y / anatomy.half_depth, 0, 1) ** 2
        height, slope = anatomy.fissure
        oblique = z - height * anatomy.height - slope * (y - 10) + 0.0022 * x * x + 3 * coarse
        horizontal = z - (height + 0.02) * anatomy.height + 0.12 * y + 4 * coarse
        horizontal = np.where((x < 0) & (oblique > 0), np.abs(horizontal), np.inf)
        sheet = np.minimum(0.7 * np.abs(oblique), horizontal) / (0.6 + 0.5 * pixel)
        lung += scene.fissure_hu * np.clip(1.2 - sheet, 0, 1)
        _blend(view, cover, np.maximum(lung, AIR))

    def spine_and_sternum(self, anatomy: Anatomy) -> None:
        """Paint vertebrae, discs, arches and the sternum."""
        middle = slice(*np.searchsorted(self.x, (-30, 30)).tolist())
        view, pixel = self.hu[:, :, middle], self.pixel
        x, y, z = self.x[middle], self.y[:, None], self.z[:, None, None]
        level = (z / anatomy.vertebra) % 1
        back = y - anatomy.spine_y(z)
        body = (np.sqrt((x / 18) ** 2 + (back / 14.5) ** 2) - 1) * 16
        disc = (np.abs(level - 0.5) - 0.1) * anatomy.vertebra
        _blend(view, _cover(body, pixel), 0.75 * CORTEX)
        _blend(view, _cover(body + 1.5, pixel), MARROW)
        _blend(view, _cover(np.maximum(body + 0.5, np.abs(disc) - 1.2), pixel), 0.6 * CORTEX)
        _blend(view, _cover(np.maximum(body, disc), pixel), DISC)
        canal = np.sqrt((x / 1.15) ** 2 + (back - 23) ** 2) - 8.5
        arch = np.maximum(np.abs(canal - 2.5) - 2.5, (level - 0.75) * anatomy.vertebra)
        spinous = np.maximum(np.abs(x) - 3.2, np.abs(back - 42 + 8 * level) - 11)
        spinous = np.maximum(spinous, (np.abs(level - 0.45) - 0.33) * anatomy.vertebra)
        _blend(view, _cover(np.minimum(arch, spinous), pixel), 0.6 * CORTEX)
        _blend(view, _cover(canal, pixel), SOFT)
        t = z / anatomy.height
        front = y - anatomy.wall_points(np.array(np.pi), z, 8)[..., 1].astype(np.float32)
        sternum = np.maximum(np.abs(x) - 12 - 12 * np.clip(t, 0, 1) ** 4, np.abs(front) - 5)
        sternum = np.maximum(sternum, 180 * np.abs(t - 0.68) - 44)
        _blend(view, _cover(sternum, pixel), 0.65 * CORTEX)
        _blend(view, _cover(sternum + 2, pixel), 0.6 * MARROW)


def _range(chosen: ArrayLike) -> slice:
    """From the first chosen one to the last."""
    at = np.flatnonzero(chosen)
    return slice(at[0], at[-1] + 1) if len(at) else slice(0)


def _parts(size: int, length: int) -> list[slice]:
    """Slices of that length, the last one shorter, which cover an axis."""
    return [slice(k, min(k + length, size)) for k in range(0, size, length)]


def render(scene: Scene) -> NDArray[np.int16]:
    """The scan's voxels in HU, [z, y, x] along the patient's axes."""
    rng = np.random.default_rng(scene.noise_seed)
    tiles = [
        ndimage.gaussian_filter(rng.standard_normal((56, 56, 56), np.float32), 0.7, mode="wrap")
        for _ in range(3)
    ]
    tiles = [tile / tile.std() for tile in tiles]
    shape = (len(scene.z), len(scene.y), len(scene.x))
    depth = max(1, 2**18 // (shape[1] * shape[2]))  # slices that fit into the CPU cache
    slabs = _parts(shape[0], depth)
    canvas = Canvas(
        np.empty(shape, np.float32), scene.z, scene.y, scene.x, scene.pixel, scene.slice
    )
    for z, y in itertools.product(*map(_parts, shape, BLOCK)):
        part = dataclasses.replace(canvas, hu=canvas.hu[z, y], z=canvas.z[z], y=canvas.y[y])
        part.tissue(scene, tiles)
    for slab in slabs:
        part = dataclasses.replace(canvas, hu=canvas.hu[slab], z=canvas.z[slab])
        part.spine_and_sternum(scene.anatomy)
    bones = scene.anatomy.bones()
    canvas.tubes(bones, CORTEX)
    canvas.tubes(bones - 1.7 * (np.arange(8) > 5), MARROW)
    canvas.tubes(scene.vessels, scene.blood, brighten=True)
    canvas.tubes(scene.airway_walls, AIRWAY_WALL, brighten=True)
    canvas.tubes(scene.airways, AIR + 15)
    canvas.tubes(scene.strands, SOFT, brighten=True)
    for lesion in scene.lesions:
        canvas.lesion(lesion)
    return _acquire(canvas, scene, slabs, rng)


def _acquire(
    canvas: Canvas, scene: Scene, slabs: Iterable[slice], rng: np.random.Generator
) -> NDArray[np.int16]:
    """Average neighboring slices, add noise, apply the reconstruction kernel, pad the corners."""

    def reconstruct(image: NDArray) -> NDArray:
        soft = ndimage.gaussian_filter(
            image, (0, scene.kernel, scene.kernel), truncate=3, mode="nearest"
        )
        return soft + scene.sharpness * (image - soft)

    impulse = np.zeros((1, 31, 31), np.float32)
    impulse[0, 15, 15] = 1
    gain = float(np.sqrt((reconstruct(impulse) ** 2).sum()))
    squared = (canvas.x - scene.view[0]) ** 2 + (canvas.y[:, None] - scene.view[1]) ** 2
    noise = (scene.noise / gain) * (0.65 + 0.6 * np.exp(-squared / 110**2))
    shoulders = (
        1 + 1.1 * np.clip(canvas.z / (0.2 * scene.anatomy.height) - 4.1, 0, 1)[:, None, None]
    )
    result = np.empty(canvas.hu.shape, np.int16)
    for slab in slabs:
        index = np.arange(slab.start, slab.stop)
        below, above = (canvas.hu.take(index + k, axis=0, mode="clip") for k in (-1, 1))
        image = (1 - 2 * scene.slice_overlap) * canvas.hu[slab] + scene.slice_overlap * (
            below + above
        )
        grains = rng.standard_normal(image.shape, np.float32)
        grains *= noise
        grains *= shoulders[slab]
        image += grains
        image = reconstruct(image)
        result[slab] = np.clip(np.rint(image, out=image), *HU_RANGE, out=image)
    if scene.padding is not None:
        result[:, squared > (0.5 * len(canvas.x) * scene.pixel) ** 2] = scene.padding
    return result


def to_image(scene: Scene, voxels: NDArray[np.int16]) -> "sitk.Image":
    """The scan as an image in world coordinates; if flipped, x and y are stored in reverse."""
    import SimpleITK as sitk

    step = -1 if scene.flipped else 1
    image = sitk.GetImageFromArray(voxels[:, ::step, ::step])
    corner = np.array([scene.x[::step][0], scene.y[::step][0], scene.z[0]], dtype=np.float64)
    image.SetOrigin((corner + scene.shift).tolist())
    image.SetSpacing((scene.pixel, scene.pixel, scene.slice))
    image.SetDirection((step, 0, 0, 0, step, 0, 0, 0, 1))
    return image


def _write_scan(out: Path, size: str, seed: int, index: int) -> tuple[NDArray, NDArray]:
    """Write a scan unless it is complete, the header last; return nodules and excluded findings."""
    import SimpleITK as sitk

    scene = Scene(size, seed, index)
    folder = out / f"subset{TEST_SUBSET if index >= FIRST_TEST_INDEX else index % SUBSETS}"
    header, raw = folder / f"{scene.uid}.mhd", folder / f"{scene.uid}.raw"
    partial = folder / f".{scene.uid}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    expected = np.dtype(np.int16).itemsize * len(scene.z) * len(scene.y) * len(scene.x)
    if not (header.is_file() and raw.is_file() and raw.stat().st_size == expected):
        partial.mkdir()
        try:
            sitk.WriteImage(to_image(scene, render(scene)), partial / header.name)
            header.unlink(missing_ok=True)
            os.replace(partial / raw.name, raw)
            os.replace(partial / header.name, header)
        except RuntimeError as error:
            raise OSError(f"{raw}: could not be written ({str(error).splitlines()[-1]})") from error
        finally:
            shutil.rmtree(partial)
    return scene.to_world(scene.nodules), scene.to_world(scene.excluded)


def _check_folder(out: Path, known: set[str], name: str) -> None:
    """Refuse a folder that contains scans or rows of another set than ``name``."""
    for path in sorted((*out.glob("subset*/*.mhd"), *out.glob("subset*/*.raw"))):
        if path.stem not in known:
            raise InputError(f"{path}: is not one of {name}; choose an empty folder")
    for path in (out / table for table in (ANNOTATIONS, EXCLUDED_TABLE, SERIES)):
        if not path.exists():
            continue
        if unknown := first_column(path) - known - {FINDING_COLUMNS[0]}:
            raise InputError(
                f"{path}: names {min(unknown)}, not one of {name}; choose an empty folder"
            )


def write_phantoms(
    out: Path,
    *,
    size: str = "demo",
    scans: int | None = None,
    test_scans: int = 0,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write a set of synthetic chest CT scans in LUNA16's layout.

    ``out`` gets ``subset0`` to ``subset9`` with ``<seriesuid>.mhd`` and ``.raw`` (int16 HU), and
    three tables: ``annotations.csv`` (nodules of up to 30 mm, the smallest 3 mm at size luna16 and
    6 mm at the others: world x, y, z of the center, and the diameter of the sphere of equal
    volume), ``annotations_excluded.csv`` (other findings, diameter -1 if unknown) and
    ``seriesuids.csv``.

    Scan i depends on ``size``, ``seed`` and i only: its bytes are the same for any number of
    workers, and a larger set holds the scans of the smaller one. A stopped run can be continued;
    the tables are written last.

    Args:
        out: the folder; it is created if missing.
        size: one of ``SIZES``.
        scans: number of scans, distributed evenly over the subsets; default: that of the size.
        test_scans: number of additional scans in ``subset9``, which every preset only tests on. A
            scan has 1.4 nodules on average.
        seed: any non-negative integer.
        workers: number of processes; default: one per CPU.
        progress: show a progress bar.

    Raises:
        InputError: an unknown size, a number below its minimum, or a folder with another set.
        OSError: the folder cannot be written or the disk is full.
    """
    if size not in SIZES:
        raise InputError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    scans = SIZES[size].scans if scans is None else scans
    workers = (os.cpu_count() or 1) if workers is None else workers
    for name, value, least, most in (
        ("scans", scans, 1, FIRST_TEST_INDEX),
        ("test_scans", test_scans, 0, FIRST_TEST_INDEX),
        ("seed", seed, 0, math.inf),
        ("workers", workers, 1, math.inf),
    ):
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise InputError(f"{name}: expected {limit}, got {value}")
    out = Path(out)
    indices = [*range(scans), *range(FIRST_TEST_INDEX, FIRST_TEST_INDEX + test_scans)]
    uids = [series_uid(size, seed, index) for index in indices]
    _check_folder(out, set(uids), f"the {len(uids)} {size} scans of seed {seed}")
    for subset in range(SUBSETS):
        (out / f"subset{subset}").mkdir(parents=True, exist_ok=True)

    write = functools.partial(_write_scan, out, size, seed)
    with lock_folder(out), process_map(write, indices, workers) as results:
        bar = tqdm(
            results, total=len(indices), desc=f"{size} phantoms", unit="scan", disable=not progress
        )
        nodules, excluded = zip(*bar, strict=True)
        write_findings(out / ANNOTATIONS, dict(zip(uids, nodules, strict=True)))
        write_findings(out / EXCLUDED_TABLE, dict(zip(uids, excluded, strict=True)))
        write_series(out / SERIES, uids)
