"""The table of kernel costs: traffic and machine code of each kernel, next to the minimum traffic.

`python -m tests.support.floor` writes docs/floor.md and docs/floor.json and prints the table with
host times. Every case of tests/plans/ is a row. The checked interpreter counts the bytes of cases
that state a minimum; the compilers and the recording driver report all else.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from . import enable_interpreter

enable_interpreter()

import triton  # noqa: E402

import tests.plans  # noqa: E402
from tests.triton_checked.interpreter import checked  # noqa: E402
from tests.triton_checked.plan import Case, PlanReport, Trips, VariantReport, run_plan  # noqa: E402

if TYPE_CHECKING:
    from tests.triton_checked.aot import MainPath

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- table: make floor -->\n", "<!-- end of the table -->\n"
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
LARGE = 1 << 22  # elements; larger cases run kernels whose traffic a smaller case shows


@dataclass(frozen=True)
class Gpu:
    """What the predictions assume; docs/floor.md says where the numbers come from."""

    target: str
    multiprocessors: int
    gigahertz: float
    bandwidth: float  # of a copy, in TB/s
    double: int  # float64 operations per clock and multiprocessor

    def share(
        self,
        minimum: float,
        moved: float,
        instructions: float,
        transcendental: float,
        double: float,
    ) -> float:
        """Percent of the copy bandwidth at which the minimum moves; all figures of an element."""
        bytes_per_clock = 1e3 * self.bandwidth / (self.multiprocessors * self.gigahertz)
        clocks = max(
            moved / bytes_per_clock,
            instructions / (ISSUED * 4 * 32),
            transcendental / 16,
            double / self.double,
        )
        return 100 * minimum / bytes_per_clock / clocks


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41, 1.84, 32),
    "H200": Gpu("sm_90", 132, 1.8, 4.3, 64),
    "B200": Gpu("sm_100", 148, 1.8, 7.2, 64),
}
ISSUED = 0.85  # instructions per clock of each of the 4 schedulers of a multiprocessor


@dataclass(frozen=True)
class Row:
    """One case. Bytes and instructions are per element, over all its kernels."""

    op: str
    case: str
    minimum: float | None  # bytes
    moved: float | None  # bytes; None for large cases and those without a minimum
    distinct: float | None  # the same, each cell once per launch: a cache may serve a second read
    # executed by a thread, on NVIDIA; None for a target that the case is not compiled for
    instructions: tuple[float | None, ...]
    loop: float | None  # the part of loops that stream, on sm_90; None without one
    share: tuple[float | None, ...] | None  # predicted percent of the copy bandwidth, on GPUS
    registers: tuple[int | None, ...]  # most of all kernels, on all targets
    spills: int  # bytes, over all kernels and targets
    conversions: int  # of layout, most of all kernels and targets
    shared: int  # bytes of shared memory, most of all kernels and targets
    width: int  # bits of the narrowest access with a sixth of the main path's traffic, on NVIDIA
    launches: int
    variants: int | None  # of all its kernels over the sweep of sizes; None if that has none


FIGURES = [field.name for field in fields(Row)][3:]
# what depends on the version of the compiler
COMPILED = (
    "instructions", "loop", "share", "registers", "spills", "conversions", "shared", "width",
)  # fmt: skip
HIGHER_IS_BETTER = ("share", "width")


def plans() -> list[str]:
    """The ops that have a plan."""
    names = [module.name for module in pkgutil.iter_modules(tests.plans.__path__)]
    return [name for name in names if f"{name}_sizes" in names]


def rows(op: str, package: str = tests.plans.__name__, host_time: bool = False) -> list[Row]:
    """The rows of one op."""
    plan = run_plan(f"{package}.{op}", host_time=host_time)
    sweep = run_plan(f"{package}.{op}_sizes", targets=("sm_90",), compiled=False)
    cases = importlib.import_module(f"{package}.{op}").cases()
    return [_row(op, case, plan, sweep, _traffic(case)) for case in cases]


@dataclass(frozen=True)
class _Traffic:
    """Bytes that a case moves."""

    launches: tuple[int, ...]  # each
    distinct: int  # all, each cell once per launch


def _traffic(case: Case) -> _Traffic | None:
    if case.min_bytes is None or case.elements > LARGE:
        return None
    with checked(shuffle=0) as report:
        case.call()
    distinct = sum(t.read_once + t.written_once + t.atomic for t in report.traffic.values())
    return _Traffic(tuple(launch.moved for launch in report.launches), distinct)


def _row(op: str, case: Case, plan: PlanReport, sweep: PlanReport, traffic: _Traffic | None) -> Row:
    found, elements, minimum = plan.cases[case.name], case.elements, case.min_bytes
    variants = [plan.variants[i] for i in found.variants]
    if traffic:
        moved = list(traffic.launches)
    else:  # the first launch moves all
        moved = [minimum and minimum * elements, *[0] * (len(variants) - 1)]
    launches = [
        _Launch(variant, math.prod(grid), nbytes, found.trips)
        for variant, (_, grid), nbytes in zip(variants, found.launches, moved, strict=True)
    ]

    def executed(target: str, count: Callable[[MainPath], float]) -> float:
        return sum(launch.executed(target, count) for launch in launches) / elements

    everywhere = [t for t in TARGETS if all(t in variant.on for variant in variants)]
    nvidia = [target for target in NVIDIA if target in everywhere]
    instructions = {target: executed(target, _instructions) for target in nvidia}
    loop = sum(launch.in_loop("sm_90") for launch in launches) / elements
    distinct = traffic and traffic.distinct / elements
    code = [code for variant in variants for code in variant.on.values()]
    kernels = {variant.kernel for variant in variants}
    # kernels that move little of all do not count
    wide = [launch for launch in launches if not launch.moved or 6 * launch.moved >= max(moved)]
    return Row(
        op=op,
        case=case.name,
        minimum=minimum,
        moved=traffic and round(sum(moved) / elements, 3),
        distinct=distinct and round(distinct, 3),
        instructions=tuple(round(instructions[t], 1) if t in nvidia else None for t in NVIDIA),
        loop=round(loop, 1) or None,
        share=minimum
        and tuple(
            round(
                gpu.share(
                    minimum,
                    distinct or minimum,
                    instructions[gpu.target],
                    executed(gpu.target, lambda path: path.transcendental),
                    executed(gpu.target, lambda path: path.double),
                )
            )
            if gpu.target in nvidia
            else None
            for gpu in GPUS.values()
        ),
        registers=tuple(
            max(v.on[target].registers for v in variants) if target in everywhere else None
            for target in TARGETS
        ),
        spills=sum(c.spill_bytes for c in code),
        conversions=max(c.conversions for c in code),
        shared=max(c.shared_bytes for c in code),
        width=min(_width(w.variant.on[target].main) for w in wide for target in nvidia),
        launches=len(launches),
        variants=sum(variant.kernel in kernels for variant in sweep.variants) or None,
    )


@dataclass(frozen=True)
class _Launch:
    variant: VariantReport
    programs: int
    moved: float | None  # bytes
    trips: Trips

    def executed(self, target: str, count: Callable[[MainPath], float]) -> float:
        """What `count` counts, over all threads.

        How often a loop that streams runs follows from the bytes that the launch moves. Others
        count once, unless the case tells, because their length depends on the data.
        """
        code = self.variant.on[target]
        threads = self.programs * code.threads
        if self.trips:
            return threads * _told(code.main, self.trips, count)[0]
        runs = 1.0
        if (inside := self._streamed_in_loop(code.main)) and self.moved is not None:
            outside = _streamed(code.main) - inside
            runs = max(8 * self.moved / threads - outside, 0) / inside
        return threads * (count(code.main) + (runs - 1) * _count_loop(code.main, count))

    def in_loop(self, target: str) -> float:
        """Instructions in loops that stream, as if all was done in them, over all threads."""
        code = self.variant.on[target]
        if self.trips:
            return self.programs * code.threads * _told(code.main, self.trips, _instructions)[1]
        inside = self._streamed_in_loop(code.main)
        return 8 * self.moved / inside * code.main.loop.instructions if inside and self.moved else 0

    @staticmethod
    def _streamed_in_loop(path: MainPath) -> int:
        return _streamed(path.loop) if path.loop else 0


def _instructions(path: MainPath) -> float:
    return path.instructions


def _count_loop(path: MainPath, count: Callable[[MainPath], float]) -> float:
    return count(path.loop) if path.loop else 0


def _told(path: MainPath, trips: Trips, count: Callable[[MainPath], float]) -> tuple[float, float]:
    """What a thread whose loops run so often executes: all, and that of loops that repeat."""
    total, repeated = count(path), 0.0
    for loop, runs in zip(path.loops, trips, strict=False):  # others run once
        runs, inside = runs if isinstance(runs, Sequence) else (runs, ())
        in_loop = runs * _told(loop, inside, count)[0]
        total += in_loop - count(loop)
        repeated += in_loop if runs > 1 else 0
    return total, repeated


def _streamed(path: MainPath) -> int:
    """Bits of accesses that are wide enough to be streams."""
    return sum(bits * n for bits, n in _accesses(path).items() if bits >= 64)


def _width(path: MainPath) -> int:
    counts = _accesses(path)
    total = sum(bits * n for bits, n in counts.items())
    return min(bits for bits, n in counts.items() if 6 * bits * n >= total)


def _accesses(path: MainPath) -> Counter[int]:
    return Counter(path.loads) + Counter(path.stores)


# a compiler sometimes emits other code for the same kernel: 147 instead of 142 instructions
NOISE = {"instructions": 1.05, "loop": 1.05, "share": 1 / 1.05}


def worse(row: Row, committed: dict, same_compiler: bool = True) -> list[str]:
    """The figures of a row that are worse than the committed ones, beyond the compilers' noise."""
    found = []
    for name in FIGURES if same_compiler else [n for n in FIGURES if n not in COMPILED]:
        new, old = getattr(row, name), committed[name]
        several = isinstance(new, tuple) and old is not None
        pairs = zip(new, old, strict=True) if several else [(new, old)]
        for a, b in pairs:
            if a is None or b is None:
                is_worse = a is not b
            else:
                limit = b * NOISE.get(name, 1)
                is_worse = a < limit if name in HIGHER_IS_BETTER else a > limit
            if is_worse:
                found.append(f"{name} {new}, was {old}")
                break
    return found


