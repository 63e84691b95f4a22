"""A kernel, its launch code and its plan: the subject of test_example.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import Case

BLOCK = 1024


@triton.jit
def scale_kernel(x, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, factor * tl.load(x + i, i < n), i < n)


def scale(x: Tensor, factor: float) -> Tensor:
    out = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), factor, BLOCK)
    return out


def cases() -> Iterator[Case]:
    for n in (4096, 4097):
        x = torch.zeros(n)
        yield Case(f"{n} elements", lambda x=x: scale(x, 2.0), elements=n, min_bytes=8)
