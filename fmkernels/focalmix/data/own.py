"""Own data sets: a folder of scans in any format with one table of annotations."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fmkernels.focalmix.data.annotations import FOLDS, Annotation, read_annotations
from fmkernels.focalmix.data.dataset import DataSet, Scan, name_scans
from fmkernels.focalmix.data.formats import SUPPORTED
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.names import ScanNames
from fmkernels.focalmix.data.tables import SPREADSHEETS, read_series, refuse_spreadsheet
from fmkernels.focalmix.errors import InputError, InputWarning

_TABLES = (".csv", ".tsv", ".json")
_ANNOTATIONS, _EXCLUDED, _SERIES = "annotations", "annotations_excluded", "seriesuids.csv"


class OwnData(DataSet):
    """A folder of scans with one table of annotations; see `DataSet`.

    Scans are found in all folders below ``root``; see `formats.find_scans`. Annotations are in
    ``annotations.csv`` (or ``.tsv``, ``.json``), or in the only such file in ``root``; see
    `annotations.read_annotations`. ``annotations_excluded.csv`` is optional. Label maps that no row
    names are left out; see `labels.label_maps`.

    A table names a scan by its file (with or without suffix and folders), its series id, or the
    folder that holds nothing else. Scans that no row names have no labels, unless
    ``seriesuids.csv`` lists them: then they have no nodule.

    Folds come from the column ``fold``, else from a hash of the id of the scan, which does not
    depend on the other scans.

    Args:
        root: the folder.
        spacing: z, y, x in mm.
        subsets: the folds to use, out of 0 ... 9; default: all. Scans without labels are in none.
        cache: the folder for the cache; default: ``root``.
        coordinates: "LPS" or "RAS": those of the tables.

    Warns:
        InputWarning: rows name no scan.

    Raises:
        ValueError: ``spacing`` is not three positive numbers, a number in ``subsets`` is not
            within 0 ... 9, or ``coordinates`` are others.
        InputError: there are no scans; there are several tables; a row names two scans, or none
            names a scan; a scan is in two folds; a table is malformed.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        subsets: Sequence[int] | None = None,
        cache: str | Path | None = None,
        coordinates: str = "LPS",
    ) -> None:
        super().__init__(
            root, spacing=spacing, cache=cache, subsets=subsets, coordinates=coordinates
        )
        self.annotations = _find_annotations(self.root)
        self.excluded_table = _named(self.root, _EXCLUDED)
        tables = [
            [] if path is None else read_annotations(path, coordinates)
            for path in (self.annotations, self.excluded_table)
        ]
        paths = name_scans(self.root, named={row.scan for table in tables for row in table})
        if not paths:
            raise InputError(
                f"{self.root}: expected scans ({SUPPORTED}) below this folder, found none"
            )
        names = ScanNames(self.root, paths)
        rows, excluded = (_by_scan(table, names) for table in tables)
        listed = _listed(self.root / _SERIES, names)
        scans = {}
        for uid, path in paths.items():
            fold = _fold(uid, rows.get(uid, ()))
            is_labeled = uid in rows or uid in listed
            if not is_labeled or subsets is None or fold in subsets:
                scans[uid] = Scan(path, fold if is_labeled else -1, self.cache, is_labeled)
        self._scans = dict(sorted(scans.items(), key=lambda item: (item[1].fold, item[0])))
        self._where = {
            uid: [row.where for row in found if row.finding is not None]
            for uid, found in rows.items()
        }
        self._nodules, self._excluded = (
            {uid: _findings(found) for uid, found in table.items() if uid in self._scans}
            for table in (rows, excluded)
        )

    def where(self, uid: str, k: int) -> str:
        return self._where[uid][k]


def open_data(
    root: str | Path,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    subsets: Sequence[int] | None = None,
    cache: str | Path | None = None,
    coordinates: str = "LPS",
    unlabeled: Iterable[str | Path] = (),
) -> DataSet:
    """Open a data set: `LUNA16` where the folder has folders ``subset0`` ..., else `OwnData`.

    Args:
        root, spacing, subsets, cache, coordinates: see there.
        unlabeled: folders of more scans, without labels.
    """
    is_luna = any(Path(root, f"subset{fold}").is_dir() for fold in FOLDS)
    kind = LUNA16 if is_luna else OwnData
    data: DataSet = kind(
        root, spacing=spacing, subsets=subsets, cache=cache, coordinates=coordinates
    )
    for folder in unlabeled:
        data.add_unlabeled(folder)
    return data


def _find_annotations(root: Path) -> Path | None:
    if (path := _named(root, _ANNOTATIONS)) is not None:
        return path
    others = [
        path
        for path in sorted(root.iterdir())
        if path.suffix.lower() in (*_TABLES, *SPREADSHEETS)
        and path.stem.lower() != _EXCLUDED
        and path.name.lower() != _SERIES
    ]
    tables = [path for path in others if path.suffix.lower() in _TABLES]
    if len(tables) > 1:
        raise InputError(
            f"{root}: expected one table of annotations, got {tables[0].name} and "
            f"{tables[1].name}; name it {_ANNOTATIONS}{tables[0].suffix}"
        )
    if others and not tables:
        refuse_spreadsheet(others[0])
    return tables[0] if tables else None


def _named(root: Path, stem: str) -> Path | None:
    """The table of this name, in any case."""
    named = [path for path in sorted(root.iterdir()) if path.stem.lower() == stem]
    found = [path for path in named if path.suffix.lower() in _TABLES]
    if len(found) > 1:
        raise InputError(f"{root}: expected one of {found[0].name} and {found[1].name}, got both")
    for path in named:
        if not found and path.suffix.lower() in SPREADSHEETS:
            refuse_spreadsheet(path)
    return found[0] if found else None


def _by_scan(table: Iterable[Annotation], names: ScanNames) -> dict[str, list[Annotation]]:
    """The rows of a table by the ids of their scans."""
    found, lost = names.by_scan(table)
    if lost:
        near = names.hint(lost[0].scan)
        if not found:
            raise InputError(f"{lost[0].where}: expected a scan, got {lost[0].scan!r}{near}")
        warnings.warn(
            f"{lost[0].where}: {lost[0].scan!r} is no scan{near}; such rows: {len(lost)}",
            InputWarning,
            stacklevel=4,
        )
    return found


def _listed(table: Path, names: ScanNames) -> set[str]:
    """The ids of the scans in a list."""
    found, lost = set(), []
    for name, row in read_series(table).items() if table.is_file() else ():
        where = f"{table}, row {row}"
        if uid := names.find(name, where):
            found.add(uid)
        else:
            lost.append((where, name))
    if lost:
        where, name = lost[0]
        warnings.warn(
            f"{where}: {name!r} is no scan{names.hint(name)}; such rows: {len(lost)}",
            InputWarning,
            stacklevel=4,
        )
    return found


def _fold(uid: str, rows: Sequence[Annotation]) -> int:
    given = [row for row in rows if row.fold is not None]
    for row in given:
        if row.fold != given[0].fold:
            raise InputError(
                f"{row.where}: fold: expected {given[0].fold} as in {given[0].where}, "
                f"got {row.fold}"
            )
    if given and given[0].fold is not None:
        return given[0].fold
    return int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big") % len(FOLDS)


def _findings(rows: Sequence[Annotation]) -> np.ndarray:
    found = [row.finding for row in rows if row.finding is not None]
    return np.array(found, dtype=np.float64).reshape(-1, 4)
