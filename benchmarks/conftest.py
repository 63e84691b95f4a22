"""How a row gets into pytest-benchmark, and what the JSON says of the machine beside what the plugin itself says."""

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.common import DEVICE, Comparison


class _Replay:
    """A timer that shows pytest-benchmark samples already taken, one per pair of calls."""

    times: Iterator[float]

    def __call__(self) -> float:
        return next(self.times)


_replay = _Replay()


def pytest_addoption(parser):
    parser.addoption("--limit", type=float, default=math.inf, help="seconds after which no comparison is begun")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_replay))


@pytest.fixture(scope="session")
def end(pytestconfig) -> float:
    """When the last comparison may begin."""
    return time.monotonic() + pytestconfig.getoption("limit")


@pytest.fixture
def record(benchmark, pytestconfig, end) -> Callable[[Comparison, str, str], None]:
    """Measure one row: record(comparison, provider, phase)."""

    def record(comparison: Comparison, provider: str, phase: str) -> None:
        if not comparison.measured and time.monotonic() > end:
            pytest.skip("no time was left")
        row = comparison.row(
            provider,
            phase,
            min_rounds=pytestconfig.getoption("benchmark_min_rounds"),
            max_time=float(pytestconfig.getoption("benchmark_max_time")),
        )
        benchmark.group = f"{comparison}, {phase}"
        benchmark.extra_info.update(row.info)
        _replay.times = (t for sample in row.samples for t in (0.0, sample))
        benchmark.pedantic(lambda: None, rounds=len(row.samples))

    return record


def pytest_benchmark_update_machine_info(config, machine_info):
    names = ("torch", "triton", "torchvision", "monai", "kornia", "numpy")
    versions = {name: _version(name) for name in names}
    machine_info["versions"] = {"python": platform.python_version()} | {k: v for k, v in versions.items() if v}
    machine_info["threads"] = torch.get_num_threads()
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        machine_info["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "runtime": torch.version.cuda or torch.version.hip,
        }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
