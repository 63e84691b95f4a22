"""Every op is tested on two paths: "cpu" and "kernel".

With FMKERNELS_TEST_DEVICE=cuda, kernels run on a GPU. Otherwise the checked interpreter runs them
on CPU tensors in place of the CPU path, below the dispatcher, so that the tests cover autograd and
checks as well.
"""

import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isfunction
from types import ModuleType

import pytest
import torch

from tests.support import enable_interpreter, on_gpu

enable_interpreter()
torch.set_num_threads(1)

if importlib.util.find_spec("numba") is None:  # a machine for kernels alone
    collect_ignore = ["test_cache.py", "test_cpu.py", "test_doctor.py", "test_fuzz.py"]


LONG = ("test_costs", "test_the_type_checker_finds_nothing", "test_the_site_builds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: one that comes last leaves all but one core idle."""
    items.sort(key=lambda item: not item.name.startswith(LONG))


@dataclass(frozen=True)
class Path:
    """Where an op runs in this test."""

    name: str
    device: torch.device


def launches() -> Iterator[tuple[ModuleType, str, Callable]]:
    """Every launcher of the CPU path: its module, its name, and the launcher of the kernels."""
    import fmkernels.cpu
    import fmkernels.ops

    for module in pkgutil.iter_modules(fmkernels.cpu.__path__):
        cpu = importlib.import_module(f"fmkernels.cpu.{module.name}")
        if not hasattr(fmkernels.ops, module.name):
            continue  # shared by ops
        kernels = importlib.import_module(f"fmkernels.kernels.{module.name}")
        for name, function in vars(cpu).items():
            if isfunction(function) and function.__module__ == cpu.__name__ and name[0] != "_":
                yield cpu, name, getattr(kernels, name)


def kernels() -> set[Callable]:
    """The functions of all kernels that are launched."""
    import fmkernels.kernels

    return {
        value.fn
        for module in pkgutil.iter_modules(fmkernels.kernels.__path__)
        for name, value in vars(importlib.import_module(f"fmkernels.kernels.{module.name}")).items()
        if name.endswith("_kernel")
    }


def _interpreted(launch):
    from tests.triton_checked.interpreter import checked

    def call(*args, **kwargs):
        with checked(shuffle=0):
            return launch(*args, **kwargs)

    return call


@pytest.fixture(params=["cpu", pytest.param("kernel", marks=pytest.mark.kernel)])
def path(request, monkeypatch) -> Path:
    if request.param == "cpu":
        return Path("cpu", torch.device("cpu"))
    if on_gpu():
        return Path("kernel", torch.device("cuda"))
    for cpu, name, launch in launches():
        monkeypatch.setattr(cpu, name, _interpreted(launch))
    return Path("kernel", torch.device("cpu"))
