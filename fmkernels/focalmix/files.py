"""Write files so that a reader sees the old one or the new one whole, and folders that belong to one process at a time.

A process that is killed leaves at most hidden files behind, which the next one to write there removes.
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


_OWN = f".fmkernels-{re.sub('[^0-9A-Za-z]', '', platform.node())[:40]}-"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well it replaces ``path``, else it is removed.

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
    except OSError as error:  # of the file that was asked for, not of the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new hidden file beside ``path``, gone afterwards; its name tells whose it is."""
    _remove_orphans(path.parent)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f"{_OWN}{os.getpid()}-", suffix=f"-{path.name}"
    )
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """The temporary files that killed processes of this machine have left in a folder."""
    if os.name == "nt":  # where asking for a process by its number ends it
        return
    for orphan in folder.glob(f"{_OWN}*"):
        number = orphan.name.removeprefix(_OWN).partition("-")[0]
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
def own_folder(folder: Path) -> Iterator[None]:
    """Make a folder where there is none and keep other processes out of it, until the block or this process ends.

    Raises:
        InputError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        try:
            if sys.platform == "win32":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                fcntl.lockf(
                    file, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # not flock: forked workers would hold it too
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{folder}: expected a folder of its own, another process is at work in it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
