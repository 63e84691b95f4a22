"""A DICOM series: a folder with one file per slice, read by SimpleITK."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fmkernels.focalmix.data.headers import Header, check_grid, printable
from fmkernels.focalmix.data.itk import itk_errors, read_voxels, simpleitk
from fmkernels.focalmix.errors import InputError

_MODALITY, _SERIES = "0008|0060", "0020|000e"
_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_SAME = {
    "0028|0010": "Rows",
    "0028|0011": "Columns",
    "0028|0030": "PixelSpacing",
    _ORIENTATION: "ImageOrientationPatient",
}
_NAMES = {
    _MODALITY: "Modality",
    _SERIES: "SeriesInstanceUID",
    _POSITION: "ImagePositionPatient",
    "0028|0008": "NumberOfFrames",
    **_SAME,
}


def is_dicom(path: Path) -> bool:
    """Whether a file begins as a DICOM file; the directory of a medium is none."""
    if path.name.upper() == "DICOMDIR":
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def series_id(folder: Path) -> str:
    """The id of the series that the first DICOM file of a folder belongs to.

    Raises:
        InputError: the folder holds no DICOM file, or its first one names no series.
    """
    file = next((file for file in sorted(folder.iterdir()) if is_dicom(file)), None)
    if file is None:
        raise InputError(f"{folder}: expected the slices of a DICOM series, found none")
    tags = _tags(simpleitk(), file)
    _expect(file, tags, _SERIES, "a series id", bool(tags.get(_SERIES)))
    return tags[_SERIES]


def dicom_header(folder: Path) -> Header:
    """Read the headers of all slices in a folder and check that they are one even stack of CT.

    Raises:
        InputError: names the slice: there is another series; a slice is missing, twice or
            different; the gantry was tilted; it is not CT; there is only one slice.
    """
    sitk = simpleitk()
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise InputError(f"{folder}: expected the slices of a DICOM series, found none")
    if len(series) > 1:
        first, second = (
            Path(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)[0]).name
            for uid in series[:2]
        )
        raise InputError(
            f"{folder}: expected one DICOM series, got {len(series)}: {first} is of {series[0]}, "
            f"{second} of {series[1]}; move each to a folder of its own"
        )
    files = tuple(map(Path, sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])))
    slices = [_tags(sitk, file) for file in files]
    for file, tags in zip(files, slices, strict=True):
        _expect(file, tags, _MODALITY, "CT", tags.get(_MODALITY) == "CT")
        frames = tags.get("0028|0008", "1")
        _expect(file, tags, "0028|0008", "one file per slice; convert it to .nii.gz", frames == "1")
        for tag, name in _SAME.items():
            if tags.get(tag) != slices[0].get(tag):
                raise InputError(
                    f"{file}: {name}: expected {printable(slices[0].get(tag, 'none'))} as in "
                    f"{files[0].name}, got {printable(tags.get(tag, 'none'))}"
                )
    if len(files) == 1:
        raise InputError(f"{folder}: expected the slices of a DICOM series, found one slice")
    row, column = _numbers(files[0], slices[0], _ORIENTATION, 6).reshape(2, 3)
    normal = np.cross(row, column)
    places = zip(files, slices, strict=True)
    positions = np.array([_numbers(file, tags, _POSITION, 3) for file, tags in places])
    order = np.argsort(positions @ normal, kind="stable")
    files, positions = tuple(files[k] for k in order), positions[order]
    in_plane = _numbers(files[0], slices[0], "0028|0030", 2)  # y, x
    rows, columns = (int(slices[0][tag]) for tag in ("0028|0010", "0028|0011"))
    spacing, warnings = _slice_spacing(files, positions, normal, float(in_plane.min()))
    direction = np.column_stack([row, column, normal])
    size = columns, rows, len(files)
    check_grid(
        folder,
        ("size", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
        size,
        (float(in_plane[1]), float(in_plane[0]), spacing),
        positions[0].tolist(),
        direction,
    )
    return Header(
        files,
        size[::-1],
        (spacing, float(in_plane[0]), float(in_plane[1])),
        tuple(positions[0].tolist()),
        tuple(map(tuple, direction.tolist())),
        partial(_read, files, size[::-1]),
        warnings,
    )


def _slice_spacing(
    files: Sequence[Path], positions: np.ndarray, normal: np.ndarray, pixel: float
) -> tuple[float, tuple[str, ...]]:
    """The spacing of the slices, and warnings about uneven ones."""
    along = positions @ normal
    steps = np.diff(along)
    usual = float(np.median(steps))
    if not steps.min() > 0.01 * usual > 0:
        k = int(np.argmin(steps))
        raise InputError(
            f"{files[k + 1]}: expected slices at different places, got the place of "
            f"{files[k].name} again"
        )
    k = int(np.argmax(np.abs(steps - usual)))
    text = f"{steps[k]:.3g} mm after {files[k].name} where others are {usual:.3g} mm apart"
    if abs(steps[k] - usual) > usual / 2:
        raise InputError(f"{files[k + 1]}: expected evenly spaced slices, got one {text}")
    offsets = positions - positions[0] - np.outer(along - along[0], normal)
    if (shift := float(np.abs(offsets).max())) > pixel:
        angle = np.degrees(np.arctan2(shift, along[-1] - along[0]))
        raise InputError(
            f"{files[-1]}: expected slices above one another, got one shifted by {shift:.3g} mm "
            f"(gantry tilt of {angle:.1f} degrees); resample the series first"
        )
    uneven = abs(steps[k] - usual) > usual / 10
    spacing = float((along[-1] - along[0]) / (len(files) - 1))
    return spacing, (f"{files[k + 1]}: the slice lies {text}",) if uneven else ()


def _tags(sitk: Any, file: Path) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    with itk_errors(file):
        reader.ReadImageInformation()
    return {tag: reader.GetMetaData(tag).strip() for tag in _NAMES if reader.HasMetaDataKey(tag)}


def _expect(file: Path, tags: dict[str, str], tag: str, expected: str, holds: bool) -> None:
    if not holds:
        got = printable(tags.get(tag, "")) or "nothing"
        raise InputError(f"{file}: {_NAMES[tag]}: expected {expected}, got {got}")


def _numbers(file: Path, tags: dict[str, str], tag: str, count: int) -> np.ndarray:
    try:
        values = np.array([float(part) for part in tags.get(tag, "").split("\\")])
    except ValueError:
        values = np.empty(0)
    valid = len(values) == count and bool(np.isfinite(values).all())
    _expect(file, tags, tag, f"{count} numbers", valid)
    return values


def _read(files: Sequence[Path], shape: tuple[int, ...]) -> np.ndarray:
    reader = simpleitk().ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(file) for file in files])
    return read_voxels(reader, files[0].parent, shape)
