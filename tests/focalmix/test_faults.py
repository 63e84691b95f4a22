"""Killed, without space, locked out, raced: what is there is whole, and going on ends as if nothing had been.

FMKERNELS_FAULTS=50 kills each job fifty times.
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

fcntl = pytest.importorskip("fcntl", reason="no fork, no SIGKILL, no limits of files")

import torch  # noqa: E402

from fmkernels.focalmix.data.luna16 import LUNA16  # noqa: E402
from fmkernels.focalmix.data.tables import read_candidates  # noqa: E402
from fmkernels.focalmix.files import atomic_write, lock_folder  # noqa: E402
from tests.focalmix import faults  # noqa: E402
from tests.focalmix.conftest import SCANS, write_luna  # noqa: E402
from tests.focalmix.faults import Fault, run  # noqa: E402
from tests.focalmix.test_cli import SETTINGS  # noqa: E402

KILLS = int(os.environ.get("FMKERNELS_FAULTS", "2"))
TRAIN = [
    *SETTINGS,
    "--steps=8",
    "--checkpoint-every=2",
    "--log-every=1",
    "--burn-in=2",
    "--amp=off",
]
UNLABELED = ["--train-subsets=0,1,2", "--unlabeled-batch-size=2", "--ramp=2", "--objects=2"]
FOCALMIX = [*TRAIN, *UNLABELED, "--method=focalmix", "--labeled=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The little data set, and a finished run beside it to detect with."""
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
"""What is done: the function and its arguments, which write into ``out`` only."""


def plain(value):
    """What ``torch.load`` gives, in a form that == compares."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {
            name: plain(part) for name, part in value.items() if name not in ("seconds", "workers")
        }
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def read(path: Path):
    """What a file says but times and the number of workers; it raises where the file is not whole."""
    content = path.read_bytes()
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return plain(json.loads(content))
    if path.suffix == ".png":
        assert content.endswith(b"IEND\xaeB`\x82")
        return "a picture"
    if path.suffix == ".csv":
        assert content.endswith(b"\n")
        if path.name == "metrics.csv":
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            assert all(None not in row and None not in row.values() for row in rows)
            return [
                {name: value for name, value in row.items() if name != "seconds"} for row in rows
            ]
        if path.name in ("candidates.csv", "found.csv"):
            read_candidates(path)
    return content


def hidden(folder: Path) -> set[Path]:
    """What killed processes left: hidden files, and all that is in hidden folders."""
    roots = [
        path
        for path in folder.rglob(".*")
        if path.name != ".lock" and not path.name.startswith(".cache-")
    ]
    return {path for root in roots for path in (root, *root.rglob("*"))}


def written(folder: Path) -> dict[str, object]:
    """What all files say but hidden ones, the events of TensorBoard and timings."""
    aside = hidden(folder) | {
        *folder.rglob(".lock"),
        *folder.rglob("events.*"),
        *folder.rglob("timing.json"),
    }
    paths = [path for path in folder.rglob("*") if path.is_file() and path not in aside]
    return {str(path.relative_to(folder)): read(path) for path in paths}


def whole_meanwhile(folder: Path, finished: dict[str, object]) -> None:
    """Each file is one that the job writes, whole; those that are written once are final, and so are the metrics up to
    the checkpoint."""
    files = written(folder)
    for name, content in files.items():
        if name.endswith("metrics.csv"):
            step = files.get(name.replace("metrics.csv", "checkpoint.pt"), {"step": 0})["step"]
            ours, final = (
                [row for row in rows if int(row["step"]) <= step]
                for rows in (content, finished[name])
            )
            assert ours == final
        elif not name.endswith(("checkpoint.pt", "burn_in.pt")):
            assert content == finished[name], name


@dataclass(frozen=True)
class Finished:
    """A job that was left alone."""

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


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_random_moments(name, data, finished, tmp_path):
    """Between any two things that it does to files, or after any time."""
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
    """It ended with 2 and one line."""
    assert ended.code == 2 and "Traceback" not in "".join(ended.lines), ended.lines
    assert all(word in ended.lines[-1] for word in words), ended.lines[-1]


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


@pytest.mark.parametrize("name", ["supervised", "prepare", "detect", "compare", "phantom"])
def test_two_at_once_in_one_folder(name, data, finished, tmp_path):
    pair = [faults.start(*JOBS[name](data, tmp_path), tmp_path) for _ in range(2)]
    for ended in [running.end() for running in pair]:
        if ended.code:
            assert name not in ("prepare", "detect")
            assert_says_so(ended, "another process")
    assert run(*JOBS[name](data, tmp_path), tmp_path).code == 0
    assert written(tmp_path) == finished(name).files


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
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_between_sessions(years, data, finished, tmp_path):
    """Whatever the times of files say: the same result from the same scans, what has changed is read again, and going
    on ends as if nothing had been."""
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
    """Let a file, or all files of a folder, have been written then."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            moved = file.stat().st_mtime_ns + years * 31_556_952 * 10**9
            os.utime(file, ns=(moved, moved))


def volume(luna: Path) -> np.ndarray:
    """The first scan as training reads it, from the cache."""
    return np.array(LUNA16(luna, spacing=(2.5, 2.0, 2.0)).volume(SCANS[0].uid).voxels)


def test_a_rank_that_dies(data, tmp_path):
    """The other one does not wait for it, and two new ones go on."""

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
    """And nothing else, hidden though it may be."""
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
