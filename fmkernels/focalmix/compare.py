"""FocalMix against the supervised baseline and against its ablations: the paper's table.

Every run has a folder of its own. Finished runs are not repeated, so that a comparison continues
where it was stopped. The burn-in, and the detection in the unlabeled scans after it, are the same
for all methods and done once. (For targets of 0 and 1 both losses agree up to rounding.)
"""

import csv
import io
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fmkernels.focalmix.config import Config, load_config
from fmkernels.focalmix.data.own import open_data
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.distributed import announced_processes
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation import figures, froc
from fmkernels.focalmix.files import atomic_write
from fmkernels.focalmix.training.checkpoint import BURN_IN, CHECKPOINT, PSEUDO_BOXES
from fmkernels.focalmix.training.loop import CANDIDATES, EVALUATION, choose_scans, train
from fmkernels.focalmix.training.metrics import METRICS

BASELINE, FOCALMIX = "supervised", "FocalMix"
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "image-mixup": ("no image MixUp", {"image_mixup": False}),
    "object-mixup": ("no object MixUp", {"object_mixup": False}),
    "soft-labels": ("hard pseudo-labels", {"pseudo_labels": "hard"}),
    "soft-loss": ("usual focal loss", {"loss": "hard"}),
    "views": ("K = 1", {"views": 1}),
    "sharpening": ("T = 1", {"temperature": 1.0}),
}
"""Components of FocalMix that can be left out: name of the row, changed options."""


@dataclass(frozen=True)
class Row:
    """One method with one number of labeled scans; means over the seeds."""

    labeled: int
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


def compare(
    config: Config,
    root: str | Path,
    out: str | Path,
    *,
    labeled: Sequence[int],
    seeds: int,
    without: Sequence[str] = (),
    bootstraps: int = 1000,
) -> list[Row]:
    """Train all runs that are not finished, and write tables and figures to ``out``.

    ``table.txt``, ``table.md`` and ``table.csv`` are the table, ``cpm.png`` shows the CPM over the
    number of labeled scans, ``labeled-N/froc.png`` the curves of both methods with N of them.

    Args:
        config: the options of all runs; method, labeled scans and seed are set here.
        root: the folder of a data set, as for `train`.
        out: the folder of the comparison.
        labeled: numbers of labeled scans; a seed chooses the same scans for every method.
        seeds: number of seeds per method, 0 ... seeds - 1.
        without: names of `ABLATIONS`; each adds a row.
        bootstraps: number of bootstrap samples.

    Raises:
        InputError: see `train`; there are no test subsets; or ``config`` already lacks a component
            of ``without``.
    """
    if not config.test_subsets:
        raise InputError("test_subsets: expected at least one, got none")
    if announced_processes()[1] > 1:
        raise InputError("compare: expected one process, got several; torchrun is for train")
    out = Path(out)
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        BASELINE: ("supervised", {"method": "supervised"}),
        FOCALMIX: ("focalmix", {"method": "focalmix"}),
    }
    for part in without:
        name, changes = ABLATIONS[part]
        if replace(config, **changes) == config:
            raise InputError(f"{part}: expected a component that the options have switched on")
        methods[name] = (f"without-{part}", {"method": "focalmix", **changes})
    subsets = [*config.train_subsets, *config.validation_subsets, *config.test_subsets]
    data = open_data(
        root,
        subsets=subsets,
        cache=config.cache,
        coordinates=config.coordinates,
        unlabeled=config.unlabeled_data,
    )
    for count, seed in itertools.product(labeled, range(seeds)):
        # an impossible choice of scans is reported before hours of training
        scans = choose_scans(replace(config, method="focalmix", labeled=count, seed=seed), data)
        if not scans.test:
            raise InputError(f"{data.root}: expected scans in the test subsets, found none")
    runs = [(count, name, seed) for count in labeled for seed in range(seeds) for name in methods]
    results: dict[tuple[int, str], list[froc.Froc]] = {}
    for number, (count, name, seed) in enumerate(runs, start=1):
        folder, baseline = (
            out / f"labeled-{count}" / methods[method][0] / f"seed-{seed}"
            for method in (name, BASELINE)
        )
        tqdm.write(f"run {number} of {len(runs)}: {count} labeled scans, {name}, seed {seed}")
        chosen = replace(config, **methods[name][1], labeled=count, seed=seed)
        finished = load_config(folder) if (folder / EVALUATION).exists() else None
        if finished is None or finished.result != chosen.result:
            if chosen.method == "focalmix":
                _share_burn_in(baseline, folder)
            train(chosen, root, folder, resume=True)
        if (baseline / BURN_IN).exists():  # beside it, for the runs to come
            _copy(folder / PSEUDO_BOXES, baseline / PSEUDO_BOXES)
        froc_of_run = _evaluate(chosen, root, folder, bootstraps)
        results.setdefault((count, name), []).append(froc_of_run)
    means = {key: froc.average(runs) for key, runs in results.items()}
    rows = [
        _row(count, name, means[count, name], means[count, BASELINE])
        for count in labeled
        for name in methods
    ]
    for name, table in (("txt", as_text), ("md", as_markdown), ("csv", as_csv)):
        with atomic_write(out / f"table.{name}") as temporary:
            temporary.write_text(table(rows), encoding="utf-8")
    points = {
        name: [(row.labeled, row.cpm, *row.interval) for row in rows if row.method == name]
        for name in methods
    }
    figures.draw_comparison(out / "cpm.png", points)
    for count in labeled:
        curves = {name: means[count, name] for name in (BASELINE, FOCALMIX)}
        figures.draw_froc(out / f"labeled-{count}" / "froc.png", curves)
    return rows


