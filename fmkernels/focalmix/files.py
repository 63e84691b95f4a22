"""Write files so that a reader sees the old one or the new one whole, and folders that belong to one process at a time.

A process that is killed leaves at most hidden files behind, which the next one to write there removes.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


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
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    except OSError as error:  # of the file that was asked for, not of the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new hidden file beside ``path``, gone afterwards; those that killed processes left in the folder are removed.

    What is in use is locked. Windows removes no file that is open, so that there the orphans stay.
    """
    if sys.platform != "win32":
        for orphan in path.parent.glob(".*.partial*"):
            with contextlib.suppress(OSError), open(orphan, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                orphan.unlink()
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".partial{path.suffix}")
        with open(handle, "rb") as file:
            try:
                if sys.platform == "win32":
                    file.close()
                else:
                    with contextlib.suppress(OSError):  # a file system without locks
                        fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.exists(name):  # else it was taken for an orphan before it was locked
                    yield Path(name)
                    return
            finally:
                Path(name).unlink(missing_ok=True)


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
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would hold it too
        except (BlockingIOError, PermissionError):
            raise InputError(f"{folder}: expected a folder of its own, another process is at work in it") from None
        except OSError:  # a file system without locks
            pass
        yield
