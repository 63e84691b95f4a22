"""Fault injection: files are always whole, and a resumed job ends as if nothing had happened.

Most of it runs in ``make nightly``; FMKERNELS_FAULTS=50 kills each job fifty times.
"""

import csv
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

fcntl = pytest.importorskip("fcntl", reason="needs fork, SIGKILL and resource limits")

import torch  # noqa: E402

from fmkernels.focalmix.data.luna16 import LUNA16  # noqa: E402
from fmkernels.focalmix.data.tables import read_candidates  # noqa: E402
from fmkernels.focalmix.files import atomic_write, lock_folder  # noqa: E402
from tests.focalmix import faults  # noqa: E402
from tests.focalmix.conftest import SCANS, write_luna  # noqa: E402
from tests.focalmix.faults import Fault, run  # noqa: E402
from tests.focalmix.test_cli import SETTINGS  # noqa: E402

KILLS = int(os.environ.get("FMKERNELS_FAULTS", "2"))
nightly = pytest.mark.nightly
TRAIN = [
    *SETTINGS,
    "--steps=8",
    "--checkpoint-every=2",
    "--log-every=1",
    "--burn-in=2",
    "--amp=off",
]
UNLABELED = [
    "--train-subsets=0,1,2",
    "--unlabeled-batch-size=2",
    "--rampup-steps=2",
    "--max-objects=2",
]
FOCALMIX = [*TRAIN, *UNLABELED, "--method=focalmix", "--labeled=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The small data set, with a finished run beside it."""
    root = write_luna(tmp_path_factory.mktemp("faults") / "luna", SCANS)
    ended = run(faults.command, ["train", root, "--out", root.parent / "run", *TRAIN], root.parent)
    assert ended.code == 0, ended.lines
    return root


JOBS = {
    "supervised": lambda data, out: (
        faults.command,
        ["train", data, "--out", out / "run", "--resume", *TRAIN],
    ),
    "focalmix": lambda data, out: (
        faults.command,
        ["train", data, "--out", out / "run", "--resume", *FOCALMIX],
    ),
    "prepare": lambda data, out: (faults.prepare, [data, out, 1]),
    "detect": lambda data, out: (
        faults.command,
        ["detect", data.parent / "run", data, "--out", out / "found.csv", "--device=cpu"],
    ),
    "compare": lambda data, out: (
        faults.command,
        [
            "compare",
            data,
            "--out",
            out / "table",
            "--labeled",
            "2",
            "--seeds=1",
            *TRAIN,
            *UNLABELED,
        ],
    ),
    "phantom": lambda data, out: (
        faults.command,
        ["phantom", out / "set", "--size=tiny", "--scans=1", "--workers=1"],
    ),
}
"""The jobs: function and arguments; they write into ``out`` only."""


def plain(value):
    """The contents of ``torch.load`` in a form that == compares."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {
            name: plain(part) for name, part in value.items() if name not in ("seconds", "workers")
        }
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def read(path: Path):
    """The contents of a file without times and workers; raises if the file is not whole."""
    content = path.read_bytes()
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return plain(json.loads(content))
    if path.suffix == ".png":
        assert content.endswith(b"IEND\xaeB`\x82")
        return "a picture"
    if path.name == "found.csv":  # grows
        return content
    if path.suffix == ".csv":
        assert content.endswith(b"\n")
        if path.name == "metrics.csv":
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            assert all(None not in row and None not in row.values() for row in rows)
            return [
                {name: value for name, value in row.items() if name != "seconds"} for row in rows
            ]
        if path.name == "candidates.csv":
            read_candidates(path)
    return content


def hidden(folder: Path) -> set[Path]:
    """Files that killed processes have left: hidden ones, and those in hidden folders."""
    roots = [
        path
        for path in folder.rglob(".*")
        if path.name != ".lock" and not path.name.startswith(".cache-")
    ]
    return {path for root in roots for path in (root, *root.rglob("*"))}


def written(folder: Path) -> dict[str, object]:
    """The contents of all files except hidden ones, TensorBoard events and timings."""
    aside = hidden(folder) | {
        *folder.rglob(".lock"),
        *folder.rglob("events.*"),
        *folder.rglob("timing.json"),
    }
    paths = [path for path in folder.rglob("*") if path.is_file() and path not in aside]
    return {str(path.relative_to(folder)): read(path) for path in paths}


def whole_meanwhile(folder: Path, finished: dict[str, object]) -> None:
    """Every file is whole; files written once are final, as are metrics up to the checkpoint."""
    files = written(folder)
    for name, content in files.items():
        if name.endswith("metrics.csv"):
            step = files.get(name.replace("metrics.csv", "checkpoint.pt"), {"step": 0})["step"]
            ours, final = (
                [row for row in rows if int(row["step"]) <= step]
                for rows in (content, finished[name])
            )
            assert ours == final
        elif name == "found.csv":
            assert finished[name].startswith(content)
        elif not name.endswith(("checkpoint.pt", "burn_in.pt")):  # a later one may follow
            assert content == finished[name], name


@dataclass(frozen=True)
class Finished:
    """A job without faults."""

    files: dict[str, object]
    events: int
    seconds: float


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    @cache
    def finish(name: str) -> Finished:
        out = tmp_path_factory.mktemp(name)
        began = time.monotonic()
        ended = run(*JOBS[name](data, out), out)
        assert ended.code == 0, ended.lines
        return Finished(written(out), ended.events, time.monotonic() - began)

    return finish


@pytest.mark.parametrize(
    "name", [name if name == "focalmix" else pytest.param(name, marks=nightly) for name in JOBS]
)
def test_killed_at_random_moments(name, data, finished, tmp_path):
    """Killed before a random change of files, or at a random time."""
    draw, alone, kills = random.Random(name), finished(name), 0
    while kills < KILLS:
        out = tmp_path / str(kills)
        out.mkdir()
        ended = None
        while ended is None or ended.code == -9:
            fault = faults.NOTHING
            if kills < KILLS and kills % 2:
                fault = Fault(kill_after=draw.uniform(0, alone.seconds))
            elif kills < KILLS:
                fault = Fault(kill_at=draw.randint(1, alone.events))
            ended = run(*JOBS[name](data, out), out, fault)
            kills += ended.code == -9
            whole_meanwhile(out, alone.files)
        assert ended.code == 0, ended.lines
        assert written(out) == alone.files
        assert not hidden(out)
        shutil.rmtree(out)
    print(f"{name}: killed {kills} times")


def assert_says_so(ended: faults.Ended, *words: str) -> None:
    """The job ended with code 2 and one line."""
    assert ended.code == 2 and "Traceback" not in "".join(ended.lines), ended.lines
    assert all(word in ended.lines[-1] for word in words), ended.lines[-1]


@nightly
@pytest.mark.parametrize(
    ("name", "fault", "word"),
    [
        ("supervised", Fault(largest_file=2_000), "run/"),
        ("supervised", Fault(refuse_from=12), "No space left"),
        ("focalmix", Fault(largest_file=30_000), "run/"),
        ("focalmix", Fault(refuse_from=25), "No space left"),
        ("prepare", Fault(largest_file=4_000), "cannot write"),
        ("prepare", Fault(refuse_from=5), "No space left"),
        ("detect", Fault(largest_file=100), "found.csv"),
        ("compare", Fault(refuse_from=70), "No space left"),
        ("phantom", Fault(largest_file=100_000), "could not be written"),
        ("supervised", Fault(refuse_from=1, error=errno.EROFS), "Read-only file system"),
        ("prepare", Fault(refuse_from=1, error=errno.EROFS), "Read-only file system"),
        ("detect", Fault(refuse_from=1, error=errno.EROFS), "found.csv"),
        ("compare", Fault(refuse_from=1, error=errno.EROFS), "Read-only file system"),
        ("phantom", Fault(refuse_from=1, error=errno.EROFS), "Read-only file system"),
    ],
)
def test_a_full_disk_and_a_read_only_one(name, fault, word, data, finished, tmp_path):
    assert_says_so(run(*JOBS[name](data, tmp_path), tmp_path, fault), word)
    whole_meanwhile(tmp_path, finished(name).files)
    assert run(*JOBS[name](data, tmp_path), tmp_path).code == 0
    assert written(tmp_path) == finished(name).files
    assert not hidden(tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("supervised", "run"), ("phantom", "set")])
def test_a_folder_in_use_is_refused(name, folder, data, tmp_path):
    with lock_folder(tmp_path / folder):
        assert_says_so(run(*JOBS[name](data, tmp_path), tmp_path), folder, "another process")
    assert not written(tmp_path)


@nightly
@pytest.mark.parametrize("name", ["supervised", "prepare", "detect", "compare", "phantom"])
def test_two_at_once_in_one_folder(name, data, finished, tmp_path):
    pair = [faults.start(*JOBS[name](data, tmp_path), tmp_path) for _ in range(2)]
    for ended in [running.end() for running in pair]:
        if ended.code:
            assert name != "prepare"
            assert_says_so(ended, "another process")
    assert run(*JOBS[name](data, tmp_path), tmp_path).code == 0
    assert written(tmp_path) == finished(name).files


@nightly
def test_a_worker_that_dies(data, finished, tmp_path):
    _, arguments = JOBS["supervised"](data, tmp_path)
    ended = run(faults.command_with_a_mortal_worker, [*arguments, "--workers=1"], tmp_path)
    assert_says_so(ended, "DataLoader worker", "--resume")
    whole_meanwhile(tmp_path, finished("supervised").files)
    assert run(*JOBS["supervised"](data, tmp_path), tmp_path).code == 0
    assert written(tmp_path) == finished("supervised").files


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    path = tmp_path / "lock"
    running = faults.start(faults.hold_with_a_worker, [path], tmp_path)
    wait_for(path.with_suffix(".held").exists)
    running.process.kill()
    with open(path, "rb") as file:
        wait_for(lambda: locks(file))


def locks(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


@nightly
@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_between_sessions(years, data, finished, tmp_path):
    """Changed scans are read again whatever their time, and a run resumes all the same."""
    luna, out = tmp_path / "luna", tmp_path / "out"
    shutil.copytree(data, luna)
    out.mkdir()
    job = JOBS["focalmix"](luna, out)
    assert run(*job, out, Fault(kill_at=2 * finished("focalmix").events // 3)).code == -9
    assert (out / "run" / "checkpoint.pt").exists()
    turn_the_clock(tmp_path, years)
    ended = run(*job, out)
    assert ended.code == 0, ended.lines
    assert written(out) == finished("focalmix").files

    before, (source,) = volume(luna), luna.glob(f"subset*/{SCANS[0].uid}.raw")
    turn_the_clock(luna, years)
    assert np.array_equal(volume(luna), before)
    values = np.fromfile(source, np.int16)
    (values + 1).tofile(source)
    turn_the_clock(source, years)
    assert not np.array_equal(volume(luna), before)
    values.tofile(source)
    assert np.array_equal(volume(luna), before)


def turn_the_clock(path: Path, years: int) -> None:
    """Move the modification time of a file, or of all files of a folder."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            moved = file.stat().st_mtime_ns + years * 31_556_952 * 10**9
            os.utime(file, ns=(moved, moved))


def volume(luna: Path) -> np.ndarray:
    """The first scan, from the cache."""
    return np.array(LUNA16(luna, spacing=(2.5, 2.0, 2.0)).volume(SCANS[0].uid).voxels)


@nightly
def test_a_rank_that_dies(data, tmp_path):
    """The other process ends too, and two new ones resume the run."""

    def ranks(folder: str, second=faults.rank) -> list[int]:
        port, argv = free_port(), ["train", data, "--resume", *TRAIN, "--out", tmp_path / folder]
        pair = [
            faults.start(job, [k, port, *argv], tmp_path)
            for k, job in enumerate((faults.rank, second))
        ]
        return [running.end().code for running in pair]

    first, second = ranks("run", faults.mortal_rank)
    assert first != 0 and second == -9
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert ranks("run") == ranks("alone") == [0, 0]
    assert written(tmp_path / "run") == written(tmp_path / "alone")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_orphans_are_removed_and_files_in_use_are_not(tmp_path):
    """Other hidden files stay."""
    name = (
        "import os; from fmkernels.focalmix.files import _PREFIX; "
        "print(f'{_PREFIX}{os.getpid()}-12345678-b.txt')"
    )
    left = subprocess.run(
        [sys.executable, "-c", name], capture_output=True, text=True, check=True
    ).stdout.strip()
    path, orphan, foreign = tmp_path / "a.txt", tmp_path / left, tmp_path / ".thesis.partial.txt"
    orphan.write_text("half")
    foreign.write_text("the only copy")
    with atomic_write(path) as first, atomic_write(path) as second:
        assert not orphan.exists() and first.exists() and first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and {*tmp_path.iterdir()} == {path, foreign}
