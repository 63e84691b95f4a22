"""Choose the launch parameters of every kernel on the GPU at hand, and write them into fmkernels/kernels/tuning.py.

    python -m benchmarks.tune [--dry-run] [--json tuning.json] [op ...]

Every setting runs on every workload of an op in interleaved rounds, between device events and with the L2 cache
emptied, beside the default row, which takes part twice: how far it is from itself is the noise. The row of this
architecture becomes the fastest setting, and the default row serves where none is faster beyond the noise. Default rows
and those of other architectures stay as they are.
"""

import argparse
import ast
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import (
    bench_crop_and_resize3d,
    bench_mixup3d,
    bench_object_mixup3d,
    bench_predict_targets,
    bench_soft_target_focal_loss,
)
from benchmarks.common import DEVICE, OURS, Comparison, Run, seconds
from fmkernels.kernels import tuning
from fmkernels.kernels.tuning import DEFAULT, TABLE, Launch
from tests.support.tolerance import assert_close

MARGIN = 0.02  # a setting must be faster by more than this, and on no workload slower by more
ROUNDS = 50
REGISTERS = 65536  # of all threads of a program
F32, BF16, I16 = torch.float32, torch.bfloat16, torch.int16

Table = Mapping[str, Mapping[str, Launch]]


@dataclass(frozen=True)
class Sweep:
    """What to try for an op: warps for each block, tiles per program; and the workloads, each with a phase to time."""

    op: str
    shapes: dict[int, tuple[int, ...]]
    cases: Callable[[], list[tuple[Comparison, str]]]
    max_tiles: tuple[int, ...] = (1,)

    def settings(self, default: Launch) -> list[Launch]:
        """All but the default, those that change it least first."""
        shapes = [(block, warps) for block, several in self.shapes.items() for warps in several]
        every = [
            replace(default, block=block, num_warps=warps, max_tiles=tiles)
            for (block, warps), tiles in itertools.product(shapes, self.max_tiles)
            if 32 * warps * (default.max_registers or 0) <= REGISTERS
        ]

        def distance(launch: Launch) -> float:
            names = ("block", "num_warps", "max_tiles")
            return sum(
                abs(math.log2(getattr(launch, name) / getattr(default, name))) for name in names
            )

        return sorted((launch for launch in every if launch != default), key=distance)


def _loss() -> list[tuple[Comparison, str]]:
    suite = bench_soft_target_focal_loss
    workloads = (
        suite.Workload(100_000),
        suite.Workload(10_000_000, scale=1024),
        suite.Workload(100_000_000, BF16, BF16),
    )
    return [(suite.comparison(workload), "both") for workload in workloads]


def _targets() -> list[tuple[Comparison, str]]:
    suite = bench_predict_targets
    workloads = suite.Workload(20, 4), suite.Workload(80, 8), suite.Workload(80, 8, BF16)
    return [(suite.comparison(workload), "forward") for workload in workloads]


def _mixup() -> list[tuple[Comparison, str]]:
    suite = bench_mixup3d
    return [
        (suite.comparison(suite.Workload(8, 128, gradient=True)), "forward"),
        (suite.comparison(suite.Workload(8, 128, gradient=True)), "backward"),
        (suite.comparison(suite.Workload(16, 160, I16, BF16, flips=True)), "forward"),
    ]


def _mixup_in_place() -> list[tuple[Comparison, str]]:
    suite = bench_mixup3d
    workloads = (
        suite.Workload(8, 64, in_place=True),
        suite.Workload(8, 160, in_place=True),
        suite.Workload(16, 160, BF16, BF16, in_place=True),
    )
    return [(suite.comparison(workload), "forward") for workload in workloads]


def _crop() -> list[tuple[Comparison, str]]:
    suite = bench_crop_and_resize3d
    workloads = (
        suite.Workload(16, 32, edge=128, gradient=False),
        suite.Workload(256, 32, edge=128, dtype=BF16, result=BF16, gradient=False),
        suite.Workload(64, 64, edge=128, dtype=I16, result=BF16, gradient=False),
    )
    return [(suite.comparison(workload), "forward") for workload in workloads]


def _crop_gradient() -> list[tuple[Comparison, str]]:
    suite = bench_crop_and_resize3d
    workloads = (
        suite.Workload(16, 32, edge=128),
        suite.Workload(256, 32, edge=128, dtype=BF16, result=BF16),
    )
    return [(suite.comparison(workload), "backward") for workload in workloads]


def _objects() -> list[tuple[Comparison, str]]:
    suite = bench_object_mixup3d
    workloads = (
        suite.Workload(16, 160, 16, 8, 24, donors=True),
        suite.Workload(16, 160, 64, 8, 40, BF16),
        suite.Workload(16, 160, 256, 8, 40, donors=True, in_place=False),
    )
    return [(suite.comparison(workload), "forward") for workload in workloads]


