"""Worker processes: a pool, and single ones."""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def process_pool(count: int) -> ProcessPoolExecutor:
    """A pool whose processes end with their parent, even if the parent is killed.

    The processes are spawned: a script that calls this needs ``if __name__ == "__main__":``.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)


@contextlib.contextmanager
def process_map(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int
) -> Iterator[Iterable[_Result]]:
    """``map`` in up to ``workers`` processes of a `process_pool`, or in this one if one is enough.

    After the block, no item is begun any more.
    """
    if (count := min(workers, len(items))) < 2:
        yield map(function, items)
        return
    with process_pool(count) as pool:
        try:
            yield pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def start_process(function: Callable, *arguments: object, log: Path) -> BaseProcess:
    """Call a function in a new process with one thread, which ends with its parent.

    The process is spawned, as those of `process_pool`. If the function raises, the exit code is 1.

    Args:
        function: a function of a module.
        arguments: its arguments, which are pickled.
        log: the file that standard output, errors and traceback are appended to.
    """
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_call, args=(log, function, *arguments))
    process.start()
    return process


def _call(log: Path, function: Callable, *arguments: object) -> None:
    import torch

    _end_with_parent()
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    function(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
