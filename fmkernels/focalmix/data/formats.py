"""Scans in files: MetaImage, NIfTI, NRRD, and folders of DICOM series.

Headers are checked before any voxel is read. HU may be stored in any signed integer or float type.
SimpleITK is imported where a scan is read that is not MetaImage, LUNA16's format.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fmkernels.focalmix.data.dicom import dicom_header, is_dicom, series_id
from fmkernels.focalmix.data.headers import (
    MAX_GROWTH,
    MAX_LENGTH,
    MAX_VOXELS,
    Header,
    kind_of,
)
from fmkernels.focalmix.data.itk import nifti_header, nrrd_header
from fmkernels.focalmix.data.metaimage import metaimage_header
from fmkernels.focalmix.data.volume import Volume, resample, resampled_shape
from fmkernels.focalmix.errors import InputError, InputWarning

_READERS: dict[str, Callable[[Path], Header]] = {
    ".mhd": metaimage_header,
    ".mha": metaimage_header,
    ".nii": nifti_header,
    ".nii.gz": nifti_header,
    ".nrrd": nrrd_header,
}
SUPPORTED = f"{', '.join(_READERS)} or a folder with a DICOM series"
"""What a scan may be, for messages."""

_DENSEST_AIR = -400  # HU
_INT16 = np.iinfo(np.int16)


def scan_name(path: str | Path) -> str:
    """The name of a scan: of its file without the suffix (``.nii.gz`` is one), or of its folder."""
    name = Path(path).name
    return name[: len(name) - len(_suffix(name))]


def scan_id(path: str | Path) -> str:
    """The id of a scan in tables: the series id of a DICOM folder, else its `scan_name`."""
    path = Path(path)
    return series_id(path) if path.is_dir() else scan_name(path)


def find_scans(folder: str | Path) -> list[Path]:
    """All scans below a folder, sorted: files by their suffix, folders that hold DICOM files.

    Hidden files and folders are left out.
    """
    found: list[Path] = []
    for name, folders, files in os.walk(folder):
        folders[:] = sorted(other for other in folders if not other.startswith("."))
        paths = [Path(name, file) for file in sorted(files) if not file.startswith(".")]
        scans = [path for path in paths if _suffix(path.name)]
        found += scans
        if any(path.is_file() and is_dicom(path) for path in paths if path not in scans):
            found.append(Path(name))
    return found


def check_header(path: str | Path) -> Header:
    """Read the header of a scan and check it.

    Raises:
        InputError: as `read_scan`.
    """
    path = Path(path)
    if path.is_dir():
        return dicom_header(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a scan ({SUPPORTED}), found no such file")
    suffix = _suffix(path.name)
    if not suffix:
        raise InputError(f"{path}: expected a scan ({SUPPORTED}), got {kind_of(path)}")
    return _READERS[suffix](path)


def read_scan(path: str | Path) -> Volume:
    """Read a scan on its stored grid, in HU as int16.

    Floats are rounded to the nearest integer. Values outside int16 are clipped, with a warning.

    Args:
        path: a ``.mhd`` (its voxels beside it in one file), ``.mha``, ``.nii``, ``.nii.gz`` or
            ``.nrrd`` file, or a folder with the files of one DICOM series.

    Warns:
        InputWarning: slices are not evenly spaced by more than a tenth of their spacing; the header
            does not say how the scan lies; values are clipped.

    Raises:
        InputError: names the file and the field of the header, what was expected and what came.
    """
    return _read(Path(path), check_header(path))


def load_volume(path: str | Path, spacing: Sequence[float]) -> Volume:
    """Read a scan as `read_scan` and resample it to ``spacing`` (z, y, x, mm), without a cache.

    Raises:
        InputError: as `read_scan`, or the resampled scan would be too large.
    """
    header = check_header(path)
    shape = resampled_shape(header.shape, header.spacing, spacing)
    limit = min(MAX_VOXELS, MAX_GROWTH * math.prod(header.shape))
    in_between = header.shape[0] * math.prod(shape[1:])
    if math.prod(shape) > limit or in_between > MAX_VOXELS or max(shape) > MAX_LENGTH:
        raise InputError(
            f"{path}: expected a spacing with at most {limit} voxels at {spacing} mm, got {shape}"
        )
    return resample(_read(Path(path), header), spacing)


def hu_problem(voxels: np.ndarray) -> str:
    """Why the values of a chest CT are no HU; empty if they may be.

    A chest holds air, so the lowest values are about -1000.
    """
    step = max(1, voxels.size // 10**6)
    sample = voxels.ravel(order="K")[::step]
    low, high = float(np.percentile(sample, 1)), int(sample.max())
    if low <= _DENSEST_AIR:
        return ""
    if low >= 0 and high <= 255:
        return f"values of {low:.0f} to {high} are no HU; store the scan with its HU"
    if low >= -100 and high > 1000:
        return f"values look like HU + 1024 (air is {low:.0f}, not -1000); subtract 1024"
    return f"expected air of about -1000 HU, got {low:.0f} as the lowest values"


def _read(path: Path, header: Header) -> Volume:
    for warning in header.warnings:
        warnings.warn(warning, InputWarning, stacklevel=3)
    voxels = _as_hu(path, header.read())
    return Volume(voxels, header.spacing, header.origin, header.direction)


def _as_hu(path: Path, stored: np.ndarray) -> np.ndarray:
    if stored.dtype.kind == "i" and stored.dtype.itemsize == 2:
        return stored.astype(np.int16, copy=False)
    voxels = np.empty(stored.shape, np.int16)
    clipped = 0
    for target, slice_ in zip(voxels, stored, strict=True):
        low, high = slice_.min(), slice_.max()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{path}: expected finite HU, got NaN or infinity")
        rounded = np.rint(slice_)
        if low < _INT16.min or high > _INT16.max:
            clipped += int(((rounded < _INT16.min) | (rounded > _INT16.max)).sum())
            rounded = rounded.clip(_INT16.min, _INT16.max)
        target[:] = rounded
    if clipped:
        warnings.warn(
            f"{path}: {clipped} voxels outside of -32768 ... 32767 HU are clipped",
            InputWarning,
            stacklevel=4,
        )
    return voxels


def _suffix(name: str) -> str:
    """The suffix of a scan as supported, in lower case; empty for other files."""
    return next((suffix for suffix in _READERS if name.lower().endswith(suffix)), "")
