"""The torch.library fragment that holds the schemas of all ops, and how an op gets one implementation per device."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

LIBRARY = torch.library.Library("fmkernels", "DEF")


def define(name: str, schema: str, module: str, function: str) -> None:
    """Define ``fmkernels::name``; its implementations are fmkernels.cpu.<module> and fmkernels.kernels.<module>.

    The modules are imported at the first call, so that importing fmkernels imports neither triton nor a driver.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, _late(f"fmkernels.cpu.{module}", function), "CPU")
    LIBRARY.impl(name, _late(f"fmkernels.kernels.{module}", function), "CUDA")


def _late(module: str, function: str) -> Callable:
    load = cache(lambda: import_module(module))
    return lambda *args: getattr(load(), function)(*args)


def fake(name: str) -> Callable:
    """Register the decorated function as what ``fmkernels::name`` does to shapes and types."""
    return torch.library.register_fake(f"fmkernels::{name}", lib=LIBRARY)
