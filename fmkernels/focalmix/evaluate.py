"""Candidates against the nodules of a data set, or of tables alone, and what to doubt in them."""

import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fmkernels.focalmix.data.annotations import read_annotations
from fmkernels.focalmix.data.dataset import name_scans
from fmkernels.focalmix.data.formats import find_scans, scan_name
from fmkernels.focalmix.data.luna16 import find_table
from fmkernels.focalmix.data.own import open_data
from fmkernels.focalmix.data.tables import read_candidates, read_series
from fmkernels.focalmix.errors import InputError, InputWarning
from fmkernels.focalmix.evaluation import froc
from fmkernels.focalmix.evaluation.froc import count

NO_TABLE = Path("none")
"""Given for a table of excluded findings: there is none, on purpose."""


@dataclass(frozen=True)
class Truth:
    """The scans of an evaluation and their findings, float64 [n, 4] per series."""

    series: list[str]
    nodules: dict[str, np.ndarray]
    excluded: dict[str, np.ndarray]
    others: Collection[str] = ()
    """Scans that are known, but not evaluated."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """A FROC curve, and what to know before it is believed; ``str()`` is a report for people."""

    froc: froc.Froc
    without_candidates: list[str]
    """Scans without a row among the candidates."""
    warnings: list[str]
    """What makes the result wrong, unless it is intended."""
    notes: list[str]
    """What does not count, as intended."""

    def to_dict(self) -> dict[str, object]:
        """Everything, for strict JSON."""
        return {
            **self.froc.to_dict(),
            "scans_without_candidates": self.without_candidates,
            "warnings": self.warnings,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = []
        if (details := self.froc.details) is not None and details.misses:
            lines.append("Nodules that no candidate hits (x, y, z, diameter in mm):")
            rows = [
                f"{miss.uid}  {', '.join(f'{value:.1f}' for value in miss.point)}, "
                f"{miss.diameter:.1f}"
                for miss in details.misses
            ]
            lines += _shortened(rows, 20)
        if self.without_candidates:
            lines += ["Scans without candidates:", *_shortened(self.without_candidates, 10)]
        lines += [*self.notes, str(self.froc)]
        if self.warnings:
            lines[-1] += f" - with {count(len(self.warnings), 'WARNING')}:"
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def _shortened(rows: Sequence[str], limit: int) -> list[str]:
    more = len(rows) - limit
    end = [f"... and {more:,} more; --json lists all"] if more > 0 else []
    return [f"  {row}" for row in [*rows[:limit], *end]]


def evaluate(
    candidates: str | Path, truth: Truth, *, bootstraps: int = 1000, seed: int = 0
) -> Evaluation:
    """Evaluate a table of candidates; see `froc.evaluate`. Candidates of other scans do not count.

    Raises:
        InputError: the table is malformed, or no candidate is of a scan that is evaluated.
    """
    found = read_candidates(candidates)
    scans = set(truth.series)
    known = {uid: rows for uid, rows in found.items() if uid in scans}
    unknown = [uid for uid in found if uid not in scans and uid not in truth.others]
    missing = [uid for uid in truth.series if uid not in known]
    if found and not known:
        uid = unknown[0] if unknown else next(iter(found))
        raise InputError(
            f"{candidates}: seriesuid: expected the scans to evaluate, such as {truth.series[0]}, "
            f"got {uid}{_hint(uid, missing)}"
        )
    doubts, notes = list(truth.warnings), list(truth.notes)
    if unknown:
        lost = count(sum(len(found[uid]) for uid in unknown), "candidate")
        hint = _hint(unknown[0], missing)
        text = _outside(candidates, scans, f"{lost} in {count(len(unknown), 'scan')}")
        # where every scan has candidates, the others are of scans that are not evaluated
        (doubts if missing else notes).append(f"{text}, the first of {unknown[0]}{hint}")
    if missing:
        nodules = count(sum(len(truth.nodules.get(uid, ())) for uid in missing), "nodule")
        doubts.append(
            f"{candidates}: no candidates and no other row in {len(missing):,} of the "
            f"{count(len(scans), 'scan')}, with {nodules}: each counts as missed"
        )
    result = froc.evaluate(
        known, truth.nodules, truth.excluded, truth.series, bootstraps=bootstraps, seed=seed
    )
    return Evaluation(result, missing, doubts, notes)


def read_truth(
    data: Path | None,
    *,
    annotations: Path | None = None,
    excluded: Path | None = None,
    series: Path | None = None,
    subsets: Sequence[int] | None = None,
    coordinates: str = "LPS",
) -> Truth:
    """The scans to evaluate and their findings.

    Args:
        data: a data set, or a folder with the tables of LUNA16 and no scans.
        annotations: the table of nodules; default: that of ``data``.
        excluded: the table of excluded findings; default: that of ``data``; `NO_TABLE`: none.
        series: the list of scans; default: all scans of ``data``, or its list.
        subsets: the subsets (folds) of ``data`` to evaluate; default: all.
        coordinates: "LPS" or "RAS": those of the tables.

    Raises:
        InputError: there is no table of nodules or no scan, or a table is malformed.
    """
    if data is not None and not data.is_dir():
        raise InputError(f"{data}: expected a folder with scans or tables, found no such folder")
    has_scans = data is not None and bool(find_scans(data))
    if data is not None and has_scans and annotations is None:
        truth = _of_data_set(data, excluded, subsets, coordinates)
        if series is None:
            return truth
        listed = read_series(series)
        chosen = [uid for uid in truth.series if uid in listed]
        if not chosen:
            got = next(iter(listed), "an empty list")
            raise InputError(f"{series}: expected scans of {data}, got {got}")
        others = {*truth.others, *truth.series} - set(chosen)
        return Truth(chosen, truth.nodules, truth.excluded, others, truth.warnings)
    if subsets is not None:
        raise InputError("--subsets: expected scans in subsets; give the list of scans as --series")
    return _of_tables(
        annotations or _table_in(data, "annotations.csv"),
        excluded or _table_in(data, "annotations_excluded.csv"),
        series or _table_in(data, "seriesuids.csv"),
        list(name_scans(data)) if data is not None and has_scans else [],
        coordinates,
    )


def _table_in(data: Path | None, name: str) -> Path | None:
    return None if data is None else find_table(data, name)


def _of_data_set(
    root: Path, excluded: Path | None, subsets: Sequence[int] | None, coordinates: str
) -> Truth:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        data = open_data(root, coordinates=coordinates)
    doubts = []
    for one in caught:
        if issubclass(one.category, InputWarning):
            doubts.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    series = [uid for uid in data.series if subsets is None or data.subset(uid) in subsets]
    if not series:
        asked = "" if subsets is None else f" in the subsets {','.join(map(str, subsets))}"
        raise InputError(f"{root}: expected scans with annotations{asked}, found none")
    nodules, dropped = data.findings(series)
    others = {*data.series, *data.unlabeled} - set(series)
    if excluded is not None:
        dropped = _read(excluded, coordinates, series)
    table = excluded or data.excluded_table
    doubts += _doubt_excluded(table, dropped, [*series, *others], root)
    return Truth(series, nodules, dropped, others, doubts)


def _of_tables(
    annotations: Path | None,
    excluded: Path | None,
    listing: Path | None,
    scans: list[str],
    coordinates: str,
) -> Truth:
    if annotations is None:
        raise InputError("--annotations: expected the table of nodules, found none")
    series = scans if listing is None else list(read_series(listing))
    if not series:
        raise InputError(
            "--series: expected the list of all scans: false positives are counted per scan, also "
            "of scans without nodules"
        )
    nodules = _read(annotations, coordinates, series)
    dropped = _read(excluded, coordinates, series)
    doubts = _doubt_excluded(excluded, dropped, series, annotations.parent)
    notes: list[str] = []
    known = set(series)
    if others := [uid for uid in nodules if uid not in known]:
        rows = count(sum(len(nodules[uid]) for uid in others), "nodule")
        hint = _hint(others[0], [uid for uid in series if uid not in nodules])
        text = _outside(annotations, series, f"{rows} in {count(len(others), 'scan')}")
        (doubts if hint else notes).append(f"{text}, the first of {others[0]}{hint}")
    return Truth(series, nodules, dropped, (), doubts, notes)


def _outside(table: str | Path, series: Collection[str], what: str) -> str:
    return f"{table}: not counted, outside of the {count(len(series), 'scan')} evaluated: {what}"


def _read(table: Path | None, coordinates: str, series: Iterable[str]) -> dict[str, np.ndarray]:
    """The findings of a table, float64 [n, 4] per series."""
    if table is None or table == NO_TABLE:
        return {}
    if not table.is_file():
        raise InputError(f"{table}: expected a table of findings, found no such file")
    scans, found = set(series), dict[str, list[tuple[float, ...]]]()
    for row in read_annotations(table, coordinates):
        uid = row.scan if row.scan in scans else scan_name(row.scan)
        found.setdefault(uid, []).extend([] if row.finding is None else [row.finding])
    return {uid: np.array(rows, dtype=np.float64).reshape(-1, 4) for uid, rows in found.items()}


def _doubt_excluded(
    table: Path | None, excluded: Iterable[str], series: Iterable[str], folder: Path
) -> list[str]:
    if table == NO_TABLE:
        return []
    if table is None:
        near = [path for path in sorted(folder.iterdir()) if "exclu" in path.name.lower()]
        hint = f"; is it {near[0]}?" if near else ""
        return [
            "no table of excluded findings (annotations_excluded.csv): candidates on them count as "
            f"false positives; give it as --excluded TABLE, or --excluded none{hint}"
        ]
    if not set(excluded) & set(series):
        return [f"{table}: no excluded finding is of a scan that is evaluated"]
    return []


def _hint(uid: str, names: Iterable[str]) -> str:
    """The name that an id may stand for, which differs in zeros, case, folder or suffix only."""

    def normal(name: str) -> str:
        name = scan_name(name.strip().replace("\\", "/")).lower()
        return re.sub(r"(?<!\d)0+(?=\d)", "", name)

    near = next((name for name in names if normal(name) == normal(uid)), None)
    return "" if near is None else f" (is it {near}?)"
