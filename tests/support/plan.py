"""Run the cases of a module in a process that compiles for GPUs instead of interpreting, and report on its kernels.

A plan is a module with a function `cases()` that yields driver.Case objects; each calls launch code on CPU tensors.

    floor = run_plan("tests.plans.mixup3d")
    assert len(floor.cases["in place"].launches) == 1
    for variant in floor.variants:
        assert variant.on["sm_90"].spill_bytes == 0
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aot import Compiled

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class CaseReport:
    elements: int | None
    microseconds: float  # host time of a call, without the driver's own launch
    launches: tuple[tuple[str, tuple[int, int, int]], ...]  # kernel and grid
    variants: tuple[int, ...]  # of these launches: places in PlanReport.variants
    floor: float | None  # bytes per element


@dataclass(frozen=True)
class VariantReport:
    """A specialisation of a kernel that the cases launch, and what the compilers made of it."""

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
def run_plan(module: str, targets: tuple[str, ...] = TARGETS, compiled: bool = True) -> PlanReport:
    """Run a plan in a process of its own. Without `compiled` only launches, variants and host time are reported."""
    from .aot import Compiled

    command = [
        sys.executable,
        "-m",
        "tests.support.plan",
        module,
        *targets,
        *([] if compiled else ["--no-compile"]),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"plan {module} failed:\n{done.stdout}{done.stderr}")
    data = json.loads(done.stdout.splitlines()[-1])
    cases = {
        name: CaseReport(
            **{
                **c,
                "launches": tuple((k, tuple(g)) for k, g in c["launches"]),
                "variants": tuple(c["variants"]),
            }
        )
        for name, c in data["cases"].items()
    }
    variants = tuple(
        VariantReport(**{**v, "on": {t: Compiled.from_json(c) for t, c in v["on"].items()}})
        for v in data["variants"]
    )
    return PlanReport(cases, variants)


def _run(module: str, targets: list[str], compiled: bool) -> dict:
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
        with recording(targets[0]):
            microseconds = host_microseconds(case.call)
        report[case.name] = {
            "elements": case.elements,
            "microseconds": microseconds,
            "launches": [(launch.variant.kernel, launch.grid) for launch in launches],
            "floor": case.floor,
        }
        for position, launch in enumerate(launches):
            if launch.variant not in variants:
                variants[launch.variant] = {
                    "kernel": launch.variant.kernel,
                    "case": case.name,
                    **_arguments(launch.variant.source),
                    "elements_per_program": case.elements
                    and case.elements / math.prod(launch.grid),
                    "on": {
                        t: recorded[t, case.name][position].variant for t in targets if compiled
                    },
                }
        order = list(variants)
        report[case.name]["variants"] = [order.index(launch.variant) for launch in launches]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for variant in variants.values():
            variant["on"] = {t: pool.submit(compile_variant, v) for t, v in variant["on"].items()}
        for variant in variants.values():
            variant["on"] = {
                t: dataclasses.asdict(future.result()) for t, future in variant["on"].items()
            }
    return {"cases": report, "variants": list(variants.values())}


def _arguments(source) -> dict:
    names = source.fn.arg_names
    constants = {
        names[path[0]] + "".join(f"[{i}]" for i in path[1:]): v
        for path, v in source.constants.items()
    }
    signature = {name: str(ty) for name, ty in source.signature.items() if ty != "constexpr"}
    return {"signature": signature, "constants": constants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    print(json.dumps(_run(args.module, args.targets, not args.no_compile), default=str))


if __name__ == "__main__":
    main()
