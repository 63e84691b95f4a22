"""FocalMix against the supervised baseline and against itself without one of its parts: the paper's table.

Every run is a folder of `train.train`; what is finished is not run again, so that a comparison that was stopped goes on
where it was. The steps before unlabelled patches come in are the same for all methods and are trained once; where
targets are 0 or 1, both losses are one but for rounding.
"""

import csv
import io
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fmkernels.focalmix.config import Config, load_config
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation import figures, froc
from fmkernels.focalmix.files import atomic_write
from fmkernels.focalmix.training.checkpoint import BURN_IN, CHECKPOINT
from fmkernels.focalmix.training.loop import CANDIDATES, EVALUATION, draw_scans, train
from fmkernels.focalmix.training.metrics import METRICS

BASELINE, FOCALMIX = "supervised", "FocalMix"
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "image-mixup": ("no image MixUp", {"image_mixup": False}),
    "object-mixup": ("no object MixUp", {"object_mixup": False}),
    "soft-labels": ("hard pseudo-labels", {"pseudo_labels": "hard"}),
    "soft-loss": ("plain focal loss", {"loss": "hard"}),
    "views": ("K = 1", {"views": 1}),
    "sharpening": ("T = 1", {"temperature": 1.0}),
}
"""What can be left out of FocalMix: the row's name and the settings."""


@dataclass(frozen=True)
class Row:
    """One method with one number of labelled scans; means over the seeds."""

    labeled: int
    method: str
    sensitivities: tuple[float, ...]
    """At the seven operating points."""
    cpm: float
    interval: tuple[float, float]
    """95 % of the CPM, over scans and seeds drawn with replacement; few seeds make it too narrow."""
    gain: float | None
    """Of the CPM over the baseline, relative; None for the baseline."""
    gain_interval: tuple[float, float] | None
    """95 %, the same scans and seeds drawn for both."""


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
    """Train what is not yet trained, and write tables (``table.txt``, ``.md``, ``.csv``) and pictures to ``out``.

    ``cpm.png`` has the CPM over the labelled scans, ``labeled-N/froc.png`` the curves of both methods with N of them.

    Args:
        config: of all runs; method, labelled scans and seed are set here. Both methods take as many steps.
        root: a folder in LUNA16's layout.
        out: the folder of the comparison.
        labeled: numbers of labelled scans; a seed draws the same scans for every method.
        seeds: 0 ... seeds - 1.
        without: names of `ABLATIONS`, for each a row more.
        bootstraps: of scans and seeds.

    Raises:
        InputError: as `train`; there are no test subsets; or a part of ``without`` is missing from ``config`` already.
    """
    if not config.test_subsets:
        raise InputError("test_subsets: expected at least one, got none")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("compare: expected one process, got several; torchrun is for train")
    out = Path(out)
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        BASELINE: ("supervised", {"method": "supervised"}),
        FOCALMIX: ("focalmix", {"method": "focalmix"}),
    }
    for part in without:
        name, changes = ABLATIONS[part]
        if replace(config, **changes) == config:
            raise InputError(
                f"{part}: expected a part that the settings have, it is left out of all rows"
            )
        methods[name] = (f"without-{part}", {"method": "focalmix", **changes})
    subsets = [*config.train_subsets, *config.validation_subsets, *config.test_subsets]
    data = LUNA16(root, spacing=config.spacing, subsets=subsets, cache=config.cache)
    for count, seed in itertools.product(
        labeled, range(seeds)
    ):  # an impossible draw is told before hours of training
        draw_scans(replace(config, method="focalmix", labeled=count, seed=seed), data)
    runs = [(count, name, seed) for count in labeled for seed in range(seeds) for name in methods]
    results: dict[tuple[int, str], list[froc.Froc]] = {}
    for number, (count, name, seed) in enumerate(runs, start=1):
        folders = {
            method: out / f"labeled-{count}" / own / f"seed-{seed}"
            for method, (own, _) in methods.items()
        }
        tqdm.write(f"run {number} of {len(runs)}: {count} labelled scans, {name}, seed {seed}")
        chosen = replace(config, **methods[name][1], labeled=count, seed=seed)
        finished = load_config(folders[name]) if (folders[name] / EVALUATION).exists() else None
        if finished is None or finished.result != chosen.result:
            if chosen.method == "focalmix":
                _share_burn_in(folders[BASELINE], folders[name])
            train(chosen, root, folders[name], resume=True)
        results.setdefault((count, name), []).append(
            _evaluate(chosen, root, folders[name], bootstraps)
        )
    means = {key: froc.average(runs) for key, runs in results.items()}
    rows = [
        _row(count, name, means[count, name], means[count, BASELINE])
        for count in labeled
        for name in methods
    ]
    for name, text in {
        "table.txt": as_text(rows),
        "table.md": as_markdown(rows),
        "table.csv": as_csv(rows),
    }.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
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
    """Let a run that has not begun go on from the end of the baseline's burn-in, until which both are the same."""
    if (baseline / BURN_IN).exists() and not (run / CHECKPOINT).exists():
        run.mkdir(parents=True, exist_ok=True)
        for source, target in ((METRICS, METRICS), (BURN_IN, CHECKPOINT)):
            with atomic_write(run / target) as temporary:
                shutil.copyfile(baseline / source, temporary)


def _evaluate(config: Config, root: str | Path, run: Path, bootstraps: int) -> froc.Froc:
    data = LUNA16(root, subsets=config.test_subsets)
    candidates, findings = read_candidates(run / CANDIDATES), data.findings(data.series)
    return froc.evaluate(candidates, *findings, data.series, bootstraps=bootstraps)


def _row(labeled: int, name: str, ours: froc.Froc, baseline: froc.Froc) -> Row:
    """Both are means over the same seeds, bootstrapped with the same draws of scans and seeds."""
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


_HEAD = (
    "labelled",
    "method",
    "1/8",
    "1/4",
    "1/2",
    "1",
    "2",
    "4",
    "8",
    "CPM",
    "95 %",
    "gain",
    "95 % of the gain",
)


def _cells(row: Row) -> list[str]:
    percent = [f"{100 * value:.1f}" for value in (*row.sensitivities, row.cpm)]
    cells = [
        str(row.labeled),
        row.method,
        *percent,
        "{:.1f} to {:.1f}".format(*(100 * v for v in row.interval)),
    ]
    if row.gain is None or row.gain_interval is None:
        return [*cells, "", ""]
    return [
        *cells,
        f"{100 * row.gain:+.1f} %",
        "{:+.1f} to {:+.1f} %".format(*(100 * v for v in row.gain_interval)),
    ]


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal: sensitivities in % at false positives per scan."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    line = "  ".join(f"{{:{'<' if i == 1 else '>'}{width}}}" for i, width in enumerate(widths))
    return "".join(line.format(*cells).rstrip() + "\n" for cells in lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [_HEAD, ["---"] * len(_HEAD), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """The table for machines: shares instead of percent, intervals in two columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    bounds = ("cpm_lower", "cpm_upper", "gain", "gain_lower", "gain_upper")
    writer.writerow(
        [
            "labeled",
            "method",
            *(f"sensitivity_at_{rate:g}" for rate in froc.OPERATING_POINTS),
            "cpm",
            *bounds,
        ]
    )
    for row in rows:
        gains = (row.gain, *(row.gain_interval or (None, None)))
        writer.writerow(
            [row.labeled, row.method, *row.sensitivities, row.cpm, *row.interval, *gains]
        )
    return text.getvalue()
