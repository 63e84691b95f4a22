"""The planted kernels over a sweep of sizes."""

from collections.abc import Iterator

import torch

from .plan import Case
from .planted import masked, streamed


def cases() -> Iterator[Case]:
    x = torch.zeros(16)
    for n in (1, 7, 8, 16, 1000, 1024, 1 << 20, 2**31 + 16, 2**31 + 32):
        yield Case(f"masked {n}", lambda n=n: masked[(1,)](x, x, n, BLOCK=1024))
        yield Case(f"streamed {n}", lambda n=n: streamed[(1,)](x, x, n, BLOCK=1024, STEPS=1))
