"""Atomic writing of files, and folders that one process at a time may use.

A killed process leaves at most hidden files, which the next process that writes to the folder
removes.
"""

import contextlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
    sees a part of a file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    try:
        with _temporary(path) as temporary:
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    except OSError as error:  # name the file of the caller, not the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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
        try:
            if sys.platform == "win32":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                # not flock: forked workers would keep the lock
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{folder}: expected an unused folder, another process is at work in it"
            ) from None
        except OSError:  # the file system has no locks
            pass
        yield
