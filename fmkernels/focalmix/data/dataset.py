"""Data sets: scans with their annotations, resampled to one spacing and kept in a cache."""

import contextlib
import hashlib
import json
import math
import os
import re
import time
import urllib.parse
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fmkernels.focalmix.data.annotations import FOLDS, check_coordinates
from fmkernels.focalmix.data.formats import (
    check_header,
    find_scans,
    hu_problem,
    load_volume,
    scan_id,
    scan_name,
)
from fmkernels.focalmix.data.labels import label_maps
from fmkernels.focalmix.data.volume import Volume
from fmkernels.focalmix.data.workers import process_map
from fmkernels.focalmix.errors import InputError, InputWarning, SkippedWarning
from fmkernels.focalmix.files import atomic_write

BYTES_PER_WORKER = 1 << 26
"""Bytes of scans to resample for which one more process is started."""

_MAX_GEOMETRY_BYTES = 1 << 20
_BLOCK = 1 << 22
_SERIES_ID = re.compile(r"\d+(\.\d+){4,}")  # of DICOM: unique in the world
_CLOCK = 10**9  # nanoseconds by which clocks of file systems may differ


class Scan(NamedTuple):
    """A scan of a data set."""

    path: Path
    fold: int
    cache: Path
    """The folder that holds the resampled scan."""
    is_labeled: bool = True
    """Whether the annotations cover this scan; it may still have no nodule."""


