"""No kernel of any plan spills, moves more than the minimum, or costs more than is committed."""

import json
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import triton

from tests.support import floor, on_gpu
from tests.triton_checked.plan import TARGETS, run_plan

pytestmark = pytest.mark.skipif(
    on_gpu(), reason="without a GPU: the interpreter counts, the compilers report"
)

COMMITTED = json.loads((floor.DOCS / "floor.json").read_text(encoding="utf-8"))
AGAIN = "If this is meant, write the table again with `make floor` and commit it."
SLACK = 1.005  # boxes, lam, flips and partial sums


@pytest.mark.parametrize("op", floor.plans())
def test_costs(op):
    variants = run_plan(f"tests.plans.{op}").variants
    everywhere = {variant.kernel for variant in variants if len(variant.on) == len(TARGETS)}
    assert everywhere == {variant.kernel for variant in variants}
    for variant in variants:
        for target, code in variant.on.items():
            assert code.spill_bytes == code.stack_bytes == 0, (
                f"{variant.kernel} ({variant.case}) on {target}"
            )
    rows = floor.rows(op)
    extra = getattr(import_module(f"tests.plans.{op}"), "EXTRA_BYTES", {})
    for row in rows:
        if row.distinct is not None:
            least = row.minimum + extra.get(row.case, 0)
            assert row.distinct <= SLACK * least, f"{row.case} moves {row.distinct} bytes"
    committed = {row["case"]: row for row in COMMITTED["rows"] if row["op"] == op}
    assert [row.case for row in rows] == list(committed), AGAIN
    same = triton.__version__ == COMMITTED["triton"]
    complaints = {row.case: floor.worse(row, committed[row.case], same) for row in rows}
    assert not any(complaints.values()), f"{ {k: v for k, v in complaints.items() if v} }\n{AGAIN}"


@pytest.mark.parametrize("name", floor.FIGURES)
def test_a_worse_figure_is_noticed(name):
    (old,) = [row for row in COMMITTED["rows"] if row["case"] == "64M elements float32"]
    old |= {"moved": 12.0, "distinct": 12.0}
    row = floor.Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in old.items()})
    value = getattr(row, name)
    figure = value[-1] if isinstance(value, tuple) else value
    step = 0.06 * figure if name in floor.NOISE else 0.001
    higher = (*value[:-1], value[-1] + step) if isinstance(value, tuple) else value + step
    lower = (*value[:-1], value[-1] - step) if isinstance(value, tuple) else value - step
    bad, good = (lower, higher) if name in floor.HIGHER_IS_BETTER else (higher, lower)
    assert floor.worse(row, old) == floor.worse(replace(row, **{name: good}), old) == []
    assert len(floor.worse(replace(row, **{name: bad}), old)) == 1
    assert len(floor.worse(replace(row, **{name: None}), old)) == 1
    assert len(floor.worse(row, old | {name: None})) == 1
    if isinstance(value, tuple):  # one target is missing
        assert len(floor.worse(replace(row, **{name: (*value[:-1], None)}), old)) == 1
    assert len(floor.worse(replace(row, **{name: bad}), old, same_compiler=False)) == (
        name not in floor.COMPILED
    )


FLAWS = {
    "read twice": "moved",
    "24 steps": "instructions",
    "crowded": "spills",
    "turned": "conversions",
    "masked torch.float32": "width",
    "launched twice": "launches",
}


@pytest.fixture(scope="module")
def planted():
    return {row.case: row for row in floor.rows("planted", "tests.triton_checked")}


@pytest.mark.parametrize("case", FLAWS)
def test_planted_flaws_are_found(case, planted):
    """Compared with a healthy kernel of the same kind, the flaw is reported."""
    healthy = planted["8 steps"]
    assert floor.worse(healthy, asdict(healthy)) == []
    assert any(line.startswith(FLAWS[case]) for line in floor.worse(planted[case], asdict(healthy)))
    assert planted["masked torch.float32"].variants == 4 and healthy.variants == 2
