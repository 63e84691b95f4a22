"""Every kind of fault is caught in a small broken kernel; its healthy twin passes."""

import re
import time

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

from .interpreter import KernelFault, checked
from .memory import Memory, Traffic

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="conftest.py did not call enable_interpreter()"
)


def faults(pattern):
    return pytest.raises(KernelFault, match=pattern)


# --- bounds ---------------------------------------------------------------------------------------


@triton.jit
def copy(source, target, n, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n if MASKED else i >= 0
    tl.store(target + i, tl.load(source + i + shift, mask), mask)


@pytest.mark.parametrize(
    ("masked", "shift", "fault"),
    [
        (True, 0, None),
        (False, 0, r"it reads 'x' at element \+20 from its first"),
        (True, 1, r"it reads 'x' at element \+20"),
        (True, -1, r"it reads 'x' at element -1"),
    ],
)
def test_read_out_of_bounds(masked, shift, fault):
    x, out = torch.randn(20), torch.empty(32)
    with checked(x=x, out=out):
        if fault is None:
            copy[(2,)](x, out, 20, shift, BLOCK=16, MASKED=masked)
        else:
            with faults(fault):
                copy[(2,)](x, out, 20, shift, BLOCK=16, MASKED=masked)


def test_write_out_of_bounds_names_kernel_program_line_and_tensor():
    with (
        checked(x=torch.randn(32)),
        faults(r"copy, program \(1, 0, 0\) of \(2, 1, 1\), test_interpreter.py:\d+") as info,
    ):
        copy[(2,)](torch.randn(32), torch.empty(20), 32, 0, BLOCK=16, MASKED=False)
    assert "it writes 'target' at element +20" in str(info.value)
    line = int(re.search(r"test_interpreter.py:(\d+)", str(info.value))[1])
    with open(__file__) as file:
        assert "tl.store(target + i" in file.readlines()[line - 1]


def test_an_access_must_stay_in_the_tensor_of_its_pointer():
    both = torch.randn(64)
    x, y = both[:20], both[20:]
    with checked(), faults("it reads 'source'"):
        copy[(2,)](x, y, 32, 0, BLOCK=16, MASKED=True)
    with checked(both=both):  # naming the whole memory allows it
        copy[(2,)](x, torch.empty(32), 32, 0, BLOCK=16, MASKED=True)


def test_gaps_of_a_view_are_out_of_bounds():
    x = torch.randn(20, 2)
    with (
        checked(),
        faults(r"'source' at element \+1 from its first; shape \(20,\), strides \(2,\)"),
    ):
        copy[(1,)](x[:, 0], torch.empty(16), 16, 0, BLOCK=16, MASKED=True)


@triton.jit
def pick(sources, target, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(sources)):
        total += tl.load(sources[k] + i)
    first = tl.where(tl.program_id(0) == 0, sources[0], sources[1])
    tl.store(target + i, total + tl.load(first + i))


def test_tuples_of_pointers():
    x, y, out = torch.randn(16), torch.randn(16), torch.empty(16)
    with checked(x=x) as report:
        pick[(1,)]((x, y), out, BLOCK=16)
    assert (
        torch.equal(out, x + y + x)
        and report["sources[1]"].read == y.nbytes
        and report["x"].read == 2 * x.nbytes
    )
    with checked(), faults(r"'sources\[1\]' at element \+8"):
        pick[(1,)]((x, y[:8]), out, BLOCK=16)


@triton.jit
def as_words(bytes, target, shift):
    words = (bytes + shift).to(tl.pointer_type(tl.int32))
    tl.store(target + tl.arange(0, 2), tl.load(words + tl.arange(0, 2)))


def test_misaligned_access():
    x, out = torch.arange(12, dtype=torch.uint8), torch.empty(2, dtype=torch.int32)
    with checked() as report:
        as_words[(1,)](x, out, 4)
        assert torch.equal(out, x[4:].view(torch.int32)) and report["bytes"] == Traffic(
            read=8, read_once=8
        )
        with faults("misaligned: it reads 4 bytes of 'bytes'"):
            as_words[(1,)](x, out, 2)


# --- races ----------------------------------------------------------------------------------------


@triton.jit
def shifted(source, target, step, shift, BLOCK: tl.constexpr):
    """Program p reads BLOCK cells from p * step + shift and writes as many from p * step."""
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    value = tl.load(source + i + shift)
    tl.debug_barrier()
    tl.store(target + i, value)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_races_between_programs(seed):
    x, out = torch.randn(64), torch.zeros(64)
    with checked(x=x, out=out, shuffle=seed):
        shifted[(4,)](x, out, 16, 0, BLOCK=16)
        shifted[(4,)](x, x, 16, 0, BLOCK=16)
    with (
        checked(out=out, shuffle=seed),
        faults(r"race: it writes a cell that program \d of the same launch writes too"),
    ):
        shifted[(4,)](x, out, 8, 0, BLOCK=16)
    pattern = (
        r"race: it (writes|reads) a cell that program \d of the same launch (writes|reads): "
        r"'x'\[\d+\]"
    )
    with checked(x=x, shuffle=seed), faults(pattern):
        shifted[(3,)](x, x, 16, 16, BLOCK=16)
    with checked(x=x, shuffle=seed, races=False):
        shifted[(3,)](x, x, 16, 16, BLOCK=16)


def test_launches_are_ordered():
    x, out = torch.randn(32), torch.zeros(32)
    with checked(shuffle=0) as report:
        shifted[(2,)](x, out, 16, 0, BLOCK=16)
        shifted[(2,)](out, x, 16, 0, BLOCK=16)
    assert [(launch.kernel, launch.grid) for launch in report.launches] == [
        ("shifted", (2, 1, 1))
    ] * 2


@triton.jit
def scatter(target, index, value, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + tl.load(index + i), value)


def test_two_lanes_write_one_cell():
    with checked(t=torch.zeros(8)):
        scatter[(1,)](torch.zeros(8), torch.tensor([3, 1, 2, 0]), 1.0, BLOCK=4)
    with checked(), faults(r"two lanes of one store write the same cell: 'target'\[[23]\]"):
        scatter[(1,)](torch.zeros(8), torch.tensor([3, 2, 2, 3]), 1.0, BLOCK=4)


@triton.jit
def swap_rows(x, index, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BARRIER: tl.constexpr):
    """x[b] = (x[b] + x[index[b]]) / 2 in place: a tile of the columns of all rows."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    own = tl.load(x + row[:, None] * columns + column)
    partner = tl.load(x + tl.load(index + row)[:, None] * columns + column)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + row[:, None] * columns + column, (own + partner) / 2)


def test_a_barrier_separates_loads_from_stores_of_other_lanes():
    x = torch.randn(4, 16)
    index = torch.tensor([1, 0, 3, 2])
    expected = (x + x[index]) / 2
    with (
        checked(x=x),
        faults(
            r"it writes a cell that another lane of it read, without a barrier in between: "
            r"'x'\[0, 0\]"
        ),
    ):
        swap_rows[(1,)](x, index, 16, ROWS=4, COLUMNS=16, BARRIER=False)
    with checked(x=x):
        swap_rows[(1,)](x, index, 16, ROWS=4, COLUMNS=16, BARRIER=True)
    assert torch.equal(x, expected)
    with checked(x=x):  # every lane reads and writes its own cells
        swap_rows[(1,)](x, torch.arange(4), 16, ROWS=4, COLUMNS=16, BARRIER=False)


@triton.jit
def through_memory(
    x, scratch, out, SHIFT: tl.constexpr, BARRIER: tl.constexpr, TWICE: tl.constexpr
):
    i = tl.arange(0, 16)
    tl.store(scratch + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    if TWICE:
        tl.store(scratch + 15 - i, tl.load(x + i))
    else:
        tl.store(out + i, tl.load(scratch + (i + SHIFT) % 16))


@pytest.mark.parametrize(
    ("shift", "barrier", "twice", "fault"),
    [
        (0, False, False, None),
        (1, True, False, None),
        (1, False, False, "it reads a cell that another lane of it wrote"),
        (0, True, True, None),
        (0, False, True, "it writes a cell that another lane of it wrote"),
    ],
)
def test_lanes_of_a_program_race_too(shift, barrier, twice, fault):
    x, out = torch.randn(16), torch.empty(16)
    with checked():
        call = lambda: through_memory[(1,)](x, torch.empty(16), out, shift, barrier, twice)  # noqa: E731
        if fault:
            with faults(fault):
                call()
        else:
            call()


@triton.jit
def last_one_adds(
    x,
    partial,
    counter,
    out,
    programs,
    BLOCK: tl.constexpr,
    BARRIER: tl.constexpr,
    SEM: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + i, tl.load(x + i) * 2)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for p in range(programs):
            total += tl.load(partial + p * BLOCK + tl.arange(0, BLOCK))
        tl.store(out + tl.arange(0, BLOCK), total)


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.parametrize("semantics", ["acq_rel", "relaxed"])
def test_atomics_order_programs(barrier, semantics):
    x, out = torch.randn(4, 16), torch.empty(16)
    counter = torch.zeros(1, dtype=torch.int32)
    with checked(shuffle=0) as report:
        call = lambda: last_one_adds[(4,)](  # noqa: E731
            x, torch.empty(64), counter, out, 4, 16, barrier, semantics
        )
        if barrier and semantics == "acq_rel":
            call()
            torch.testing.assert_close(out, 2 * x.sum(0))
            assert report["counter"].atomic == 16
        else:
            with faults(
                "race: it reads a cell that program . of the same launch writes: 'partial'"
            ):
                call()


@triton.jit
def take_a_number(out, counter, ORDERED: tl.constexpr):
    number = tl.atomic_add(counter, 1)
    tl.store(out + tl.program_id(0), tl.program_id(0) if ORDERED else number)


def test_a_result_that_depends_on_the_order_of_programs_shows():
    def results(ordered):
        for seed in (None, 0, 1):
            out, counter = torch.empty(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            with checked(shuffle=seed):
                take_a_number[(64,)](out, counter, ORDERED=ordered)
            yield out

    healthy, broken = list(results(True)), list(results(False))
    assert all(torch.equal(out, healthy[0]) for out in healthy)
    assert not torch.equal(broken[0], broken[1]) and not torch.equal(broken[1], broken[2])


@triton.jit
def count(index, counts, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.load(index + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    if PLAIN:
        tl.store(counts + tl.program_id(0), 7)
    tl.atomic_add(counts + cell, 1)


def test_atomics_race_with_plain_accesses_only():
    index, counts = torch.randint(0, 5, (64,)), torch.zeros(5, dtype=torch.int32)
    with checked(shuffle=0):
        count[(4,)](index, counts, PLAIN=False, BLOCK=16)
    assert torch.equal(counts, torch.bincount(index, minlength=5).int())
    with checked(shuffle=0), faults(r"race: it (writes|updates atomically)"):
        count[(4,)](torch.arange(64) % 4, counts, PLAIN=True, BLOCK=16)


# --- values ---------------------------------------------------------------------------------------


@triton.jit
def integers(out, a, b, OP: tl.constexpr, WIDE: tl.constexpr):
    x = tl.full([4], 0, tl.int32) + a
    if WIDE:
        x = x.to(tl.int64)
    value = x * b if OP == "multiply" else (x + b if OP == "add" else x - b)
    tl.store(out + tl.arange(0, 4), value)


@pytest.mark.parametrize(
    ("op", "a", "b", "fault"),
    [
        ("multiply", 70_000, 70_000, 4_900_000_000),
        ("add", 2**31 - 1, 1, 2**31),
        ("subtract", -(2**31), 1, -(2**31) - 1),
    ],
)
def test_int32_overflow(op, a, b, fault):
    out = torch.empty(4, dtype=torch.int64)
    with checked():
        integers[(1,)](out, a, b, op, WIDE=True)
        assert out.tolist() == [fault] * 4
        with faults(f"int32 overflow: {op} gives {fault}"):
            integers[(1,)](out, a, b, op, WIDE=False)


@triton.jit
def random(out, seed):
    tl.store(out + tl.arange(0, 16), tl.rand(seed, tl.arange(0, 16)))


def test_unsigned_integers_may_wrap():
    out = torch.empty(16)
    with checked():
        random[(1,)](out, 7)
    assert ((out >= 0) & (out < 1)).all() and out.unique().numel() == 16


@triton.jit
def promises(x, stride, CLAIM: tl.constexpr):
    if CLAIM == "assert":
        tl.device_assert(stride == 16, "stride is 16")
    elif CLAIM == "assume":
        tl.assume(stride == 16)
    elif CLAIM == "multiple":
        stride = tl.multiple_of(stride, 16)
    else:
        i = tl.max_contiguous(tl.arange(0, 8) * stride // 16, 8)
        tl.store(x + i, 0.0)
    tl.store(x + stride, 1.0)


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        ("assert", "device_assert: stride is 16"),
        ("assume", "tl.assume: the assumption is false"),
        ("multiple", "tl.multiple_of: 24 is not a multiple of 16"),
        ("contiguous", "tl.max_contiguous: no runs of 8 consecutive values"),
    ],
)
def test_promises(claim, fault):
    with checked():
        promises[(1,)](torch.zeros(40), 16, claim)
        with faults(fault):
            promises[(1,)](torch.zeros(40), 24, claim)


@triton.jit
def half_loaded(x, out, n, USE: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, 16)
    mask = i < n
    value = tl.load(x + i, mask, other=OTHER)
    if USE == "store":
        tl.store(out + i, value)
    elif USE == "masked store":
        tl.store(out + i, value, mask)
    elif USE == "maximum":  # drops a NaN
        tl.store(out + i, tl.maximum(value.to(tl.float32), 0.0))
    elif USE == "select":
        tl.store(out + i, tl.where(mask, value, 0))
    elif USE == "sum":
        tl.store(out, tl.sum(value.to(tl.float32), axis=0))
    elif USE == "rows":  # the second row is all undefined, and its sum is not stored
        rows = tl.sum(tl.reshape(value.to(tl.float32), [2, 8]), axis=1)
        tl.store(out + tl.arange(0, 2), rows, tl.arange(0, 2) < n // 8)
    elif USE == "address":
        tl.store(out + value.to(tl.int32), 1)
    elif USE == "mask":
        tl.store(out + i, 1, value > 0)
    elif USE == "both":
        tl.store(out + i, 1, mask & (value > 0))
    elif USE == "flip":
        tl.store(out + i, tl.flip(value, 0), i >= 16 - n)
    elif USE == "branch":
        if tl.max(value.to(tl.float32), axis=0) > 0:
            tl.store(out, 1)
    else:
        tl.store(out + i, i // value.to(tl.int32), mask)


USES = {
    "store": "lane 8 of a stored value",
    "masked store": None,
    "maximum": "lane 8 of a stored value",
    "select": None,
    "sum": "lane 0 of a stored value",
    "rows": None,
    "address": "of the addresses of a write",
    "mask": "of the mask of a write",
    "both": None,
    "flip": None,
    "branch": "a branch condition",
}
NOT_IN_BFLOAT16 = {"mask", "both"}  # they compare what they loaded


@pytest.mark.parametrize(
    ("use", "dtype"),
    [(u, t) for u in USES for t in (torch.float32, torch.int32, torch.uint8)]
    + [(u, torch.bfloat16) for u in USES if u not in NOT_IN_BFLOAT16],
)
def test_lanes_left_undefined(use, dtype):
    x = torch.arange(16).to(dtype)
    with checked():
        if USES[use]:
            with faults(f"undefined lanes: .*{USES[use]}"):
                half_loaded[(1,)](x, torch.zeros(16, dtype=dtype), 8, use, None)
        else:
            half_loaded[(1,)](x, torch.zeros(16, dtype=dtype), 8, use, None)
        if use != "address":  # two lanes would write cell 0
            half_loaded[(1,)](x, torch.zeros(16, dtype=dtype), 8, use, 0)


def test_division_by_zero_matters_where_it_is_used():
    out = torch.zeros(16, dtype=torch.int32)
    with checked():
        half_loaded[(1,)](torch.ones(16, dtype=torch.int32), out, 8, "divide", 0)  # masked away
        with faults("division by zero"):
            half_loaded[(1,)](torch.zeros(16, dtype=torch.int32), out, 8, "divide", 0)


@triton.jit
def truncate(x, out, BLOCK: tl.constexpr):
    """To bfloat16 without rounding, as the stock interpreter converts."""
    i = tl.arange(0, BLOCK)
    bits = tl.load(x + i).to(tl.int32, bitcast=True)
    tl.store(out + i, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


def test_bfloat16_that_is_truncated_shows():
    x, out = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    with checked():
        truncate[(1,)](x, out, 64)
        assert not torch.equal(out, x.bfloat16())
        convert[(1,)](x, out, 64)
        assert torch.equal(out, x.bfloat16())


@triton.jit
def convert(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def test_bfloat16_rounds_to_nearest_even():
    x = torch.cat(
        [
            torch.randn(2000),
            torch.randn(1000) * 1e-39,
            torch.tensor([1.998, np.inf, -np.inf, 0.0, 3.4e38]),
        ]
    )
    x = torch.nn.functional.pad(x, (0, 4096 - x.numel()))
    out = torch.empty(4096, dtype=torch.bfloat16)
    with checked():
        convert[(1,)](x, out, 4096)
    assert torch.equal(out, x.bfloat16())
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = torch.empty(2**16)
    with checked():
        convert[(1,)](every, wide, 2**16)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int32, [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 300]),
        (torch.int64, [1, -1, 2**63 - 1, -(2**63), 0, 3_000_000_000, 300]),
        (torch.int16, [1, -1, 2**15 - 1, -(2**15), 0, 2**15 - 1, 300]),
        (torch.uint8, [1, 0, 255, 0, 0, 255, 300 - 256]),
    ],
)
def test_float_to_integer(dtype, expected):
    x = torch.tensor([1.9, -1.9, np.inf, -np.inf, np.nan, 3e9, 300.0, 0.0])
    out = torch.empty(8, dtype=dtype)
    with checked():
        convert[(1,)](x, out, 8)
    assert out[:7].tolist() == expected


@triton.jit
def extremes(x, out):
    i = tl.arange(0, 4)
    v = tl.load(x + i)
    tl.store(out + i, tl.maximum(v, 0.5))
    tl.store(out + 4 + i, tl.minimum(v, 0.5))
    tl.store(out + 8 + i, tl.clamp(v, 0.0, 1.0))
    tl.store(out + 12 + i, tl.clamp(v, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL))


def test_nan_in_maximum_minimum_and_clamp():
    nan = float("nan")
    out = torch.empty(16)
    with checked():
        extremes[(1,)](torch.tensor([nan, 2.0, -1.0, 0.25]), out)
    expected = torch.tensor(
        [[0.5, 2, 0.5, 0.5], [0.5, 0.5, -1, 0.25], [0, 1, 0, 0.25], [nan, 1, 0, 0.25]]
    )
    torch.testing.assert_close(out.reshape(4, 4), expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def sloppy(x, out, OP: tl.constexpr):
    i = tl.arange(0, 4)
    value = tl.load(x + i)
    if OP == "bfloat16":
        value = value + value
    elif value > 0:
        value = value.to(tl.float32).to(tl.bfloat16)
    tl.store(out + i, value)


def test_arithmetic_on_bfloat16_and_branch_on_a_block():
    x = torch.ones(4, dtype=torch.bfloat16)
    with checked():
        with faults("arithmetic .* on bfloat16"):
            sloppy[(1,)](x, x, "bfloat16")
        with faults("a branch on a block of values"):
            sloppy[(1,)](torch.ones(4), x, "branch")


@triton.jit
def within(x, out, low, high):
    value = tl.load(x + tl.arange(0, 4))
    tl.store(out + tl.arange(0, 4), (value > low) & (low < high))


def test_comparisons_of_scalars_combine_with_those_of_blocks():
    out = torch.empty(4, dtype=torch.bool)
    with checked():
        within[(1,)](torch.tensor([1.0, 2.0, 3.0, 4.0]), out, 2.5, 3.0)
    assert out.tolist() == [False, False, True, True]


@triton.jit
def numbers(out, a, b: tl.float64, c, n):
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    total = 0
    for i in range(0, n, 3):
        total += i
    tl.store(out + 3, total)


def test_numbers_arrive_as_the_compiler_passes_them():
    out = torch.empty(4, dtype=torch.float64)
    with checked():
        numbers[(1,)](out, 0.1, 0.1, True, 10)
    assert out.tolist() == [float(np.float32(0.1)), 0.1, 1.0, 0 + 3 + 6 + 9]


@triton.jit
def functions(x, out, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    if OP == "log1p":
        v = libdevice.log1p(v)
    elif OP == "pow":
        v = libdevice.pow(v, 0.3)
    elif OP == "divide":
        v = libdevice.fast_dividef(1.0, v)
    elif OP == "exp":
        v = libdevice.fast_expf(v)
    elif OP == "log":
        v = libdevice.fast_logf(v)
    elif OP == "rint":
        v = libdevice.rint(v)
    elif OP == "tanh":
        v = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
    else:
        v = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
    tl.store(out + i, v)


@pytest.mark.parametrize(
    ("op", "reference", "ulps"),
    [
        ("log1p", torch.log1p, 1),
        ("pow", lambda x: x ** float(np.float32(0.3)), 1),
        ("divide", lambda x: 1 / x, 1),
        ("exp", torch.exp, 16),  # the product with log2(e) is rounded
        ("rint", torch.round, 0),
        ("tanh", torch.tanh, 1),
    ],
)
def test_device_functions(op, reference, ulps):
    x, out = torch.linspace(1e-3, 20, 512), torch.empty(512)
    with checked():
        functions[(1,)](x, out, 512, op)
    expected = reference(x.double())
    assert (
        (out - expected).abs() <= ulps * 2.0**-24 * expected.abs() + (1e-30 if ulps else 0)
    ).all()


def test_device_functions_have_the_limits_of_the_hardware():
    with checked():
        out = torch.empty(4)
        functions[(1,)](torch.tensor([2.0**127, 1e-39, 2.0, 1.0]), out, 4, "divide")
        assert out.tolist() == [0.0, float("inf"), 0.5, 1.0]
        x = torch.tensor([1 + 2.0**-23, 1 - 2.0**-24, 1.5, 1.0])
        functions[(1,)](x, out, 4, "log")  # fast_logf resolves 2^-22 around 1
        assert out[1] == 0 and abs(out[2] - x[2].log()) < 2e-7
        with faults(r"libdevice.fast_expf does not take fp64"):
            functions[(1,)](torch.ones(4, dtype=torch.float64), out, 4, "exp")
        with faults("inline assembly 'popc.b32"):
            functions[(1,)](x, out, 4, "popc")


# --- launches, large tensors, traffic -------------------------------------------------------------


def test_grids_that_no_gpu_runs():
    x = torch.zeros(16)
    with checked(programs=[0]) as report:
        copy[(2**31 - 1,)](x, torch.empty(16), 16, 0, BLOCK=16, MASKED=True)
        copy[(0,)](x, torch.empty(16), 16, 0, BLOCK=16, MASKED=True)
        for grid in [(1, 65536), (1, 1, 65536), (2**20, 2**11)]:
            with faults("no GPU runs the grid"):
                copy[grid](x, torch.empty(16), 16, 0, BLOCK=16, MASKED=True)
    assert len(report.launches) == 2


@triton.jit
def ones(out, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 1, i < n)


def test_offsets_past_two_to_the_31_without_the_memory():
    n = 3_000_000_003
    out = torch.empty(n, dtype=torch.int8)
    start = time.perf_counter()
    with checked(out=out, programs=[0, -1]) as report:
        ones[(triton.cdiv(n, 1024),)](out, n, BLOCK=1024, WIDE=True)
    assert time.perf_counter() - start < 2
    assert out[:1024].eq(1).all() and out[-(n % 1024) :].eq(1).all()
    assert report.never_written("out") == n - 1024 - n % 1024
    with checked(programs=[-1]), faults("int32 overflow: multiply gives"):
        ones[(triton.cdiv(n, 1024),)](out, n, BLOCK=1024, WIDE=False)


def test_races_in_large_tensors():
    out = torch.empty(2**27)
    with checked(out=out, programs=[3, 4]), faults(r"writes too: 'out'\[67108864\]"):
        overlapping[(5,)](out, 2**24, BLOCK=2**10)


@triton.jit
def overlapping(out, step, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * step + tl.arange(0, BLOCK)
    tl.store(out + tl.where(tl.program_id(0) == 3, i + step, i), 1.0)


@triton.jit
def smooth(x, scale, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    a = tl.load(x + i, mask)
    b = tl.load(x + tl.maximum(i - 1, 0), mask)
    tl.store(out + i, (a + b) * tl.load(scale), mask & (i > 0))


def test_traffic_is_exact():
    x, scale = torch.randn(100), torch.ones(1)
    with checked(x=x) as report:
        out = torch.empty(100)
        smooth[(4,)](x, scale, out, 100, BLOCK=32)
    # every cell is read twice, but brought in once; program and tile borders count as they are
    assert report["x"] == Traffic(read=800, read_once=400)
    assert report["scale"] == Traffic(read=16, read_once=4)
    assert report["out"] == report[out] == Traffic(written=396, written_once=396)
    assert report.never_written(out) == 1 and report.never_written(x) == 100
    assert set(report.traffic) == {"x", "scale", "out"}


def test_one_storage_under_two_names_and_types():
    words = torch.zeros(8, dtype=torch.int32)
    with checked(words=words) as report:
        convert[(1,)](torch.arange(8, dtype=torch.int32), words, 8)
        convert[(1,)](torch.arange(16, dtype=torch.int16), words.view(torch.int16)[8:], 8)
    assert report["words"].written == 32 + 16 and report.never_written("words") == 0
    assert words.tolist()[:4] == [0, 1, 2, 3] and words.view(torch.int16)[8:].tolist() == list(
        range(8)
    )


def test_uninitialized_memory_shows():
    with checked():
        scratch, out = torch.empty(20), torch.zeros(16)
        copy[(1,)](scratch, out, 16, 0, BLOCK=16, MASKED=True)
        assert (
            out.isnan().all()
            and torch.zeros(3).new_empty(2, dtype=torch.int16).tolist() == [2**15 - 1] * 2
        )


def test_the_language_is_restored():
    def state():
        builder = interpreter.interpreter_builder
        return (
            tl.load,
            tl.reduce,
            tl.flip,
            hasattr(tl.tensor, "__bool__"),
            libdevice.log1p,
            builder.__class__,
            torch.empty,
        )

    before = state()
    with pytest.raises(ZeroDivisionError), checked():
        assert not set(before) & (set(state()) - {True, False})
        raise ZeroDivisionError
    assert before == state()
    x, out = torch.randn(16), torch.empty(16)
    copy[(1,)](x, out, 16, 0, BLOCK=16, MASKED=True)
    assert torch.equal(x, out)


def test_a_block_in_a_block_joins_it():
    x, out = torch.randn(16), torch.empty(16)
    with checked(x=x) as outer:
        with checked():
            copy[(1,)](x, out, 16, 0, BLOCK=16, MASKED=True)
        copy[(1,)](x, out, 16, 0, BLOCK=16, MASKED=True)
    assert len(outer.launches) == 2 and outer["x"].read == 2 * x.nbytes


def test_never_written_of_a_strided_view():
    out = torch.zeros(8, 4)[:, ::2]
    memory = Memory({"out": out}, races=True)
    assert memory.never_written("out") == 16


def test_without_the_interpreter_checked_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs enable_interpreter\(\)"), checked():
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with checked() as report:
        assert report.launches == []
