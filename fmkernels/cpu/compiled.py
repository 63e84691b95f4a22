"""How the loops of the CPU path are compiled, and how threads share them.

Numba compiles a loop at its first call with new types, in a second or two, and caches it on disk.
Its own threads are not used: they survive neither a fork (OpenMP) nor two callers at once (its work
queue). The loops release the GIL instead, and Python threads run them on ranges of one call.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

FREEDOM = {"contract"}
"""Fast-math flags: contraction only. `reassoc` turned the mean of two infinities into NaN, and
`arcp` resampled what identity crops should copy."""

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT16, UINT8 = range(6)
KINDS = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.int16: INT16,
    torch.uint8: UINT8,
}
"""The code of each dtype in loops."""

_STAMP = tuple(
    (file.name, file.stat().st_mtime_ns, file.stat().st_size)
    for file in sorted(Path(__file__).parent.glob("*.py"))
)
"""Cache key: all files of this package; Numba only checks the file that defines a function."""


def compiled(function: Callable) -> Callable:
    """The function compiled by Numba for any argument types, cached where that is possible."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FREEDOM}
    try:
        loop = numba.njit(function, cache=True, **options)
        loop._cache._cache_file._source_stamp = _STAMP
    except (RuntimeError, AttributeError):  # no writable folder, or other internals of Numba
        return numba.njit(function, **options)
    return loop


def shared(loop: Callable, size: int, least: int, *args: Any) -> None:
    """Call ``loop(start, end, *args)`` on ranges that make up range(size), in several threads.

    There are at most as many ranges as torch may use threads, each of at least ``least``. The
    result must not depend on their number. The loop gets a tensor as (address, dtype code). Ranges
    keep the tensors alive: an interrupted call may return before its last ranges end.
    """
    count = min(torch.get_num_threads(), size // max(least, 1))
    if count <= 1:
        _run(loop, args, 0, size)
        return
    bounds = pairwise([size * i // count for i in range(count + 1)])
    ranges = deque(partial(_run, loop, args, *ends) for ends in bounds)
    helpers: list[Future] = []
    try:
        with suppress(RuntimeError):  # no thread can start
            for _ in range(count - 1):
                helpers.append(_pool().submit(_run_all, ranges))
        _run_all(ranges)
        while helpers:
            helpers[-1].cancel() or helpers[-1].result()
            helpers.pop()
    finally:
        ranges.clear()
        helpers.clear()  # an error of theirs refers to this frame


def _run(loop: Callable, args: tuple, start: int, end: int) -> None:
    loop(
        start, end, *[(x.data_ptr(), KINDS[x.dtype]) if isinstance(x, Tensor) else x for x in args]
    )


def _run_all(ranges: deque[Callable[[], None]]) -> None:
    """Run ranges until none is left, or one fails."""
    try:
        while True:
            try:
                run = ranges.popleft()
            except IndexError:
                return
            run()
    except BaseException:
        ranges.clear()
        raise


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "fmkernels")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
