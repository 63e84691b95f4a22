"""A plan of kernels with known compiled code: healthy ones, and some with a planted flaw."""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .plan import Case

N = 100_003


@triton.jit(do_not_specialize=["n"])
def streamed(x, out, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Has an unmasked main path and a masked tail. STEPS fused multiply-adds per element."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        value = tl.load(x + i)
        for _ in tl.static_range(STEPS):
            value = tl.fma(value, value, 1.5)
        tl.store(out + i, value)
    else:
        value = tl.load(x + i, i < n)
        for _ in tl.static_range(STEPS):
            value = tl.fma(value, value, 1.5)
        tl.store(out + i, value, i < n)


@triton.jit
def averaged(x, out, BLOCK: tl.constexpr):
    """Reads every cell twice."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 0.5 * (tl.load(x + i) + tl.load(x + (i ^ 1))))


@triton.jit
def masked(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + 1, i < n)


@triton.jit
def crowded(x, out, BLOCK: tl.constexpr, VALUES: tl.constexpr):
    """Keeps VALUES loads alive until the last of them has arrived."""
    i = tl.arange(0, BLOCK)
    values = ()
    for k in tl.static_range(VALUES):
        values += (tl.load(x + k * BLOCK + i, volatile=True),)  # not moved to its use
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(VALUES):
        total = total * values[VALUES - 1 - k] + 1.0
    tl.store(out + i, total)


@triton.jit
def turned(x, out, BLOCK: tl.constexpr):
    """Reads rows and writes columns, both in vectors, so that values change threads."""
    i = tl.arange(0, BLOCK)
    tile = tl.load(x + i[:, None] * BLOCK + i[None, :])
    tl.store(out + i[None, :] * BLOCK + i[:, None], tile)


def cases() -> Iterator[Case]:
    x, out = torch.zeros(N), torch.zeros(N)
    grid = (triton.cdiv(N, 1024),)
    for dtype, min_bytes in ((torch.float32, 8), (torch.bfloat16, None)):
        y = x.to(dtype)
        yield Case(f"masked {dtype}", lambda y=y: masked[grid](y, y, N, BLOCK=1024), N, min_bytes)
    for steps in (8, 24):
        call = functools.partial(streamed[grid], x, x, N, BLOCK=1024, STEPS=steps)
        yield Case(f"{steps} steps", call, 1024 * grid[0], 8)
    yield Case(
        "launched twice",
        lambda: [streamed[grid](x, x, N, BLOCK=1024, STEPS=8) for _ in range(2)],
        N,
        8,
    )
    yield Case("read twice", lambda: averaged[(64,)](x, out, BLOCK=1024), 1 << 16, 8)
    yield Case("aligned", lambda: masked[(64,)](x, x, 1 << 16, BLOCK=1024), 1 << 16)
    yield Case(
        "unaligned pointer", lambda: masked[(64,)](x[1:], x[1:], 1 << 16, BLOCK=1024), 1 << 16
    )
    yield Case("crowded", lambda: crowded[(1,)](x, out, BLOCK=1024, VALUES=40), 1024, 164)
    yield Case("roomy", lambda: crowded[(1,)](x, out, BLOCK=1024, VALUES=4), 1024, 20)
    yield Case("turned", lambda: turned[(1,)](x, out, BLOCK=64), 64 * 64, 8)
