"""How the loops of the CPU path are compiled, and shared out over threads.

Numba compiles a loop at its first call with new types, a second or two, and keeps it on disk for later processes. Its
own threads are not used: they survive neither a fork (OpenMP) nor two callers at once (its work queue). The loops give
up the GIL instead, and plain Python threads, as many as torch is allowed, run them on ranges of one call.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import torch

FREEDOM = {"contract"}
"""What the compiler may do to arithmetic: fuse a product and a sum. More has cost here: reordered, the mean of two
infinities was NaN; with reciprocals for quotients, what was to be copied was resampled."""


def compiled(function: Callable) -> Callable:
    """The function as machine code, for any types of its arguments."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FREEDOM}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(function, **options)


def shared(loop: Callable, size: int, least: int, *args: Any) -> None:
    """``loop(start, end, *args)`` over range(size), in as many parts as torch may use threads, of at least ``least``.

    The parts write to places of their own, so that the result does not depend on their number.
    """
    parts = min(torch.get_num_threads(), size // max(least, 1))
    if parts <= 1:
        loop(0, size, *args)
        return
    cuts = [size * i // parts for i in range(parts + 1)]
    own, *others = pairwise(cuts)
    futures = [_pool().submit(loop, *ends, *args) for ends in others]
    loop(*own, *args)
    for future in futures:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fmkernels")


if hasattr(os, "register_at_fork"):  # the threads stay behind in the parent
    os.register_at_fork(after_in_child=_pool.cache_clear)
