"""LUNA16's evaluation: the FROC curve, the CPM and its bootstrap interval.

Findings and candidates are float64 arrays [n, 4] per series, as in `data.tables`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fmkernels.focalmix.data.tables import as_rows, diameters
from fmkernels.focalmix.errors import InputError

OPERATING_POINTS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 takes the sensitivity; the CPM is the mean of all."""

RATE_NAMES = ("1/8", "1/4", "1/2", "1", "2", "4", "8")
"""The `OPERATING_POINTS` for people."""

BAND_RATES = np.array([2.0 ** (k / 10) for k in range(-30, 31)])
"""False positives per scan of `Froc.band`: ten per octave, every tenth is an operating point."""

MAX_CANDIDATES = 100
"""Only the most probable candidates of a scan count, at most this many."""

DIAMETERS = (0.0, 6.0, 8.0, 15.0, np.inf)
"""Limits of the groups of nodules by diameter (mm), the lower one included."""


class Miss(NamedTuple):
    """A nodule that no candidate hits."""

    uid: str
    point: tuple[float, float, float]
    """World x, y, z in mm."""
    diameter: float
    """In mm, negative if unknown."""


class Group(NamedTuple):
    """The nodules of similar diameters."""

    low: float
    high: float
    """Limits in mm, the lower one included; see `tables.diameters` for unknown ones."""
    n_nodules: int
    sensitivities: tuple[float, ...]
    """At each of the `OPERATING_POINTS`. Their mean, weighted by nodules, is that of all."""


@dataclass(frozen=True)
class Details:
    """What became of the candidates and nodules of one evaluation, all thresholds together."""

    n_candidates: int
    """Candidates in the scans evaluated: the sum of the next five, unless some hit two nodules."""
    n_true: int
    """Nodules that are hit: each by its best candidate."""
    n_false: int
    """Candidates that hit nothing."""
    n_ignored: int
    """Candidates that hit an excluded finding and no nodule."""
    n_repeated: int
    """Candidates on nodules, of which none is their best."""
    n_capped: int
    """Candidates beyond the 100 most probable of their scan."""
    misses: tuple[Miss, ...]
    """The nodules that no candidate hits."""
    groups: tuple[Group, ...]
    """Nodules by diameter, without empty groups."""
    thresholds: tuple[float | None, ...]
    """Lowest probability that is kept at each of the `OPERATING_POINTS`; None: no candidate is."""

    def to_dict(self) -> dict[str, object]:
        """Everything except the thresholds, as numbers for strict JSON."""
        names = ("n_candidates", "n_true", "n_false", "n_ignored", "n_repeated", "n_capped")
        return {
            "counts": {name: getattr(self, name) for name in names}
            | {"n_missed": len(self.misses)},
            "by_diameter": [
                {
                    "low": group.low,
                    "high": group.high if np.isfinite(group.high) else None,
                    "n_nodules": group.n_nodules,
                    "sensitivities": list(group.sensitivities),
                }
                for group in self.groups
            ],
            "missed": [
                {"seriesuid": miss.uid, "point": list(miss.point), "diameter": miss.diameter}
                for miss in self.misses
            ],
        }

    def __str__(self) -> str:
        return (
            f"Candidates {self.n_candidates:,}: true positives {self.n_true:,}, false positives "
            f"{self.n_false:,}, ignored on excluded findings {self.n_ignored:,}, repeated "
            f"{self.n_repeated:,}, beyond the {MAX_CANDIDATES} of a scan {self.n_capped:,}. "
            f"Nodules missed {len(self.misses):,}."
        )


