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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from . import enable_interpreter

enable_interpreter()

import triton  # noqa: E402

import tests.plans  # noqa: E402
from tests.triton_checked.interpreter import checked  # noqa: E402
from tests.triton_checked.plan import Case, CaseReport, PlanReport, Trips, run_plan  # noqa: E402

if TYPE_CHECKING:
    from tests.triton_checked.aot import MainPath

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- table: make floor -->\n", "<!-- end of the table -->\n"
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
LARGE = 1 << 22  # elements; larger cases run kernels whose traffic a smaller case shows


@dataclass(frozen=True)
class Row:
    """One case. Bytes and instructions are per element."""

    op: str
    case: str
    kernel: str  # the first one launched; `instructions`, `loop` and `width` are about it
    minimum: float | None  # bytes
    moved: float | None  # bytes; None for large cases and those without a minimum
    distinct: float | None  # the same, each cell once per launch: a cache may serve a second read
    instructions: tuple[float, ...]  # executed by a thread, on NVIDIA
    loop: float | None  # the part of the main loop on sm_90; None without one that streams
    registers: tuple[int, ...]  # most of all kernels, on all targets
    spills: int  # bytes, over all kernels and targets
    conversions: int  # of layout, most of all kernels and targets
    shared: int  # bytes of shared memory, most of all kernels and targets
    width: int  # bits of the narrowest access with a sixth of the main path's traffic, on NVIDIA
    launches: int
    variants: int | None  # of all its kernels over the sweep of sizes; None if that has none


FIGURES = [field.name for field in fields(Row)][4:]
# what depends on the version of the compiler
COMPILED = ("instructions", "loop", "registers", "spills", "conversions", "shared", "width")


def plans() -> list[str]:
    """The ops that have a plan."""
    names = [module.name for module in pkgutil.iter_modules(tests.plans.__path__)]
    return [name for name in names if f"{name}_sizes" in names]


def rows(op: str, package: str = tests.plans.__name__, host_time: bool = False) -> list[Row]:
    """The rows of one op."""
    plan = run_plan(f"{package}.{op}", host_time=host_time)
    sweep = run_plan(f"{package}.{op}_sizes", targets=("sm_90",), compiled=False)
    cases = importlib.import_module(f"{package}.{op}").cases()
    traffic = {case.name: _traffic(case) for case in cases}
    return [_row(op, name, case, plan, sweep, *traffic[name]) for name, case in plan.cases.items()]


def _traffic(case: Case) -> tuple[float | None, float | None]:
    """Bytes per element that a case moves: all, and each cell once per launch."""
    if case.min_bytes is None or case.elements > LARGE:
        return None, None
    with checked(shuffle=0) as report:
        case.call()
    tensors = report.traffic.values()
    moved = sum(t.read + t.written + t.atomic for t in tensors)
    distinct = sum(t.read_once + t.written_once + t.atomic for t in tensors)
    return round(moved / case.elements, 3), round(distinct / case.elements, 3)


def _row(
    op: str,
    name: str,
    case: CaseReport,
    plan: PlanReport,
    sweep: PlanReport,
    moved: float | None,
    distinct: float | None,
) -> Row:
    variants = [plan.variants[i] for i in case.variants]
    kernel = variants[0].kernel
    first = [
        (variant, math.prod(grid))
        for variant, (_, grid) in zip(variants, case.launches, strict=True)
        if variant.kernel == kernel
    ]
    programs = sum(count for _, count in first)
    instructions, loop = [], None
    for target in NVIDIA:
        executed = 0.0
        for variant, count in first:
            code = variant.on[target]
            elements = case.elements / programs / code.threads  # of a thread
            if case.trips:
                total, in_loop = (n / elements for n in _told(code.main, case.trips))
                in_loop = round(in_loop, 1)
            else:
                total, in_loop = _executed(code.main, elements, moved or case.min_bytes)
            executed += total * count / programs
            loop = in_loop if target == "sm_90" else loop
        instructions.append(round(executed, 1))
    code = [code for variant in variants for code in variant.on.values()]
    kernels = {variant.kernel for variant in variants}
    return Row(
        op=op,
        case=name,
        kernel=kernel,
        minimum=case.min_bytes,
        moved=moved,
        distinct=distinct,
        instructions=tuple(instructions),
        loop=loop,
        registers=tuple(max(v.on[target].registers for v in variants) for target in TARGETS),
        spills=sum(c.spill_bytes for c in code),
        conversions=max(c.conversions for c in code),
        shared=max(c.shared_bytes for c in code),
        width=min(_width(variant.on[target].main) for variant, _ in first for target in NVIDIA),
        launches=len(case.launches),
        variants=sum(variant.kernel in kernels for variant in sweep.variants) or None,
    )


def _executed(path: MainPath, elements: float, moved: float | None) -> tuple[float, float | None]:
    """Instructions of a thread per element: all, and those of its loop.

    How often the loop runs follows from the bytes that an element moves. A loop that streams
    nothing counts once, because its length depends on the data.
    """
    inside = _streamed(path.loop) if path.loop and moved else 0
    if not inside:
        return path.instructions / elements, None
    in_loop = inside / (8 * moved)  # elements
    outside = (_streamed(path) - inside) / (8 * moved)
    executed = path.instructions + path.loop.instructions * ((elements - outside) / in_loop - 1)
    return executed / elements, round(path.loop.instructions / in_loop, 1)


def _told(path: MainPath, trips: Trips) -> tuple[float, float]:
    """Instructions of a thread whose loops run so often: all, and those of loops that repeat."""
    total, repeated = path.instructions, 0.0
    for loop, runs in zip(path.loops, trips, strict=False):  # others run once
        runs, inside = runs if isinstance(runs, Sequence) else (runs, ())
        in_loop = runs * _told(loop, inside)[0]
        total += in_loop - loop.instructions
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
NOISE = {"instructions": 1.05, "loop": 1.05}


def worse(row: Row, committed: dict, same_compiler: bool = True) -> list[str]:
    """The figures of a row that are worse than the committed ones, beyond the compilers' noise."""
    found = []
    for name in FIGURES if same_compiler else [n for n in FIGURES if n not in COMPILED]:
        new, old = getattr(row, name), committed[name]
        pairs = zip(new, old, strict=True) if isinstance(new, tuple) else [(new, old)]
        for a, b in pairs:
            limit = b if b is None else b * NOISE.get(name, 1)
            if (a is None) != (b is None) or (
                a is not None and (a < limit if name == "width" else a > limit)
            ):
                found.append(f"{name} {new}, was {old}")
                break
    return found


HEADER = [
    "case", "minimum", "bytes", "distinct", "instructions", "in the loop", "registers", "spills",
    "conversions", "shared", "width", "launches", "variants",
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
