"""All checks and benchmarks that need a GPU, in one run of less than 9 minutes: `make gpu`.

    python -m benchmarks.gpu --results benchmarks/results

Installs nothing. Runs the tests with compiled kernels, every kernel under compute-sanitizer (if it
is installed), every op in a CUDA graph and on more than 2^31 elements, a training step, the
benchmarks and the tuning sweep. Every stage has a time limit, plus the time that earlier stages
saved. A stage that fails or times out does not stop the others. Writes to results/<gpu>/: run.json
(stages, outcomes, versions, commit, clocks), tests.xml, tuning.json, and the benchmarks as JSON,
table and picture.
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
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.common import op_suites

ROOT = Path(__file__).parents[1]
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"
# exit codes of timeout(1), which also kills itself after it killed a stage
OUTCOMES = {0: "passed", 124: "timed out", -9: "timed out"}
SHORTEST = 5  # seconds; a stage with less time left is not started
GRACE = 10  # seconds between SIGINT and SIGKILL
SUITES = {  # seconds per benchmark
    "focalmix_step": 30,
    **{op: suite.SECONDS for op, suite in op_suites().items()},
    "growth": 40,
    "host_time": 10,
}


@dataclass(frozen=True)
class Stage:
    """A command and its time limit in seconds. `missing` says why it cannot run here."""

    name: str
    command: list[str]
    seconds: float
    missing: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="output folder"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that PyTorch can use was found", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    out = options.results.resolve() / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": name, "commit": _output("git", "rev-parse", "HEAD"), "versions": _versions()}
    done = run(stages(out), out / "run.json", about)
    for path in sorted(out.glob("*.md")):
        print(f"\n{path.stem}: {path.read_text(encoding='utf-8')}")
    print(f"\n{name}, commit {about['commit']}\n{table(done)}")
    return int(any(stage["outcome"] not in ("passed", "skipped") for stage in done.values()))


def stages(out: Path) -> list[Stage]:
    """All stages, in order. Their limits add up to less than 9 minutes."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    checks = [*python, "benchmarks.device_checks"]
    tests = [
        *pytest,
        *parallel,
        "tests",
        "--ignore=tests/focalmix",
        "-m",
        "kernel",
        f"--junitxml={out / 'tests.xml'}",
    ]
    result = [Stage("tests", tests, 90)]
    sanitizer = _sanitizer()
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *checks, "calls"]
        result.append(
            Stage(tool, command, 35, "" if sanitizer else "compute-sanitizer was not found")
        )
    result += [Stage("graphs", [*checks, "graphs"], 20), Stage("large", [*checks, "large"], 25)]
    for suite, seconds in SUITES.items():
        report = out / f"{suite}.json"
        report.unlink(missing_ok=True)  # from an earlier run
        options = ["--benchmark-quiet", "--benchmark-max-time=0.05", f"--benchmark-json={report}"]
        command = [
            *pytest,
            f"benchmarks/bench_{suite}.py",
            f"--limit={0.6 * seconds:.0f}",
            *options,
        ]
        result.append(Stage(suite, command, seconds))
    tuning = [*python, "benchmarks.tune", "--limit=35", f"--json={out / 'tuning.json'}"]
    result.append(Stage("tuning", tuning, 45))
    reports = [str(out / f"{suite}.json") for suite in SUITES]
    return [*result, Stage("plots", [*python, "benchmarks.plot", *reports], 15)]


def run(stages: Sequence[Stage], record: Path, about: dict) -> dict[str, dict]:
    """Run the stages. The record is written after each."""
    done: dict[str, dict] = {}
    end = time.monotonic()
    for stage in stages:
        end += stage.seconds
        done[stage.name] = _run(stage, end - time.monotonic())
        record.write_text(json.dumps({**about, "stages": done}, indent=2) + "\n", encoding="utf-8")
    return done


def _run(stage: Stage, seconds: float) -> dict[str, str | float]:
    """Run a stage and show its output."""
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
    for package in ("torch", "triton", "numpy", "pytest-benchmark"):
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