def _share_burn_in(baseline: Path, run: Path) -> None:
    """Let a new run continue from the end of the baseline's burn-in, until which both are equal."""
    if (baseline / BURN_IN).exists() and not (run / CHECKPOINT).exists():
        run.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, PSEUDO_BOXES):
            (run / name).unlink(missing_ok=True)
            _copy(baseline / name, run / name)
        _copy(baseline / BURN_IN, run / CHECKPOINT)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, if it exists, to where there is none."""
    if source.exists() and not target.exists():
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def _evaluate(config: Config, root: str | Path, run: Path, bootstraps: int) -> froc.Froc:
    data = open_data(root, subsets=config.test_subsets, coordinates=config.coordinates)
    candidates, findings = read_candidates(run / CANDIDATES), data.findings(data.series)
    return froc.evaluate(candidates, *findings, data.series, bootstraps=bootstraps)


def _row(labeled: int, name: str, ours: froc.Froc, baseline: froc.Froc) -> Row:
    """A row from two means over the same seeds, with the same bootstrap samples."""
    assert ours.interval is not None and ours.samples is not None and baseline.samples is not None
    gain = gain_interval = None
    if name != BASELINE and baseline.cpm > 0:
        gain = ours.cpm / baseline.cpm - 1
        drawn, below = (samples[:, ::10].mean(1) for samples in (ours.samples, baseline.samples))
        gains = np.divide(drawn, below, out=np.full_like(drawn, np.inf), where=below > 0) - 1
        lower, upper = np.quantile(gains, (0.025, 0.975), method="inverted_cdf").tolist()
        gain_interval = (lower, upper)
    return Row(
        labeled, name, ours.operating_sensitivities, ours.cpm, ours.interval, gain, gain_interval
    )


_RATES = ("1/8", "1/4", "1/2", "1", "2", "4", "8")
_HEAD = ("labeled", "method", *_RATES, "CPM", "95%", "gain", "95% of the gain")


def _cells(row: Row) -> list[str]:
    percent = [f"{100 * value:.1f}" for value in (*row.sensitivities, row.cpm)]
    interval = "{:.1f} to {:.1f}".format(*(100 * value for value in row.interval))
    cells = [str(row.labeled), row.method, *percent, interval]
    if row.gain is None or row.gain_interval is None:
        return [*cells, "", ""]
    interval = "{:+.1f} to {:+.1f}%".format(*(100 * value for value in row.gain_interval))
    return [*cells, f"{100 * row.gain:+.1f}%", interval]


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
    bounds = ("cpm_lower", "cpm_upper", "gain", "gain_lower", "gain_upper")
    writer.writerow(["labeled", "method", *rates, "cpm", *bounds])
    for row in rows:
        gains = (row.gain, *(row.gain_interval or (None, None)))
        writer.writerow(
            [row.labeled, row.method, *row.sensitivities, row.cpm, *row.interval, *gains]
        )
    return text.getvalue()
