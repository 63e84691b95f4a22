"""How the loops of the CPU path are compiled, and shared out over threads.

Numba compiles a loop at its first call with new types, a second or two, and keeps it on disk for later processes. Its
own threads are not used: they survive neither a fork (OpenMP) nor two callers at once (its work queue). The loops give
up the GIL instead, and plain Python threads, as many as torch is allowed, run them on ranges of one call.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import torch

FREEDOM = {"contract"}
"""What the compiler may do to arithmetic: fuse a product and a sum. More has cost here: reordered, the mean of two
infinities was NaN; with reciprocals for quotients, what was to be copied was resampled."""


_STAMP = tuple(
    (file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(Path(__file__).parent.glob("*.py"))
)
"""What is kept is of these files; Numba itself looks at that alone which a loop stands in, not at what it calls."""


def compiled(function: Callable) -> Callable:
    """The function as machine code, for any types of its arguments."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FREEDOM}
    try:
        loop = numba.njit(function, cache=True, **options)
        loop._cache._cache_file._source_stamp = _STAMP
    except (RuntimeError, AttributeError):  # no folder to keep it in can be written; another Numba names it otherwise
        return numba.njit(function, **options)
    return loop


def shared(loop: Callable, size: int, least: int, *args: Any) -> None:
    """``loop(start, end, *args)`` over range(size), in as many parts as torch may use threads, of at least ``least``.

    The parts write to places of their own, so that the result does not depend on their number. Whatever happens, Ctrl-C
    too, none is at work any more when this returns: the memory that it writes to may be gone then.
    """
    parts = min(torch.get_num_threads(), size // max(least, 1))
    if parts <= 1:
        loop(0, size, *args)
        return
    cuts = [size * i // parts for i in range(parts + 1)]
    own, *others = pairwise(cuts)
    futures: list[Future] = []
    try:
        for ends in others:
            futures.append(Future())
            try:
                _pool().submit(_run, futures[-1], loop, *ends, *args)
            except RuntimeError:  # no thread can be started: a limit, or the interpreter is shutting down
                if futures[-1].cancel():  # it may wait in the queue nevertheless
                    futures.pop()
                    loop(*ends, *args)
        loop(*own, *args)
    except BaseException:
        futures = [future for future in futures if not future.cancel()]  # what has not begun will not
        raise
    finally:
        _wait(futures)
    for future in futures:
        future.result()


def _run(future: Future, loop: Callable, *args: Any) -> None:
    """The loop, unless the future was cancelled."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(loop(*args))
        except BaseException as problem:
            future.set_exception(problem)


def _wait(futures: list[Future]) -> None:
    try:
        wait(futures)
    except BaseException:  # Ctrl-C once more
        _wait(futures)
        raise


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fmkernels")


if hasattr(os, "register_at_fork"):  # the threads stay behind in the parent
    os.register_at_fork(after_in_child=_pool.cache_clear)
