"""The checked header of a scan in any format, and the checks that all formats share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmkernels.focalmix.errors import InputError

MAX_VOXELS = 2**31
"""Maximum number of voxels of a scan, as stored, as resampled and in between (4 GiB of int16)."""

MAX_LENGTH = 2**15
"""Maximum number of voxels along an axis of a scan, as stored or as resampled."""

MAX_GROWTH = 1000
"""Maximum growth of the number of voxels by resampling: no few bytes may become gigabytes."""

MAX_COMPRESSION = 200
"""Maximum ratio of the bytes of voxels and of a compressed file, from `MIN_BOMB` bytes on."""

MIN_BOMB = 2**28
"""Bytes of voxels below which any compression is accepted."""

SPACINGS = (1e-3, 1e3)
"""Minimum and maximum spacing of voxels in mm."""

HU_TYPE = "a type of HU, which are signed (from HU + 1024 subtract 1024; keep label maps elsewhere)"
"""What the type of voxels may be, for messages."""

_KINDS = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (128, b"DICM", "a DICOM file; give the folder of its series"),
    (344, b"n+1\0", "a NIfTI file; name it .nii"),
    (4, b"n+2\0", "a NIfTI file; name it .nii"),
    (0, b"NRRD", "an NRRD file; name it .nrrd"),
    (0, b"ObjectType", "a MetaImage header; name it .mhd"),
    (0, b"NDims", "a MetaImage header; name it .mhd"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it, or name it .nii.gz if it holds NIfTI"),
    (0, b"PK\x03\x04", "a ZIP archive; unpack it"),
    (0, b"<", "a web page or XML"),
)


@dataclass(frozen=True)
class Header:
    """The checked header of a scan: its files, its grid as in `Volume`."""

    files: tuple[Path, ...]
    """All files that hold the scan."""
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[tuple[float, ...], ...]
    read: Callable[[], np.ndarray]
    """Reads the voxels [D, H, W], in the stored type."""
    warnings: tuple[str, ...] = ()
    """What is suspicious, each a line that names the file."""


def check_grid(
    where: object,
    names: Sequence[str],
    size: Sequence[int],
    spacing: Sequence[float],
    origin: Sequence[float],
    direction: np.ndarray,
) -> None:
    """Check size, spacing, origin (x, y, z) and direction (a column per axis) of a scan.

    Args:
        where: the file, for messages.
        names: what the four are called in this format.

    Raises:
        InputError: names the file and the field, what was expected and what came.
    """

    def expect(name: str, expected: str, holds: bool, value: Sequence[float]) -> None:
        if not holds:
            got = " ".join(
                f"{number:g}" if isinstance(number, float) else str(number) for number in value
            )
            raise InputError(f"{where}: {name}: expected {expected}, got {got}")

    is_size = len(size) == 3 and 0 < math.prod(size) <= MAX_VOXELS and max(size) <= MAX_LENGTH
    expect(
        names[0],
        f"3 positive integers, each at most {MAX_LENGTH}, at most {MAX_VOXELS} voxels",
        is_size and min(size) > 0,
        size,
    )
    low, high = SPACINGS
    fits = all(low <= step <= high for step in spacing)
    expect(names[1], f"3 numbers of {low:g} to {high:g} (mm)", fits, spacing)
    expect(names[2], "3 finite numbers", bool(np.isfinite(origin).all()), origin)
    orthonormal = np.allclose(direction.T @ direction, np.eye(3), atol=1e-3)
    expect(names[3], "an orthonormal matrix", orthonormal, direction.ravel().tolist())


def check_compression(path: Path, voxel_bytes: int) -> None:
    """Refuse a compressed file that would become gigabytes."""
    size = path.stat().st_size
    if voxel_bytes > max(MIN_BOMB, MAX_COMPRESSION * size):
        raise InputError(
            f"{path}: expected at most {MAX_COMPRESSION} bytes of voxels per compressed byte, got "
            f"{voxel_bytes} of {size}; if the scan is right, store it uncompressed"
        )


def check_slices(path: Path, deviation: float, spacing: float) -> tuple[str, ...]:
    """Warnings about slices that are not evenly spaced.

    Args:
        path: the file, for messages.
        deviation: the largest distance of a slice from its place in an even stack, in mm.
        spacing: the spacing of the slices in mm.

    Raises:
        InputError: the deviation is more than half a slice.
    """
    text = f"slices lie up to {deviation:.3g} mm beside their places ({spacing:.3g} mm apart)"
    if not deviation <= spacing / 2:
        raise InputError(f"{path}: expected evenly spaced slices, got some missing: {text}")
    return (f"{path}: {text}",) if deviation > spacing / 10 else ()


def kind_of(path: Path) -> str:
    """What a file is by its first bytes, for a message."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    for offset, magic, kind in _KINDS:
        if head[offset : offset + len(magic)] == magic:
            return kind
    return "text" if head.isascii() and b"\0" not in head else "other data"


def printable(text: str) -> str:
    """The beginning of a text, fit for a message of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])
