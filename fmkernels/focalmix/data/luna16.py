"""LUNA16's folder of CT scans: read, checked, resampled to one spacing, and kept on disk as memory maps.

Arrays are z, y, x and hold Hounsfield units (HU) as int16; world points are x, y, z in mm, LPS.
"""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import SimpleITK as sitk
from tqdm import tqdm

from fmkernels.focalmix.data.workers import process_pool
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.froc import UNKNOWN_DIAMETER, Froc, evaluate, read_findings
from fmkernels.focalmix.files import atomic_write

AIR = -1024
"""HU of air: the least value of a resampled scan, and what a patch holds outside of its scan."""

MAX_VOXELS = 2**31
"""A scan of more voxels than this, as stored, as resampled or on the way there, is refused (4 GiB of int16)."""

MAX_LENGTH = 2**15
"""Voxels along an axis of a scan, as stored or as resampled: more are refused."""

MAX_GROWTH = 1000
"""A scan that would have so many times its voxels once resampled is refused: a few bytes must not become gigabytes."""

SPACINGS = (1e-3, 1e3)
"""Millimetres between voxels: less or more is refused."""

WORTH_A_PROCESS = 1 << 26
"""Bytes of scans to resample that are worth the start of another process."""

_SUBSETS = range(10)
_TABLE_FOLDERS = (
    "",
    "CSVFILES",
    "evaluationScript/annotations",
    "evaluationScript/evaluationScript/annotations",
)
_MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan on an axis-aligned grid of its own: voxels and where they lie in the world.

    The grid keeps the direction of the scan, so a flipped scan stays flipped and `to_world` knows it.
    """

    voxels: np.ndarray
    """int16 [D, H, W], HU; a read-only ``np.memmap`` where it comes from the cache."""
    spacing: tuple[float, ...]
    """Millimetres from voxel to voxel along z, y, x."""
    origin: tuple[float, ...]
    """World x, y, z of the centre of voxel (0, 0, 0)."""
    direction: tuple[tuple[float, ...], ...]
    """3 x 3, row by row; column j is the world direction of the grid's axis x, y, z (orthonormal)."""

    def to_index(self, world: np.ndarray) -> np.ndarray:
        """World points [n, 3] (x, y, z) as continuous indices float64 [n, 3] (z, y, x), integer at voxel centres."""
        offset = np.asarray(world, dtype=np.float64).reshape(-1, 3) - self.origin
        return (offset @ np.linalg.inv(self.direction).T)[:, ::-1] / self.spacing

    def to_world(self, index: np.ndarray) -> np.ndarray:
        """Continuous indices [n, 3] (z, y, x) as world points float64 [n, 3] (x, y, z): the inverse of `to_index`."""
        offset = (np.asarray(index, dtype=np.float64).reshape(-1, 3) * self.spacing)[:, ::-1]
        return offset @ np.transpose(self.direction) + self.origin

    def boxes(self, nodules: np.ndarray) -> np.ndarray:
        """The cubes of the nodules' diameters as half-open boxes of this grid.

        Args:
            nodules: [n, 4]: world x, y, z, diameter, in mm; a negative diameter means `froc.UNKNOWN_DIAMETER`.

        Returns:
            float32 [n, 6]: z1, y1, x1, z2, y2, x2 in voxels, voxel i covering [i, i + 1); not clipped to the grid.
        """
        nodules = np.asarray(nodules, dtype=np.float64).reshape(-1, 4)
        centre = self.to_index(nodules[:, :3]) + 0.5
        diameter = np.where(nodules[:, 3:] < 0, UNKNOWN_DIAMETER, nodules[:, 3:])
        half = diameter / 2 / self.spacing
        return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


class Header(NamedTuple):
    """What a header says of its scan."""

    raw: Path
    """The file of the voxels."""
    skip: int
    """Bytes before them."""
    dtype: np.dtype
    shape: tuple[int, ...]
    """Voxels along z, y, x."""
    spacing: Sequence[float]
    """Millimetres along x, y, z."""
    origin: Sequence[float]
    """World x, y, z of the first voxel."""
    direction: Sequence[float]
    """3 x 3, row by row; column j is the world direction of axis x, y, z."""


