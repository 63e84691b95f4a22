"""Scan files: MetaImage headers are checked before any voxel is read.

A scan is a header ``.mhd`` beside one raw file of signed 16-bit HU, as in LUNA16. Other element
types are refused even if their values would fit: lung masks and unscaled detector values have them.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmkernels.focalmix.data.volume import Volume, resample, resampled_shape
from fmkernels.focalmix.errors import InputError

MAX_VOXELS = 2**31
"""Maximum number of voxels of a scan, as stored, as resampled and in between (4 GiB of int16)."""

MAX_LENGTH = 2**15
"""Maximum number of voxels along an axis of a scan, as stored or as resampled."""

MAX_GROWTH = 1000
"""Maximum growth of the number of voxels by resampling: no few bytes may become gigabytes."""

SPACINGS = (1e-3, 1e3)
"""Minimum and maximum spacing of voxels in mm."""

_MAX_HEADER_BYTES = 1 << 16


class Header(NamedTuple):
    """The checked header of a scan: its raw file, and the grid as in `Volume`."""

    raw: Path
    offset: int
    """Bytes in the raw file before the voxels."""
    dtype: np.dtype
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[tuple[float, ...], ...]


def check_header(path: Path) -> Header:
    """Read a header, check it and the size of its raw file; raise InputError as `read_scan`."""
    if not path.is_file():
        raise InputError(f"{path}: expected a MetaImage header (.mhd), found no such file")
    with open(path, "rb") as file:
        text = file.read(_MAX_HEADER_BYTES).decode("utf-8", "surrogateescape")
    fields: dict[str, str] = {}
    repeated = ""

    def expect(name: str, expected: str, holds: bool) -> None:
        if not holds:
            value = _printable(fields.get(name, "")) or "nothing"
            raise InputError(f"{path}: {name}: expected {expected}, got {value}")

    for line in re.split("[\r\n]+", text):
        name, *value = (part.strip() for part in re.split("[=:]", line, maxsplit=1))
        repeated = repeated or (name if name in fields else "")
        fields[name] = "".join(value)
        if name == "ElementDataFile":
            break

    def numbers(name: str, count: int) -> np.ndarray:
        try:
            values = np.array([float(word) for word in fields.get(name, "").split()])
        except ValueError:
            values = np.empty(0)
        valid = len(values) == count and bool(np.isfinite(values).all())
        expect(name, f"{count} finite numbers", valid)
        return values

    def flag(name: str, default: str = "False") -> bool:
        value = fields.get(name, default).lower()
        expect(name, "True or False", value in ("true", "false", "1", "0"))
        return value in ("true", "1")

    expect("NDims", "3", fields.get("NDims") == "3")
    if repeated:
        raise InputError(f"{path}: {_printable(repeated)}: expected this field once, got it again")
    expect("ElementNumberOfChannels", "1", fields.get("ElementNumberOfChannels", "1") == "1")
    expect("ElementType", "MET_SHORT (signed 16-bit HU)", fields.get("ElementType") == "MET_SHORT")
    expect("CompressedData", "False", not flag("CompressedData"))
    expect("BinaryData", "True", flag("BinaryData", "True"))
    big_endian = flag("BinaryDataByteOrderMSB") or flag("ElementByteOrderMSB")
    match = re.fullmatch(r"(\d{1,9})\s+(\d{1,9})\s+(\d{1,9})", fields.get("DimSize", ""), re.ASCII)
    size = tuple(map(int, match.groups())) if match else (0,)
    voxels = math.prod(size)
    expect(
        "DimSize",
        f"3 positive integers, each at most {MAX_LENGTH}, at most {MAX_VOXELS} voxels",
        0 < voxels <= MAX_VOXELS and max(size) <= MAX_LENGTH,
    )
    spacing = numbers("ElementSpacing", 3)
    low, high = SPACINGS
    fits = bool(((spacing >= low) & (spacing <= high)).all())
    expect("ElementSpacing", f"3 numbers of {low:g} to {high:g} (mm)", fits)
    origin = numbers("Offset", 3)
    axes = numbers("TransformMatrix", 9).reshape(3, 3)  # one row per axis
    orthonormal = np.allclose(axes @ axes.T, np.eye(3), atol=1e-3)
    expect("TransformMatrix", "an orthonormal matrix", orthonormal)
    header_size = fields.get("HeaderSize", "0")
    is_integer = re.fullmatch(r"-?\d{1,18}", header_size, re.ASCII) is not None
    expect("HeaderSize", "an integer", is_integer)
    offset = max(int(header_size), 0)

    name = fields.get("ElementDataFile", "")
    bare = (
        re.fullmatch(r"[^/\\:%]+", name)
        and name not in (".", "..")
        and name.upper() not in ("LOCAL", "LIST")
    )
    expect("ElementDataFile", "the name of a file in the same folder", bool(bare))
    raw = path.parent / name
    if not os.path.isfile(raw):  # Path.is_file raises if a name is too long
        raise InputError(
            f"{path}: ElementDataFile: expected {_printable(name)} beside the header, "
            "found no such file"
        )
    expected = 2 * voxels + offset
    if (got := raw.stat().st_size) != expected:
        raise InputError(
            f"{raw}: expected {expected} bytes (DimSize {fields['DimSize']} of MET_SHORT), "
            f"got {got}"
        )
    return Header(
        raw,
        offset,
        np.dtype(">i2" if big_endian else "<i2"),
        size[::-1],
        tuple(spacing[::-1].tolist()),
        tuple(origin.tolist()),
        tuple(map(tuple, axes.T.tolist())),
    )


def _printable(text: str) -> str:
    """The beginning of a text, fit for a message of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])


def read_scan(path: str | Path) -> Volume:
    """Read a scan on its stored grid.

    The header and the size of the raw file are checked before any memory is allocated. No second
    parser reads the header, so none can find another file or size in it.

    Raises:
        InputError: names the file and the field of the header, what was expected and what came.
    """
    return _read(check_header(Path(path)))


def _read(header: Header) -> Volume:
    count = math.prod(header.shape)
    voxels = np.fromfile(header.raw, header.dtype, count, offset=header.offset)
    if voxels.size != count:
        raise InputError(
            f"{header.raw}: expected a file that stays as it is, but it changed while it was read"
        )
    voxels = voxels.astype(np.int16, copy=False).reshape(header.shape)
    return Volume(voxels, header.spacing, header.origin, header.direction)


def load_volume(path: str | Path, spacing: Sequence[float]) -> Volume:
    """Read a scan and resample it to ``spacing`` (z, y, x, mm), without a cache.

    Raises:
        InputError: as `read_scan`, or the resampled scan would be too large.
    """
    header = check_header(Path(path))
    shape = resampled_shape(header.shape, header.spacing, spacing)
    limit = min(MAX_VOXELS, MAX_GROWTH * math.prod(header.shape))
    in_between = header.shape[0] * math.prod(shape[1:])
    if math.prod(shape) > limit or in_between > MAX_VOXELS or max(shape) > MAX_LENGTH:
        raise InputError(
            f"{path}: ElementSpacing: expected at most {limit} voxels at {spacing} mm, got {shape}"
        )
    return resample(_read(header), spacing)
