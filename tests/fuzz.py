"""Test random cases for a given time: ``python -m tests.fuzz --minutes 5``.

Operations run on the CPU path, in one or more threads, and must agree with the float64 reference.
The property tests define the cases, which differ with every seed. Files (scans, tables, configs,
checkpoints, caches, metrics) are damaged. Reading them must succeed or raise InputError: no other
exception, no hang, no gigabytes of memory.

Hypothesis draws the cases, shrinks failing ones and prints a script that reproduces each.
"""

import argparse
import contextlib
import functools
import importlib
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fmkernels import functional
from fmkernels.focalmix.config import Config, load_config
from fmkernels.focalmix.data.annotations import read_annotations
from fmkernels.focalmix.data.formats import load_volume
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.tables import read_candidates, write_candidates
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.froc import evaluate
from fmkernels.focalmix.training.checkpoint import State, load_run
from fmkernels.focalmix.training.metrics import Metrics
from tests.focalmix.conftest import SCANS, write_luna
from tests.focalmix.kinds import write_dicom
from tests.focalmix.training.test_loop import TINY
from tests.support.threads import finely_split

OPS = functional.__all__
"""Ops: ``tests.test_<op>`` holds ``CASE``, a strategy, and ``check_case``."""

PER_ROUND = 40
SECONDS, BYTES = 20, 4 << 30
"""Limits for reading a damaged file: time, and memory on top of what is already in use."""

TOKENS = (
    b"", b"0", b"-1", b"1e999", b"nan", b"inf", b"9" * 5000, b"99999999999", b"1e-320", b"\0",
    b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b'"', b",", b"=", b":", b"{", b"[" * 5000, b"../",
    b"/etc/passwd", b"LOCAL", b" " * 70_000, b"x" * 140_000,
)  # fmt: skip


def check(target: str, case: Mapping[str, Any]) -> None:
    """Run one case. Raises if it fails."""
    if target in OPS:
        check_operation(target, **case)
    else:
        check_file(target, **case)


def check_operation(name: str, case: Mapping[str, Any], threads: int) -> None:
    """Compare with the reference. With several threads, even the smallest loop is split."""
    module = importlib.import_module(f"tests.test_{name}")
    with finely_split(threads) if threads > 1 else contextlib.nullcontext():
        module.check_case(case, "cpu")


def operation_cases(name: str) -> st.SearchStrategy:
    case = importlib.import_module(f"tests.test_{name}").CASE
    return st.fixed_dictionaries({"case": case, "threads": st.sampled_from([1, 1, 2, 3])})


def write_originals(folder: Path) -> dict[str, Path]:
    """A data set, a run and its results. Returns the file to damage for each target."""
    data = write_luna(folder / "luna", SCANS[:1])
    (data / "cache").mkdir()
    LUNA16(data, cache=data / "cache").prepare(workers=1, progress=False)
    (cached,) = data.glob("cache/.cache*/*.npy")
    run = folder / "run"
    run.mkdir()
    State(TINY, torch.device("cpu")).save(run / "checkpoint.pt", TINY, ["1.2.3"])
    (run / "config.json").write_text(json.dumps(asdict(TINY)))
    rows = "".join(f"{step},0.5,0.25,0.25,3,0.001,,{step}.5\n" for step in range(2, 9, 2))
    (run / "metrics.csv").write_text(
        "step,loss,loss_cls,loss_box,positives,lr,val_cpm,seconds\n" + rows
    )
    write_candidates(
        run / "candidates.csv",
        {SCANS[0].uid: [[-160.5, -140.25, -280, 0.75], [-150, -130, -270, 0.5]]},
    )
    scan = sitk.ReadImage(str(data / "subset0" / f"{SCANS[0].uid}.mhd"))
    kinds = {"mha": ".mha", "nifti": ".nii", "packed": ".nii.gz", "nrrd": ".nrrd"}
    formats = {name: folder / f"scan{suffix}" for name, suffix in kinds.items()}
    for path in formats.values():
        sitk.WriteImage(scan[:9, :9, :9], str(path), useCompression=path.suffix == ".nrrd")
    series = write_dicom(folder / "series", scan[:9, :9, :5], "1.2.3")
    own = folder / "annotations.json"
    own.write_text('{"training": [{"image": "a.nii", "box": [[1, 2.5, -3, 4, 5, 6]], "fold": 2}]}')
    return formats | {
        "slice": series / "IM0014",
        "json": own,
        "header": data / "subset0" / f"{SCANS[0].uid}.mhd",
        "annotations": data / "annotations.csv",
        "excluded": data / "annotations_excluded.csv",
        "series": data / "seriesuids.csv",
        "cache": cached,
        "candidates": run / "candidates.csv",
        "metrics": run / "metrics.csv",
        "config": run / "config.json",
        "checkpoint": run / "checkpoint.pt",
    }


def read(target: str, path: Path) -> None:
    """Read the file and use its content, as far as that is quick."""
    luna, run = path.parents[1], path.parent
    if target in ("header", "mha", "nifti", "packed", "nrrd", "slice"):
        load_volume(path.parent if target == "slice" else path, (1.0, 1.0, 1.0))
    elif target == "json":
        read_annotations(path, "RAS")
    elif target in ("annotations", "excluded", "series"):
        data = LUNA16(run, cache=run / "cache")
        evaluate({}, *data.findings(data.series), data.series, bootstraps=10)
        data.boxes(data.series[0])
    elif target == "cache":
        volume = LUNA16(luna.parent, cache=luna).volume(SCANS[0].uid)
        volume.boxes(volume.to_world([[0, 0, 0]]).repeat(2, 0)[:, [0, 1, 2, 2]])
    elif target == "candidates":
        candidates = read_candidates(path)
        series = [SCANS[0].uid]
        evaluate(candidates, *LUNA16(luna / "luna").findings(series), series, bootstraps=10)
    elif target == "metrics":
        Metrics(run, 8).close()
    elif target == "config":
        load_config(run)
    else:
        load_run(run)
        State(TINY, torch.device("cpu")).load(path, ["1.2.3"])