def check_header(path: Path) -> Header:
    """Read a header, check it and the size of its raw file; raise InputError as `read_scan`."""
    if not path.is_file():
        raise InputError(f"{path}: expected a MetaImage header (.mhd), found no such file")
    with open(path, "rb") as file:
        text = file.read(_MAX_HEADER_BYTES).decode("utf-8", "surrogateescape")
    fields: dict[str, str] = {}
    repeated = ""

    def expect(name: str, wanted: str, holds: bool) -> None:
        if not holds:
            raise InputError(
                f"{path}: {name}: expected {wanted}, got {_printable(fields.get(name, '')) or 'nothing'}"
            )

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
        expect(
            name,
            f"{count} finite numbers",
            len(values) == count and bool(np.isfinite(values).all()),
        )
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
    axes = numbers("TransformMatrix", 9).reshape(3, 3)  # a row for each axis
    expect(
        "TransformMatrix", "an orthonormal matrix", np.allclose(axes @ axes.T, np.eye(3), atol=1e-3)
    )
    header_size = fields.get("HeaderSize", "0")
    expect(
        "HeaderSize", "an integer", re.fullmatch(r"-?\d{1,18}", header_size, re.ASCII) is not None
    )
    skip = max(int(header_size), 0)

    name = fields.get("ElementDataFile", "")
    bare = (
        re.fullmatch(r"[^/\\:%]+", name)
        and name not in (".", "..")
        and name.upper() not in ("LOCAL", "LIST")
    )
    expect("ElementDataFile", "the name of a file in the same folder", bool(bare))
    raw = path.parent / name
    if not os.path.isfile(raw):  # the method of a path raises where a name is too long
        raise InputError(
            f"{path}: ElementDataFile: expected {_printable(name)} beside the header, found no such file"
        )
    expected = 2 * voxels + skip
    if (got := raw.stat().st_size) != expected:
        raise InputError(
            f"{raw}: expected {expected} bytes (DimSize {fields['DimSize']} of MET_SHORT), got {got}"
        )
    dtype = np.dtype(">i2" if big_endian else "<i2")
    shape = (size[2], size[1], size[0])
    return Header(
        raw, skip, dtype, shape, spacing.tolist(), origin.tolist(), axes.T.ravel().tolist()
    )