_VECTORS = {128: (1, 2, 4), 256: (2, 4, 8), 512: (2, 4, 8), 1024: (4, 8)}

SWEEPS = (
    Sweep("object_mixup3d", {256: (2, 4), 512: (2, 4), 1024: (4, 8), 2048: (4, 8)}, _objects),
    Sweep("predict_targets", {512: (2, 4), 1024: (2, 4, 8), 2048: (4, 8)}, _targets),
    Sweep(
        "soft_target_focal_loss",
        {512: (2, 4), 1024: (2, 4, 8), 2048: (4, 8), 4096: (8, 16)},
        _loss,
        max_tiles=(1, 4, 8, 32),
    ),
    Sweep("crop_and_resize3d", {256: (2, 4), 512: (2, 4), 1024: (2, 4), 2048: (4,)}, _crop),
    Sweep(
        "crop_and_resize3d_backward", {256: (2, 4), 512: (2, 4, 8), 1024: (4, 8)}, _crop_gradient
    ),
    Sweep("mixup3d", _VECTORS, _mixup),
    Sweep("mixup3d_in_place", _VECTORS, _mixup_in_place),
)


@dataclass(frozen=True)
class Timing:
    """Seconds that a setting took, [workloads, rounds]."""

    launch: Launch
    times: np.ndarray

    def ratios(self, default: "Timing") -> np.ndarray:
        """Of the time to that of the default in each round, all workloads alike: their geometric mean."""
        return np.exp(np.log(self.times / default.times).mean(axis=0))

    def slowest(self, default: "Timing") -> float:
        """The same on the workload on which it is worst, in the median of the rounds."""
        return float(np.median(self.times / default.times, axis=1).max())


def choose(default: Timing, again: Timing, others: Sequence[Timing]) -> Launch | None:
    """The fastest setting, if it is faster than the default beyond the noise, by what the default shows ``again``."""
    noise = np.abs(np.quantile(again.ratios(default), (0.1, 0.9)) - 1).max()
    best: tuple[float, Launch | None] = (1 - max(MARGIN, noise), None)
    for timing in others:
        ratios = timing.ratios(default)
        surely = np.quantile(ratios, 0.8) < 1 and timing.slowest(default) < 1 + MARGIN
        if surely and np.median(ratios) < best[0]:
            best = float(np.median(ratios)), timing.launch
    return best[1]


def row_in_use(op: str, launch: Launch) -> AbstractContextManager:
    """Within it, every device has this row."""
    return mock.patch.dict(TABLE, {op: {DEFAULT: launch}})


class _Case:
    """A workload with the results that every setting must give."""

    def __init__(self, comparison: Comparison, phase: str):
        self.comparison, self.phase = comparison, phase
        self.provider = next(provider for provider in comparison.providers if provider.name == OURS)
        self.run, self.results = self.results_of_a_fresh_run()

    def results_of_a_fresh_run(self) -> tuple[Run, list[Tensor]]:
        run, results = self.comparison.ready(self.provider)
        return run, [*results, *(run.forward_backward()[2] if run.backward else [])]

    def check(self) -> None:
        """Compile for the row in use; raise where results differ from the default's."""
        for result, expected in zip(self.results_of_a_fresh_run()[1], self.results, strict=True):
            assert_close(result, expected)


def measure(
    sweep: Sweep, first: Sequence[Launch], limit: float
) -> tuple[list[Timing], dict[Launch, str]]:
    """The timings of ``first`` and of all settings that compile and agree with it, and why others have none.

    Compiling and checking takes half of ``limit`` seconds at most; settings that were not reached have no timing.
    """
    start = time.perf_counter()
    with row_in_use(sweep.op, first[0]):
        cases = [_Case(*case) for case in sweep.cases()]
    launches, problems = [], {}
    for launch in dict.fromkeys((*first, *sweep.settings(first[0]))):
        if launch not in first and time.perf_counter() - start > limit / 2:
            problems[launch] = "no time was left"
            continue
        try:
            with row_in_use(sweep.op, launch):
                for case in cases:
                    case.check()
            launches.append(launch)
        except Exception as problem:
            traceback.clear_frames(problem.__traceback__)
            problems[launch] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    if first[0] not in launches:
        raise RuntimeError(f"{sweep.op}: the default row fails: {problems[first[0]]}")
    order = [*launches, first[0]]
    times = [[[] for _ in cases] for _ in order]
    for _ in range(ROUNDS):
        spans = []
        for launch in order:
            with row_in_use(sweep.op, launch):
                spans.append([case.run.round()[case.phase] for case in cases])
        for taken, of_launch in zip(times, spans, strict=True):
            for samples, span in zip(taken, of_launch, strict=True):
                samples.append(seconds(*span))
        if time.perf_counter() - start > limit and len(times[0][0]) >= 10:
            break
    return [
        Timing(launch, np.array(taken)) for launch, taken in zip(order, times, strict=True)
    ], problems


