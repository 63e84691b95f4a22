"""Device and processes of a run: one process, or those started by ``torchrun``."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fmkernels.focalmix.errors import InputError, first_line

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU of this process, or the CPU if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"device: expected auto, cpu or cuda, got {name!r} ({first_line(error)})"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device: expected a GPU for {name!r}, found none")
        if device.index is None:
            device = torch.device("cuda", _from_environment("LOCAL_RANK", 0))
    return device


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let this process keep the memory of tensors that are freed, from now on.

    glibc gives large blocks back to the system, and each new one costs a page fault every 4 KB: a
    seventh of a training step. The price: it is never given back, and where sizes of tensors change
    the process may hold twice what is in use.
    """
    if device.type == "cpu":
        with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)


def announced_processes() -> tuple[int, int]:
    """Rank of this process and number of processes, as ``torchrun`` announces them.

    Raises:
        InputError: ``WORLD_SIZE`` announces several processes, but not where they meet.
    """
    world_size = _from_environment("WORLD_SIZE", 1)
    if world_size <= 1:
        return 0, 1
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name, "").strip()]:
        raise InputError(
            f"WORLD_SIZE: expected {' and '.join(missing)} beside it, as torchrun sets them; "
            f"start with torchrun, or unset WORLD_SIZE (it is {world_size}) to use one process"
        )
    rank = _from_environment("RANK", 0)
    if rank >= world_size:
        raise InputError(f"RANK: expected less than WORLD_SIZE ({world_size}), got {rank}")
    return rank, world_size


def _from_environment(name: str, default: int) -> int:
    """A number in an environment variable; an empty one counts as unset."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise InputError(f"{name}: expected a number in this environment variable, got {text!r}")
    return int(text)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of ``torchrun``; without it, do nothing.

    Raises:
        InputError: the environment is incomplete, or the processes do not meet.
    """
    rank, world_size = announced_processes()
    if world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    except (RuntimeError, ValueError) as error:
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"process {rank} of {world_size} cannot join the others at {meeting} "
            f"({first_line(error)})"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_of_ranks(values: Tensor) -> Tensor:
    """All-reduce sum, without a gradient."""
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """All-reduce OR."""
    return bool(sum_of_ranks(torch.tensor(flag, dtype=torch.int32, device=device)))
