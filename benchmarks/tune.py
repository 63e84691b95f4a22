"""Tune the launch parameters on the GPU of this machine and print rows for kernels/tuning.py.

    python -m benchmarks.tune [--json tuning.json] [op ...]

Every setting runs on every workload of an op, in interleaved rounds, timed by device events, with
the L2 cache flushed. The default row runs twice: the difference from itself is the noise. The
fastest setting becomes the row of this architecture if it beats the default beyond the noise.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import DEVICE, OURS, Comparison, Run, Sweep, op_suites, seconds
from fmkernels.kernels import tuning
from fmkernels.kernels.tuning import DEFAULT, TABLE, Launch
from tests.support.tolerance import assert_close

MARGIN = 0.02  # a setting must be faster than the default by this, and on no workload slower by it
ROUNDS = 50

SWEEPS = [sweep for suite in op_suites().values() for sweep in suite.SWEEPS]


@dataclass(frozen=True)
class Timing:
    """The seconds of a setting, [workloads, rounds]."""

    launch: Launch
    times: np.ndarray

    def ratios(self, default: "Timing") -> np.ndarray:
        """Time relative to the default in each round: the geometric mean over the workloads."""
        return np.exp(np.log(self.times / default.times).mean(axis=0))

    def slowest(self, default: "Timing") -> float:
        """Time relative to the default on the worst workload: the median of the rounds."""
        return float(np.median(self.times / default.times, axis=1).max())


def choose(default: Timing, again: Timing, others: Sequence[Timing]) -> Launch | None:
    """The fastest setting if it beats the default beyond the noise (``again``), else None."""
    noise = np.abs(np.quantile(again.ratios(default), (0.1, 0.9)) - 1).max()
    best: tuple[float, Launch | None] = (1 - max(MARGIN, noise), None)
    for timing in others:
        ratios = timing.ratios(default)
        reliable = np.quantile(ratios, 0.8) < 1 and timing.slowest(default) < 1 + MARGIN
        if reliable and np.median(ratios) < best[0]:
            best = float(np.median(ratios)), timing.launch
    return best[1]


def row_in_use(op: str, launch: Launch) -> AbstractContextManager:
    """Use this row on every device."""
    return mock.patch.dict(TABLE, {op: {DEFAULT: launch}})


class _Case:
    """A workload, with the results that every setting must give."""

    def __init__(self, comparison: Comparison, phase: str):
        self.comparison, self.phase = comparison, phase
        self.provider = next(provider for provider in comparison.providers if provider.name == OURS)
        self.run, self.results = self.results_of_a_fresh_run()

    def results_of_a_fresh_run(self) -> tuple[Run, list[Tensor]]:
        run, results = self.comparison.ready(self.provider)
        return run, [*results, *(run.forward_backward()[2] if run.backward else [])]

    def check(self) -> None:
        """Compile for the row in use. Raise if the results differ from those of the default."""
        for result, expected in zip(self.results_of_a_fresh_run()[1], self.results, strict=True):
            assert_close(result, expected)


def measure(
    sweep: Sweep, first: Sequence[Launch], limit: float
) -> tuple[list[Timing], dict[Launch, str]]:
    """Time ``first`` and all settings that compile and agree with it. Also says why others failed.

    Compiling and checking takes at most half of ``limit`` seconds. Settings that were not reached
    by then have no timing.
    """
    start = time.perf_counter()
    with row_in_use(sweep.op, first[0]):
        cases = [_Case(*case) for case in sweep.cases()]
    launches, problems = [], {}
    for launch in dict.fromkeys((*first, *sweep.settings(first[0]))):
        if launch not in first and time.perf_counter() - start > limit / 2:
            problems[launch] = "out of time"
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
    times: list[list[list[float]]] = [[[] for _ in cases] for _ in order]
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


def _arguments(launch: Launch) -> str:
    """The arguments that differ from the defaults of Launch."""
    named = [(f.name, getattr(launch, f.name)) for f in fields(Launch)]
    default = {f.name: f.default for f in fields(Launch)}
    return ", ".join(
        f"{name}={value}"
        for name, value in named
        if default[name] is MISSING or default[name] != value
    )


def main(arguments: Sequence[str] | None = None) -> int:
    ops = [sweep.op for sweep in SWEEPS]
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="*", help=f"rows to tune: {', '.join(ops)} (default: all)")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument(
        "--limit",
        type=float,
        default=600,
        help="approximate seconds in total (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.op) - set(ops):
        parser.error(f"no such op: {', '.join(sorted(unknown))}")
    if DEVICE.type != "cuda":
        print("benchmarks.tune: no GPU that PyTorch can use was found", file=sys.stderr)
        return 2
    sweeps = [sweep for sweep in SWEEPS if not options.op or sweep.op in options.op]
    architecture = tuning.architecture(DEVICE)
    chosen, record = tune(sweeps, architecture, options.limit)
    if options.json:
        options.json.write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), **record}, indent=1) + "\n"
        )
    print(f"rows for TABLE in {tuning.__file__}:")
    for op, launch in chosen.items():
        print(row(op, architecture, launch))
    return 0


def row(op: str, architecture: str, launch: Launch | None) -> str:
    """A row as it stands in the table; a comment if the default row is used."""
    if launch is None:
        return f"# {op}: no row for {architecture}, the default is as fast"
    return f'"{op}": {{"{architecture}": Launch({_arguments(launch)})}},'


def tune(
    sweeps: Sequence[Sweep], architecture: str, limit: float
) -> tuple[dict[str, Launch | None], dict]:
    """The row of each op for this architecture (None: the default), and all measurements."""
    rows: dict[str, Launch | None] = {}
    record = {"architecture": architecture, "ops": {}}
    end = time.perf_counter() + limit
    for number, sweep in enumerate(sweeps):
        default = TABLE[sweep.op][DEFAULT]
        first = list(dict.fromkeys((default, TABLE[sweep.op].get(architecture, default))))
        seconds_left = (end - time.perf_counter()) / (len(sweeps) - number)
        timings, problems = measure(sweep, first, seconds_left)
        reference, *others, again = timings
        chosen = rows[sweep.op] = choose(reference, again, others)
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
            f"{sweep.op}: timed {len(others)} settings besides the default, left out "
            f"{len(problems)}; the fastest, {_arguments(best.launch)}, takes "
            f"{np.median(best.ratios(reference)):.3f} of the default's time "
            f"(the default, repeated: {np.median(again.ratios(reference)):.3f})"
        )
    return rows, record


def _measured(timing: Timing, default: Timing) -> dict:
    p20, median, p80 = np.quantile(timing.ratios(default), (0.2, 0.5, 0.8)).tolist()
    return {
        **asdict(timing.launch),
        "median_s": np.median(timing.times, axis=1).tolist(),
        "time_to_default": median, "time_to_default_p20": p20, "time_to_default_p80": p80,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
