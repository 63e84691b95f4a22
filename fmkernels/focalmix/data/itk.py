"""NIfTI and NRRD, read by SimpleITK after the checks that it leaves out."""

import contextlib
import gzip
import math
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fmkernels.focalmix.data.headers import (
    HU_TYPE,
    Header,
    check_compression,
    check_grid,
    check_slices,
    kind_of,
)
from fmkernels.focalmix.errors import InputError

_DEVIATION = "ITK_non_uniform_sampling_deviation"
_NIFTI_BYTES = 348  # of the header
_NRRD_BYTES = 1 << 16  # of the header, at most
_NRRD_LINE = 1000  # bytes: longer lines can crash ITK's reader (5.4)
_BLOCK = 1 << 20
_MAX_TAIL = 1 << 24  # bytes behind the voxels


def simpleitk() -> ModuleType:
    """SimpleITK, imported here alone, without the warnings that it prints."""
    import SimpleITK

    SimpleITK.ProcessObject_SetGlobalWarningDisplay(False)
    return SimpleITK


@contextlib.contextmanager
def itk_errors(path: Path) -> Iterator[None]:
    """Make an error of SimpleITK in the block an InputError that names ``path``."""
    try:
        yield
    except RuntimeError as error:
        # the last line says most
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = re.sub(r"^.*?\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else "no reason given"
        raise InputError(f"{path}: cannot be read: {reason}") from None


def read_voxels(reader: Any, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The voxels [D, H, W] of a reader of SimpleITK, of the shape that the header says.

    Args:
        reader: any reader, with its file names set.
        path: the scan, for messages.
        shape: the shape of the voxels.

    Raises:
        InputError: they cannot be read, or have another shape.
    """
    with itk_errors(path):
        voxels = simpleitk().GetArrayFromImage(reader.Execute())
    if voxels.shape != shape:
        raise InputError(
            f"{path}: expected a scan that stays as it is, but it changed while it was read"
        )
    return voxels


def nifti_header(path: Path) -> Header:
    """Read a header of NIfTI (``.nii``, ``.nii.gz``) and check that the voxels are complete.

    Raises:
        InputError: names the file and the field of the header, what was expected and what came.
    """
    is_packed = path.suffix.lower() == ".gz"
    if is_packed and kind_of(path).partition(" archive")[0] != "a gzip":
        raise InputError(f"{path}: expected NIfTI in a gzip archive, got {kind_of(path)}")
    try:
        with gzip.open(path) if is_packed else open(path, "rb") as file:
            head = file.read(_NIFTI_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected NIfTI in a gzip archive: {error}") from None
    if head[344:348] != b"n+1\0" and head[4:8] != b"n+2\0":
        pair = "the header of a NIfTI pair (.hdr and .img); convert it to one .nii.gz"
        found = pair if head[344:348] == b"ni1\0" else kind_of(path)
        raise InputError(f"{path}: expected a NIfTI file, got {found}")
    warnings: tuple[str, ...] = ()
    if head[344:348] == b"n+1\0" and not any(head[252:256]):  # qform_code, sform_code
        warnings = (f"{path}: the header does not say how the scan lies (qform and sform are 0)",)
    header = _header(path, "NiftiImageIO")
    expected = _stored_bytes(path, head, math.prod(header.shape))
    if is_packed:
        check_compression(path, expected)
    elif (size := path.stat().st_size) < expected:
        raise InputError(
            f"{path}: expected at least {expected} bytes, got {size}; is the copy complete?"
        )
    read = partial(_read_packed, path, expected, header.shape) if is_packed else header.read
    return replace(header, read=read, warnings=warnings + header.warnings)


def _stored_bytes(path: Path, head: bytes, voxels: int) -> int:
    """Size of a NIfTI file by its header."""
    order = "<" if struct.unpack("<i", head[:4])[0] in (348, 540) else ">"
    bits_at, offset_at, kind = (14, 168, "q") if head[4:8] == b"n+2\0" else (72, 108, "f")
    (bits,) = struct.unpack_from(f"{order}h", head, bits_at)
    (offset,) = struct.unpack_from(f"{order}{kind}", head, offset_at)
    if not math.isfinite(offset):
        raise InputError(f"{path}: vox_offset: expected a finite number, got {offset}")
    return int(offset) + voxels * bits // 8


def nrrd_header(path: Path) -> Header:
    """Read a header of NRRD with its voxels in the same file (``.nrrd``).

    Raises:
        InputError: names the file and the field of the header, what was expected and what came.
    """
    with open(path, "rb") as file:
        data = file.read(_NRRD_BYTES)
    if not data.startswith(b"NRRD"):
        raise InputError(f"{path}: expected an NRRD file, got {kind_of(path)}")
    text, blank, _ = data.replace(b"\r", b"").partition(b"\n\n")
    if not blank or re.search(rb"^\s*data\s*file", text, re.I | re.M):
        raise InputError(
            f"{path}: data file: expected voxels in the file itself, got a header without them"
        )
    if (longest := max(map(len, text.split(b"\n")))) > _NRRD_LINE:
        raise InputError(
            f"{path}: expected lines of at most {_NRRD_LINE} bytes in the header, got {longest}"
        )
    warnings: tuple[str, ...] = ()
    if not re.search(rb"^space:", text, re.I | re.M):
        warnings = (f"{path}: the header does not say how the scan lies (no field space)",)
    header = _header(path, "NrrdImageIO")
    if not re.search(rb"^encoding:\s*raw\s*$", text, re.I | re.M):
        check_compression(path, 2 * math.prod(header.shape))  # at least
    return replace(header, warnings=warnings + header.warnings)


def _header(path: Path, kind: str) -> Header:
    """The checked header, as ITK reads it."""
    sitk = simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO(kind)
    with _lower_case(path) as name, itk_errors(path):
        reader.SetFileName(name)
        reader.ReadImageInformation()
    if reader.GetDimension() != 3:
        raise InputError(f"{path}: expected 3 dimensions, got {reader.GetDimension()}")
    if (channels := reader.GetNumberOfComponents()) != 1:
        raise InputError(f"{path}: expected 1 channel, got {channels}")
    type_ = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if not re.fullmatch(r"(16|32|64)-bit (signed integer|float)", type_):
        raise InputError(f"{path}: expected {HU_TYPE}, got {type_}")
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    size, spacing, origin = reader.GetSize(), reader.GetSpacing(), reader.GetOrigin()
    check_grid(path, ("size", "spacing", "origin", "direction"), size, spacing, origin, direction)
    warnings: tuple[str, ...] = ()
    if reader.HasMetaDataKey(_DEVIATION):
        warnings = check_slices(path, float(reader.GetMetaData(_DEVIATION)), spacing[2])
    return Header(
        (path,),
        size[::-1],
        spacing[::-1],
        origin,
        tuple(map(tuple, direction.tolist())),
        partial(_read, path, kind, size[::-1]),
        warnings,
    )


def _read(path: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    reader = simpleitk().ImageFileReader()
    reader.SetImageIO(kind)
    with _lower_case(path) as name:
        reader.SetFileName(name)
        return read_voxels(reader, path, shape)


def _read_packed(path: Path, expected: int, shape: tuple[int, ...]) -> np.ndarray:
    """ITK reads zeros where the archive ends too early: check its length and its checksum first."""
    length = 0
    try:
        with gzip.open(path) as file:
            while length <= expected + _MAX_TAIL and (block := file.read(_BLOCK)):
                length += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a complete gzip archive: {error}") from None
    if not expected <= length <= expected + _MAX_TAIL:
        got = f"{length}" if length < expected else "many more"
        raise InputError(f"{path}: expected {expected} bytes in the archive, got {got}")
    return _read(path, "NiftiImageIO", shape)


@contextlib.contextmanager
def _lower_case(path: Path) -> Iterator[str]:
    """The name of a file for ITK, which knows NIfTI by suffixes in lower case alone."""
    lower = "".join(path.suffixes[-2:]).lower()
    if path.name.endswith(lower):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"scan{lower}")
        os.symlink(path.absolute(), link)
        yield str(link)