class DataSet(ABC):
    """Scans, their nodules and excluded findings, resampled to one spacing.

    Resampled scans are kept in a folder ``.cache-<spacing>``. They are made again if a source file
    has changed or the cached file is broken. Instances are small and can be pickled.

    A class of data sets sets ``_scans``, ``_nodules`` and ``_excluded`` in its constructor.

    Args:
        root: the folder.
        spacing: z, y, x in mm.
        cache: the folder for the cache; default: ``root``.
        subsets: the folds to use, out of 0 ... 9, or None.
        coordinates: "LPS" or "RAS": those of the tables.

    Raises:
        ValueError: ``spacing`` is not three positive numbers, a fold is not within 0 ... 9, or
            ``coordinates`` are others.
        InputError: there is no such folder.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        spacing: Sequence[float],
        cache: str | Path | None,
        subsets: Sequence[int] | None,
        coordinates: str,
    ) -> None:
        check_coordinates(type(self).__name__, coordinates)
        spacing = tuple(map(float, spacing))
        if len(spacing) != 3 or not all(0 < step < math.inf for step in spacing):
            raise ValueError(
                f"{type(self).__name__}: spacing: expected 3 positive numbers (z, y, x in mm), "
                f"got {spacing}"
            )
        if subsets is not None and not set(subsets) <= set(FOLDS):
            raise ValueError(
                f"{type(self).__name__}: subsets: expected numbers of 0 to 9, got {list(subsets)}"
            )
        self.root = Path(root)
        self.spacing = spacing
        self.cache = self._cache_in(self.root if cache is None else cache)
        self._shared_cache = cache is not None
        if not self.root.is_dir():
            raise InputError(f"{self.root}: expected a folder with scans, found no such folder")
        self.annotations: Path | None = None
        """The table of nodules."""
        self.excluded_table: Path | None = None
        self._scans: dict[str, Scan] = {}
        self._nodules: dict[str, np.ndarray] = {}
        self._excluded: dict[str, np.ndarray] = {}
        self._checksums: dict[str, list[list[int]]] = {}

    def _cache_in(self, folder: str | Path) -> Path:
        return Path(folder) / f".cache-{'x'.join(f'{step:g}' for step in self.spacing)}"

    def __len__(self) -> int:
        """Number of scans, with labels or without."""
        return len(self._scans)

    @property
    def series(self) -> list[str]:
        """The series ids of the scans with labels, sorted by fold, then by name."""
        return [uid for uid, scan in self._scans.items() if scan.is_labeled]

    @property
    def unlabeled(self) -> list[str]:
        """The series ids of the scans without labels."""
        return [uid for uid, scan in self._scans.items() if not scan.is_labeled]

    def summary(self) -> str:
        """The number of scans and nodules, in a line."""
        nodules = [self.nodules(uid) for uid in self.series]
        sizes = np.concatenate([*nodules, np.empty((0, 4))])[:, 3]
        known = sizes[sizes > 0]
        sizes_text = f" of {known.min():.3g} to {known.max():.3g} mm" if len(known) else ""
        with_nodules = sum(len(rows) > 0 for rows in nodules)
        return (
            f"{self.root}: {len(self)} scans: {with_nodules} with {len(sizes)} nodules"
            f"{sizes_text}, {len(nodules) - with_nodules} without a nodule, "
            f"{len(self.unlabeled)} without labels"
        )

    def subset(self, uid: str) -> int:
        """The subset (the fold) of a series, 0 ... 9."""
        return self._scan(uid).fold

    def path(self, uid: str) -> Path:
        """The file of a series, or the folder of its DICOM files."""
        return self._scan(uid).path

    @abstractmethod
    def where(self, uid: str, k: int) -> str:
        """The file and row of the k-th nodule of a series, for messages."""

    def add_unlabeled(self, folder: str | Path) -> None:
        """Add all scans below a folder, without labels.

        Where a scan has the name of another one, that of the folder is put before it.

        Raises:
            InputError: the folder holds no scan, or one that the data set has already: of the same
                series id, or in a file with the same contents under the same name.
        """
        folder = Path(folder)
        found = name_scans(folder)
        if not found:
            raise InputError(f"{folder}: expected scans below this folder, found none")
        cache = self.cache if self._shared_cache else self._cache_in(folder)
        for uid, path in found.items():
            if uid in self._scans:
                other = self._scans[uid].path
                if _SERIES_ID.fullmatch(uid) or _are_same(path, other):
                    raise InputError(
                        f"{path}: expected scans that are not in the data set, got that of {other} "
                        "again"
                    )
                uid = self._distinct(uid, folder)
            self._scans[uid] = Scan(path, -1, cache, is_labeled=False)

    def _distinct(self, uid: str, folder: Path) -> str:
        """The id of a scan with as much of its folder before it as makes it new."""
        parts = folder.resolve().parts
        ids = (
            PurePosixPath(*parts[first:], uid).as_posix() for first in range(len(parts) - 1, -1, -1)
        )
        return next(name for name in ids if name not in self._scans)

    def nodules(self, uid: str) -> np.ndarray:
        """Nodules of a series, float64 [n, 4]: world x, y, z, diameter, in mm."""
        self._scan(uid)
        return self._nodules.get(uid, np.empty((0, 4)))

    def excluded(self, uid: str) -> np.ndarray:
        """Excluded findings of a series, float64 [n, 4], as `nodules`."""
        self._scan(uid)
        return self._excluded.get(uid, np.empty((0, 4)))

    def findings(
        self, series: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """`nodules` and `excluded` of some series."""
        return {uid: self.nodules(uid) for uid in series}, {
            uid: self.excluded(uid) for uid in series
        }

    def volume(self, uid: str) -> Volume:
        """The resampled scan as a read-only memory map; it is made first if the cache lacks it.

        Raises:
            InputError: an unknown series, a bad scan, or a cache that cannot be written.
        """
        path, _, cache, _ = self._scan(uid)
        volume = _open_cached(cache, uid, path, self.spacing)
        if volume is None:
            for message in _write_cached((uid, path, cache), self.spacing):
                warnings.warn(message, InputWarning, stacklevel=2)
            volume = _open_cached(cache, uid, path, self.spacing)
        if volume is None:
            raise InputError(
                f"{path}: expected a scan that stays as it is, "
                "but it changed while it was resampled"
            )
        return volume

    def checksums(self, uid: str) -> list[list[int]]:
        """Size and checksum of each file of a scan; read from the cache, if it is up to date."""
        if uid not in self._checksums:
            path, _, cache, _ = self._scan(uid)
            source = _cached_source(_cached_file(cache, uid), path) or _checksums(path)
            self._checksums[uid] = sorted(source.values())
        return self._checksums[uid]

    def boxes(self, uid: str) -> tuple[np.ndarray, np.ndarray]:
        """`Volume.boxes` of the nodules and of the excluded findings in the resampled scan.

        Raises:
            InputError: as `volume`, or a nodule lies outside its scan.
        """
        volume, nodules = self.volume(uid), self.nodules(uid)
        centers = volume.from_world(nodules[:, :3])
        outside = ((centers < 0) | (centers >= volume.voxels.shape)).any(axis=1)
        if outside.any():
            k = int(np.argmax(outside))
            point = ", ".join(f"{value:g}" for value in nodules[k, :3])
            raise InputError(
                f"{self.where(uid, k)}: expected a point inside of scan {uid}, got ({point}) mm"
            )
        return volume.boxes(nodules), volume.boxes(self.excluded(uid))

    def prepare(
        self,
        series: Sequence[str] | None = None,
        *,
        workers: int | None = None,
        progress: bool = True,
    ) -> None:
        """Check scans and findings, and resample the scans that the cache lacks.

        Afterwards `volume` only opens files. Several processes may prepare the same data at once.
        The workers are spawned: a script that calls this needs ``if __name__ == "__main__":``.

        Args:
            series: the scans to prepare; default: all.
            workers: processes; 0 or 1 uses the current process only; default: one per core, at
                most 8, and fewer for small scans.
            progress: show a progress bar.

        Raises:
            InputError: as `boxes`, for the first bad scan.
        """
        series = list(self._scans) if series is None else series
        stale = [
            (uid, path, cache)
            for uid, (path, _, cache, _) in ((uid, self._scan(uid)) for uid in series)
            if _open_cached(cache, uid, path, self.spacing) is None
        ]
        write = partial(_write_cached, spacing=self.spacing)
        if workers is None:
            size = sum(_size(path) for _, path, _ in stale)
            workers = min(os.cpu_count() or 1, 8, 1 + size // BYTES_PER_WORKER)
        hidden = not (progress and stale)
        with process_map(write, stale, workers) as mapped:
            for messages in tqdm(mapped, "resampling", len(stale), unit="scan", disable=hidden):
                for message in messages:
                    warnings.warn(message, InputWarning, stacklevel=2)
        for uid in series:
            self.boxes(uid)

    def _scan(self, uid: str) -> Scan:
        if uid not in self._scans:
            raise InputError(f"{self.root}: expected a series of the data set, got {uid!r}")
        return self._scans[uid]


def name_scans(
    root: Path, failed: dict[Path, str] | None = None, *, named: Iterable[str] = ()
) -> dict[str, Path]:
    """All scans below a folder by their ids, sorted by path.

    The id is `formats.scan_id`. Scans that share it have their path from the folder instead. Label
    maps are skipped, and so are DICOM series in a folder that holds another scan.

    Args:
        root: the folder.
        failed: gets the scans that have no id, and why; default: they are errors.
        named: names in tables, perhaps of files that look like label maps, but are scans.

    Warns:
        SkippedWarning: there are label maps.
    """
    found, paths, ids = find_scans(root), [], []
    tails = {
        "/".join(parts[first:])
        for parts in (PurePosixPath(name.replace("\\", "/")).parts for name in named)
        for first in range(len(parts))
    }
    maps = {
        path
        for path in label_maps(root, found)
        if not tails & {path.relative_to(root).as_posix(), _relative(root, path)}
    }
    if maps:
        warnings.warn(
            f"{min(maps)}: a label map, not read as a scan; {len(maps)} such files",
            SkippedWarning,
            stacklevel=3,
        )
    folders = {path.parent for path in found if not path.is_dir() and path not in maps}
    for path in (path for path in found if path not in maps | folders):
        try:
            ids.append(scan_id(path))
        except InputError as error:
            if failed is None:
                raise
            failed[path] = str(error)
        else:
            paths.append(path)
    counts = Counter(ids)
    scans: dict[str, Path] = {}
    for uid, path in zip(ids, paths, strict=True):
        uid = _relative(root, path) if counts[uid] > 1 else uid
        if uid in scans:
            raise InputError(
                f"{path}: expected a name of its own, got that of {scans[uid]} but for the ending; "
                "move or rename one of them"
            )
        scans[uid] = path
    return scans


def _relative(root: Path, path: Path) -> str:
    """The path of a scan from a folder, without its suffix."""
    return (path.relative_to(root).parent / scan_name(path)).as_posix()


def _open_cached(cache: Path, uid: str, path: Path, spacing: Sequence[float]) -> Volume | None:
    """The cached volume of a scan; None if it is missing, broken, or made from other files."""
    file = _cached_file(cache, uid)
    try:
        voxels, geometry = _read_cached(file)
        if not _is_made_from(file, geometry["source"], path):
            return None
        if voxels.dtype != np.int16 or voxels.ndim != 3 or geometry["spacing"] != list(spacing):
            return None
        origin, direction = (
            np.array(geometry[name], dtype=np.float64) for name in ("origin", "direction")
        )
        if origin.shape != (3,) or direction.shape != (3, 3):
            return None
        if not np.isfinite([*direction, origin]).all():
            return None
        return Volume(
            voxels, tuple(spacing), tuple(origin.tolist()), tuple(map(tuple, direction.tolist()))
        )
    except Exception:  # numpy's reader raises many types, among them those of its tokenizer
        return None


def _read_cached(file: Path) -> tuple[np.memmap, dict[str, Any]]:
    voxels = np.lib.format.open_memmap(file, mode="r")
    with open(file, "rb") as stream:
        stream.seek(voxels.offset + voxels.nbytes)
        return voxels, json.loads(stream.read(_MAX_GEOMETRY_BYTES))


def _cached_source(file: Path, path: Path) -> dict[str, list[int]]:
    """The checksums of the files that a cached file was made from; empty if they have changed."""
    try:
        source = _read_cached(file)[1]["source"]
        return source if _is_made_from(file, source, path) else {}
    except Exception:  # as in _open_cached
        return {}


def _write_cached(scan: tuple[str, Path, Path], spacing: Sequence[float]) -> list[str]:
    """Resample a scan into the cache; return the warnings, which a worker cannot show.

    One ``.npy`` file holds the array and, behind it, its geometry: the two always match.
    """
    uid, path, cache = scan
    began = time.time_ns()
    source = _checksums(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        volume = load_volume(path, spacing)
    if problem := hu_problem(volume.voxels):
        raise InputError(f"{path}: {problem}")
    geometry = {
        "source": source,
        "spacing": list(spacing),
        "origin": volume.origin,
        "direction": volume.direction,
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(_cached_file(cache, uid)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, volume.voxels)
            stream.write(json.dumps(geometry).encode())
            stream.flush()
            os.utime(temporary, ns=(began, began))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{cache}: cannot write resampled scans here ({reason}); see --cache"
        ) from None
    return [str(warning.message) for warning in caught]


def _cached_file(cache: Path, uid: str) -> Path:
    return cache / f"{urllib.parse.quote(uid, safe=' ')}.npy"


def _is_made_from(file: Path, source: Mapping[str, Sequence[int]], path: Path) -> bool:
    """Whether a cached file was made from the present files of a scan.

    Files that were there unchanged before the cached file are trusted. Others, such as those of an
    archive that was unpacked again, are read to compare their checksums.
    """
    files = _source_files(path, source)
    statuses = [other.stat() for other in files]
    if sorted(source) != sorted(other.name for other in files) or any(
        source[other.name][0] != status.st_size
        for other, status in zip(files, statuses, strict=True)
    ):
        return False
    newest = max(max(status.st_mtime_ns, status.st_ctime_ns) for status in statuses)
    if newest + _CLOCK < file.stat().st_mtime_ns:
        return True
    began = time.time_ns()
    if _checksums(path) != source:
        return False
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(file, ns=(began, began))
    return True


def _source_files(path: Path, names: Iterable[str]) -> list[Path]:
    """The files of a scan, of which some are known by name."""
    if path.is_dir():
        return [
            file
            for file in sorted(path.iterdir())
            if file.is_file() and not file.name.startswith(".")
        ]
    return [path.with_name(name) for name in names]


def _are_same(path: Path, other: Path) -> bool:
    """Whether two scans have files of the same contents."""
    ours, theirs = _files(path), _files(other)
    sizes = [sorted(file.stat().st_size for file in files) for files in (ours, theirs)]
    if sizes[0] != sizes[1]:
        return False
    return sorted(_checksums(path).values()) == sorted(_checksums(other).values())


def scan_state(path: Path) -> str:
    """A digest of the names, sizes and times of the files of a scan; empty if it cannot be read."""
    try:
        statuses = [(file.name, file.stat()) for file in _files(path)]
    except (InputError, OSError):
        return ""
    found = [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    """The files of a scan."""
    names = () if path.is_dir() else [file.name for file in check_header(path).files]
    return _source_files(path, names)


def _checksums(path: Path) -> dict[str, list[int]]:
    """Size and checksum of each file of a scan."""
    found = {}
    for file in _files(path):
        size = checksum = 0
        with open(file, "rb") as stream:
            while block := stream.read(_BLOCK):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
        found[file.name] = [size, checksum]
    return found


def _size(path: Path) -> int:
    """Bytes of the files of a scan, or somewhat more."""
    files = path.iterdir() if path.is_dir() else path.parent.glob(f"{scan_name(path)}.*")
    return sum(file.stat().st_size for file in files)
