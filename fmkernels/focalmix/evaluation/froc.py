"""LUNA16's evaluation: submissions in and out, the FROC curve, the CPM and its bootstrap interval.

Findings and candidates are float64 arrays [n, 4] per series: world x, y, z in mm (LPS), then a diameter in mm or a
probability.
"""

import contextlib
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.files import atomic_write

OPERATING_POINTS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 reads the sensitivity; the CPM is the mean of the seven."""

BAND_RATES = np.array([2.0 ** (k / 10) for k in range(-30, 31)])
"""False positives per scan at which `Froc.band` is given: ten to the octave, every tenth an operating point."""

MAX_CANDIDATES = 100
"""Only so many of a scan's candidates count, the most probable ones."""

UNKNOWN_DIAMETER = 10.0
"""Millimetres, for a finding whose diameter is negative (LUNA16 writes -1 where it is not known)."""

_COORDINATES = ("coordX", "coordY", "coordZ")
_CANDIDATE_COLUMNS = ("seriesuid", *_COORDINATES, "probability")
_FINDING_COLUMNS = ("seriesuid", *_COORDINATES, "diameter_mm")


def read_findings(path: str | Path) -> dict[str, np.ndarray]:
    """Read ``annotations.csv`` or ``annotations_excluded.csv``.

    Columns ``seriesuid, coordX, coordY, coordZ, diameter_mm`` in any order; others are ignored. A header without rows
    means no findings.

    Returns:
        Series -> float64 [n, 4]: x, y, z (mm), diameter (mm, negative where not known), in the order of the file.

    Raises:
        InputError: names file, row and field: a column is missing, a row is ragged, a value is no finite number, a
            diameter is zero.
    """
    uids, values, rows = _read_table(path, _FINDING_COLUMNS)
    if (zero := np.flatnonzero(values[:, 3] == 0)).size:
        raise InputError(
            f"{path}, row {rows[zero[0]]}: diameter_mm: expected a diameter other than zero, got 0"
        )
    return _by_series(uids, values)


def read_candidates(path: str | Path) -> dict[str, np.ndarray]:
    """Read a submission: columns ``seriesuid, coordX, coordY, coordZ, probability`` in any order; others are ignored.

    Any finite score serves as a probability: only its order counts.

    Returns:
        Series -> float64 [n, 4]: x, y, z (mm), probability, in the order of the file.

    Raises:
        InputError: names file, row and field: a column is missing, a row is ragged, a value is no finite number.
    """
    uids, values, _ = _read_table(path, _CANDIDATE_COLUMNS)
    return _by_series(uids, values)


def write_candidates(path: str | Path, candidates: Mapping[str, ArrayLike]) -> None:
    """Write a submission that `read_candidates` gives back bit for bit, by series, then by falling probability.

    Args:
        path: the file, replaced as a whole once the new one is complete.
        candidates: series -> [n, 4]: x, y, z (mm), probability. A series without candidates leaves no row.
    """
    checked = {uid: _checked("candidates", uid, candidates[uid]) for uid in sorted(candidates)}
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CANDIDATE_COLUMNS)
        for uid, table in checked.items():
            by_probability = table[np.argsort(-table[:, 3], kind="stable")]
            writer.writerows([uid, *row] for row in by_probability.tolist())


