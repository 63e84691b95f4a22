"""What needs a GPU, as three commands of less than 9 minutes each: `make gpu` runs all three.

    python -m benchmarks.gpu checks    tests with compiled kernels, every kernel under
                                       compute-sanitizer, CUDA graphs, more than 2^31 elements
    python -m benchmarks.gpu bench     a training step and the benchmarks of every op
    python -m benchmarks.gpu tune      the tuning sweep

Nothing is installed: python, torch, triton, numba, numpy, pytest and hypothesis are enough.
Every stage has a time limit, plus the time that earlier stages saved; the import of torch here
counts as a part of the first. A stage that fails or times out does not stop the others. Each
command leaves one archive, <gpu>-<command>.tar.gz, with run.json (stages, outcomes, versions,
commit, clocks), the output of every stage, and its results.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import BEGAN
from benchmarks.common import op_suites
from fmkernels import functional

ROOT = Path(__file__).parents[1]
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"
# exit codes of timeout(1), which also kills itself after it killed a stage
OUTCOMES = {0: "passed", 124: "timed out", -9: "timed out"}
SHORTEST = 5  # seconds; a stage with less time left is not started
GRACE = 10  # seconds between SIGINT and SIGKILL
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
KERNELS = "fmkernels_"  # their names begin with it
WORKERS = 12


@dataclass(frozen=True)
class Stage:
    """A command and its time limit in seconds. `missing` says why it cannot run here."""

    name: str
    command: list[str]
    seconds: float
    missing: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="output folder"
    )
    parser.add_argument("--commit", help="commit id, where git is not there (default: asks git)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that PyTorch can use was found", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    commit = options.commit or _output("git", "rev-parse", "HEAD")
    about = {"gpu": gpu, "command": options.command, "commit": commit, "versions": _versions()}
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{options.command}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        done = run(COMMANDS[options.command](out), out, about, BEGAN)
        for path in sorted(out.glob("*.md")):
            print(f"\n{path.stem}: {path.read_text(encoding='utf-8')}")
        archive = shutil.make_archive(str(options.results / name), "gztar", out)
    print(f"\n{gpu}, commit {commit}\n{table(done)}\nwrote {archive}")
    return int(any(stage["outcome"] not in ("passed", "skipped") for stage in done.values()))


def checks(out: Path) -> list[Stage]:
    tests = [f"tests/test_{op}.py" for op in ("ops", *functional.__all__)]
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if _has("xdist") else []
    report = f"--junitxml={out / 'tests.xml'}"
    result = [Stage("tests", [*PYTEST, *parallel, *tests, "-m", "kernel", report], 200)]
    device_checks = [sys.executable, "-m", "benchmarks.device_checks"]
    sanitizer = _sanitizer()
    missing = "" if sanitizer else "compute-sanitizer was not found"
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--kernel-name", f"kernel_substring={KERNELS}"]
        command = [sanitizer, *options, "--error-exitcode", "1", *device_checks, "calls"]
        result.append(Stage(tool, command, 90, missing))
    graphs, large = [*device_checks, "graphs"], [*device_checks, "large"]
    return [*result, Stage("graphs", graphs, 60), Stage("large", large, 80)]


def bench(out: Path) -> list[Stage]:
    suites = {
        "focalmix_step": 115,
        **{op: suite.SECONDS for op, suite in op_suites().items()},
        "growth": 60,
        "host_time": 15,
    }
    stages = []
    for suite, seconds in suites.items():
        report = f"--benchmark-json={out / f'{suite}.json'}"
        options = ["--benchmark-quiet", "--benchmark-max-time=0.05", report]
        limit = f"--limit={0.6 * seconds:.0f}"
        command = [*PYTEST, f"benchmarks/bench_{suite}.py", limit, *options]
        stages.append(Stage(suite, command, seconds))
    reports = [str(out / f"{suite}.json") for suite in suites]
    missing = "" if _has("matplotlib") else "matplotlib is not installed: plot the JSON elsewhere"
    plots = [sys.executable, "-m", "benchmarks.plot", *reports]
    return [*stages, Stage("plots", plots, 20, missing)]


def tune(out: Path) -> list[Stage]:
    command = [sys.executable, "-m", "benchmarks.tune", f"--json={out / 'tuning.json'}"]
    return [Stage("tuning", [*command, "--limit=400"], 500)]


COMMANDS = {command.__name__: command for command in (checks, bench, tune)}


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run(
    stages: Sequence[Stage], out: Path, about: dict, began: float | None = None
) -> dict[str, dict]:
    """Run the stages, in their time after ``began`` or now. The record is written after each."""
    done: dict[str, dict] = {}
    end = time.monotonic() if began is None else began
    for stage in stages:
        end += stage.seconds
        done[stage.name] = _run(stage, end - time.monotonic(), out / f"{stage.name}.log")
        record = json.dumps({**about, "stages": done}, indent=2) + "\n"
        (out / "run.json").write_text(record, encoding="utf-8")
    return done


def _run(stage: Stage, seconds: float, log: Path) -> dict[str, str | float]:
    """Run a stage. Show and keep its output."""
    began = time.monotonic()
    if stage.missing:
        return {"outcome": "skipped", "seconds": 0.0, "last_line": stage.missing}
    if seconds < SHORTEST:
        return {"outcome": "left out", "seconds": 0.0, "last_line": "out of time"}
    environment = os.environ | {"FMKERNELS_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}
    if stage.name in ("memcheck", "racecheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = (
            "1"  # so that bounds are those of each tensor
        )
    command = ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{seconds:.1f}", *stage.command]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    lines: list[str] = []
    reader = threading.Thread(target=_show, args=(process.stdout, lines), daemon=True)
    reader.start()
    code = process.wait()
    reader.join(1)  # a worker that outlives the stage would keep the pipe open
    log.write_text("".join(lines), encoding="utf-8")
    return {
        "outcome": OUTCOMES.get(code, "failed"),
        "seconds": round(time.monotonic() - began, 1),
        "last_line": next((line.strip() for line in reversed(lines) if line.strip()), ""),
        "clocks": _clocks(),
    }


def _show(stream: TextIO, lines: list[str]) -> None:
    for line in stream:
        print(line, end="", flush=True)
        lines.append(line)


def table(done: dict[str, dict]) -> str:
    """The outcome of every stage."""
    lines = [f"{'stage':<24}{'outcome':<11}{'seconds':>8}  last line"]
    for name, stage in done.items():
        lines.append(
            f"{name:<24}{stage['outcome']:<11}{stage['seconds']:>8.0f}  {stage['last_line']}"
        )
    return "\n".join(lines)


def _sanitizer() -> str:
    """The path of compute-sanitizer, or an empty string."""
    folders = [
        Path(os.environ.get(name, "/usr/local/cuda")) / "bin" for name in ("CUDA_HOME", "CUDA_PATH")
    ]
    return (
        shutil.which(
            "compute-sanitizer",
            path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]),
        )
        or ""
    )


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "runtime": torch.version.cuda or torch.version.hip,
    }
    for package in ("torch", "triton", "numba", "numpy", "pytest", "pytest-benchmark"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def _clocks() -> str:
    return _output("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
