"""How a row gets into pytest-benchmark, and what its JSON says about the machine.

Where pytest-benchmark is not installed, its options that are used here and its JSON are made here.
"""

import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.common import DEVICE, Comparison, Row

PACKAGES = (
    "torch",
    "triton",
    "numba",
    "numpy",
    "scipy",
    "SimpleITK",
    "kornia",
    "monai",
    "timm",
    "torchvision",
)
STATISTICS: dict[str, Callable[[list[float]], float]] = {  # of the JSON
    "rounds": len,
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "stddev": lambda samples: statistics.stdev(samples) if len(samples) > 1 else 0.0,
}


class _Replay:
    """A timer that replays recorded samples to pytest-benchmark, one per pair of calls."""

    times: Iterator[float]

    def __call__(self) -> float:
        return next(self.times)


_replay = _Replay()
_left_out: dict[str, str] = {}  # what was not measured, and why
_entries: list[dict] = []  # of the JSON, without the plugin


def pytest_addoption(parser, pluginmanager):
    parser.addoption(
        "--limit", type=float, default=math.inf, help="seconds after which no comparison begins"
    )
    if not pluginmanager.hasplugin("benchmark"):
        parser.addoption("--benchmark-json", type=Path, help="file to write")
        parser.addoption("--benchmark-max-time", type=float, default=1.0, help="of a row, in s")
        parser.addoption("--benchmark-min-rounds", type=int, default=5, help="of a row")
        parser.addoption("--benchmark-quiet", action="store_true", help="as without it")


def pytest_collection_modifyitems(config, items):
    for item in items if config.pluginmanager.hasplugin("benchmark") else ():
        item.add_marker(pytest.mark.benchmark(timer=_replay))


@pytest.fixture(scope="session")
def end(pytestconfig) -> float:
    """When the last comparison may begin."""
    return time.monotonic() + pytestconfig.getoption("limit")


@pytest.fixture
def keep(request, pytestconfig) -> Callable[[str, Row], None]:
    """Put a row into the JSON, in a group."""
    if not pytestconfig.pluginmanager.hasplugin("benchmark"):

        def append(group: str, row: Row) -> None:
            name, fullname = request.node.name, request.node.nodeid
            stats = {name: statistic(row.samples) for name, statistic in STATISTICS.items()}
            entry = {"group": group, "name": name, "fullname": fullname, "extra_info": row.info}
            _entries.append({**entry, "stats": stats})

        return append
    benchmark = request.getfixturevalue("benchmark")

    def replay(group: str, row: Row) -> None:
        benchmark.group = group
        benchmark.extra_info.update(row.info)
        _replay.times = (t for sample in row.samples for t in (0.0, sample))
        benchmark.pedantic(lambda: None, rounds=len(row.samples))

    return replay


@pytest.fixture
def record(keep, pytestconfig, end) -> Callable[[Comparison, str, str], None]:
    """Measure one row: record(comparison, provider, phase)."""

    def record(comparison: Comparison, provider: str, phase: str) -> None:
        if not comparison.measured and time.monotonic() > end:
            _left_out[f"{comparison}"] = "no time was left"
            pytest.skip("no time was left")
        try:
            row = comparison.row(
                provider,
                phase,
                min_rounds=pytestconfig.getoption("benchmark_min_rounds"),
                max_time=float(pytestconfig.getoption("benchmark_max_time")),
            )
        except pytest.skip.Exception as missing:
            _left_out[provider] = f"{missing}"
            raise
        except Exception:
            _left_out[f"{comparison}: {provider}"] = "failed"
            raise
        keep(f"{comparison}, {phase}", row)

    return record


def pytest_sessionfinish(session):
    """Write the JSON, without the plugin."""
    config = session.config
    path = config.getoption("benchmark_json")
    if config.pluginmanager.hasplugin("benchmark") or path is None:
        return
    machine = {**platform.uname()._asdict(), "processor": platform.processor(), "cpu": {}}
    pytest_benchmark_update_machine_info(config, machine)
    report = {
        "machine_info": machine,
        "commit_info": {"id": "unversioned", "dirty": False},
        "benchmarks": _entries,
        "datetime": datetime.now(UTC).isoformat(),
        "left_out": _left_out,
    }
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what affects times; drop what identifies the machine."""
    of_cpu = (
        "arch",
        "brand_raw",
        "count",
        "flags",
        "l1_data_cache_size",
        "l2_cache_size",
        "l3_cache_size",
    )
    about = {name: machine_info[name] for name in ("machine", "processor", "system")}
    about["cpu"] = {
        name: machine_info["cpu"][name] for name in of_cpu if name in machine_info["cpu"]
    }
    about["versions"] = {"python": platform.python_version()}
    about["versions"] |= {name: version for name in PACKAGES if (version := _version(name))}
    machine_info.clear()
    machine_info.update(about)
    machine_info["threads"] = torch.get_num_threads()
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        machine_info["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "runtime": torch.version.cuda or torch.version.hip,
        }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config, commit_info):
    """Drop the names of the folder and of the branch."""
    for name in ("project", "branch"):
        commit_info.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Add what was left out. Keep the statistics of each row, drop its samples."""
    output_json["left_out"] = _left_out
    for entry in output_json["benchmarks"]:
        del entry["options"], entry["params"], entry["param"]
        entry["stats"] = {name: entry["stats"][name] for name in STATISTICS}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