def _read_table(
    path: str | Path, columns: Sequence[str]
) -> tuple[list[str], np.ndarray, list[int]]:
    """Read the series ids, the numbers [n, 4] of the other columns, and each row's place in the file (header: 1)."""
    uids: list[str] = []
    values: list[tuple[float, ...]] = []
    rows: list[int] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise InputError(
                    f"{path}: expected a header with {','.join(columns)}, got an empty file"
                )
            for name in columns:
                if header.count(name) != 1:
                    raise InputError(
                        f"{path}: expected one column {name}, got the columns {','.join(header)}"
                    )
            uid_of = itemgetter(header.index(columns[0]))
            numbers_of = itemgetter(*map(header.index, columns[1:]))
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, row {reader.line_num}: expected {len(header)} fields, got {len(row)}"
                    )
                if not (uid := uid_of(row).strip()):
                    raise InputError(
                        f"{path}, row {reader.line_num}: {columns[0]}: expected a series id, got nothing"
                    )
                try:
                    values.append(tuple(map(float, numbers_of(row))))
                except ValueError:
                    complaint = _complain(columns[1:], numbers_of(row))
                    raise InputError(f"{path}, row {reader.line_num}: {complaint}") from None
                uids.append(uid)
                rows.append(reader.line_num)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: expected text in UTF-8, got the byte {error.object[error.start]:#04x}"
            ) from None
        except csv.Error as error:
            raise InputError(
                f"{path}, row {reader.line_num}: expected comma-separated values: {error}"
            ) from None
    table = np.array(values, dtype=np.float64).reshape(-1, 4)
    if (bad := np.argwhere(~np.isfinite(table))).size:
        row = bad[0, 0]
        raise InputError(f"{path}, row {rows[row]}: {_complain(columns[1:], table[row])}")
    return uids, table, rows


def _complain(names: Sequence[str], values: Iterable[str | float]) -> str:
    """What is wrong with the first of the values that is no finite number."""
    for name, value in zip(names, values, strict=True):
        with contextlib.suppress(ValueError):
            if math.isfinite(float(value)):
                continue
        return f"{name}: expected a finite number, got {str(value)!r}"
    raise AssertionError("every value is a finite number")


def _by_series(uids: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """Split the rows by series; series and rows keep their order."""
    members: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        members.setdefault(uid, []).append(row)
    return {uid: values[rows] for uid, rows in members.items()}


@dataclass(frozen=True, eq=False)
class Froc:
    """A free-response ROC curve; ``str()`` is a table for people, `to_dict` the same for machines.

    The curve starts at (0 false positives, sensitivity 0), which no array holds. Points within a horizontal stretch are
    left out: linear interpolation between the others gives them back.
    """

    thresholds: np.ndarray = field(repr=False)
    """float64 [p], falling: point i takes every candidate whose probability is at least ``thresholds[i]``."""
    fps_per_scan: np.ndarray = field(repr=False)
    """float64 [p]: false positives per scan at each threshold."""
    sensitivities: np.ndarray = field(repr=False)
    """float64 [p]: share of the nodules found at each threshold."""
    operating_sensitivities: tuple[float, ...]
    """Sensitivity at each of the `OPERATING_POINTS`."""
    cpm: float
    """Mean of the seven."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the CPM; None without bootstraps."""
    band: np.ndarray | None = field(repr=False)
    """float64 [2, 61]: lower and upper ends of the 95 % bootstrap interval of the sensitivity at the `BAND_RATES`."""
    samples: np.ndarray | None = field(repr=False)
    """float64 [bootstraps, 61]: the sensitivities; with one seed, row i draws the same scans for all curves."""
    n_scans: int
    n_nodules: int
    n_bootstraps: int

    def to_dict(self) -> dict[str, object]:
        """Everything but samples and the band between operating points, as plain numbers that strict JSON can hold."""
        points = [
            {"fps_per_scan": rate, "sensitivity": sensitivity}
            for rate, sensitivity in zip(
                OPERATING_POINTS, self.operating_sensitivities, strict=True
            )
        ]
        if self.band is not None:
            for point, lower, upper in zip(points, *self.band[:, ::10].tolist(), strict=True):
                point |= {"lower": lower, "upper": upper}
        return {
            "n_scans": self.n_scans,
            "n_nodules": self.n_nodules,
            "n_bootstraps": self.n_bootstraps,
            "cpm": self.cpm,
            "interval": self.interval and list(self.interval),
            "operating_points": points,
            "curve": {
                "threshold": self.thresholds.tolist(),
                "fps_per_scan": self.fps_per_scan.tolist(),
                "sensitivity": self.sensitivities.tolist(),
            },
        }

    def __str__(self) -> str:
        lines = [
            f"{self.n_scans} scan{'s' * (self.n_scans != 1)}, {self.n_nodules} nodule{'s' * (self.n_nodules != 1)}",
            _line("False positives per scan", ("1/8", "1/4", "1/2", "1", "2", "4", "8")),
            _line(
                "Sensitivity (%)", [f"{100 * value:.1f}" for value in self.operating_sensitivities]
            ),
        ]
        cpm = f"CPM {self.cpm:.3f}"
        if self.band is not None and self.interval is not None:
            lines += [
                _line(f"  95 % interval, {end}", [f"{100 * value:.1f}" for value in values])
                for end, values in zip(("lower", "upper"), self.band[:, ::10], strict=True)
            ]
            cpm += f" (95 % interval {self.interval[0]:.3f} to {self.interval[1]:.3f}, {self.n_bootstraps} bootstraps)"
        return "\n".join([*lines, cpm])


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<26}" + "".join(f"{cell:>7}" for cell in cells)


