"""Everything that a machine with a GPU can show, in one run: `make gpu`. Installs nothing.

    python -m benchmarks.gpu --results benchmarks/results

Runs the tests with the real kernels, then every benchmark there is, and leaves results/<gpu>/run.json (what ran,
outcome, versions, commit, clocks), tests.xml and benchmarks.json. Stages that do not fit into the time are left out and
said so.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIMIT = 520  # seconds, all stages together
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where to write")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all stages (default: %(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that PyTorch can use was found", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    out = arguments.results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    suites = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("bench_*.py"))
    stages = {
        "tests": [*pytest, "tests", "--ignore=tests/focalmix", "-m", "kernel", f"--junitxml={out / 'tests.xml'}"],
        "benchmarks": [*pytest, *suites, f"--benchmark-json={out / 'benchmarks.json'}"],
    }
    record = {"gpu": name, "commit": _output("git", "rev-parse", "HEAD"), "versions": _versions(), "stages": {}}
    deadline = time.monotonic() + arguments.limit
    for stage, command in stages.items():
        record["stages"][stage] = _run(command, deadline - time.monotonic()) | {"clocks": _clocks()}
        (out / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{name}, commit {record['commit']}\n{'stage':<12}{'outcome':<10}{'seconds':>8}  last line")
    for stage, done in record["stages"].items():
        print(f"{stage:<12}{done['outcome']:<10}{done['seconds']:>8.0f}  {done['last_line']}")
    return int(any(done["outcome"] != "passed" for done in record["stages"].values()))


def _run(command: list[str], seconds: float) -> dict[str, str | float]:
    """Run a stage, its output shown as it comes."""
    began, last = time.monotonic(), ""
    if seconds < 30:
        return {"outcome": "left out", "seconds": 0.0, "last_line": "no time was left"}
    environment = os.environ | {"FMKERNELS_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}
    command = ["timeout", "--signal=INT", "--kill-after=10", f"{seconds:.0f}", *command]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="")
        last = line.strip() or last
    outcome = {0: "passed", 124: "timed out"}.get(process.wait(), "failed")
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "last_line": last}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "runtime": torch.version.cuda or torch.version.hip}
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
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
