"""Division by a multiplication, exact over the whole range of int32."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fmkernels.kernels.arithmetic import quotient, reciprocal
from tests.support import on_gpu
from tests.support.cases import cases

TOP = 2**31 - 1
EDGES = (1, 2, 3, 5, 7, 2**15, 2**16 - 1, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1, TOP - 1, TOP)


def divided(n: int, divisor: int) -> int:
    """As the kernel computes it, in Python's integers."""
    multiplier, shift = reciprocal(divisor) >> 32, reciprocal(divisor) % 2**32
    assert 2**31 <= multiplier < 2**32 and 0 <= shift < 32
    return (2 * n * multiplier >> 32) >> shift


@cases(2000)
@given(st.integers(0, TOP), st.integers(1, TOP))
def test_any_quotient(n, divisor):
    assert divided(n, divisor) == n // divisor
    multiple = n // divisor * divisor  # where a multiplier that is too small would fail
    assert divided(multiple, divisor) == n // divisor
    if multiple:
        assert divided(multiple - 1, divisor) == n // divisor - 1


@triton.jit(do_not_specialize=["by_divisor"])
def divide_kernel(n, out, by_divisor, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, quotient(tl.load(n + at), by_divisor))


@pytest.mark.kernel
@pytest.mark.parametrize("divisor", EDGES)
def test_in_a_kernel(divisor):
    device = "cuda" if on_gpu() else "cpu"
    near = [k * divisor + i for k in (0, 1, TOP // divisor) for i in (-1, 0, 1)]
    values = [n for n in (*near, *EDGES) if 0 <= n <= TOP]
    n = torch.zeros(32, dtype=torch.int32)
    n[: len(values)] = torch.tensor(values, dtype=torch.int32)
    n = n.to(device)
    out = torch.empty_like(n)
    divide_kernel[(1,)](n, out, reciprocal(divisor), 32)
    assert torch.equal(out, n // divisor)
