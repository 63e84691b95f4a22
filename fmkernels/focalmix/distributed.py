"""Device and processes of a run: one process, or those started by ``torchrun``."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fmkernels.focalmix.errors import InputError, first_line


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
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of ``torchrun``; without it, do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
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
