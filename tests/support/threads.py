"""The CPU path in several threads, however small the tensors."""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import fmkernels.cpu


@contextlib.contextmanager
def finely_split(threads: int) -> Iterator[None]:
    """So many threads, among which even the smallest loop of an op is split."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        for part in pkgutil.iter_modules(fmkernels.cpu.__path__):
            cpu = importlib.import_module(f"fmkernels.cpu.{part.name}")
            if part.name != "compiled" and hasattr(cpu, "parallel_for"):
                small = functools.partial(_cut_small, cpu.parallel_for)
                stack.enter_context(mock.patch.object(cpu, "parallel_for", small))
        yield


def _cut_small(
    parallel_for: Callable, loop: Callable, size: int, grain_size: int, *arguments: object
) -> None:
    """As ``parallel_for``, with ranges of any size."""
    parallel_for(loop, size, 1, *arguments)
