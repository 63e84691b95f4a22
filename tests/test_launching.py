"""Launches that the JIT does not make are those that it would make."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from triton import knobs

import tests.plans
from fmkernels.kernels import launching
from tests.support import on_gpu

ROOT = Path(__file__).parents[1]
PLANS = sorted(plan.name for plan in pkgutil.iter_modules(tests.plans.__path__))

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the recording driver")


def test_launches_are_those_of_the_jit():
    """Variant, grid and arguments of every launch of all plans, in a process without a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert int(done.stdout) > 300


def compare_all() -> int:
    """Compare the launches of all plans; return how many went past the JIT."""
    from triton.runtime import jit

    import fmkernels.kernels
    from tests.triton_checked import driver

    plans = [importlib.import_module(f"tests.plans.{plan}") for plan in PLANS]
    cases = [case for plan in plans for case in plan.cases()]
    kernels = [
        kernel
        for module in pkgutil.iter_modules(fmkernels.kernels.__path__)
        for kernel in vars(importlib.import_module(f"fmkernels.kernels.{module.name}")).values()
        if isinstance(kernel, jit.JITFunction) and "run" in vars(kernel)
    ]
    launches: list[tuple] = []

    def run(self, *arguments):
        *where, _, _, _ = arguments[:9]  # without launch metadata and hooks
        launches.append((self.variant, where, [describe(x) for x in arguments[9:]]))

    def launch_all() -> list[tuple]:
        launches.clear()
        for case in cases:
            case.call()
        return list(launches)

    driver._Kernel.run = run
    with driver.recording():
        launch_all()
        with mock.patch.object(jit, "compute_cache_key", side_effect=AssertionError("by the JIT")):
            quick = launch_all()
        for kernel in kernels:
            del kernel.run
        assert quick == launch_all()
    return len(quick)


def describe(x: object) -> object:
    """What a kernel sees of an argument; results are other tensors in each call."""
    if isinstance(x, tuple):
        return [describe(each) for each in x]
    return (x.dtype, x.shape, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("hook", [None, lambda metadata: None])
def test_a_launch_hook_may_be_a_plain_function_or_nothing(hook, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    kernel = SimpleNamespace(pre_run_hooks=[])
    assert launching._is_watched(kernel) is (hook is not None)


if __name__ == "__main__":
    print(compare_all())