@dataclass(frozen=True, eq=False)
class Froc:
    """A free-response ROC curve; ``str()`` is a table for people, `to_dict` the same for machines.

    The curve starts at (0 false positives, sensitivity 0), which is not in the arrays. Points
    inside a horizontal segment are left out: linear interpolation restores them.
    """

    thresholds: np.ndarray = field(repr=False)
    """float64 [p], descending: point i counts the candidates of at least this probability."""
    fps_per_scan: np.ndarray = field(repr=False)
    """float64 [p]: false positives per scan at each threshold."""
    sensitivities: np.ndarray = field(repr=False)
    """float64 [p]: fraction of the nodules that are hit at each threshold."""
    operating_sensitivities: tuple[float, ...]
    """Sensitivity at each of the `OPERATING_POINTS`."""
    cpm: float
    """Mean of ``operating_sensitivities``."""
    interval: tuple[float, float] | None
    """95% bootstrap interval of the CPM; None without bootstraps."""
    band: np.ndarray | None = field(repr=False)
    """float64 [2, 61]: ends of the 95% bootstrap interval of the sensitivity at `BAND_RATES`."""
    samples: np.ndarray | None = field(repr=False)
    """float64 [bootstraps, 61]: sensitivities; with the same seed, row i has the same scans."""
    n_scans: int
    n_nodules: int
    n_bootstraps: int
    details: Details | None = field(default=None, repr=False)
    """None for a mean of several evaluations."""

    def to_dict(self) -> dict[str, object]:
        """Everything except samples and most of the band, as numbers for strict JSON."""
        points: list[dict[str, float | None]] = [
            {"fps_per_scan": rate, "sensitivity": sensitivity}
            for rate, sensitivity in zip(
                OPERATING_POINTS, self.operating_sensitivities, strict=True
            )
        ]
        if self.band is not None:
            for point, lower, upper in zip(points, *self.band[:, ::10].tolist(), strict=True):
                point |= {"lower": lower, "upper": upper}
        if self.details is not None:
            for point, threshold in zip(points, self.details.thresholds, strict=True):
                point["threshold"] = threshold
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
            **(self.details.to_dict() if self.details is not None else {}),
        }

    def __str__(self) -> str:
        def line(name: str, values: Sequence[float]) -> str:
            return _line(name, [f"{100 * value:.1f}" for value in values])

        lines = [
            f"{count(self.n_scans, 'scan')}, {count(self.n_nodules, 'nodule')}",
            _line("False positives per scan", RATE_NAMES),
            line("Sensitivity (%)", self.operating_sensitivities),
        ]
        cpm = f"CPM {self.cpm:.3f}"
        if self.band is not None and self.interval is not None:
            lines += [
                line(f"  95% interval, {end}", values)
                for end, values in zip(("lower", "upper"), self.band[:, ::10], strict=True)
            ]
            lower, upper = self.interval
            cpm += f" (95% interval {lower:.3f} to {upper:.3f}, {self.n_bootstraps} bootstraps)"
        if self.details is not None:
            for group in self.details.groups:
                ends = f"{group.low:g} to {group.high:g} mm"
                ends = f"under {group.high:g} mm" if not group.low else ends
                ends = f"{group.low:g} mm and over" if np.isinf(group.high) else ends
                lines.append(line(f"  {ends} ({group.n_nodules:,})", group.sensitivities))
            cells = [
                "-" if threshold is None else f"{threshold:.3g}"
                for threshold in self.details.thresholds
            ]
            lines += [_line("Threshold", cells), str(self.details)]
        return "\n".join([*lines, cpm])


