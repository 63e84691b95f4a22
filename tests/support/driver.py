"""A Triton driver without a GPU, and a guard against host synchronisation.

Under `recording` the JIT binds, specialises and launches kernels on CPU tensors as on a GPU, but compiles nothing and
runs nothing: every launch and every variant it would have compiled is noted. Not for a process that interprets kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource

from fmkernels.kernels import tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """A call that launches kernels on CPU tensors.

    `elements` is how many elements (voxels, anchors) it is about. A case with a `floor`, the bytes that must be moved
    for each of them, is a row of the floor table.
    """

    name: str
    call: Callable[[], object]
    elements: int | None = None
    floor: float | None = None


@dataclass(frozen=True, eq=False)
class Variant:
    """One specialisation of a kernel: what the JIT hands to the compiler."""

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
        """The variants launched, each once."""
        return list(dict.fromkeys(launch.variant for launch in self.launches))


class _Kernel:
    """Stands for a compiled kernel."""

    function, packed_metadata = None, ()

    def __init__(self, driver: RecordingDriver, variant: Variant):
        self.driver, self.variant = driver, variant

    def launch_metadata(self, *_):
        return None

    def run(self, x: int, y: int, z: int, *_) -> None:
        self.driver.recording.launches.append(Launch(self.variant, (x, y, z)))


class RecordingDriver(DriverBase):
    def __init__(self, name: str):
        self.target, self.index, self.recording = (
            TARGETS[name],
            list(TARGETS).index(name),
            Recording(),
        )

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
        raise NotImplementedError("kernels are launched with fixed parameters")

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, _: int) -> int:
        return 0

    def compile(self, source, target: GPUTarget, options: dict, **_) -> _Kernel:
        return _Kernel(self, Variant(source.fn.fn.__name__, source, target, dict(options)))


_drivers: dict[str, RecordingDriver] = {}


@contextmanager
def recording(target: str = "sm_90") -> Iterator[Recording]:
    """Record the launches of the block as a GPU of the given kind would see them."""
    driver = _drivers.setdefault(target, RecordingDriver(target))
    driver.recording = Recording()
    active, compile_ = triton.runtime.driver._active, triton.compiler.compile
    triton.runtime.driver.set_active(driver)
    triton.compiler.compile = lambda source, **kwargs: triton.runtime.driver.active.compile(
        source, **kwargs
    )
    try:
        with mock.patch.object(tuning, "architecture", lambda device: target):
            yield driver.recording
    finally:
        triton.runtime.driver._active, triton.compiler.compile = active, compile_


def host_microseconds(call: Callable[[], object], calls: int = 50, rounds: int = 5) -> float:
    """Host time of a call, best of several rounds, without compiling and without the driver's own launch."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return min(times) * 1e6


class HostSyncError(AssertionError):
    """Code that must not wait for the device did."""


SYNCHRONISING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::nonzero",
    "aten::nonzero_numpy", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip
INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
}
COPIES = (
    (torch.Tensor, ("tolist", "cpu", "numpy")),
    (torch, ("tensor", "as_tensor", "from_numpy")),
    (torch.cuda, ("synchronize",)),
)


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        masks = (
            [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if name in INDEXING
            else []
        )
        unsized = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        to_host = (
            name == "aten::_to_copy"
            and kwargs.get("device") == torch.device("cpu")
            and args[0].is_cuda
        )
        if name in SYNCHRONISING or masks or unsized or to_host:
            raise HostSyncError(f"{name} waits for the device")
        with self:  # below autograd item() and its like arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if not name.startswith(
            ("aten::", "prim", "profiler::")
        ):  # look inside operators written in Python
            tensors = [
                a
                for a in torch.utils._pytree.tree_leaves((args, kwargs))
                if isinstance(a, torch.Tensor)
            ]
            key = (
                torch._C.DispatchKey.CUDA
                if any(t.is_cuda for t in tensors)
                else torch._C.DispatchKey.CPU
            )
            with self:
                return func._op_dk(key, *args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise HostSyncError where code in the block would wait for the device, or copy from pageable host memory.

    On CPU tensors it stands for what the same code does to a GPU; operators written in Python are looked into.
    """

    def refuse(name: str) -> Callable:
        def method(*_, **__):
            raise HostSyncError(f"{name}() waits for the device")

        return method

    with ExitStack() as patches, _NoHostSync():
        for owner, names in COPIES:
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, refuse(name)))
        yield
