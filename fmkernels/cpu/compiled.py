"""How the loops of the CPU path are compiled, and shared out over threads.

Numba compiles a loop at its first call with new types, a second or two, and keeps it on disk for later processes. Its
own threads are not used: they survive neither a fork (OpenMP) nor two callers at once (its work queue). The loops give
up the GIL instead, and plain Python threads, as many as torch is allowed, run them on ranges of one call.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numba
import torch

FREEDOM = {"contract"}
"""What the compiler may do to arithmetic: fuse a product and a sum. More has cost here: reordered, the mean of two
infinities was NaN; with reciprocals for quotients, what was to be copied was resampled."""


_STAMP = tuple(
    (file.name, file.stat().st_mtime_ns, file.stat().st_size)
    for file in sorted(Path(__file__).parent.glob("*.py"))
)
"""What is kept is of these files; Numba itself looks at that alone which a loop stands in, not at what it calls."""


def compiled(function: Callable) -> Callable:
    """The function as machine code, for any types of its arguments."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FREEDOM}
    try:
        loop = numba.njit(function, cache=True, **options)
        loop._cache._cache_file._source_stamp = _STAMP
    except (
        RuntimeError,
        AttributeError,
    ):  # no folder to keep it in can be written; another Numba names it otherwise
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
    call = _Call(loop, pairwise([size * i // parts for i in range(parts + 1)]), args)
    problem = None
    try:
        _pool().ask(call, parts - 1)
        call.run()
    except BaseException as error:
        problem = error
    while True:
        try:
            call.wait()
            break
        except BaseException as error:  # Ctrl-C, once more perhaps
            problem = problem or error
    problem = problem or next(filter(None, call.ended), None)
    if problem is not None:
        try:
            raise problem
        finally:
            del problem, call  # or its traceback would hold all tensors


class _Call:
    """A loop in parts, which threads take until there is none left.

    Interrupts come between instructions of Python: what several threads share changes by single calls of C alone, and
    nothing depends on a message that was taken but not noted.
    """

    def __init__(self, loop: Callable, parts: Iterable[tuple[int, int]], args: tuple):
        self.loop, self.parts, self.args = loop, deque(parts), args
        self.begun: list[None] = []  # for each thread that helps
        self.ended: list[BaseException | None] = []  # the same, later
        self.news: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                ends = self.parts.popleft()
            except IndexError:
                return
            self.loop(*ends, *self.args)

    def help(self) -> None:
        """Run, in another thread."""
        self.begun.append(None)
        problem = None
        try:
            self.run()
        except BaseException as error:
            self.parts.clear()
            problem = error
        self.ended.append(problem)
        self.news.put(None)

    def wait(self) -> None:
        """Until no other thread is at work, and none can begin."""
        self.parts.clear()
        while len(self.ended) < len(self.begun):
            with suppress(Empty):
                self.news.get(timeout=0.05)


class _Pool:
    """Threads that help, as many as have been asked for at once, at most one for each CPU."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call] = SimpleQueue()
        self.threads: list[Thread] = []

    def ask(self, call: _Call, helpers: int) -> None:
        """Put a call before so many threads; before fewer where the system lets no more start."""
        with suppress(RuntimeError):
            while len(self.threads) < min(helpers, os.cpu_count() or 1):
                thread = Thread(target=self._work, name="fmkernels", daemon=True)
                thread.start()
                self.threads.append(thread)
        for _ in range(min(helpers, len(self.threads))):
            self.calls.put(call)

    def _work(self) -> None:
        while True:
            self.calls.get().help()


@cache
def _pool() -> _Pool:
    return _Pool()


if hasattr(os, "register_at_fork"):  # the threads stay behind in the parent
    os.register_at_fork(after_in_child=_pool.cache_clear)
