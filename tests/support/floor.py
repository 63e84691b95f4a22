"""The floor table: what every kernel moves and executes for each element, beside the least that it must.

`python -m tests.support.floor` writes it to docs/floor.md and docs/floor.json and prints it, with the host's share. The
rows are the cases of tests/plans/ that state a floor: bytes come from the checked interpreter, all else from what the
compilers and the recording driver report.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from . import enable_interpreter

enable_interpreter()

import triton  # noqa: E402

import tests.plans  # noqa: E402

from .interpreter import checked  # noqa: E402
from .plan import CaseReport, PlanReport, run_plan  # noqa: E402

if TYPE_CHECKING:
    from .aot import MainPath

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- table: make floor -->\n", "<!-- end of the table -->\n"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
LARGE = 1 << 22  # elements; what larger cases move is known from their smaller siblings
COMPILED = (
    "instructions",
    "steady",
    "registers",
    "spills",
    "conversions",
    "width",
)  # what depends on the version of the compiler


@dataclass(frozen=True)
class Row:
    """One case. Bytes and instructions are for each element, registers and instructions for each of the targets."""

    op: str
    case: str
    kernel: str  # the first of those launched, of which what follows `distinct` tells
    floor: float
    moved: float | None  # bytes; None for a large case
    distinct: (
        float | None
    )  # the same, each cell once per launch: a second read may come from a cache
    instructions: tuple[float, ...]  # that a thread executes, all included
    steady: float | None  # of the main loop alone, on sm_90; None without one
    registers: tuple[int, ...]
    spills: int  # bytes, over all kernels and targets
    conversions: int  # of layout, through shared memory or between threads, on sm_90
    width: int  # bits of the narrowest access that carries a sixth of the main path's traffic, on sm_90
    launches: int
    variants: (
        int | None
    )  # of the kernel, compiled for a sweep of sizes; None where that does not launch it


FIGURES = [field.name for field in fields(Row)][4:]


def plans() -> list[str]:
    """The operations that have a plan."""
    names = [module.name for module in pkgutil.iter_modules(tests.plans.__path__)]
    return [name for name in names if f"{name}_sizes" in names]


def rows(op: str, package: str = "tests.plans") -> list[Row]:
    """The rows of one operation."""
    plan = run_plan(f"{package}.{op}")
    sweep = run_plan(f"{package}.{op}_sizes", targets=("sm_90",), compiled=False)
    cases = importlib.import_module(f"{package}.{op}").cases()
    traffic = {case.name: _traffic(case) for case in cases if case.floor}
    return [
        _row(op, name, case, plan, sweep, traffic[name])
        for name, case in plan.cases.items()
        if case.floor
    ]


def _traffic(case) -> tuple[float | None, float | None]:
    """Bytes per element that a case moves: all, and each cell once per launch."""
    if case.elements > LARGE:
        return None, None
    with checked() as report:
        case.call()
    tensors = report.traffic.values()
    moved = sum(t.read + t.written + t.atomic for t in tensors)
    distinct = sum(t.read_once + t.written_once + t.atomic for t in tensors)
    return round(moved / case.elements, 3), round(distinct / case.elements, 3)


def _row(
    op: str, name: str, case: CaseReport, plan: PlanReport, sweep: PlanReport, traffic: tuple
) -> Row:
    variants = [plan.variants[i] for i in case.variants]
    kernel = case.launches[0][0]
    per_program = case.elements / sum(
        math.prod(grid) for launched, grid in case.launches if launched == kernel
    )
    moved, distinct = traffic
    instructions, steady = [], None
    for target in TARGETS[:-1]:
        code = variants[0].on[target]
        executed, in_loop = _executed(code.main, per_program / code.threads, moved or case.floor)
        instructions.append(executed)
        if target == "sm_90":
            steady, width = in_loop, _width(code.main)
    return Row(
        op=op,
        case=name,
        kernel=kernel,
        floor=case.floor,
        moved=moved,
        distinct=distinct,
        instructions=tuple(instructions),
        steady=steady,
        registers=tuple(variants[0].on[target].registers for target in TARGETS),
        spills=sum(code.spill_bytes for variant in variants for code in variant.on.values()),
        conversions=variants[0].on["sm_90"].conversions,
        width=width,
        launches=len(case.launches),
        variants=sum(variant.kernel == kernel for variant in sweep.variants) or None,
    )


def _executed(path: MainPath, elements: float, moved: float) -> tuple[float, float | None]:
    """Instructions for each of a thread's elements, and those of its loop, by what that moves of so many bytes.

    A loop that streams nothing, whose length depends on the data, counts once.
    """
    inside = _streamed(path.loop) if path.loop else 0
    if not inside:
        return round(path.instructions / elements, 1), None
    in_loop = inside / (8 * moved)  # elements
    outside = (_streamed(path) - inside) / (8 * moved)
    executed = path.instructions + path.loop.instructions * ((elements - outside) / in_loop - 1)
    return round(executed / elements, 1), round(path.loop.instructions / in_loop, 1)


def _streamed(path: MainPath) -> int:
    """Bits that go through accesses as wide as only streams have."""
    return sum(
        bits * n for bits, n in (Counter(path.loads) + Counter(path.stores)).items() if bits >= 64
    )


def _width(path: MainPath) -> int:
    counts = Counter(path.loads) + Counter(path.stores)
    total = sum(bits * n for bits, n in counts.items())
    return min(bits for bits, n in counts.items() if 6 * bits * n >= total)


# now and then a compiler makes another code of one kernel: 147 instructions instead of 142, once in four runs
NOISE = {"instructions": 1.05, "steady": 1.05}


def worse(row: Row, committed: dict, same_compiler: bool = True) -> list[str]:
    """The figures of a row that are worse than the committed ones, beyond the compilers' own noise."""
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
    "case",
    "floor",
    "bytes",
    "distinct",
    "instructions",
    "in the loop",
    "registers",
    "spills",
    "conversions",
]
HEADER += ["width", "launches", "variants"]


def table(rows: list[Row], host: dict[str, float] | None = None) -> str:
    """Markdown of one operation's rows."""

    def text(value) -> str:
        if isinstance(value, tuple):
            return " / ".join(map(text, value))
        return "–" if value is None else f"{value:g}"

    header = HEADER + ["host µs"] * bool(host)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for row in rows:
        figures = [row.floor, *(getattr(row, name) for name in FIGURES)]
        line = [row.case, *map(text, figures)]
        lines.append([*line, f"{host[row.case]:.0f}"] if host else line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    found = {op: rows(op) for op in plans()}
    found = {op: of_op for op, of_op in found.items() if of_op}
    for op, of_op in found.items():
        host = {
            name: case.microseconds for name, case in run_plan(f"tests.plans.{op}").cases.items()
        }
        print(f"{op}\n\n{table(of_op, host)}")
    page = DOCS / "floor.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    tables = "\n".join(f"### {op}\n\n{table(of_op)}" for op, of_op in found.items())
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    record = {
        "triton": triton.__version__,
        "rows": [asdict(row) for of_op in found.values() for row in of_op],
    }
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in record["rows"])
    (DOCS / "floor.json").write_text(
        f'{{"triton": "{record["triton"]}", "rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