@functools.cache
def originals() -> tuple[tempfile.TemporaryDirectory, dict[str, Path], dict[str, bytes]]:
    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    paths = write_originals(Path(folder.name))
    return folder, paths, {target: path.read_bytes() for target, path in paths.items()}


def check_file(target: str, damage: list[tuple], values: Mapping[str, Any] | None = None) -> None:
    """Damage one of the files and read it. Only InputError is allowed."""
    _, paths, contents = originals()
    path, content = paths[target], contents[target]
    try:
        if values and target == "checkpoint":
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["config"].update(values)
            torch.save(checkpoint, path)
            content = path.read_bytes()
        elif values:
            content = json.dumps({**json.loads(content), **values}).encode()
        for step in damage:
            content = damaged(content, *step)
        path.write_bytes(content)
        with guarded(), contextlib.suppress(InputError):
            read(target, path)
    finally:
        path.write_bytes(contents[target])


def damaged(content: bytes, kind: str, position: int, token: int) -> bytes:
    """Flip a bit, cut, lose or double a part, insert a token, or replace a number."""
    at, length = position % (len(content) + 1), 1 + token % 64
    if kind == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << token % 8)]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "lose":
        return content[:at] + content[at + length :]
    if kind == "double":
        return content[: at + length] + content[at:]
    if kind == "insert":
        return content[:at] + TOKENS[token % len(TOKENS)] + content[at:]
    if kind == "number" and (numbers := list(re.finditer(rb"-?\d[\d.e+-]*", content[:10_000]))):
        number = numbers[position % len(numbers)]
        return content[: number.start()] + TOKENS[token % len(TOKENS)] + content[number.end() :]
    return content


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Raise TimeoutError or MemoryError if the block takes too much, where the system can."""
    with contextlib.ExitStack() as stack:
        if hasattr(signal, "setitimer"):
            stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, too_long))
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        if sys.platform == "linux":
            import resource

            limits = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, limits)
            resource.setrlimit(
                resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1])
            )
        yield


def too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"reading takes more than {SECONDS} s")


DAMAGE = st.tuples(
    st.sampled_from(["number", "flip", "cut", "lose", "double", "insert"]),
    st.integers(0, 10**6),
    st.integers(0, 511),
)
NUMBERS = (
    st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from([0, 1, 2**31, 2**63, 10**400])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda part: st.lists(part, max_size=5),
    max_leaves=8,
)
SETTINGS = st.dictionaries(
    st.sampled_from([option.name for option in fields(Config)]), VALUES, min_size=1, max_size=2
)


def file_cases(target: str) -> st.SearchStrategy:
    damage = st.lists(DAMAGE, min_size=1, max_size=4)
    case = st.fixed_dictionaries({"damage": damage})
    if target in ("config", "checkpoint"):
        return case | st.fixed_dictionaries({"damage": st.just([]), "values": SETTINGS})
    return case


def run(target: str, number: int, end: float) -> tuple[int, str]:
    """Run a round of cases of one target.

    Returns the number of cases, and a script for the smallest failure, if any. After `end`, cases
    that Hypothesis still draws are skipped, except the first one; a failure is shrunk first.
    """
    count, failing = 0, None

    @seed(number)
    @settings(
        max_examples=PER_ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation_cases(target) if target in OPS else file_cases(target))
    def each(case: dict) -> None:
        nonlocal count, failing
        if count and failing is None and time.monotonic() >= end:
            return
        count += 1
        try:
            check(target, case)
        except Exception:
            failing = case
            raise

    try:
        each()
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        imports = "import torch\nfrom math import inf, nan\nfrom tests.fuzz import check"
        return count, f"# {message[:200]}\n{imports}\ncheck({target!r}, {failing})"
    return count, ""


def fuzz(seconds: float, first: int, targets: list[str]) -> dict[str, tuple[int, str]]:
    """Run rounds until the time is over, but at least one case of each target.

    Returns the number of cases and the first failure of each target.
    """
    found = dict.fromkeys(targets, (0, ""))
    end, number = time.monotonic() + seconds, first
    while number == first or (
        time.monotonic() < end and not all(failure for _, failure in found.values())
    ):
        for target in targets:
            before, failure = found[target]
            if not failure and (number == first or time.monotonic() < end):
                count, failure = run(target, number, end)
                found[target] = before + count, failure
        number += 1
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a case failed, else 0."""
    targets = [*OPS, *originals()[1]]
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="duration (default: 1)")
    parser.add_argument(
        "--seed", type=int, help="seed of the first round (default: the current time)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=targets, default=targets, help="targets (default: all)"
    )
    arguments = parser.parse_args(argv)
    first = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {first}", flush=True)
    found = fuzz(60 * arguments.minutes, first, arguments.only)
    for target, (count, failure) in found.items():
        print(f"{target:<24}{count:>8} cases{'  FAILED' if failure else ''}")
    print(f"{'all':<24}{sum(count for count, _ in found.values()):>8} cases")
    for _, failure in found.values():
        if failure:
            print(f"\n{failure}")
    return int(any(failure for _, failure in found.values()))


if __name__ == "__main__":
    sys.exit(main())
