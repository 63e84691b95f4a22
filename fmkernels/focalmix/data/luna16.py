"""LUNA16's folder of CT scans: its subsets and tables, and a cache of resampled scans."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fmkernels.focalmix.data.formats import check_header, load_volume
from fmkernels.focalmix.data.tables import find_row, read_findings, read_series
from fmkernels.focalmix.data.volume import Volume
from fmkernels.focalmix.data.workers import process_pool
from fmkernels.focalmix.errors import InputError, InputWarning
from fmkernels.focalmix.files import atomic_write

BYTES_PER_WORKER = 1 << 26
"""Bytes of scans to resample for which one more process is started."""

_SUBSETS = range(10)
_TABLE_FOLDERS = (
    "",
    "CSVFILES",
    "evaluationScript/annotations",
    "evaluationScript/evaluationScript/annotations",
)
_MAX_GEOMETRY_BYTES = 1 << 16


class LUNA16:
    """LUNA16, or a data set in its layout, resampled to one spacing.

    ``root`` has the folders ``subset0`` ... ``subset9`` with ``<seriesuid>.mhd`` and ``.raw`` (or a
    folder of the same name inside, as some archives unpack), ``annotations.csv``, and optionally
    ``annotations_excluded.csv`` and ``seriesuids.csv``. The tables may also be in ``CSVFILES`` or
    ``evaluationScript/annotations``, as downloaded. Without ``seriesuids.csv``, the data set is the
    scans in the folders. Annotations of series in missing or unselected subsets are ignored.

    Resampled scans are kept in a folder ``.cache-<spacing>``. They are made again if a source file
    has changed or the cached file is broken. Instances are small and can be pickled.

    Args:
        root: the folder.
        spacing: z, y, x in mm.
        subsets: the subsets to use, out of 0 ... 9; default: those in the folder.
        cache: the folder for the cache; default: ``root``.

    Raises:
        ValueError: ``spacing`` is not three positive numbers, or a number in ``subsets`` is not
            within 0 ... 9.
        InputError: the folder, a subset or ``annotations.csv`` is missing; there are no scans; a
            series is in two subsets; ``seriesuids.csv`` does not list a scan, or lists a series
            without a scan although all subsets are complete; a finding belongs to an unknown series
            although all subsets are complete; a table is malformed.
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
        cache_name = f".cache-{'x'.join(f'{step:g}' for step in spacing)}"
        self.cache = Path(self.root if cache is None else cache) / cache_name
        if not self.root.is_dir():
            raise InputError(
                f"{self.root}: expected a folder in LUNA16's layout, found no such folder"
            )
        present = [subset for subset in _SUBSETS if (self.root / f"subset{subset}").is_dir()]
        selected = present if subsets is None else sorted(set(subsets))
        if missing := sorted(set(selected) - set(present)):
            raise InputError(f"{self.root}: expected a folder subset{missing[0]}, found none")
        all_scans: dict[str, tuple[int, Path]] = {}
        for subset in present:
            for path in scan_headers(self.root / f"subset{subset}"):
                if path.stem in all_scans:
                    first = all_scans[path.stem][1]
                    raise InputError(f"{path}: expected each series once, got it in {first} too")
                all_scans[path.stem] = subset, path
        self._scans = {uid: scan for uid, scan in all_scans.items() if scan[0] in selected}
        if not self._scans:
            raise InputError(
                f"{self.root}: expected scans subset0/<seriesuid>.mhd to subset9/..., found none"
            )
        annotations = _find_table(self.root, "annotations.csv")
        if annotations is None:
            raise InputError(
                f"{self.root / 'annotations.csv'}: expected the table of nodules, "
                "found no such file"
            )
        self._annotations = annotations
        nodules = read_findings(annotations)
        excluded_table = _find_table(self.root, "annotations_excluded.csv")
        excluded = {} if excluded_table is None else read_findings(excluded_table)
        complete = len(present) == len(_SUBSETS)
        tables = {annotations: nodules} | ({excluded_table: excluded} if excluded_table else {})
        _check_known(all_scans, tables, _find_table(self.root, "seriesuids.csv"), complete)
        self._nodules = {uid: rows for uid, rows in nodules.items() if uid in self._scans}
        self._excluded = {uid: rows for uid, rows in excluded.items() if uid in self._scans}

    def __len__(self) -> int:
        """Number of scans."""
        return len(self._scans)

    @property
    def series(self) -> list[str]:
        """The series ids, sorted by subset, then by name."""
        return list(self._scans)

    def subset(self, uid: str) -> int:
        """The subset of a series, 0 ... 9."""
        return self._scan(uid)[0]

    def path(self, uid: str) -> Path:
        """The header ``.mhd`` of a series."""
        return self._scan(uid)[1]

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
        path = self.path(uid)
        volume = _open_cached(self.cache, path, self.spacing)
        if volume is None:
            _write_cached(path, self.cache, self.spacing)
            volume = _open_cached(self.cache, path, self.spacing)
        if volume is None:
            raise InputError(
                f"{path}: expected a scan that stays as it is, "
                "but it changed while it was resampled"
            )
        return volume

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
            row = find_row(self._annotations, uid, k)
            raise InputError(
                f"{self._annotations}, row {row}: expected a point inside of scan {uid}, "
                f"got ({point}) mm"
            )
        return volume.boxes(nodules), volume.boxes(self.excluded(uid))

    def prepare(self, workers: int | None = None, progress: bool = True) -> None:
        """Check all scans and findings, and resample the scans that the cache lacks.

        Afterwards `volume` only opens files. Several processes may prepare the same data at once.
        The workers are spawned: a script that calls this needs ``if __name__ == "__main__":``.

        Args:
            workers: processes; 0 or 1 uses the current process only; default: one per core, at
                most 8, and fewer for small scans.
            progress: show a progress bar.

        Raises:
            InputError: as `boxes`, for the first bad scan.
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
            workers = min(os.cpu_count() or 1, 8, 1 + size // BYTES_PER_WORKER)
        with (
            tqdm(
                total=len(stale), desc="resampling", unit="scan", disable=not (progress and stale)
            ) as bar,
            contextlib.ExitStack() as stack,
        ):
            mapped: Iterable[list[str]] = map(write, paths)
            if min(workers, len(stale)) > 1:
                pool = stack.enter_context(process_pool(min(workers, len(stale))))
                mapped = pool.map(write, paths)
            for messages in mapped:
                for message in messages:
                    warnings.warn(message, InputWarning, stacklevel=2)
                bar.update()
        for uid in self.series:
            self.boxes(uid)

    def _scan(self, uid: str) -> tuple[int, Path]:
        if uid not in self._scans:
            raise InputError(f"{self.root}: expected a series of the data set, got {uid!r}")
        return self._scans[uid]


def scan_headers(folder: Path) -> list[Path]:
    """The headers in a folder and in the folder of the same name inside it, sorted by name."""
    paths = [*folder.glob("*.mhd"), *(folder / folder.name).glob("*.mhd")]
    return sorted(
        (path for path in paths if not path.name.startswith(".")), key=lambda path: path.name
    )


def _find_table(root: Path, name: str) -> Path | None:
    """A table of the data set, from the first folder that contains it."""
    paths = (root / folder / name for folder in _TABLE_FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def _check_known(
    scans: Mapping[str, tuple[int, Path]],
    tables: Mapping[Path, Mapping[str, np.ndarray]],
    seriesuids: Path | None,
    complete: bool,
) -> None:
    """Check scans, list of series and findings against each other.

    ``complete``: all ten subsets are in the folder.
    """
    listed = {} if seriesuids is None else read_series(seriesuids)
    if seriesuids is not None:
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
            row = find_row(table, unknown, 0)
            raise InputError(
                f"{table}, row {row}: seriesuid: expected a series of the data set, got {unknown!r}"
            )


def _open_cached(cache: Path, path: Path, spacing: Sequence[float]) -> Volume | None:
    """The cached volume of a scan; None if it is missing, broken, or made from other files."""
    file = _cached_file(cache, path)
    try:
        voxels = np.lib.format.open_memmap(file, mode="r")
        with open(file, "rb") as stream:
            stream.seek(voxels.offset + voxels.nbytes)
            geometry = json.loads(stream.read(_MAX_GEOMETRY_BYTES))
        if any(_stamp(path.with_name(name)) != stamp for name, stamp in geometry["source"].items()):
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


def _write_cached(path: Path, cache: Path, spacing: Sequence[float]) -> list[str]:
    """Resample a scan into the cache; return the warnings, which a worker cannot show.

    One ``.npy`` file holds the array and, behind it, its geometry: the two always match.
    """
    source = {file.name: _stamp(file) for file in check_header(path).files}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
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
    return [str(warning.message) for warning in caught]


def _cached_file(cache: Path, path: Path) -> Path:
    return cache / f"{path.stem}.npy"


def _stamp(path: Path) -> list[int]:
    """Size and modification time of a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