def evaluate(
    candidates: Mapping[str, ArrayLike],
    nodules: Mapping[str, ArrayLike],
    excluded: Mapping[str, ArrayLike],
    series: Sequence[str],
    *,
    bootstraps: int = 1000,
    seed: int = 0,
) -> Froc:
    """Evaluate candidates by the rules of LUNA16.

    - Of each scan's candidates the 100 most probable count; where that cap cuts through equal probabilities, the first.
    - A candidate hits a finding if the square of its distance to the centre is below (not at) the square of the radius;
      a negative diameter means 10 mm. A candidate may hit several findings.
    - A nodule is found at the probability of the best candidate that hits it; its other hits are neither true nor false
      positives. A nodule that nothing hits counts as missed.
    - A candidate that hits no nodule is dropped if it hits an excluded finding, else it is a false positive.
    - Each distinct probability is a threshold, the lowest too, and takes all candidates of at least that probability.
    - False positives are counted per scan of ``series``, scans without nodules or candidates included.
    - The sensitivity at a rate is interpolated linearly in false positives per scan; where it jumps, the rate of the
      jump has the higher value. Below the curve's first point it rises linearly from sensitivity 0 at rate 0; beyond
      the last point, where the candidates are used up, it stays as it is.
    - The interval goes from the 2.5th to the 97.5th percentile over bootstraps of whole scans, drawn with replacement;
      a draw without any nodule has no sensitivity and is drawn again.

    Args:
        candidates: series -> [n, 4]: x, y, z (mm), probability (any finite score). A series may be absent.
        nodules: series -> [n, 4]: x, y, z (mm), diameter (mm). Series outside ``series`` are passed over.
        excluded: the same for findings that are neither nodules nor false positives.
        series: the scans to evaluate, each once.
        bootstraps: number of bootstraps; 0 leaves the intervals out.
        seed: of the bootstraps.

    Raises:
        InputError: a candidate lies in no scan of ``series``, a series is listed twice, there is no nodule in all of
            ``series``, or an array is not [n, 4] of finite numbers.

    Example:
        >>> froc = evaluate({"a": [[0, 0, 0, 0.4], [50, 0, 0, 0.5]]}, {"a": [[1, 0, 0, 6]]}, {}, ["a"], bootstraps=0)
        >>> froc.operating_sensitivities
        (0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    """
    scans = {uid: scan for scan, uid in enumerate(series)}
    if len(scans) != len(series):
        twice = next(uid for uid in scans if series.count(uid) > 1)
        raise InputError(f"series: expected every id once, got {twice} {series.count(twice)} times")
    if (unknown := next((uid for uid in candidates if uid not in scans), None)) is not None:
        raise InputError(f"candidates: unknown series id {unknown}, not among the scans evaluated")
    empty = np.empty((0, 4))
    marks_of = [_checked("candidates", uid, candidates.get(uid, empty)) for uid in scans]
    nodules_of = [_checked("nodules", uid, nodules.get(uid, empty)) for uid in scans]
    excluded_of = [_checked("excluded findings", uid, excluded.get(uid, empty)) for uid in scans]
    n_nodules = np.array([len(own) for own in nodules_of])
    if not n_nodules.any():
        raise InputError("nodules: expected at least one in the scans evaluated, got none")

    events = _Events.of(
        [_score_scan(*scan) for scan in zip(marks_of, nodules_of, excluded_of, strict=True)]
    )
    fps, hits = events.count(np.ones(len(scans)))
    operating = _interpolate(np.array(OPERATING_POINTS) * len(scans), fps, hits) / n_nodules.sum()
    samples = (
        _bootstrap(events, n_nodules, bootstraps, np.random.default_rng(seed))
        if bootstraps
        else None
    )
    interval, band = (None, None) if samples is None else _intervals(samples)
    return Froc(
        thresholds=events.thresholds,
        fps_per_scan=fps / len(scans),
        sensitivities=hits / n_nodules.sum(),
        operating_sensitivities=tuple(operating.tolist()),
        cpm=float(operating.mean()),
        interval=interval,
        band=band,
        samples=samples,
        n_scans=len(scans),
        n_nodules=int(n_nodules.sum()),
        n_bootstraps=bootstraps,
    )


