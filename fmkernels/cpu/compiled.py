"""How the loops of the CPU path are compiled, and how threads share them.

Numba compiles a loop at its first call with new types, in a second or two, and caches it on disk.
Its own threads are not used: they survive neither a fork (OpenMP) nor two callers at once (its work
queue). The loops release the GIL instead, and Python threads run them on ranges of one call.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numba
import torch
from torch import Tensor

FASTMATH = {"contract"}
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


def njit(function: Callable) -> Callable:
    """The function compiled by Numba for any argument types, cached where that is possible."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FASTMATH}
    try:
        loop = numba.njit(function, cache=True, **options)
        loop._cache._cache_file._source_stamp = _STAMP
    except (RuntimeError, AttributeError):  # no writable folder, or other internals of Numba
        return numba.njit(function, **options)
    return loop


def parallel_for(loop: Callable, size: int, grain_size: int, *args: Any) -> None:
    """Call ``loop(start, end, *args)`` on ranges that make up range(size), in several threads.

    There are at most as many ranges as torch may use threads, each of at least ``grain_size``. The
    result must not depend on their number. The loop gets a tensor as (address, dtype code). Ranges
    keep the tensors alive: an interrupted call may return before its last ranges end.
    """
    count = min(torch.get_num_threads(), size // max(grain_size, 1))
    if count <= 1:
        _run(loop, args, 0, size)
        return
    bounds = pairwise([size * i // count for i in range(count + 1)])
    ranges: deque[Callable[[], None]] = deque(partial(_run, loop, args, *ends) for ends in bounds)
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    error = None
    try:
        _pool().help(count - 1, ranges, ended)
        _run_all(ranges, ended)
        for _ in range(count):
            error = ended.get()
            if error is not None:
                raise error
    finally:
        ranges.clear()
        del error  # its traceback refers to this frame


def _run(loop: Callable, args: tuple, start: int, end: int) -> None:
    loop(
        start, end, *[(x.data_ptr(), KINDS[x.dtype]) if isinstance(x, Tensor) else x for x in args]
    )


def _run_all(ranges: deque[Callable[[], None]], ended: SimpleQueue[BaseException | None]) -> None:
    """Run ranges until none is left or one fails. Each that has ended leaves None or its error."""
    while True:
        try:
            run = ranges.popleft()
        except IndexError:
            return
        try:
            run()
        except BaseException as error:
            ranges.clear()
            ended.put(error)
            return
        ended.put(None)


class _Pool:
    """Threads that help callers. Queues in C, unlike futures, survive an interrupt at any time."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple] = SimpleQueue()
        self.threads: list[Thread] = []

    def help(self, count: int, *task: Any) -> None:
        """Offer a task to so many threads; to fewer where no more can start."""
        with suppress(RuntimeError):
            while len(self.threads) < min(count, os.cpu_count() or 1):
                thread = Thread(target=self._work, name="fmkernels", daemon=True)
                thread.start()
                self.threads.append(thread)
        for _ in range(min(count, len(self.threads))):
            self.tasks.put(task)

    def _work(self) -> None:
        while True:
            _run_all(*self.tasks.get())


@cache
def _pool() -> _Pool:
    return _Pool()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
