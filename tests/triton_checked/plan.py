"""Compile the kernels that a list of calls launches, and report on them.

A plan is a module with a function `cases()` that yields `Case` objects. Each calls launch code on
CPU tensors. The plan runs in a process of its own, which does not interpret kernels.

    report = run_plan("tests.plans.scale")
    assert len(report.cases["float32"].launches) == 1
    for variant in report.variants:
        assert variant.on["sm_90"].spill_bytes == 0
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    from .aot import Compiled

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
Trips = Sequence["float | tuple[float, Trips]"]


@dataclass(frozen=True)
class Case:
    """A call that launches kernels on CPU tensors.

    elements: the number of elements (voxels, anchors) that it works on.
    min_bytes: bytes per element that any kernel must move for it; None if that is not counted.
    trips: how often each loop of the main path runs, in order; needed where the bytes that they
        stream do not tell. A pair gives the loop's own and the trips of the loops inside it.
    targets: GPUs that it is compiled for. Of cases that are alike, one needs all of them.
    without: device functions that the call does not run to their end; the main path leaves out what
        they load and store themselves.
    """

    name: str
    call: Callable[[], object]
    elements: int | None = None
    min_bytes: float | None = None
    trips: Trips = ()
    without: Sequence[triton.JITFunction] = ()
    targets: Sequence[str] = TARGETS


@dataclass(frozen=True)
class CaseReport:
    elements: int | None
    min_bytes: float | None
    trips: Trips
    launches: tuple[tuple[str, tuple[int, int, int]], ...]  # kernel and grid
    variants: tuple[int, ...]  # of these launches: indices into PlanReport.variants
    microseconds: float | None  # host time of a call, without the launch in the real driver


@dataclass(frozen=True)
class VariantReport:
    """A specialization of a kernel that the cases launch, and its compiled code."""

    kernel: str
    case: str  # the first case that launches it
    signature: dict[str, str]
    constants: dict[str, object]
    elements_per_program: float | None
    on: dict[str, Compiled]

    def per_element(self, target: str) -> float | None:
        """Instructions that a thread executes on the main path for each of its elements."""
        compiled = self.on[target]
        if self.elements_per_program is None or compiled.main is None:
            return None
        return compiled.main.instructions * compiled.threads / self.elements_per_program


@dataclass(frozen=True)
class PlanReport:
    cases: dict[str, CaseReport]
    variants: tuple[VariantReport, ...]


@functools.cache
def run_plan(
    module: str,
    targets: tuple[str, ...] = TARGETS,
    compiled: bool = True,
    host_time: bool = False,
) -> PlanReport:
    """Run a plan. Without `compiled`, only launches and variants are reported."""
    from .aot import Compiled

    options = [*["--no-compile"] * (not compiled), *["--host-time"] * host_time]
    command = [sys.executable, "-m", f"{__package__}.plan", module, *targets, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"plan {module} failed:\n{done.stdout}{done.stderr}")
    data = json.loads(done.stdout.splitlines()[-1])
    for case in data["cases"].values():
        case["launches"] = tuple((kernel, tuple(grid)) for kernel, grid in case["launches"])
        case["variants"] = tuple(case["variants"])
    for variant in data["variants"]:
        variant["on"] = {t: Compiled.from_json(code) for t, code in variant["on"].items()}
    return PlanReport(
        {name: CaseReport(**case) for name, case in data["cases"].items()},
        tuple(VariantReport(**variant) for variant in data["variants"]),
    )


def _run(module: str, targets: list[str], compiled: bool, host_time: bool) -> dict:
    from .aot import compile_variant
    from .driver import host_microseconds, recording

    cases = list(importlib.import_module(module).cases())
    recorded = {}
    for target in targets:
        for case in cases:
            with recording(target) as calls:
                case.call()
            recorded[target, case.name] = calls.launches
    report, variants = {}, {}
    for case in cases:
        launches = recorded[targets[0], case.name]
        without = tuple(_lines(function) for function in case.without)
        for position, launch in enumerate(launches):
            if (launch.variant, without) not in variants:
                variants[launch.variant, without] = {
                    "kernel": launch.variant.kernel,
                    "case": case.name,
                    **_arguments(launch.variant.source),
                    "elements_per_program": case.elements
                    and case.elements / math.prod(launch.grid),
                    "on": {},
                }
            on = variants[launch.variant, without]["on"]
            for target in targets if compiled else ():
                if target in case.targets:
                    on[target] = recorded[target, case.name][position].variant
        order = list(variants)
        report[case.name] = {
            "elements": case.elements,
            "min_bytes": case.min_bytes,
            "trips": case.trips,
            "launches": [(launch.variant.kernel, launch.grid) for launch in launches],
            "variants": [order.index((launch.variant, without)) for launch in launches],
            "microseconds": None,
        }
        if host_time:
            with recording(targets[0]):
                report[case.name]["microseconds"] = host_microseconds(case.call)
    with _alone(module), ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, without), variant in variants.items():
            variant["on"] = {
                t: pool.submit(compile_variant, v, without) for t, v in variant["on"].items()
            }
        for variant in variants.values():
            variant["on"] = {t: dataclasses.asdict(f.result()) for t, f in variant["on"].items()}
    return {"cases": report, "variants": list(variants.values())}


@contextmanager
def _alone(module: str) -> Iterator[None]:
    """Let other processes that run the same plan wait, and find the code in Triton's cache."""
    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{module}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lines(function: triton.JITFunction) -> tuple[str, int, int]:
    lines, first = inspect.getsourcelines(function.fn)
    return Path(inspect.getsourcefile(function.fn)).name, first, first + len(lines) - 1


def _arguments(source) -> dict:
    names = source.fn.arg_names
    constants = {
        names[path[0]] + "".join(f"[{i}]" for i in path[1:]): v
        for path, v in source.constants.items()
    }
    signature = {name: str(ty) for name, ty in source.signature.items() if ty != "constexpr"}
    return {"signature": signature, "constants": constants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", help="the plan")
    parser.add_argument("targets", nargs="+", help=f"GPUs, of {', '.join(TARGETS)}")
    parser.add_argument("--no-compile", action="store_true", help="only record launches")
    parser.add_argument("--host-time", action="store_true", help="measure the host time of a call")
    args = parser.parse_args()
    report = _run(args.module, args.targets, not args.no_compile, args.host_time)
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