def with_row(table: Table, op: str, architecture: str, launch: Launch | None) -> Table:
    """The table with another row for an architecture, or with none; default rows first, the others by name."""
    rows = {name: row for name, row in table[op].items() if name != architecture}
    if launch is not None:
        rows[architecture] = launch
    return {**table, op: dict(sorted(rows.items(), key=lambda item: (item[0] != DEFAULT, item[0])))}


def render(table: Table) -> str:
    """The table as it stands in tuning.py."""
    lines = ["TABLE: dict[str, dict[str, Launch]] = {"]
    for op, rows in table.items():
        lines.append(f'    "{op}": {{')
        for name, launch in rows.items():
            key = "DEFAULT" if name == DEFAULT else f'"{name}"'
            lines.append(f"        {key}: Launch({_arguments(launch)}),")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def _arguments(launch: Launch) -> str:
    """Those that differ from what Launch has by itself."""
    named = [(f.name, getattr(launch, f.name)) for f in fields(Launch)]
    own = {f.name: f.default for f in fields(Launch)}
    return ", ".join(
        f"{name}={value}" for name, value in named if own[name] is MISSING or own[name] != value
    )


def rewritten(source: str, table: Table) -> str:
    """The text of tuning.py with another table."""
    nodes = [
        n
        for n in ast.parse(source).body
        if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "TABLE"
    ]
    lines = source.split("\n")
    lines[nodes[0].lineno - 1 : nodes[0].end_lineno] = render(table).split("\n")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    ops = [sweep.op for sweep in SWEEPS]
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="*", help=f"rows to choose, of {', '.join(ops)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    parser.add_argument("--json", type=Path, help="write what was measured")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds for all ops, about (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.op) - set(ops):
        parser.error(f"no such op: {', '.join(sorted(unknown))}")
    if DEVICE.type != "cuda":
        print("benchmarks.tune: no GPU that PyTorch can use was found", file=sys.stderr)
        return 2
    sweeps = [sweep for sweep in SWEEPS if not options.op or sweep.op in options.op]
    table, record = tune(sweeps, TABLE, tuning.architecture(DEVICE), options.limit)
    if options.json:
        options.json.write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), **record}, indent=1) + "\n"
        )
    if options.dry_run:
        print(render(table))
    else:
        path = Path(tuning.__file__)
        path.write_text(rewritten(path.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


def tune(
    sweeps: Sequence[Sweep], table: Table, architecture: str, limit: float
) -> tuple[Table, dict]:
    """The table with this architecture's rows chosen anew, and what was measured."""
    record = {"architecture": architecture, "ops": {}}
    end = time.perf_counter() + limit
    for place, sweep in enumerate(sweeps):
        default = table[sweep.op][DEFAULT]
        first = list(dict.fromkeys((default, table[sweep.op].get(architecture, default))))
        share = (end - time.perf_counter()) / (len(sweeps) - place)
        timings, problems = measure(sweep, first, share)
        reference, *others, again = timings
        chosen = choose(reference, again, others)
        table = with_row(table, sweep.op, architecture, chosen)
        record["ops"][sweep.op] = {
            "workloads": [f"{comparison}, {phase}" for comparison, phase in sweep.cases()],
            "chosen": None if chosen is None else asdict(chosen),
            "settings": [_measured(timing, reference) for timing in timings],
            "left_out": [
                {**asdict(launch), "reason": reason} for launch, reason in problems.items()
            ],
        }
        best = min(others or [reference], key=lambda timing: np.median(timing.ratios(reference)))
        print(
            f"{sweep.op}: {len(others)} settings beside the default, {len(problems)} left out; the fastest, "
            f"{_arguments(best.launch)}, takes {np.median(best.ratios(reference)):.3f} of its time, "
            f"the default itself {np.median(again.ratios(reference)):.3f}; "
            f"{'the default serves' if chosen is None else 'chosen: ' + _arguments(chosen)}"
        )
    return table, record


def _measured(timing: Timing, default: Timing) -> dict:
    p20, median, p80 = np.quantile(timing.ratios(default), (0.2, 0.5, 0.8)).tolist()
    return {
        **asdict(timing.launch),
        "median_s": np.median(timing.times, axis=1).tolist(),
        "time_to_default": median, "time_to_default_p20": p20, "time_to_default_p80": p80,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
