"""A small data set in LUNA16's layout with known nodules, written with SimpleITK."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Scan:
    """A scan for `write_luna`; a finding is (z, y, x, diameter): a voxel index, and mm."""

    uid: str
    subset: int
    shape: tuple[int, int, int] = (24, 40, 44)
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.8)
    origin: tuple[float, float, float] = (-170.2, -150.5, -300.7)
    direction: tuple[float, ...] = IDENTITY
    nodules: Sequence[tuple[float, float, float, float]] = ()
    excluded: Sequence[tuple[float, float, float, float]] = ()


SCANS = (
    Scan(
        "1.3.6.1.4.1.1001",
        0,
        nodules=[(8.3, 16.6, 15.2, 9.0), (15.5, 25.0, 30.4, 6.0)],
        excluded=[(6, 28, 30, -1)],
    ),
    Scan(
        "1.3.6.1.4.1.1002",
        0,
        shape=(40, 48, 36),
        spacing=(1.25, 0.7, 0.7),
        nodules=[(19.8, 23.1, 18.4, 7.5)],
    ),
    Scan(
        "1.3.6.1.4.1.1003",
        1,
        direction=FLIPPED,
        nodules=[(11.7, 14.4, 26.1, 8.0)],
        excluded=[(11, 28, 14, 5)],
    ),
    Scan("1.3.6.1.4.1.1004", 2, spacing=(2.0, 0.9, 0.9)),
    Scan("1.3.6.1.4.1.1005", 9, origin=(12.5, 80.25, 900.0), nodules=[(12.1, 20.2, 22.3, 12.0)]),
)


def write_scan(path: Path, scan: Scan) -> sitk.Image:
    """Write an ellipse of lung in a wall of tissue, with padding around and balls of 40 HU."""
    z, y, x = np.ogrid[tuple(slice(0, length) for length in scan.shape)]
    middle = [(length - 1) / 2 for length in scan.shape]
    radius = np.hypot((y - middle[1]) / middle[1], (x - middle[2]) / middle[2]) + 0 * z
    voxels = np.select(
        [radius < 0.85, radius < 0.97, radius < 1.3], [-850, 20, -1000], -2000
    ).astype(np.int16)
    for *center, diameter in scan.nodules:
        offsets = [
            (axis - c) * step for axis, c, step in zip((z, y, x), center, scan.spacing, strict=True)
        ]
        voxels[sum(offset**2 for offset in offsets) < (diameter / 2) ** 2] = 40
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(scan.spacing[::-1])
    image.SetOrigin(scan.origin)
    image.SetDirection(scan.direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


def write_luna(root: Path, scans: Sequence[Scan]) -> Path:
    """Write a folder in LUNA16's layout, all ten subsets and the three tables."""
    for subset in range(10):
        (root / f"subset{subset}").mkdir(parents=True)
    tables = {
        name: [["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]]
        for name in ("", "_excluded")
    }
    for scan in scans:
        image = write_scan(root / f"subset{scan.subset}" / f"{scan.uid}.mhd", scan)
        for name, findings in (("", scan.nodules), ("_excluded", scan.excluded)):
            for z, y, x, diameter in findings:
                tables[name].append(
                    [scan.uid, *image.TransformContinuousIndexToPhysicalPoint((x, y, z)), diameter]
                )
    for name, rows in tables.items():
        with open(root / f"annotations{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    (root / "seriesuids.csv").write_text("".join(f"{scan.uid}\n" for scan in scans))
    return root


@pytest.fixture
def luna_folder(tmp_path: Path) -> Path:
    """Five small anisotropic scans in the subsets 0, 0, 1 (flipped), 2 (no nodules) and 9."""
    return write_luna(tmp_path / "luna", SCANS)


@pytest.fixture
def luna_scans() -> Sequence[Scan]:
    """The scans of `luna_folder`."""
    return SCANS


@pytest.fixture
def make_luna(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of other scans, each given by some keywords of `Scan`."""

    def make(*scans: dict) -> Path:
        return write_luna(
            tmp_path / "made",
            [Scan(**{"uid": f"1.2.{i}", "subset": 0} | scan) for i, scan in enumerate(scans)],
        )

    return make
