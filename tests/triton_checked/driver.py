"""A Triton driver without a GPU.

Under `recording`, the JIT binds, specializes and launches kernels on CPU tensors as on a GPU, but
compiles nothing and runs nothing. Every launch is noted, and every variant it would have compiled.
Not for a process that interprets kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

DURING_RECORDING: list[Callable[[str], AbstractContextManager]] = []
"""Context managers around each recording. They get the name of the target. Where launch code asks
for the architecture of its device, register one that answers for the target."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One specialization of a kernel: what the JIT hands to the compiler."""

    kernel: str
    source: ASTSource
    target: GPUTarget
    options: dict


@dataclass(frozen=True)
class Launch:
    variant: Variant
    grid: tuple[int, int, int]


@dataclass
class Recording:
    launches: list[Launch] = field(default_factory=list)

    @property
    def variants(self) -> list[Variant]:
        """Every variant that was launched, once."""
        return list(dict.fromkeys(launch.variant for launch in self.launches))


class _Kernel:
    """A stand-in for a compiled kernel."""

    function, packed_metadata = None, ()

    def __init__(self, driver: RecordingDriver, variant: Variant):
        self.driver, self.variant = driver, variant

    def launch_metadata(self, *_):
        return None

    def run(self, x: int, y: int, z: int, *_) -> None:
        self.driver.recording.launches.append(Launch(self.variant, (x, y, z)))


class RecordingDriver(DriverBase):
    def __init__(self, name: str):
        self.target, self.index = TARGETS[name], list(TARGETS).index(name)
        self.recording = Recording()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("the recording driver runs nothing, so it cannot autotune")

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, _: int) -> int:
        return 0

    def compile(self, source, target: GPUTarget, options: dict, **_) -> _Kernel:
        return _Kernel(self, Variant(source.fn.fn.__name__, source, target, dict(options)))


_drivers: dict[str, RecordingDriver] = {}


@contextmanager
def recording(target: str = "sm_90") -> Iterator[Recording]:
    """Record the launches of the block as they would reach a GPU of the given architecture."""
    driver = _drivers.setdefault(target, RecordingDriver(target))
    driver.recording = Recording()
    active, compile_ = triton.runtime.driver._active, triton.compiler.compile
    triton.runtime.driver.set_active(driver)
    triton.compiler.compile = lambda source, **kwargs: triton.runtime.driver.active.compile(
        source, **kwargs
    )
    try:
        with ExitStack() as stack:
            for context in DURING_RECORDING:
                stack.enter_context(context(target))
            yield driver.recording
    finally:
        triton.runtime.driver._active, triton.compiler.compile = active, compile_


def host_microseconds(call: Callable[[], object], calls: int = 50, rounds: int = 5) -> float:
    """Host time of a call, without compilation and without the launch in the real driver.

    The best of several rounds.
    """
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return min(times) * 1e6