def _printable(text: str) -> str:
    """What a line of a message can hold of it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])


def read_scan(path: str | Path) -> sitk.Image:
    """Read a CT scan in LUNA16's form: a MetaImage header ``.mhd`` beside one raw file of signed 16-bit HU.

    The header is checked, and the raw file's size against it, before any memory is taken. What was checked is what is
    read: no other reader takes the header apart once more, and finds another file or size in it. Other element types
    are refused even where their values would fit: lung masks come as such, and unscaled detector values do.

    Raises:
        InputError: names the file and the field of the header, what was expected and what came.
    """
    return _read(check_header(Path(path)))


def _read(header: Header) -> sitk.Image:
    count = math.prod(header.shape)
    voxels = np.fromfile(header.raw, header.dtype, count, offset=header.skip)
    if voxels.size != count:
        raise InputError(
            f"{header.raw}: expected a file that stays as it is, but it changed while it was read"
        )
    image = sitk.GetImageFromArray(voxels.astype(np.int16, copy=False).reshape(header.shape))
    image.SetSpacing(header.spacing)
    image.SetOrigin(header.origin)
    image.SetDirection(header.direction)
    return image


def resample(image: sitk.Image, spacing: Sequence[float]) -> Volume:
    """Resample a scan to exactly ``spacing`` (z, y, x, mm), axis by axis of its own direction.

    Linear interpolation; where an axis gets coarser, its triangle is widened to the new spacing, which averages instead
    of skipping voxels (what image libraries call antialiasing). The new grid begins at the same outer corner as the old
    one and covers it whole, so its last voxel may stand out by less than a voxel; the scan goes on beyond its outermost
    voxels with their values. Values below `AIR` (LUNA16 pads with them) become `AIR`.

    Args:
        image: 3D, int16.
        spacing: z, y, x in mm.

    Returns:
        A `Volume` in memory.
    """
    sizes = list(zip(image.GetSize()[::-1], image.GetSpacing()[::-1], spacing, strict=True))
    shape = tuple(_resampled_length(*axis) for axis in sizes)
    weights = [
        _triangle_weights(old_length, new_length, new / old)
        for (old_length, old, new), new_length in zip(sizes, shape, strict=True)
    ]
    slices = sitk.GetArrayViewFromImage(image)
    in_plane = np.empty((len(slices), *shape[1:]), dtype=np.float32)
    for row, slice_ in zip(in_plane, slices, strict=True):
        columns = weights[1] @ np.maximum(slice_, AIR, dtype=np.float32)
        row[:] = (weights[2] @ columns.T).T
    voxels = np.empty(shape, dtype=np.int16)
    for y in range(shape[1]):
        voxels[:, y] = np.rint(weights[0] @ in_plane[:, y])
    first = [
        0.5 * new / old - 0.5 for new, old in zip(spacing[::-1], image.GetSpacing(), strict=True)
    ]
    return Volume(
        voxels=voxels,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        origin=image.TransformContinuousIndexToPhysicalPoint(first),
        direction=tuple(tuple(row) for row in np.reshape(image.GetDirection(), (3, 3)).tolist()),
    )


def _resampled_length(length: int, old: float, new: float) -> int:
    return max(1, math.ceil(length * old / new - 1e-6))


def _triangle_weights(old_length: int, new_length: int, ratio: float) -> scipy.sparse.csr_matrix:
    """Weights float32 [new, old] of linear interpolation; ``ratio`` is the new spacing over the old one."""
    centres = (np.arange(new_length) + 0.5) * ratio - 0.5
    width = max(ratio, 1.0)
    reach = math.ceil(width)
    columns = np.floor(centres)[:, None].astype(np.int64) + np.arange(1 - reach, reach + 1)
    values = np.maximum(0, 1 - np.abs(columns - centres[:, None]) / width) * (
        (columns >= 0) & (columns < old_length)
    )
    values /= values.sum(axis=1, keepdims=True)
    rows, taps = np.nonzero(values)
    triplets = (values[rows, taps].astype(np.float32), (rows, columns[rows, taps]))
    return scipy.sparse.csr_matrix(triplets, shape=(new_length, old_length))


def load_volume(path: str | Path, spacing: Sequence[float]) -> Volume:
    """Read one scan and resample it to ``spacing`` (z, y, x, mm), without a cache.

    Raises:
        InputError: as `read_scan`, or the resampled scan would be too large.
    """
    header = check_header(Path(path))
    sizes = zip(header.shape, header.spacing[::-1], spacing, strict=True)
    shape = tuple(_resampled_length(*axis) for axis in sizes)
    limit = min(MAX_VOXELS, MAX_GROWTH * math.prod(header.shape))
    between = header.shape[0] * math.prod(shape[1:])
    if math.prod(shape) > limit or between > MAX_VOXELS or max(shape) > MAX_LENGTH:
        raise InputError(
            f"{path}: ElementSpacing: expected at most {limit} voxels at {spacing} mm, got {shape}"
        )
    return resample(_read(header), spacing)


class LUNA16:
    """LUNA16, or a data set in its layout, resampled to one spacing.

    Under ``root`` are ``subset0`` ... ``subset9`` with ``<seriesuid>.mhd`` and ``.raw`` (also one folder of the same
    name deeper, as some archives unpack), ``annotations.csv``, and where they exist ``annotations_excluded.csv`` and
    ``seriesuids.csv``. The tables may also be in ``CSVFILES`` or ``evaluationScript/annotations``, as downloaded.
    Without ``seriesuids.csv`` the scans that are found are the data set. Annotations of series in subsets that are not
    there, or not asked for, are left aside.

    Resampled scans are kept in a folder ``.cache-<spacing>`` and made again when a source has changed or the kept file
    is broken. Instances are light and can be pickled.

    Args:
        root: the folder.
        spacing: z, y, x in mm.
        subsets: the subsets to use, out of 0 ... 9; default: those that are there.
        cache: the folder that takes the cache; default: ``root``.

    Raises:
        ValueError: ``spacing`` is not three positive numbers, or ``subsets`` has others than 0 ... 9.
        InputError: no such folder; a subset or ``annotations.csv`` is missing; there is no scan; a series is in two
            subsets; ``seriesuids.csv`` lacks a scan that is there, or lists one that is not though all subsets are; a
            finding's series is nowhere though all subsets are there; a table is malformed.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        subsets: Sequence[int] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        spacing = tuple(map(float, spacing))
        if len(spacing) != 3 or not all(0 < step < math.inf for step in spacing):
            raise ValueError(
                f"LUNA16: spacing: expected 3 positive numbers (z, y, x in mm), got {spacing}"
            )
        if subsets is not None and not set(subsets) <= set(_SUBSETS):
            raise ValueError(f"LUNA16: subsets: expected numbers of 0 to 9, got {list(subsets)}")
        self.root = Path(root)
        self.spacing = spacing
        self.cache = (
            Path(self.root if cache is None else cache)
            / f".cache-{'x'.join(f'{step:g}' for step in spacing)}"
        )
        if not self.root.is_dir():
            raise InputError(
                f"{self.root}: expected a folder in LUNA16's layout, found no such folder"
            )
        present = [subset for subset in _SUBSETS if (self.root / f"subset{subset}").is_dir()]
        wanted = present if subsets is None else sorted(set(subsets))
        if missing := sorted(set(wanted) - set(present)):
            raise InputError(f"{self.root}: expected a folder subset{missing[0]}, found none")
        everywhere: dict[str, tuple[int, Path]] = {}
        for subset in present:
            for path in scan_headers(self.root / f"subset{subset}"):
                if path.stem in everywhere:
                    raise InputError(
                        f"{path}: expected each series once, got it in {everywhere[path.stem][1]} too"
                    )
                everywhere[path.stem] = subset, path
        self._scans = {uid: scan for uid, scan in everywhere.items() if scan[0] in wanted}
        if not self._scans:
            raise InputError(
                f"{self.root}: expected scans subset0/<seriesuid>.mhd to subset9/..., found none"
            )
        annotations = _find_table(self.root, "annotations.csv")
        if annotations is None:
            raise InputError(
                f"{self.root / 'annotations.csv'}: expected the table of nodules, found no such file"
            )
        self._annotations = annotations
        nodules = read_findings(annotations)
        excluded_table = _find_table(self.root, "annotations_excluded.csv")
        excluded = {} if excluded_table is None else read_findings(excluded_table)
        complete = len(present) == len(_SUBSETS)
        tables = {annotations: nodules} | ({excluded_table: excluded} if excluded_table else {})
        _check_known(everywhere, tables, _find_table(self.root, "seriesuids.csv"), complete)
        self._nodules = {uid: rows for uid, rows in nodules.items() if uid in self._scans}
        self._excluded = {uid: rows for uid, rows in excluded.items() if uid in self._scans}

    def __len__(self) -> int:
        """Number of scans."""
        return len(self._scans)

    @property
    def series(self) -> list[str]:
        """The series ids, by subset, then by name."""
        return list(self._scans)

    def subset(self, uid: str) -> int:
        """The subset a series is in, 0 ... 9."""
        return self._scan(uid)[0]

    def path(self, uid: str) -> Path:
        """The header ``.mhd`` of a series."""
        return self._scan(uid)[1]

    def nodules(self, uid: str) -> np.ndarray:
        """Nodules of a series, float64 [n, 4]: world x, y, z, diameter, in mm."""
        self._scan(uid)
        return self._nodules.get(uid, np.empty((0, 4)))

    def excluded(self, uid: str) -> np.ndarray:
        """Irrelevant findings of a series, float64 [n, 4]: world x, y, z, diameter (negative: not known), in mm."""
        self._scan(uid)
        return self._excluded.get(uid, np.empty((0, 4)))

    def evaluate(
        self, candidates: Mapping[str, np.ndarray], series: Sequence[str], *, bootstraps: int = 1000
    ) -> Froc:
        """Evaluate candidates on some of the series by LUNA16's rules: `froc.evaluate` with what is known of them."""
        nodules, excluded = (
            {uid: of(uid) for uid in series} for of in (self.nodules, self.excluded)
        )
        return evaluate(candidates, nodules, excluded, series, bootstraps=bootstraps)

    def volume(self, uid: str) -> Volume:
        """The resampled scan as a read-only memory map, made first where the cache lacks it.

        Raises:
            InputError: no such series, a bad scan, a nodule outside of it, or a cache that cannot be written.
        """
        path = self.path(uid)
        volume = _open_cached(self.cache, path, self.spacing)
        if volume is None:
            _write_cached(path, self.cache, self.spacing)
            volume = _open_cached(self.cache, path, self.spacing)
        if volume is None:
            raise InputError(
                f"{path}: expected a scan that stays as it is, but it changed while it was resampled"
            )
        self._check_nodules(uid, volume)
        return volume

    def prepare(self, workers: int | None = None, progress: bool = True) -> None:
        """Check every scan and resample those that the cache lacks, so that `volume` only opens files afterwards.

        Several processes may prepare the same data at once. The workers are spawned: a script that calls this needs
        ``if __name__ == "__main__":``.

        Args:
            workers: processes; 0 or 1 stays in this one; default: one per core, at most 8,
                and in this process where there is little to do.
            progress: show a bar.

        Raises:
            InputError: as `volume`, for the first bad scan.
        """
        stale = [
            uid
            for uid in self.series
            if _open_cached(self.cache, self.path(uid), self.spacing) is None
        ]
        paths = [self.path(uid) for uid in stale]
        write = partial(_write_cached, cache=self.cache, spacing=self.spacing)
        if workers is None:
            size = sum(
                file.stat().st_size for path in paths for file in path.parent.glob(f"{path.stem}.*")
            )
            workers = min(os.cpu_count() or 1, 8, 1 + size // WORTH_A_PROCESS)
        with tqdm(
            total=len(stale), desc="resampling", unit="scan", disable=not (progress and stale)
        ) as bar:
            if min(workers, len(stale)) <= 1:
                for path in paths:
                    write(path)
                    bar.update()
            else:
                with process_pool(min(workers, len(stale))) as pool:
                    for _ in pool.map(write, paths):
                        bar.update()
        for uid in self.series:
            self.volume(uid)

    def _scan(self, uid: str) -> tuple[int, Path]:
        if uid not in self._scans:
            raise InputError(f"{self.root}: expected a series of the data set, got {uid!r}")
        return self._scans[uid]

    def _check_nodules(self, uid: str, volume: Volume) -> None:
        if self._annotations is None:
            return
        nodules = self.nodules(uid)
        centres = volume.to_index(nodules[:, :3]) + 0.5
        outside = ((centres < 0) | (centres >= volume.voxels.shape)).any(axis=1)
        if outside.any():
            k = int(np.argmax(outside))
            point = ", ".join(f"{value:g}" for value in nodules[k, :3])
            row = _row_of(self._annotations, uid, k)
            raise InputError(
                f"{self._annotations}, row {row}: expected a point inside of scan {uid}, got ({point}) mm"
            )


def scan_headers(folder: Path) -> list[Path]:
    """The headers in a subset's folder and in the folder of the same name within it, by name."""
    found = [*folder.glob("*.mhd"), *(folder / folder.name).glob("*.mhd")]
    return sorted(
        (path for path in found if not path.name.startswith(".")), key=lambda path: path.name
    )


def _find_table(root: Path, name: str) -> Path | None:
    """A table of the data set in the first folder that has it."""
    return next(
        (root / folder / name for folder in _TABLE_FOLDERS if (root / folder / name).is_file()),
        None,
    )


def _check_known(
    scans: Mapping[str, tuple[int, Path]],
    tables: Mapping[Path, Mapping[str, np.ndarray]],
    seriesuids: Path | None,
    complete: bool,
) -> None:
    """Hold scans, list of series and tables of findings against each other; ``complete``: all ten subsets are there."""
    listed: dict[str, int] = {}
    if seriesuids is not None:
        lines = seriesuids.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        listed = {line.strip(): row for row, line in enumerate(lines, start=1) if line.strip()}
        if unlisted := next((uid for uid in scans if uid not in listed), None):
            raise InputError(
                f"{scans[unlisted][1]}: expected a series of {seriesuids}, which does not list it"
            )
        if complete and (lost := next((uid for uid in listed if uid not in scans), None)):
            raise InputError(
                f"{seriesuids}, row {listed[lost]}: expected a series with a scan, got {lost!r}"
            )
    for table, findings in tables.items() if complete or listed else ():
        unknown = next((uid for uid in findings if uid not in scans and uid not in listed), None)
        if unknown is not None:
            row = _row_of(table, unknown, 0)
            raise InputError(
                f"{table}, row {row}: seriesuid: expected a series of the data set, got {unknown!r}"
            )


def _row_of(table: Path, uid: str, k: int) -> int:
    """The row of a series' k-th finding in its file, the header being row 1."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        column = [name.strip() for name in next(reader)].index("seriesuid")
        return [reader.line_num for row in reader if row and row[column].strip() == uid][k]


def _open_cached(cache: Path, path: Path, spacing: Sequence[float]) -> Volume | None:
    """The cached volume of a scan, or None where it is missing, broken, or made from other files than there are now."""
    file = _cached_file(cache, path)
    try:
        voxels = np.lib.format.open_memmap(file, mode="r")
        with open(file, "rb") as stream:
            stream.seek(voxels.offset + voxels.nbytes)
            geometry = json.loads(stream.read(_MAX_HEADER_BYTES))
        if any(_stamp(path.with_name(name)) != stamp for name, stamp in geometry["source"].items()):
            return None
        if voxels.dtype != np.int16 or voxels.ndim != 3 or geometry["spacing"] != list(spacing):
            return None
        origin, direction = (
            np.array(geometry["origin"], np.float64),
            np.array(geometry["direction"], np.float64),
        )
        if (
            origin.shape != (3,)
            or direction.shape != (3, 3)
            or not np.isfinite([*direction, origin]).all()
        ):
            return None
        voxel = (spacing[0], spacing[1], spacing[2])
        return Volume(voxels, voxel, tuple(origin.tolist()), tuple(map(tuple, direction.tolist())))
    except Exception:  # numpy's reader of headers knows many, of tokens and syntax too
        return None


def _write_cached(path: Path, cache: Path, spacing: Sequence[float]) -> None:
    """Resample a scan into the cache: one ``.npy`` with the geometry behind the array, so that the two always match."""
    source = {file.name: _stamp(file) for file in (path, check_header(path).raw)}
    volume = load_volume(path, spacing)
    geometry = {
        "source": source,
        "spacing": list(spacing),
        "origin": volume.origin,
        "direction": volume.direction,
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(_cached_file(cache, path)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, volume.voxels)
            stream.write(json.dumps(geometry).encode())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{cache}: cannot write resampled scans here ({reason}); see --cache"
        ) from None


def _cached_file(cache: Path, path: Path) -> Path:
    return cache / f"{path.stem}.npy"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