def count(number: int, name: str) -> str:
    """A number of things: 1 scan, 2 scans."""
    return f"{number:,} {name}{'s' * (number != 1)}"


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

    - The 100 most probable candidates of each scan count; of equal probabilities, the first.
    - A candidate hits the findings that it lies inside (see `hits`), possibly several.
    - A nodule is detected at the probability of the best candidate that hits it. The other hits are
      neither true nor false positives. A nodule without hits is missed.
    - A candidate that hits no nodule is dropped if it hits an excluded finding; otherwise it is a
      false positive.
    - Each distinct probability is a threshold, the lowest included; it counts all candidates of at
      least that probability.
    - False positives are counted per scan of ``series``, scans without nodules or candidates
      included.
    - The sensitivity is interpolated linearly over false positives per scan; at a jump, the higher
      value counts. Below the first point it rises linearly from sensitivity 0 at rate 0. Beyond the
      last point, where no candidates are left, it stays constant.
    - The interval goes from the 2.5th to the 97.5th percentile over bootstraps of whole scans,
      drawn with replacement. A draw without any nodule has no sensitivity and is repeated.

    Args:
        candidates: series -> [n, 4]: x, y, z (mm), probability (any finite score). A series may be
            missing.
        nodules: series -> [n, 4]: x, y, z (mm), diameter (mm). Other series are ignored.
        excluded: the same for findings that are neither nodules nor false positives.
        series: the scans to evaluate, each once.
        bootstraps: number of bootstraps; 0 omits the intervals.
        seed: seed of the bootstraps.

    Raises:
        InputError: a candidate is in no scan of ``series``, a series is listed twice, there is no
            nodule in ``series``, or an array is not [n, 4] of finite numbers.

    Example:
        >>> candidates = {"a": [[0, 0, 0, 0.4], [50, 0, 0, 0.5]]}
        >>> froc = evaluate(candidates, {"a": [[1, 0, 0, 6]]}, {}, ["a"], bootstraps=0)
        >>> froc.operating_sensitivities
        (0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    """
    scans = {uid: scan for scan, uid in enumerate(series)}
    if len(scans) != len(series):
        twice = next(uid for uid in scans if series.count(uid) > 1)
        raise InputError(f"series: expected every id once, got {twice} {series.count(twice)} times")
    if (unknown := next((uid for uid in candidates if uid not in scans), None)) is not None:
        raise InputError(f"candidates: unknown series id {unknown}, not among the scans evaluated")
    tables = {"candidates": candidates, "nodules": nodules, "excluded findings": excluded}
    rows = [
        [as_rows(name, uid, table.get(uid, ())) for name, table in tables.items()] for uid in scans
    ]
    n_nodules = np.array([len(scan_nodules) for _, scan_nodules, _ in rows])
    if not n_nodules.any():
        raise InputError("nodules: expected at least one in the scans evaluated, got none")

    scores = [_score_scan(*scan) for scan in rows]
    events = _Events.of([(score.detected, score.false) for score in scores])
    fps, detected = events.count(np.ones(len(scans)))
    rates = np.array(OPERATING_POINTS) * len(scans)
    operating = interpolate(rates, fps, detected) / n_nodules.sum()
    rng = np.random.default_rng(seed)
    samples = _bootstrap(events, n_nodules, bootstraps, rng) if bootstraps else None
    interval, band = (None, None) if samples is None else _intervals(samples)
    return Froc(
        thresholds=events.thresholds,
        fps_per_scan=fps / len(scans),
        sensitivities=detected / n_nodules.sum(),
        operating_sensitivities=tuple(operating.tolist()),
        cpm=float(operating.mean()),
        interval=interval,
        band=band,
        samples=samples,
        n_scans=len(scans),
        n_nodules=int(n_nodules.sum()),
        n_bootstraps=bootstraps,
        details=_details(list(scans), rows, scores, events, fps),
    )


def hits(points: np.ndarray, findings: np.ndarray) -> np.ndarray:
    """Which points lie inside which findings: the one hit rule, LUNA16's.

    A point hits a finding if its squared distance to the center is less than the squared radius; a
    point at the radius does not. A negative diameter means 10 mm.

    Args:
        points: [n, 3]: world x, y, z in mm.
        findings: [m, 4]: world x, y, z, diameter, in mm.

    Returns:
        bool [n, m].
    """
    distance2 = np.square(points[:, None] - findings[None, :, :3]).sum(axis=2)
    return distance2 < np.square(diameters(findings) / 2)


def average(runs: Sequence[Froc], *, seed: int = 0) -> Froc:
    """The mean of runs that were evaluated on the same scans, with the same bootstraps.

    A bootstrap draws runs with replacement, on top of the scans, which are the same for all runs;
    with the same seed it draws the same positions among the runs for every method. The curve is
    given at `BAND_RATES`, without thresholds.
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
    curves = [interpolate(BAND_RATES, run.fps_per_scan, run.sensitivities) for run in runs]
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
    """95% intervals of the CPM, and of the sensitivity at `BAND_RATES` [2, 61]."""
    lower, upper = np.quantile(samples[:, ::10].mean(axis=1), (0.025, 0.975)).tolist()
    return (lower, upper), np.quantile(samples, (0.025, 0.975), axis=0)


class _Scores(NamedTuple):
    """The candidates of a scan that count, and what they hit."""

    detected: np.ndarray  # probability of the best candidate of each nodule that is hit
    false: np.ndarray  # probability of each false positive
    is_hit: np.ndarray  # bool [nodules]
    n_ignored: int
    n_repeated: int
    n_capped: int


def _score_scan(candidates: np.ndarray, nodules: np.ndarray, excluded: np.ndarray) -> _Scores:
    n_capped = max(0, len(candidates) - MAX_CANDIDATES)
    candidates = candidates[np.argsort(-candidates[:, 3], kind="stable")[:MAX_CANDIDATES]]
    points, probability = candidates[:, :3], candidates[:, 3]
    on_nodule = hits(points, nodules)
    hits_nodule, is_hit = np.asarray(on_nodule.any(axis=1)), np.asarray(on_nodule.any(axis=0))
    on_excluded = hits(points, excluded).any(axis=1)
    best = np.where(on_nodule, probability[:, None], -np.inf).max(axis=0, initial=-np.inf)
    # candidates are sorted: the first on a nodule is its best
    bests = set(on_nodule[:, is_hit].argmax(axis=0).tolist()) if is_hit.any() else ()
    return _Scores(
        best[is_hit],
        probability[~hits_nodule & ~on_excluded],
        is_hit,
        int((~hits_nodule & on_excluded).sum()),
        int(hits_nodule.sum()) - len(bests),
        n_capped,
    )


def _details(
    series: Sequence[str],
    rows: Sequence[Sequence[np.ndarray]],
    scores: Sequence[_Scores],
    events: "_Events",
    fps: np.ndarray,
) -> Details:
    misses = tuple(
        Miss(uid, (x, y, z), diameter)
        for uid, (_, nodules, _), score in zip(series, rows, scores, strict=True)
        for x, y, z, diameter in nodules[~score.is_hit].tolist()
    )
    # in the order of the events
    detected = np.concatenate([score.detected for score in scores])
    order = np.argsort(-detected, kind="stable")
    sizes = [diameters(nodules) for _, nodules, _ in rows]
    hit = [size[score.is_hit] for size, score in zip(sizes, scores, strict=True)]
    all_sizes, hit_sizes = np.concatenate(sizes), np.concatenate(hit)[order]
    rates = np.array(OPERATING_POINTS) * len(series)
    groups = []
    for low, high in pairwise(DIAMETERS):
        total = int(((low <= all_sizes) & (all_sizes < high)).sum())
        of_group = np.cumsum(np.append(0.0, (low <= hit_sizes) & (hit_sizes < high)))
        if total:
            at = interpolate(rates, fps, of_group[events.n_detected]) / total
            groups.append(Group(low, high, total, tuple(at.tolist())))
    last = np.searchsorted(fps, rates, side="right") - 1
    thresholds = [float(events.thresholds[i]) if i >= 0 else None for i in last.tolist()]
    return Details(
        n_candidates=sum(len(candidates) for candidates, _, _ in rows),
        n_true=len(detected),
        n_false=len(events.false_scan),
        n_ignored=sum(score.n_ignored for score in scores),
        n_repeated=sum(score.n_repeated for score in scores),
        n_capped=sum(score.n_capped for score in scores),
        misses=misses,
        groups=tuple(groups),
        thresholds=tuple(thresholds),
    )


@dataclass(frozen=True)
class _Events:
    """Detected nodules and false positives of all scans, most probable first, and thresholds."""

    thresholds: np.ndarray  # [p], descending
    detected_scan: np.ndarray  # [detected nodules], index of the scan
    n_detected: np.ndarray  # [p], how many of them are at or above each threshold
    false_scan: np.ndarray  # [false positives]
    n_false: np.ndarray  # [p]

    @classmethod
    def of(cls, scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> "_Events":
        """From each scan's probabilities of detected nodules and of false positives."""
        detected, detected_scan = _sorted_by_probability([detected for detected, _ in scores])
        false, false_scan = _sorted_by_probability([false for _, false in scores])
        thresholds = np.unique(np.concatenate([detected, false]))[::-1]
        n_detected = np.searchsorted(-detected, -thresholds, side="right")
        rises = np.diff(n_detected, prepend=0) > 0
        corner = rises | np.append(rises[1:], True)[: len(rises)]
        n_false = np.searchsorted(-false, -thresholds, side="right")
        return cls(
            thresholds[corner], detected_scan, n_detected[corner], false_scan, n_false[corner]
        )

    def count(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """False positives and detected nodules at each threshold if scan s counts weights[s]."""
        fps = np.cumsum(np.append(0.0, weights[self.false_scan]))[self.n_false]
        detected = np.cumsum(np.append(0.0, weights[self.detected_scan]))[self.n_detected]
        return fps, detected


def _sorted_by_probability(scans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All probabilities in descending order, and the index of the scan of each."""
    probability = np.concatenate(scans)
    scan = np.repeat(np.arange(len(scans)), [len(one) for one in scans])
    order = np.argsort(-probability, kind="stable")
    return probability[order], scan[order]


def interpolate(rates: np.ndarray, fps: np.ndarray, detected: np.ndarray) -> np.ndarray:
    """A curve through (0, 0) at some rates; at a jump np.interp takes the last, highest point."""
    return np.interp(rates, np.append(0.0, fps), np.append(0.0, detected))


def _bootstrap(
    events: _Events, n_nodules: np.ndarray, bootstraps: int, rng: np.random.Generator
) -> np.ndarray:
    """Sensitivities [bootstraps, 61] at `BAND_RATES`, each row from n scans with replacement."""
    n_scans = len(n_nodules)
    samples = np.empty((bootstraps, len(BAND_RATES)))
    for sample in samples:
        total = 0
        while not total:
            weights = np.bincount(rng.integers(n_scans, size=n_scans), minlength=n_scans)
            total = weights @ n_nodules
        sample[:] = interpolate(BAND_RATES * n_scans, *events.count(weights)) / total
    return samples
