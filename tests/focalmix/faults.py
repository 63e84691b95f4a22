"""Commands in processes of their own that something happens to: killed, refused by the file system, without space.

Children are forked from one server that has imported all there is, so that a command costs what its work does.
"""

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch._dynamo  # what an optimizer imports at its first use, for a second or two

import fmkernels.focalmix.compare  # noqa: F401 (for the server)
from fmkernels.focalmix.cli import main
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.patches import PatchDataset
from fmkernels.focalmix.data.workers import process_pool
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation import figures
from fmkernels.focalmix.files import atomic_write
from fmkernels.focalmix.training import loop

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Fault:
    """What happens to a process; by default nothing.

    ``event`` counts what it does to files in its folder: it opens one to write, moves, removes ...
    """

    kill_at: int | None = None
    """The event before which it is killed."""
    kill_after: float | None = None
    """Seconds after which it is killed."""
    refuse_from: int | None = None
    """The first of the events that fail with ``error``."""
    error: int = errno.ENOSPC
    largest_file: int | None = None
    """Bytes beyond which no file grows."""


NOTHING = Fault()


def start(
    job: Callable[..., int], arguments: Sequence[object], folder: Path, fault: Fault = NOTHING
) -> "Running":
    """Start a job whose events are those in the folder."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(job, arguments, folder, fault, theirs))
    process.start()
    theirs.close()
    return Running(process, ours)


@dataclass
class Running:
    """A job under way."""

    process: multiprocessing.Process
    output: Connection

    def end(self) -> "Ended":
        text = b""
        while part := os.read(self.output.fileno(), 1 << 16):
            text += part
        self.process.join(120)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        assert code is not None, "the process hangs"
        lines = [
            line
            for line in text.decode(errors="replace").replace("\r", "\n").splitlines()
            if line.strip()
        ]
        events = int(lines.pop()) if lines and lines[-1].isdecimal() else 0
        return Ended(code, lines, events)


@dataclass
class Ended:
    """What a job left behind."""

    code: int
    """-9 where it was killed."""
    lines: list[str]
    """What it said."""
    events: int


def run(
    job: Callable[..., int], arguments: Sequence[object], folder: Path, fault: Fault = NOTHING
) -> Ended:
    """Run a job to its end."""
    return start(job, arguments, folder, fault).end()


def command(*argv: object) -> int:
    """A command of the command line."""
    return main([str(word) for word in argv])


def rank(number: int, port: int, *argv: object) -> int:
    """One of two processes that train together."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return command(*argv)


def mortal_rank(number: int, port: int, *argv: object) -> int:
    """One of two processes that train together, killed in the sixth step."""
    stock, calls = loop.supervised_loss, itertools.count(1)

    def step(*arguments: object) -> object:
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*arguments)

    loop.supervised_loss = step
    return rank(number, port, *argv)


def command_with_a_mortal_worker(*argv: object) -> int:
    """A command whose process that reads patches is killed on the way."""
    stock = PatchDataset.__getitem__

    def read(self: PatchDataset, i: int) -> dict:
        if i == 9 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(self, i)

    PatchDataset.__getitem__ = read
    return command(*argv)


def prepare(root: Path, cache: Path, workers: int) -> int:
    """Resample the scans of a data set."""
    try:
        LUNA16(root, spacing=(2.5, 2.0, 2.0), cache=cache).prepare(workers=workers, progress=False)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def hold_with_a_worker(path: Path) -> int:
    """Let a worker of a pool lock a file, and stay."""
    with process_pool(1) as pool:
        # a program, as a function of this module would import all of it
        lock = f"import fcntl, os; fcntl.flock(os.open({str(path)!r}, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)"
        pool.submit(exec, lock).result()
        path.with_suffix(".held").touch()
        time.sleep(600)
    return 0


def _draw(path: Path, *_: object) -> None:
    """In place of pictures, which take nine tenths of the time of so small a run."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"IEND\xaeB`\x82")


def _child(
    job: Callable[..., int],
    arguments: Sequence[object],
    folder: Path,
    fault: Fault,
    output: Connection,
) -> None:
    multiprocessing.set_start_method(None, force=True)  # as in a process that is no server's
    os.dup2(output.fileno(), 2)
    os.dup2(2, 1)
    output.close()
    torch.set_num_threads(1)
    for name in ("draw_training", "draw_froc", "draw_examples", "draw_comparison"):
        setattr(figures, name, _draw)
    if fault.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, fault.largest_file))
    events = [0]

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            flags = arguments[2]
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in CHANGES:
            return
        if os.getpid() != parent or not str(arguments[0]).startswith(str(folder)):
            return
        events[0] += 1
        if fault.kill_at == events[0]:
            os.kill(parent, signal.SIGKILL)
        if (
            fault.refuse_from is not None
            and events[0] >= fault.refuse_from
            and event != "os.remove"
        ):
            raise OSError(fault.error, os.strerror(fault.error), str(arguments[0]))

    parent = os.getpid()
    sys.addaudithook(watch)
    if fault.kill_after is not None:
        threading.Thread(target=_kill, args=(fault.kill_after,), daemon=True).start()
    code = job(*arguments)
    print(f"\n{events[0]}", flush=True)
    sys.exit(code)


def _kill(after: float) -> None:
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)