def average(runs: Sequence[Froc], *, seed: int = 0) -> Froc:
    """The mean of runs that were evaluated on the same scans with as many bootstraps, and the same seed of these.

    A bootstrap draws runs with replacement on top of the scans, which are the same for all runs; with one seed, the
    same places among the runs for every method. The curve is given at the `BAND_RATES`, without thresholds.
    """
    sizes = {(run.n_scans, run.n_nodules, run.n_bootstraps) for run in runs}
    if len(sizes) != 1 or runs[0].samples is None:
        raise ValueError(
            f"average: runs: expected bootstraps of the same scans and as many, got {sorted(sizes)}"
        )
    drawn = np.random.default_rng(seed).integers(
        len(runs), size=(len(runs), runs[0].n_bootstraps, 1)
    )
    samples = np.take_along_axis(
        np.stack([run.samples for run in runs if run.samples is not None]), drawn, 0
    ).mean(0)
    interval, band = _intervals(samples)
    curves = [
        np.interp(BAND_RATES, np.append(0, run.fps_per_scan), np.append(0, run.sensitivities))
        for run in runs
    ]
    operating = np.mean([run.operating_sensitivities for run in runs], 0)
    return Froc(
        thresholds=np.full(len(BAND_RATES), np.nan),
        fps_per_scan=BAND_RATES,
        sensitivities=np.mean(curves, 0),
        operating_sensitivities=tuple(operating.tolist()),
        cpm=float(operating.mean()),
        interval=interval,
        band=band,
        samples=samples,
        n_scans=runs[0].n_scans,
        n_nodules=runs[0].n_nodules,
        n_bootstraps=runs[0].n_bootstraps,
    )


def _intervals(samples: np.ndarray) -> tuple[tuple[float, float], np.ndarray]:
    """95 % of the CPM, and of the sensitivity at the `BAND_RATES` [2, 61]."""
    lower, upper = np.quantile(samples[:, ::10].mean(axis=1), (0.025, 0.975)).tolist()
    return (lower, upper), np.quantile(samples, (0.025, 0.975), axis=0)


def _checked(what: str, uid: str, rows: ArrayLike) -> np.ndarray:
    """The rows as float64 [n, 4], or an InputError."""
    table = np.asarray(rows, dtype=np.float64)
    if table.shape == (0,):
        return table.reshape(0, 4)
    if table.ndim != 2 or table.shape[1] != 4:
        raise InputError(
            f"{what} of series {uid}: expected an array [n, 4], got {list(table.shape)}"
        )
    if not np.isfinite(table).all():
        raise InputError(
            f"{what} of series {uid}: expected finite numbers, got {table[~np.isfinite(table)][0]}"
        )
    return table


