"""What all suites share: a comparison of providers on one workload, and how it is recorded.

A suite makes one `Comparison` per workload and one test per row of it (`rows`), which calls
`record(comparison, provider, phase)`, a fixture of conftest.py. The first row of a comparison
checks every provider against the reference and then times all in interleaved rounds, so that
background load affects all alike. Each test replays its samples to pytest-benchmark. A wrong
provider fails and is not timed; one that cannot be imported is skipped.
"""

import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from fmkernels import functional
from fmkernels.kernels.tuning import Launch
from tests.support.tolerance import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = "fmkernels"

_COPY_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}[
    DEVICE.type
]  # read and written: more than any cache holds
_FLUSH_BYTES = 512 << 20
_REGISTERS = 65536  # limit for all threads of a program
LARGE_ROWS = 2**11  # rows times columns of a plane of large volumes
_MOST_ROUNDS = 1000  # more would only fill the JSON


@dataclass(frozen=True)
class Row:
    """Seconds of every round, and the other fields of the JSON."""

    samples: list[float]
    info: dict[str, str | float | bool | None]


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    function: takes the inputs, returns a tensor or a list of tensors. It may work in place: only
        its first call is checked.
    inputs: makes its arguments, if they differ from the workload's: hard labels, or objects that a
        user makes once. It may call pytest.importorskip; so may the function, with a cache.
    compile: whether to time torch.compile of the function.
    reference: its oracle, if it differs from the workload's.
    """

    name: str
    function: Callable[..., Tensor | Sequence[Tensor]]
    inputs: Callable[[], tuple] | None = None
    compile: bool = False
    reference: Callable[..., Tensor | Sequence[Tensor]] | None = None


@dataclass
class Comparison:
    """All providers of an op on one workload.

    op, workload: names in the table.
    inputs: makes the arguments on DEVICE from torch's default generator; gradients are computed
        for those that require one.
    reference: the float64 oracle, called with the inputs of a provider.
    floor: the minimum traffic of each phase in bytes; None if a provider may move it in another
        phase. The phases are "forward" (without a graph) and, with a gradient, "backward" and
        "both" (forward with a graph, then backward).
    providers: one of them is named OURS.
    precision: the dtype whose tolerances apply; by default that of the result.
    scale: the gradient of a 0-d result, like that of a GradScaler; others get random gradients.
    elements: the size of the workload, in a series that grows.
    host: time the host alone, without waiting for a GPU.
    wall: time from the call until the GPU has finished, with warm caches.
    threads: number of CPU threads; torch's default if None.
    """

    op: str
    workload: str
    inputs: Callable[[], tuple]
    reference: Callable[..., Tensor | Sequence[Tensor]]
    floor: dict[str, int | None]
    providers: Sequence[Provider]
    scale: float = 1.0
    precision: torch.dtype | None = None
    elements: int | None = None
    host: bool = False
    wall: bool = False
    threads: int | None = None
    measured: bool = field(default=False, init=False)
    _samples: dict[str, dict[str, list[float]]] = field(default_factory=dict, init=False)
    _memory: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    _launches: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    _problems: dict[str, BaseException] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        return f"{self.op}, {self.workload}"

    def row(self, provider: str, phase: str, *, min_rounds: int, max_time: float) -> "Row":
        """Samples and statistics of one row; the first call measures all rows."""
        if not self.measured:
            self.measured = True
            try:
                with cpu_threads(self.threads):
                    self._measure(min_rounds, max_time)
            except Exception as problem:
                self._problems = {provider.name: problem for provider in self.providers}
            for problem in (
                self._problems.values()
            ):  # whose frames would hold all tensors until the last comparison
                traceback.clear_frames(problem.__traceback__)
        if provider in self._problems:
            raise self._problems[provider]
        samples = self._samples[provider][phase]
        p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
        compiled = any(each.compile for each in self.providers if each.name == provider)
        threads = self.threads or torch.get_num_threads()
        floor, copy = self.floor[phase], copy_bandwidth(threads)
        speed = None if floor is None else floor / median
        return Row(
            samples,
            {
                "op": self.op,
                "workload": self.workload,
                "provider": provider,
                "phase": phase,
                "device": DEVICE.type,
                "median_s": median,
                "p20_s": p20,
                "p80_s": p80,
                "floor_bytes": floor,
                "bytes_per_s": speed,
                "copy_bytes_per_s": copy,
                "share_of_copy": speed and speed / copy,
                "peak_extra_bytes": self._memory[provider].get(phase),
                "launches": self._launches[provider].get(phase),
                "elements": self.elements,
                "host": self.host,
                "compiled": compiled,
                "threads": threads,
            },
        )

    def _measure(self, min_rounds: int, max_time: float) -> None:
        """Interleaved rounds: `min_rounds`, then up to 1000 within `max_time` s a provider."""
        torch.compiler.reset()
        runs: dict[str, Run] = {}
        for provider in self.providers:
            try:
                runs[provider.name] = self.checked(provider)
            except (Exception, pytest.skip.Exception) as problem:
                self._problems[provider.name] = problem
        self._memory = {name: run.peak_memory() for name, run in runs.items()}
        self._launches = {name: run.launches() for name, run in runs.items()}
        self._samples = {name: {phase: [] for phase in self.floor} for name in runs}
        start = time.perf_counter()
        for done in range(max(min_rounds, _MOST_ROUNDS) if runs else 0):
            if done >= min_rounds and time.perf_counter() - start >= max_time * len(runs):
                break
            taken = [(self._samples[name], run.round()) for name, run in runs.items()]
            for samples, spans in taken:
                for phase, span in spans.items():
                    samples[phase].append(seconds(*span))

    def ready(self, provider: Provider) -> tuple["Run", list[Tensor]]:
        """The provider, ready to be timed, and the results of its first call on fixed inputs."""
        torch.manual_seed(0)
        run = Run(provider, (provider.inputs or self.inputs)(), self.floor, self.host, self.wall)
        results = run.forward()
        run.upstream = [
            torch.full_like(r, self.scale) if r.dim() == 0 else torch.randn_like(r) for r in results
        ]
        return run, results

    def checked(self, provider: Provider) -> "Run":
        """The provider, ready to be timed, after its results and gradients were checked."""
        run, results = self.ready(provider)
        torch.manual_seed(0)
        inputs = (provider.inputs or self.inputs)()
        expected = _flat((provider.reference or self.reference)(*inputs))
        for result, wanted in zip(results, expected, strict=True):
            assert_close(result, wanted, self.precision)
        if run.backward:
            upstream = [u.to(e.dtype) for u, e in zip(run.upstream, expected, strict=True)]
            gradients = torch.autograd.grad(expected, _leaves(inputs), upstream)
            for result, wanted in zip(run.forward_backward()[2], gradients, strict=True):
                # a sum of n random terms, such as the gradient of a weight, grows by sqrt(n)
                terms = sum(e.numel() for e in expected) / wanted.numel()
                scale = self.scale * math.sqrt(max(1, terms))
                assert_close(
                    result.double() / scale,
                    wanted.double() / scale,
                    self.precision or result.dtype,
                )
        run.round()
        return run


def op_suites() -> dict[str, ModuleType]:
    """The suite of every op that launches kernels, by the name of the op.

    In addition to tests, a suite has

    ONE: a comparison on one element or few, for the host's time;
    SMALL: comparisons which together launch every kernel of the op, once each;
    SWEEPS: what to tune;
    SECONDS: its share of a GPU run;
    growth(gpu): workloads, each with its number of elements, from few elements up;
    large(elements, part): a check on so many elements against the op on their last ``part``;
    LARGE_BYTES: what the check takes, per element.
    """
    paths = sorted(Path(__file__).parent.glob("bench_*.py"))
    names = [path.stem.removeprefix("bench_") for path in paths]
    return {
        name: import_module(f"benchmarks.bench_{name}")
        for name in names
        if name in functional.__all__
    }


def large_volume(elements: int, dtype: torch.dtype) -> Tensor:
    """[1, 1, planes, 32, 64]: so many voxels."""
    shape = 1, 1, elements // LARGE_ROWS, 32, LARGE_ROWS // 32
    return torch.empty(shape, dtype=dtype, device=DEVICE).random_(120)


@dataclass(frozen=True)
class Sweep:
    """The settings to try for an op: warps for each block, and tiles per program.

    `cases` makes the workloads, each with the phase to time.
    """

    op: str
    shapes: dict[int, tuple[int, ...]]
    cases: Callable[[], list[tuple[Comparison, str]]]
    max_tiles: tuple[int, ...] = (1,)

    def settings(self, default: Launch) -> list[Launch]:
        """All settings but the default, the most similar to it first."""
        shapes = [(block, warps) for block, counts in self.shapes.items() for warps in counts]
        every = [
            replace(default, block=block, num_warps=warps, max_tiles=tiles)
            for (block, warps), tiles in itertools.product(shapes, self.max_tiles)
            if 32 * warps * (default.max_registers or 0) <= _REGISTERS
        ]

        def distance(launch: Launch) -> float:
            names = ("block", "num_warps", "max_tiles")
            return sum(
                abs(math.log2(getattr(launch, name) / getattr(default, name))) for name in names
            )

        return sorted((launch for launch in every if launch != default), key=distance)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Make torch use this many threads in a block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_one_thread(comparison: Comparison) -> list[Comparison]:
    """The same comparison on one CPU thread; none on a GPU."""
    workload = f"{comparison.workload}, one thread"
    return [replace(comparison, workload=workload, threads=1)] if DEVICE.type == "cpu" else []


def wall_time(comparison: Comparison) -> list[Comparison]:
    """The same comparison from call to completion on a GPU; none on a CPU."""
    op, floor = f"{comparison.op}, wall time", dict.fromkeys(comparison.floor)
    return [replace(comparison, op=op, floor=floor, wall=True)] if DEVICE.type == "cuda" else []


def rows(comparisons: Iterable[Comparison]) -> list:
    """Parameters ("comparison", "provider", "phase") for pytest: each provider in each phase."""
    return [
        pytest.param(
            comparison, provider.name, phase, id=f"{comparison.workload}-{provider.name}-{phase}"
        )
        for comparison in comparisons
        for provider in comparison.providers
        for phase in comparison.floor
    ]


class Run:
    """One provider with its inputs."""

    def __init__(
        self,
        provider: Provider,
        inputs: tuple,
        phases: Iterable[str],
        host: bool = False,
        wall: bool = False,
    ):
        compiled = (
            torch.compile(provider.function, fullgraph=True, dynamic=False)
            if provider.compile
            else None
        )
        self.function = compiled or provider.function
        self.inputs, self.leaves = inputs, _leaves(inputs)
        self.backward, self.host, self.wall = "backward" in phases, host or wall, wall
        self.upstream: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return _flat(self.function(*self.inputs))

    def forward_backward(self) -> tuple[list[Tensor], "Mark", Sequence[Tensor]]:
        results = _flat(self.function(*self.inputs))
        middle = _mark(self.host)
        return results, middle, torch.autograd.grad(results, self.leaves, self.upstream)

    def round(self) -> dict[str, tuple["Mark", "Mark"]]:
        """Run each phase once. Returns when it began and when it ended."""
        begin = self._begin()
        self.forward()
        spans = {"forward": (begin, self._end())}
        if self.backward:
            begin = self._begin()
            _, middle, _ = self.forward_backward()
            end = self._end()
            spans |= {"backward": (middle, end), "both": (begin, end)}
        return spans

    def _begin(self) -> "Mark":
        """Flush a GPU's L2 cache, which also gives the host a head start on the launches.

        To time the host, wait until the GPU is idle, so that no launch blocks on a full queue.
        """
        if DEVICE.type == "cuda":
            if self.host:
                torch.cuda.synchronize()
            else:
                _flush_buffer().zero_()
        return _mark(self.host)

    def _end(self) -> "Mark":
        if self.wall and DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return _mark(self.host)

    def _calls(self) -> dict[str, Callable]:
        """The phases that a GPU is profiled in."""
        if DEVICE.type == "cpu":
            return {}
        return {"forward": self.forward} | (
            {"both": self.forward_backward} if self.backward else {}
        )

    def peak_memory(self) -> dict[str, int]:
        """Peak bytes that a GPU's allocator handed out beyond the inputs."""
        peak = {}
        for phase, call in self._calls().items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peak[phase] = torch.cuda.max_memory_allocated() - before
        return peak

    def launches(self) -> dict[str, int]:
        """Number of kernels that a GPU ran, without copies and fills."""
        count = {}
        for phase, call in self._calls().items():
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                call()
                torch.cuda.synchronize()
            ran = [
                event.name
                for event in profile.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
            count[phase] = sum(not name.startswith(("Memcpy", "Memset")) for name in ran)
        return count


Mark = float | torch.cuda.Event


def _mark(host: bool = False) -> Mark:
    """A point in time, on the GPU's stream or on the host's clock."""
    if host or DEVICE.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Mark, end: Mark) -> float:
    """Time between two points, once the GPU has reached the second."""
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)


@cache
def copy_bandwidth(threads: int) -> float:
    """Bytes per second, read plus written, of a large copy: the median of 9 on DEVICE."""
    source = torch.ones(_COPY_BYTES // 2, dtype=torch.uint8, device=DEVICE)
    target = source.clone()
    spans = []
    with cpu_threads(threads):
        for _ in range(9):
            begin = _mark()
            target.copy_(source)
            spans.append((begin, _mark()))
    return _COPY_BYTES / statistics.median(seconds(*span) for span in spans)


def _flat(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _leaves(inputs: tuple) -> list[Tensor]:
    tensors = [
        t for value in inputs for t in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
