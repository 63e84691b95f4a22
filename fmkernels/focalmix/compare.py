"""FocalMix against the supervised baseline and against its variants: the paper's table.

Every run has a folder of its own. Finished runs are not repeated, so that a comparison continues
where it was stopped. Runs with the same labeled scans, seed and options of the burn-in share it,
and the detection in the unlabeled scans after it. (For targets of 0 and 1 both losses agree up to
rounding.)
"""

import csv
import io
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from fmkernels.focalmix.config import Config, load_config
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.data.workers import start_process
from fmkernels.focalmix.distributed import announced_processes
from fmkernels.focalmix.errors import InputError, first_line
from fmkernels.focalmix.evaluation import figures, froc
from fmkernels.focalmix.files import atomic_write, write_text
from fmkernels.focalmix.roles import DATA, check_data, choose_scans, keep_data, open_scans
from fmkernels.focalmix.training.checkpoint import BURN_IN, CHECKPOINT, PSEUDO_BOXES
from fmkernels.focalmix.training.loop import (
    CANDIDATES,
    EVALUATION,
    TIMING,
    check_options,
    train,
)
from fmkernels.focalmix.training.metrics import METRICS

BASELINE, FOCALMIX, ALL_LABELS = "supervised", "FocalMix", "all labels"
LOG = "log.txt"
"""What a run prints that is trained beside others."""
_FAILED = "failed: "

ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "image-mixup": ("no image MixUp", {"image_mixup": False}),
    "object-mixup": ("no object MixUp", {"object_mixup": False}),
    "mixup": ("no MixUp", {"image_mixup": False, "object_mixup": False}),
    "soft-labels": ("hard pseudo-labels", {"pseudo_labels": "hard"}),
    "soft-loss": ("usual focal loss", {"loss": "hard"}),
    "views": ("K = 1", {"views": 1}),
    "sharpening": ("T = 1", {"temperature": 1.0}),
}
"""Components of FocalMix that can be left out: name of the row, changed options."""

_SUPERVISED: dict[str, Any] = {"method": "supervised", "student": "continued"}
_FRESH: dict[str, Any] = {"student": "fresh", "teacher": "fixed"}


