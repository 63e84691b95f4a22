"""MetaImage: a header ``.mhd`` beside a file of voxels, or both in one ``.mha``.

The header is read here and not by ITK, so that no second parser finds another file or size in it.
"""

import math
import os
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from fmkernels.focalmix.data.headers import (
    HU_TYPE,
    Header,
    check_compression,
    check_grid,
    check_slices,
    kind_of,
    printable,
)
from fmkernels.focalmix.errors import InputError

_MAX_HEADER_BYTES = 1 << 16
_DEVIATION = "ITK_non_uniform_sampling_deviation"
_TYPES = {
    "MET_SHORT": "i2",
    "MET_INT": "i4",
    "MET_LONG": "i4",
    "MET_LONG_LONG": "i8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_UNSIGNED = ("MET_UCHAR", "MET_USHORT", "MET_UINT", "MET_ULONG", "MET_ULONG_LONG")


def metaimage_header(path: Path) -> Header:
    """Read a header, check it and the size of its file of voxels.

    Raises:
        InputError: names the file and the field of the header, what was expected and what came.
    """
    with open(path, "rb") as file:
        data = file.read(_MAX_HEADER_BYTES)
    fields: dict[str, str] = {}
    repeated = ""
    end = 0
    for line in re.finditer(rb"[^\r\n]*(?:\r?\n|\r|$)", data):
        text = line[0].decode("utf-8", "surrogateescape")
        name, *value = (part.strip() for part in re.split("[=:]", text, maxsplit=1))
        repeated = repeated or (name if name and name in fields else "")
        fields[name] = "".join(value)
        end = line.end()
        if name == "ElementDataFile":
            break

    def expect(name: str, expected: str, holds: bool) -> None:
        if not holds:
            value = printable(fields.get(name, "")) or "nothing"
            raise InputError(f"{path}: {name}: expected {expected}, got {value}")

    def numbers(name: str, count: int) -> np.ndarray:
        try:
            values = np.array([float(word) for word in fields.get(name, "").split()])
        except ValueError:
            values = np.empty(0)
        valid = len(values) == count and bool(np.isfinite(values).all())
        expect(name, f"{count} finite number{'s' * (count > 1)}", valid)
        return values

    def flag(name: str, default: str = "False") -> bool:
        value = fields.get(name, default).lower()
        expect(name, "True or False", value in ("true", "false", "1", "0"))
        return value in ("true", "1")

    if "NDims" not in fields:
        raise InputError(f"{path}: expected a MetaImage header, got {kind_of(path)}")
    expect("NDims", "3", fields.get("NDims") == "3")
    if repeated:
        raise InputError(f"{path}: {printable(repeated)}: expected this field once, got it again")
    expect("ElementNumberOfChannels", "1", fields.get("ElementNumberOfChannels", "1") == "1")
    kind = fields.get("ElementType", "")
    expect("ElementType", HU_TYPE, kind not in _UNSIGNED)
    expect("ElementType", f"one of {', '.join(_TYPES)}", kind in _TYPES)
    is_compressed = flag("CompressedData")
    expect("BinaryData", "True", flag("BinaryData", "True"))
    big_endian = flag("BinaryDataByteOrderMSB") or flag("ElementByteOrderMSB")
    dtype = np.dtype((">" if big_endian else "<") + _TYPES[kind])
    match = re.fullmatch(
        r"(\d{1,18})\s+(\d{1,18})\s+(\d{1,18})", fields.get("DimSize", ""), re.ASCII
    )
    expect("DimSize", "3 positive integers", match is not None)
    assert match is not None
    size = tuple(map(int, match.groups()))
    spacing, origin = numbers("ElementSpacing", 3), numbers("Offset", 3)
    axes = numbers("TransformMatrix", 9).reshape(3, 3)  # one row per axis
    names = ("DimSize", "ElementSpacing", "Offset", "TransformMatrix")
    check_grid(path, names, size, spacing.tolist(), origin.tolist(), axes.T)
    warnings: tuple[str, ...] = ()
    if _DEVIATION in fields:
        warnings = check_slices(path, float(numbers(_DEVIATION, 1)[0]), float(spacing[2]))

    header_size = fields.get("HeaderSize", "0")
    is_integer = re.fullmatch(r"-?\d{1,18}", header_size, re.ASCII) is not None
    expect("HeaderSize", "an integer", is_integer)
    offset = max(int(header_size), 0)
    name = fields.get("ElementDataFile", "")
    if is_local := path.suffix.lower() == ".mha":
        expect("ElementDataFile", "LOCAL", name == "LOCAL")
        expect("HeaderSize", "0", offset == 0)
        raw, offset = path, end
    else:
        bare = (
            re.fullmatch(r"[^/\\:%]+", name)
            and name not in (".", "..")
            and name.upper() not in ("LOCAL", "LIST")
        )
        expect("ElementDataFile", "the name of a file in the same folder", bool(bare))
        raw = path.parent / name
        if not os.path.isfile(raw):  # Path.is_file raises if a name is too long
            raise InputError(
                f"{path}: ElementDataFile: expected {printable(name)} beside the header, "
                "found no such file"
            )
    expected = math.prod(size) * dtype.itemsize
    if is_compressed:
        check_compression(raw, expected)
    elif (got := raw.stat().st_size) != expected + offset:
        if (kind_found := kind_of(raw)).startswith("a Git LFS"):
            raise InputError(f"{raw}: expected voxels, got {kind_found}")
        raise InputError(
            f"{raw}: expected {expected + offset} bytes (DimSize {fields['DimSize']} of {kind}), "
            f"got {got}"
        )
    read = _inflate if is_compressed else _read
    return Header(
        (path,) if is_local else (path, raw),
        size[::-1],
        tuple(spacing[::-1].tolist()),
        tuple(origin.tolist()),
        tuple(map(tuple, axes.T.tolist())),
        partial(read, raw, offset, dtype, size[::-1]),
        warnings,
    )


def _read(raw: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    voxels = np.fromfile(raw, dtype, count, offset=offset)
    if voxels.size != count:
        raise InputError(
            f"{raw}: expected a file that stays as it is, but it changed while it was read"
        )
    return voxels.reshape(shape)


def _inflate(raw: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    expected = math.prod(shape) * dtype.itemsize
    with open(raw, "rb") as file:
        file.seek(offset)
        packed = file.read()
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib or gzip
    try:
        data = stream.decompress(packed, expected + 1)
    except zlib.error as error:
        raise InputError(f"{raw}: expected voxels compressed by zlib: {error}") from None
    if len(data) != expected or not stream.eof:
        got = "more" if len(data) > expected else f"{len(data)}"
        raise InputError(f"{raw}: expected {expected} bytes of voxels, got {got}")
    return np.frombuffer(data, dtype).reshape(shape)
