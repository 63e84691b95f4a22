"""LUNA16's folder of CT scans: its subsets and tables."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fmkernels.focalmix.data.annotations import FOLDS, negated
from fmkernels.focalmix.data.dataset import DataSet, Scan, name_scans
from fmkernels.focalmix.data.tables import (
    SPREADSHEETS,
    find_row,
    read_findings,
    read_series,
    refuse_spreadsheet,
)
from fmkernels.focalmix.errors import InputError, InputWarning

_TABLE_FOLDERS = (
    "",
    "CSVFILES",
    "evaluationScript/annotations",
    "evaluationScript/evaluationScript/annotations",
)


class LUNA16(DataSet):
    """LUNA16, or a data set in its layout; see `DataSet`.

    ``root`` has the folders ``subset0`` ... ``subset9`` with ``<seriesuid>.mhd`` and ``.raw`` (or
    scans in another format, or in folders inside, as some archives unpack), ``annotations.csv``,
    and optionally ``annotations_excluded.csv`` and ``seriesuids.csv``. The tables may also be in
    ``CSVFILES`` or ``evaluationScript/annotations``, as downloaded. Without ``seriesuids.csv``, the
    data set is the scans in the folders. Annotations of series in unselected subsets are ignored.

    Args:
        root: the folder.
        spacing: z, y, x in mm.
        subsets: the subsets to use, out of 0 ... 9; default: those in the folder.
        cache: the folder for the cache; default: ``root``.
        coordinates: "LPS" or "RAS": those of the tables.

    Warns:
        InputWarning: findings belong to series without a scan, and subsets are missing.

    Raises:
        ValueError: ``spacing`` is not three positive numbers, a number in ``subsets`` is not
            within 0 ... 9, or ``coordinates`` are others.
        InputError: the folder, a subset or ``annotations.csv`` is missing; there are no scans; a
            series is in two subsets; ``seriesuids.csv`` does not list a scan, or lists a series
            without a scan although all subsets are complete; a finding belongs to an unknown series
            although all subsets are complete; no finding belongs to a scan; a table is malformed.
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
        present = [subset for subset in FOLDS if (self.root / f"subset{subset}").is_dir()]
        selected = present if subsets is None else sorted(set(subsets))
        if missing := sorted(set(selected) - set(present)):
            raise InputError(f"{self.root}: expected a folder subset{missing[0]}, found none")
        annotations = find_table(self.root, "annotations.csv")
        seriesuids = find_table(self.root, "seriesuids.csv")
        nodules = {} if annotations is None else read_findings(annotations)
        named = {*nodules, *(() if seriesuids is None else read_series(seriesuids))}
        all_scans: dict[str, Scan] = {}
        for subset in present:
            folder = self.root / f"subset{subset}"
            for uid, path in name_scans(folder, named=named).items():
                if uid in all_scans:
                    first = all_scans[uid].path
                    raise InputError(f"{path}: expected each series once, got it in {first} too")
                all_scans[uid] = Scan(path, subset, self.cache)
        self._scans = {uid: scan for uid, scan in all_scans.items() if scan.fold in selected}
        if not self._scans:
            raise InputError(
                f"{self.root}: expected scans subset0/<seriesuid>.mhd to subset9/..., found none"
            )
        if annotations is None:
            raise InputError(
                f"{self.root / 'annotations.csv'}: expected the table of nodules, "
                "found no such file"
            )
        self.annotations = annotations
        self.excluded_table = find_table(self.root, "annotations_excluded.csv")
        excluded = {} if self.excluded_table is None else read_findings(self.excluded_table)
        complete = len(present) == len(FOLDS)
        tables = {annotations: nodules}
        if self.excluded_table is not None:
            tables[self.excluded_table] = excluded
        _check_known(all_scans, tables, seriesuids, complete)
        if coordinates == "RAS":
            nodules, excluded = (
                {uid: negated(rows) for uid, rows in table.items()} for table in (nodules, excluded)
            )
        self._nodules = {uid: rows for uid, rows in nodules.items() if uid in self._scans}
        self._excluded = {uid: rows for uid, rows in excluded.items() if uid in self._scans}

    def where(self, uid: str, k: int) -> str:
        assert self.annotations is not None
        return f"{self.annotations}, row {find_row(self.annotations, uid, k)}"


def find_table(root: Path, name: str) -> Path | None:
    """A table of the data set, from the first folder that contains it.

    Raises:
        InputError: there is a spreadsheet instead.
    """
    paths = [root / folder / name for folder in _TABLE_FOLDERS]
    for path in paths:
        if path.is_file():
            return path
    for path in paths:
        for suffix in SPREADSHEETS:
            if (spreadsheet := path.with_suffix(suffix)).is_file():
                refuse_spreadsheet(spreadsheet)
    return None


def _check_known(
    scans: Mapping[str, Scan],
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
                f"{scans[unlisted].path}: expected a series of {seriesuids}, which does not list it"
            )
        if complete and (lost := next((uid for uid in listed if uid not in scans), None)):
            raise InputError(
                f"{seriesuids}, row {listed[lost]}: expected a series with a scan, got {lost!r}"
            )
    for table, findings in tables.items():
        unknown = [uid for uid in findings if uid not in scans and uid not in listed]
        if not unknown:
            continue
        row = find_row(table, unknown[0], 0)
        if complete or listed or len(unknown) == len(findings):
            raise InputError(
                f"{table}, row {row}: seriesuid: expected a series of the data set, "
                f"got {unknown[0]!r}"
            )
        count = sum(len(findings[uid]) for uid in unknown)
        warnings.warn(
            f"{table}: {count} findings are of {len(unknown)} series without a scan here, "
            f"the first in row {row} of {unknown[0]}",
            InputWarning,
            stacklevel=3,
        )