def _alike(name: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """The same change of both methods."""
    return {f"{BASELINE}, {name}": {**_SUPERVISED, **changes}, f"{FOCALMIX}, {name}": changes}


EXTENSIONS: dict[str, Callable[[Config], dict[str, dict[str, Any]]]] = {
    "burn-in": lambda config: {
        "burn-in alone": {
            **_SUPERVISED,
            "steps": config.burn_in_steps,
            "burn_in": float(config.burn_in_steps),
        }
    },
    "fresh-supervised": lambda _: {"fresh supervised student": {**_SUPERVISED, "student": "fresh"}},
    "fresh-student": lambda _: {"fresh student": _FRESH},
    "following-teacher": lambda config: {
        "fresh student, teacher follows": {
            **_FRESH,
            "follow_after": (config.steps - config.burn_in_steps) // 2,
        }
    },
    "supervised-mixup": lambda _: _alike("MixUp in supervised steps", supervised_mixup=True),
    "unlabeled-mixup": lambda _: {"only unlabeled images mixed": {"mixed_images": "unlabeled"}},
    "rotations": lambda _: _alike("rotations", rotations=True),
    "contrast": lambda _: _alike("contrast", contrast=0.1),
    "noise": lambda _: _alike("noise", noise=30.0),
    "blur": lambda _: _alike("blur", blur=0.7),
    "probable-boxes": lambda _: {"boxes of 0.8 and more": {"pseudo_box_probability": 0.8}},
    "own-normalizer": lambda _: {
        "unlabeled loss by its own targets": {"unlabeled_normalizer": "own"}
    },
    "ignored-targets": lambda _: {"targets of 0.1 to 0.6 ignored": {"ignored_targets": (0.1, 0.6)}},
    "plain-ops": lambda _: {"plain PyTorch": {"ops": "plain"}},
}
"""What can be added: rows with their changed options, as functions of the options of all runs."""

BURN_IN_OPTIONS = ("supervised_mixup", "rotations", "contrast", "noise", "blur")
"""Options of `EXTENSIONS` that change the burn-in."""


@dataclass(frozen=True)
class Row:
    """One method with one number of labeled scans; means over the seeds."""

    labeled: int | None
    """Number of labeled scans; None: all."""
    method: str
    sensitivities: tuple[float, ...]
    """Sensitivity at the seven operating points."""
    cpm: float
    interval: tuple[float, float]
    """95% bootstrap interval of the CPM over scans and seeds; too narrow if there are few seeds."""
    gain: float | None
    """Relative gain of the CPM over the baseline; None for the baseline."""
    gain_interval: tuple[float, float] | None
    """95% bootstrap interval, with the same scans and seeds for both methods."""
    difference: float | None
    """CPM minus that of the baseline."""
    difference_interval: tuple[float, float] | None
    """95% interval of a paired t test over the seeds; None with one seed."""
    share: float | None
    """Difference / that of training with all labels; None if these are not trained."""
    to_focalmix: float | None
    """CPM minus that of FocalMix: what a part is worth; None for the baseline and FocalMix."""
    to_focalmix_interval: tuple[float, float] | None
    """95% interval of a paired t test over the seeds; None with one seed."""


@dataclass(frozen=True)
class _Run:
    """A run of the comparison."""

    labeled: int | None
    method: str
    config: Config
    folder: Path
    shared: Path | None
    """The folder of the run whose burn-in is the same, which may be this run; None: not shared."""

    def __str__(self) -> str:
        scans = "all" if self.labeled is None else self.labeled
        return f"{scans} labeled scans, {self.method}, seed {self.config.seed}"

    @property
    def begun(self) -> bool:
        return (self.folder / CHECKPOINT).exists()

    @property
    def finished(self) -> bool:
        if not (self.folder / EVALUATION).exists():
            return False
        stored = load_config(self.folder)
        return stored is not None and stored.result == self.config.result


def compare(
    config: Config,
    root: str | Path,
    out: str | Path,
    *,
    labeled: Sequence[int],
    seeds: int,
    without: Sequence[str] = (),
    extended: Sequence[str] = (),
    all_labels: bool = False,
    jobs: int = 1,
    bootstraps: int = 1000,
) -> list[Row]:
    """Train all runs that are not finished, and write tables and figures to ``out``.

    ``table.txt``, ``table.md`` and ``table.csv`` are the table, ``runs.csv`` has the CPM of every
    run, ``timing.json`` the milliseconds per step of the methods. ``cpm.png`` shows the CPM over
    the number of labeled scans, ``labeled-N/froc.png`` the curves of both methods with N of them,
    ``labeled-N/seeds.png`` the CPM of both methods for each seed.

    Args:
        config: the options of all runs; method, labeled scans and seed are set here.
        root: the folder of a data set, as for `train`.
        out: the folder of the comparison.
        labeled: numbers of labeled scans; a seed chooses the same scans for every method.
        seeds: number of seeds per method, 0 ... seeds - 1.
        without: names of `ABLATIONS`; each adds a row.
        extended: names of `EXTENSIONS`; each adds its rows.
        all_labels: train with the labels of all training scans too.
        jobs: number of runs that are trained at once. More than one are processes of one thread
            each, whose output goes to ``log.txt`` in the folder of the run.
        bootstraps: number of bootstrap samples.

    Raises:
        InputError: see `train`; there are no test subsets; a run was trained with other data; or
            ``config`` already has what ``without`` or ``extended`` change.
        FloatingPointError: a run diverged; all others are finished.
        ChildProcessError: the process of a run failed otherwise; all others are finished.
    """
    if not config.test_subsets:
        raise InputError("test_subsets: expected at least one, got none")
    if announced_processes()[1] > 1:
        raise InputError("compare: expected one process, got several; torchrun is for train")
    out = Path(out)
    methods = _methods(config, without, extended)
    runs = _plan(config, out, methods, labeled, seeds, all_labels)
    data = open_scans(config, root, config.unlabeled_data)
    used: set[str] = set()
    for run in runs:  # what is impossible is reported before hours of training
        check_options(run.folder, run.config)
        if run.begun:
            check_data(run.folder, data, choose_scans(run.config, data))
        if run.method not in (BASELINE, ALL_LABELS):
            continue  # all methods have the scans of the baseline
        method = "supervised" if run.labeled is None else "focalmix"
        scans = choose_scans(replace(run.config, method=method), data)
        if not scans.test:
            raise InputError(f"{data.root}: expected scans in the test subsets, found none")
        used.update(uid for role in scans for uid in role)
    if jobs > 1:
        data.prepare(sorted(used))
    progress = _Progress(len(runs))
    for run in runs:
        if run.finished:
            progress.add(run)
    _train_all([run for run in runs if not run.finished], root, jobs, progress)
    progress.raise_failures()

    findings = data.findings(scans.test)  # all runs have the same test scans
    results: dict[tuple[int | None, str], list[froc.Froc]] = {}
    for run in runs:
        candidates = read_candidates(run.folder / CANDIDATES)
        found = froc.evaluate(candidates, *findings, scans.test, bootstraps=bootstraps)
        results.setdefault((run.labeled, run.method), []).append(found)
    rows = _rows(results)
    for name, table in (("txt", as_text), ("md", as_markdown), ("csv", as_csv)):
        write_text(out / f"table.{name}", table(rows))
    write_text(out / "runs.csv", _runs_as_csv(rows, results))
    write_text(out / TIMING, json.dumps(_timing(runs), indent=2) + "\n")
    points = {
        name: [
            (row.labeled, row.cpm, *row.interval)
            for row in rows
            if row.method == name and row.labeled is not None
        ]
        for name in methods
    }
    figures.draw_comparison(out / "cpm.png", points)
    for count in labeled:
        pair = {name: results[count, name] for name in (BASELINE, FOCALMIX)}
        curves = {name: froc.average(found) for name, found in pair.items()}
        figures.draw_froc(out / f"labeled-{count}" / "froc.png", curves)
        cpms = {name: [found.cpm for found in all_found] for name, all_found in pair.items()}
        figures.draw_seeds(out / f"labeled-{count}" / "seeds.png", cpms)
    return rows


def _methods(
    config: Config, without: Iterable[str], extended: Iterable[str]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """The methods by the name of their row: name of the folder, changed options."""
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        BASELINE: ("supervised", _SUPERVISED),
        FOCALMIX: ("focalmix", {"method": "focalmix"}),
    }
    for part in without:
        name, changes = ABLATIONS[part]
        if replace(config, **changes) == config:
            raise InputError(f"{part}: expected a component that the options have switched on")
        methods[name] = (f"without-{part}", {"method": "focalmix", **changes})
    for part in extended:
        for name, changes in EXTENSIONS[part](config).items():
            changes = {"method": "focalmix", **changes}
            is_supervised = changes["method"] == "supervised"
            usual = methods[BASELINE if is_supervised else FOCALMIX][1]
            if replace(config, **changes) == replace(config, **usual):
                raise InputError(f"{part}: expected an extension that the options do not have yet")
            methods[name] = (f"{'supervised-' * is_supervised}with-{part}", changes)
    return methods


def _plan(
    config: Config,
    out: Path,
    methods: Mapping[str, tuple[str, dict[str, Any]]],
    labeled: Iterable[int],
    seeds: int,
    all_labels: bool,
) -> list[_Run]:
    """All runs, in the order in which one process trains them."""
    runs = []
    for count in labeled:
        for seed in range(seeds):
            first: dict[tuple, Path] = {}
            for method, (name, changes) in methods.items():
                chosen = replace(config, **changes, labeled=count, seed=seed)
                folder = out / f"labeled-{count}" / name / f"seed-{seed}"
                key = tuple(getattr(chosen, option) for option in BURN_IN_OPTIONS)
                shared = first.setdefault(key, folder) if chosen.burn_in_steps else None
                runs.append(_Run(count, method, chosen, folder, shared))
    for seed in range(seeds if all_labels else 0):
        chosen = replace(config, **_SUPERVISED, labeled=None, seed=seed)
        folder = out / "labeled-all" / "supervised" / f"seed-{seed}"
        runs.append(_Run(None, ALL_LABELS, chosen, folder, None))
    return runs


class _Progress:
    """One line for every run that has ended, and the runs that failed."""

    def __init__(self, total: int) -> None:
        self.total, self.ended = total, 0
        self.failures: list[tuple[_Run, str, bool]] = []

    def add(self, run: _Run, minutes: float | None = None) -> None:
        evaluation = json.loads((run.folder / EVALUATION).read_text(encoding="utf-8"))
        time_taken = "" if minutes is None else f", {minutes:.1f} minutes"
        self._write(run, f"CPM {evaluation['cpm']:.3f}{time_taken}")

    def add_failure(self, run: _Run, error: str, *, diverged: bool) -> None:
        self.failures.append((run, error, diverged))
        self._write(run, f"failed: {error}")

    def _write(self, run: _Run, text: str) -> None:
        self.ended += 1
        tqdm.write(f"run {self.ended} of {self.total}: {run}: {text}")

    def raise_failures(self) -> None:
        if not self.failures:
            return
        run, error, _ = self.failures[0]
        kind = FloatingPointError if all(row[2] for row in self.failures) else ChildProcessError
        raise kind(
            f"{len(self.failures)} of {self.total} runs failed, the first one in {run.folder}: "
            f"{error}; all others are finished, and the same command trains these again"
        )


def _train_all(runs: Sequence[_Run], root: str | Path, jobs: int, progress: _Progress) -> None:
    """Train runs that are not finished, and report each that ends."""
    if jobs > 1:
        return _train_in_processes(runs, root, jobs, progress)
    for run in runs:
        tqdm.write(f"training: {run}")
        _share_burn_in(run)
        began = time.monotonic()
        try:
            train(run.config, root, run.folder, resume=run.begun)
        except FloatingPointError as error:
            progress.add_failure(run, f"FloatingPointError: {first_line(error)}", diverged=True)
        else:
            progress.add(run, (time.monotonic() - began) / 60)
        _keep_pseudo_boxes(run)
    return None


def _train_in_processes(
    runs: Sequence[_Run], root: str | Path, jobs: int, progress: _Progress
) -> None:
    waiting = list(runs)
    running: dict[Path, tuple[_Run, BaseProcess, float]] = {}
    try:
        while waiting or running:
            for run, process, began in list(running.values()):
                _keep_pseudo_boxes(run)
                if process.exitcode is None:
                    continue
                del running[run.folder]
                if process.exitcode == 0:
                    progress.add(run, (time.monotonic() - began) / 60)
                else:
                    error = _reason(run.folder / LOG, process.exitcode)
                    diverged = error.startswith(FloatingPointError.__name__)
                    progress.add_failure(run, error, diverged=diverged)
            others = [run for run, *_ in running.values()]
            for run in list(waiting):
                if len(running) < jobs and _is_ready(run, others, waiting):
                    _share_burn_in(run)
                    run.folder.mkdir(parents=True, exist_ok=True)
                    alone = replace(run, config=replace(run.config, workers=0))
                    process = start_process(_train_alone, alone, root, log=run.folder / LOG)
                    running[run.folder] = run, process, time.monotonic()
                    waiting.remove(run)
                    others.append(run)
            time.sleep(0.2)
    finally:
        for _, process, _ in running.values():
            process.terminate()  # each saves a checkpoint first
        for _, process, _ in running.values():
            process.join()


def _train_alone(run: _Run, root: str | Path) -> None:
    """Train a run, in a process of its own."""
    try:
        train(run.config, root, run.folder, resume=run.begun)
    except Exception as error:
        print(f"\n{_FAILED}{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        raise


def _reason(log: Path, code: int) -> str:
    """Why the process of a run failed."""
    if code < 0:
        return f"the process was ended by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(_FAILED) for line in lines if line.startswith(_FAILED)]
    return said[-1] if said else f"exit code {code}, see {log}"


def _is_ready(run: _Run, running: Sequence[_Run], waiting: Sequence[_Run]) -> bool:
    """Whether nothing that a run shares is being made by another one."""
    if run.shared is None or run.shared == run.folder:
        return True
    if any(run.shared == other.folder for other in waiting):
        return False
    if not (run.shared / BURN_IN).exists() and any(run.shared == o.folder for o in running):
        return False
    detects = (
        other
        for other in running
        if other.shared == run.shared and other.config.method == "focalmix"
    )
    return (
        run.config.method == "supervised"
        or (run.shared / PSEUDO_BOXES).exists()
        or not any(detects)
    )


def _share_burn_in(run: _Run) -> None:
    """Let a new run continue from the end of a burn-in, until which both are equal."""
    if run.shared is None or run.shared == run.folder:
        return
    if (run.shared / BURN_IN).exists() and not run.begun:
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, PSEUDO_BOXES, BURN_IN):
            (run.folder / name).unlink(missing_ok=True)
            _copy(run.shared / name, run.folder / name)
        if (run.shared / DATA).exists():  # the unlabeled scans may be others
            found = json.loads((run.shared / DATA).read_text(encoding="utf-8"))
            keep_data(run.folder, {k: value for k, value in found.items() if k != "unlabeled"})
        _copy(run.shared / BURN_IN, run.folder / CHECKPOINT)


def _keep_pseudo_boxes(run: _Run) -> None:
    """Keep what a run has detected beside the burn-in, for the runs to come."""
    if run.shared is not None and (run.shared / BURN_IN).exists():
        _copy(run.folder / PSEUDO_BOXES, run.shared / PSEUDO_BOXES)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, if it exists, to where there is none."""
    if source.exists() and not target.exists():
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def _rows(results: Mapping[tuple[int | None, str], Sequence[froc.Froc]]) -> list[Row]:
    """The table, from the runs of every method in the order of their seeds."""
    every = results.get((None, ALL_LABELS))
    rows = []
    for (count, name), runs in results.items():
        baseline = results.get((count, BASELINE), runs)
        rows.append(_row(count, name, runs, baseline, every, results.get((count, FOCALMIX))))
    return rows


def _row(
    labeled: int | None,
    name: str,
    ours: Sequence[froc.Froc],
    baseline: Sequence[froc.Froc],
    all_labels: Sequence[froc.Froc] | None = None,
    focalmix: Sequence[froc.Froc] | None = None,
) -> Row:
    """A row from runs with the same seeds and the same bootstrap samples."""
    mean, below = froc.average(ours), froc.average(baseline)
    assert mean.interval is not None and mean.samples is not None and below.samples is not None
    gain = gain_interval = difference = difference_interval = share = None
    to_focalmix = to_focalmix_interval = None
    if focalmix is not None and name not in (BASELINE, FOCALMIX):
        to_focalmix = mean.cpm - froc.average(focalmix).cpm
        to_focalmix_interval = paired_interval(ours, focalmix)
    if ours is not baseline and name != BASELINE:
        difference = mean.cpm - below.cpm
        difference_interval = paired_interval(ours, baseline)
        if below.cpm > 0:
            gain = mean.cpm / below.cpm - 1
            drawn, under = (samples[:, ::10].mean(1) for samples in (mean.samples, below.samples))
            gains = np.divide(drawn, under, out=np.full_like(drawn, np.inf), where=under > 0) - 1
            lower, upper = np.quantile(gains, (0.025, 0.975), method="inverted_cdf").tolist()
            gain_interval = (lower, upper)
        way = 0.0 if all_labels is None else froc.average(all_labels).cpm - below.cpm
        share = difference / way if way > 0 else None
    return Row(
        labeled,
        name,
        mean.operating_sensitivities,
        mean.cpm,
        mean.interval,
        gain,
        gain_interval,
        difference,
        difference_interval,
        share,
        to_focalmix,
        to_focalmix_interval,
    )


def paired_interval(
    ours: Sequence[froc.Froc], theirs: Sequence[froc.Froc]
) -> tuple[float, float] | None:
    """95% interval of the mean difference of the CPM, from the t distribution over the seeds."""
    if len(ours) < 2:
        return None
    differences = [a.cpm - b.cpm for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.fmean(differences), stats.sem(differences)
    reach = float(stats.t.ppf(0.975, len(differences) - 1) * error)
    return mean - reach, mean + reach


def _runs_as_csv(
    rows: Iterable[Row], results: Mapping[tuple[int | None, str], Sequence[froc.Froc]]
) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["labeled", "method", "seed", "cpm"])
    for row in rows:
        for seed, run in enumerate(results[row.labeled, row.method]):
            writer.writerow([_scans(row.labeled), row.method, seed, run.cpm])
    return text.getvalue()


def _timing(runs: Iterable[_Run]) -> dict[str, dict[str, float]]:
    """Milliseconds per step: the median of each run, their median over the seeds."""
    steps: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if (path := run.folder / TIMING).exists():
            medians = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
            scans = steps.setdefault(_scans(run.labeled), {})
            scans.setdefault(run.method, []).append(medians["step"])
    return {
        scans: {method: statistics.median(values) for method, values in methods.items()}
        for scans, methods in steps.items()
    }


def _scans(labeled: int | None) -> str:
    return "all" if labeled is None else str(labeled)


_HEAD = (
    *("labeled", "method", *froc.RATE_NAMES, "CPM", "95%", "gain", "95% of the gain"),
    *("difference", "95%, paired t", "of the way", "to FocalMix", "95%, paired t"),
)


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str = "{:+.3f}") -> str:
        return "" if value is None else form.format(value)

    def interval(ends: tuple[float, float] | None, form: str = "{:+.3f}") -> str:
        return "" if ends is None else " to ".join(number(value, form) for value in ends)

    return [
        _scans(row.labeled),
        row.method,
        *(f"{100 * value:.1f}" for value in row.sensitivities),
        number(row.cpm, "{:.3f}"),
        interval(row.interval, "{:.3f}"),
        number(row.gain, "{:+.1%}"),
        interval(row.gain_interval, "{:+.1%}"),
        number(row.difference),
        interval(row.difference_interval),
        number(row.share, "{:.0%}"),
        number(row.to_focalmix),
        interval(row.to_focalmix_interval),
    ]


def as_text(rows: Sequence[Row]) -> str:
    """The table as aligned text: sensitivities in % at false positives per scan."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    line = "  ".join(f"{{:{'<' if i == 1 else '>'}{width}}}" for i, width in enumerate(widths))
    return "".join(line.format(*cells).rstrip() + "\n" for cells in lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [_HEAD, ["---"] * len(_HEAD), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: fractions instead of percent, two columns per interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rates = (f"sensitivity_at_{rate:g}" for rate in froc.OPERATING_POINTS)
    bounds = (
        *("cpm_lower", "cpm_upper", "gain", "gain_lower", "gain_upper"),
        *("difference", "difference_lower", "difference_upper", "share"),
        *("to_focalmix", "to_focalmix_lower", "to_focalmix_upper"),
    )
    writer.writerow(["labeled", "method", *rates, "cpm", *bounds])
    for row in rows:
        gains = (row.gain, *(row.gain_interval or (None, None)), row.difference)
        writer.writerow(
            [
                *(_scans(row.labeled), row.method, *row.sensitivities, row.cpm, *row.interval),
                *(*gains, *(row.difference_interval or (None, None)), row.share),
                *(row.to_focalmix, *(row.to_focalmix_interval or (None, None))),
            ]
        )
    return text.getvalue()
