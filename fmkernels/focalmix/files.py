"""Atomic writing of files, and folders that one process at a time may use.

A killed process leaves at most hidden files, which the next process that writes to the folder
removes.
"""

import contextlib
import errno
import io
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fmkernels.focalmix.errors import InputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


_PREFIX = f".fmkernels-{re.sub('[^0-9A-Za-z]', '', platform.node())[:40]}-"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and replace ``path`` with it after the block.

    If the block raises, the temporary file is removed and ``path`` stays as it is. A reader never
    sees a part of a file. A symbolic link stays: the file that it points to is replaced. A device,
    a pipe or ``/dev/stdout`` is not replaced either: it gets the contents after the block.

    Raises:
        OSError: names ``path``; on a full disk also how much was written and what is free.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    with naming(path):
        stream = open_stream(path)
        if stream is None:
            target = Path(os.path.realpath(path))
            with _temporary(target) as temporary, naming(path, temporary):
                yield temporary
                with open(temporary, "r+b") as file:
                    os.fsync(file.fileno())
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(temporary, 0o666 & ~umask)
                os.replace(temporary, target)
            return
        with stream, tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "contents")
            temporary.touch()
            yield temporary
            with open(temporary, "rb") as file:
                shutil.copyfileobj(file, stream)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path, written: Path | None = None) -> Iterator[None]:
    """Make an OSError of the block name ``path``, and a full disk what ``written`` holds."""
    try:
        yield
    except OSError as error:
        reason, number = error.strerror or str(error), error.errno
        if number is None and re.search(r"\d+ requested and \d+ written", reason):  # by NumPy
            reason, number = os.strerror(errno.ENOSPC), errno.ENOSPC
        if written is not None and number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with contextlib.suppress(OSError):
                size, free = written.stat().st_size, shutil.disk_usage(written.parent).free
                reason += f" ({size / 1e6:,.1f} MB were written, {free / 1e6:,.1f} MB are free)"
        raise OSError(number, reason, str(path)) from error


def open_stream(path: Path) -> BinaryIO | None:
    """Open a device, a pipe, or a path such as ``/dev/stdout``; None if ``path`` is a file.

    Raises:
        InputError: ``path`` is a block device, whose contents are those of a disk.
    """
    if (descriptor := _descriptor(path)) is not None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return os.fdopen(os.dup(descriptor), "wb")
    if not path.exists() or path.is_file() or path.is_dir():
        return None
    if stat.S_ISBLK(path.stat().st_mode):
        raise InputError(f"{path}: expected a file, got a block device")
    return open(path, "wb")


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path or the links behind it stand for."""
    text = os.fspath(path)
    for _ in range(40):  # the links that Linux follows
        folder = os.path.realpath(os.path.dirname(text))
        text = os.path.join(folder, os.path.basename(text))
        if match := re.fullmatch(rf"(?:/proc/{os.getpid()}|/dev)/fd/(\d+)", text):
            return int(match[1])
        if not os.path.islink(text):
            return None
        text = os.path.join(folder, os.readlink(text))
    return None


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new hidden file beside ``path``, removed after the block; its name has the process id."""
    _remove_orphans(path.parent)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f"{_PREFIX}{os.getpid()}-", suffix=f"-{path.name}"
    )
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine left in a folder."""
    if os.name == "nt":  # os.kill(process, 0) would end the process
        return
    for orphan in folder.glob(f"{_PREFIX}*"):
        number = orphan.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not _runs(int(number)):
            orphan.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing, and lock out other processes until the block ends.

    Raises:
        InputError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        if not lock_file(file):
            raise InputError(
                f"{folder}: expected an unused folder, another process is at work in it"
            )
        yield


def lock_file(file: BinaryIO | io.FileIO) -> bool:
    """Lock a file until it is closed; False if another process has locked it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            # not flock: forked workers would keep the lock
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks
        pass
    return True