def _score_scan(
    candidates: np.ndarray, nodules: np.ndarray, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the nodules found (best candidate each) and of the false positives of one scan."""
    candidates = candidates[np.argsort(-candidates[:, 3], kind="stable")[:MAX_CANDIDATES]]
    probability = candidates[:, 3]
    on_nodule = _hits(candidates, nodules)
    best = np.where(on_nodule, probability[:, None], -np.inf).max(axis=0, initial=-np.inf)
    wrong = ~on_nodule.any(axis=1) & ~_hits(candidates, excluded).any(axis=1)
    return best[on_nodule.any(axis=0)], probability[wrong]


def _hits(candidates: np.ndarray, findings: np.ndarray) -> np.ndarray:
    """bool [candidates, findings]: the candidate lies inside the finding's sphere."""
    diameter = np.where(findings[:, 3] < 0, UNKNOWN_DIAMETER, findings[:, 3])
    distance2 = np.square(candidates[:, None, :3] - findings[None, :, :3]).sum(axis=2)
    return distance2 < np.square(diameter / 2)


@dataclass(frozen=True)
class _Events:
    """What makes a curve: nodules found and false positives of all scans, most probable first, and the thresholds."""

    thresholds: np.ndarray  # [p], falling
    found_scan: np.ndarray  # [found], index of the scan
    n_found: np.ndarray  # [p], how many of them are at or above each threshold
    wrong_scan: np.ndarray  # [false positives]
    n_wrong: np.ndarray  # [p]

    @classmethod
    def of(cls, scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> "_Events":
        """From each scan's probabilities of nodules found and of false positives."""
        found, found_scan = _sorted_by_probability([found for found, _ in scores])
        wrong, wrong_scan = _sorted_by_probability([wrong for _, wrong in scores])
        thresholds = np.unique(np.concatenate([found, wrong]))[::-1]
        n_found = np.searchsorted(-found, -thresholds, side="right")
        rises = np.diff(n_found, prepend=0) > 0
        corner = rises | np.append(rises[1:], True)[: len(rises)]
        n_wrong = np.searchsorted(-wrong, -thresholds, side="right")
        return cls(thresholds[corner], found_scan, n_found[corner], wrong_scan, n_wrong[corner])

    def count(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """False positives and nodules found at each threshold where scan s is taken ``weights[s]`` times."""
        fps = np.cumsum(np.append(0.0, weights[self.wrong_scan]))[self.n_wrong]
        hits = np.cumsum(np.append(0.0, weights[self.found_scan]))[self.n_found]
        return fps, hits


def _sorted_by_probability(scans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All probabilities, falling, and the index of each one's scan."""
    probability = np.concatenate(scans)
    scan = np.repeat(np.arange(len(scans)), [len(one) for one in scans])
    order = np.argsort(-probability, kind="stable")
    return probability[order], scan[order]


def _interpolate(at: np.ndarray, fps: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Nodules found at ``at`` false positives; of several points at one rate np.interp takes the last, the highest."""
    return np.interp(at, np.append(0.0, fps), np.append(0.0, hits))


def _bootstrap(
    events: _Events, n_nodules: np.ndarray, bootstraps: int, rng: np.random.Generator
) -> np.ndarray:
    """Sensitivities [bootstraps, 61] at the `BAND_RATES`, each row from n scans drawn with replacement."""
    n_scans = len(n_nodules)
    samples = np.empty((bootstraps, len(BAND_RATES)))
    for sample in samples:
        total = 0
        while not total:
            weights = np.bincount(rng.integers(n_scans, size=n_scans), minlength=n_scans)
            total = weights @ n_nodules
        sample[:] = _interpolate(BAND_RATES * n_scans, *events.count(weights)) / total
    return samples