HEADER = [
    "case", "minimum", "bytes", "distinct", "instructions", "in the loop", "share", "registers",
    "spills", "conversions", "shared", "width", "launches", "variants",
]  # fmt: skip


def table(rows: list[Row], host: dict[str, float] | None = None) -> str:
    """The rows of one op in Markdown."""

    def text(value) -> str:
        if isinstance(value, tuple):
            return " / ".join(map(text, value))
        return "–" if value is None else f"{value:g}"

    header = HEADER + ["host µs"] * bool(host)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for row in rows:
        line = [row.case, *(text(getattr(row, name)) for name in ("minimum", *FIGURES))]
        lines.append([*line, f"{host[row.case]:.0f}"] if host else line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    found = {op: rows(op, host_time=True) for op in plans()}
    for op, of_op in found.items():
        plan = run_plan(f"{tests.plans.__name__}.{op}", host_time=True)
        host = {name: case.microseconds for name, case in plan.cases.items()}
        print(f"{op}\n\n{table(of_op, host)}")
    page = DOCS / "floor.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    tables = "\n".join(f"### {op}\n\n{table(of_op)}" for op, of_op in found.items())
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    lines = ",\n".join(
        json.dumps(asdict(row), ensure_ascii=False) for of_op in found.values() for row in of_op
    )
    (DOCS / "floor.json").write_text(
        f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
