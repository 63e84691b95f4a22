"""How the loops of the CPU path are compiled, and how threads share them.

Numba compiles a loop at its first call with new types. Compiled loops are kept in files, one per
loop and types, that hold all that the loop calls. A file that cannot be used is compiled again; a
folder that cannot be written costs the next process the same time, and nothing else.

Numba's own threads are not used: they survive neither a fork (OpenMP) nor two callers at once (its
work queue). The loops release the GIL instead, and Python threads run them on ranges of one call.
"""

import hashlib
import inspect
import logging
import os
import pickle
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import llvmlite
import numba
import torch
from numba import types
from numba.core import compiler
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.serialize import dumps
from numba.extending import intrinsic
from numba.misc.appdirs import AppDirs
from torch import Tensor

FASTMATH = {"contract"}
"""Fast-math flags: contraction only. `reassoc` turned the mean of two infinities into NaN, and
`arcp` resampled what identity crops should copy."""

OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": FASTMATH,
    "no_cfunc_wrapper": True,
}
SLOW = 1.0
"""A compilation that takes more seconds is logged."""

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT16, UINT8, INT64 = range(7)
KINDS = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.int16: INT16,
    torch.uint8: UINT8,
    torch.bool: UINT8,
    torch.int64: INT64,
}
"""The code of each dtype in loops. `voxels` loads and stores all but INT64."""

STAMP = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py"))))
"""Of all files of this package. Not of their times: layers of containers round or change them."""

LOG = logging.getLogger("fmkernels")
_OWNER = os.stat(__file__).st_uid


def njit(function: Callable) -> Callable:
    """The function compiled by Numba for any argument types, and kept in a file where possible."""
    loop = numba.njit(function, **OPTIONS)
    if function.__closure__ is None and os.path.isfile(function.__code__.co_filename):
        loop._cache = _Cache(function)
    return loop


def subroutine(function: Callable | None = None, *, by_type: bool = False, **options: Any) -> Any:
    """A function for loops to call. It is compiled into them and never on its own.

    That takes a fifth of the time of a nested `njit`, which compiles what only Python would need.

    Args:
        function: it has neither keyword nor default arguments. Signed integers become int64.
        by_type: whether the function takes the types of the arguments and returns what to compile.
        options: of numba.njit, in addition to those of loops.
    """
    if function is None:
        return partial(subroutine, by_type=by_type, **options)
    compiled: dict[tuple, compiler.CompileResult] = {}

    def typed(typing_context, *args):
        args = tuple(types.intp if _is_signed(x) else types.unliteral(x) for x in args)
        if args not in compiled:
            flags = compiler.Flags()
            cpu_target.options.parse_as_flags(flags, OPTIONS | options)
            flags.no_compile = flags.no_cpython_wrapper = True
            context = cpu_target.target_context
            code = _Subroutine(context.codegen(), function.__name__)
            compiled[args] = compiler.compile_internal(
                typing_context, context, code, function(*args) if by_type else function, args,
                None, flags, {},
            )  # fmt: skip
        result = compiled[args]

        def generate(context, builder, signature, values):
            context.active_code_library.add_linking_library(result.library)
            return context.call_internal(builder, result.fndesc, result.signature, values)

        return result.signature, generate

    first = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    typed.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    typed.__name__, typed.__doc__ = function.__name__, function.__doc__
    return intrinsic(typed)


class _Subroutine(JITCodeLibrary):
    """Code that is optimized only as a part of the loops that call it."""

    def finalize(self):
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True


def _is_signed(x: types.Type) -> bool:
    x = types.unliteral(x)
    return isinstance(x, types.Integer) and x.signed


def cache_folders() -> list[Path]:
    """Where compiled loops are looked for; they are written into the first that can be written.

    That is NUMBA_CACHE_DIR, or else the package's ``__pycache__`` and the user's cache folder. Like
    those of Numba, subfolders bear the name of the package's folder: two installations that share
    a folder do not overwrite each other's files.
    """
    package = Path(__file__).parent
    name = f"fmkernels_{hashlib.sha256(str(package).encode()).hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        return [Path(numba.config.CACHE_DIR, name)]
    user = Path(AppDirs(appname="numba", appauthor=False).user_cache_dir)
    return [package / "__pycache__", user / name]


class _Cache(NullCache):
    """The compiled versions of one loop, one per file, which begins with a digest.

    Numba's own cache has an index of files: a damaged one raises, and processes that write at once
    can leave an index that names files of other types. It also loads the compiler to load a loop.
    """

    def __init__(self, function: Callable) -> None:
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self.source = function.__code__.co_filename
        self.start = 0.0

    def load_overload(self, sig, target_context):
        """The loop compiled for these types, or None."""
        try:
            name, stamp = self._file(sig, target_context.codegen())
            for folder in cache_folders():
                with suppress(OSError):
                    data = _read(folder / name)
                    if data[:32] == hashlib.sha256(stamp + data[32:]).digest():
                        rtsys.initialize(target_context)  # what Numba does before it compiles
                        return CompileResult._rebuild(target_context, *pickle.loads(data[32:]))
        except Exception as error:  # any damage to a file: the loop is compiled again
            _say_once("fmkernels: a compiled loop cannot be loaded, compiling it again: %r", error)
        self.start = time.perf_counter()
        return None

    def save_overload(self, sig, data):
        """Keep what was compiled since `load_overload` found nothing."""
        seconds, kept = time.perf_counter() - self.start, None
        try:
            kept = self._save(*self._file(sig, data.codegen), data)
        except Exception as error:  # a full disk, a folder that belongs to somebody else
            _say_once(
                "fmkernels: compiled loops cannot be kept, each process will compile them: %s. "
                "NUMBA_CACHE_DIR names another folder",
                error,
            )
        if seconds > SLOW:
            LOG.warning(
                "fmkernels: compiled %s for the CPU in %.1f s%s. To compile ahead of time: "
                "fmkernels warmup",
                self.name,
                seconds,
                f", kept in {kept} (NUMBA_CACHE_DIR)" if kept else "",
            )

    def _file(self, sig, codegen) -> tuple[str, bytes]:
        """Name of the file for these types on such a machine, and a digest of it and the source."""
        machine = numba.__version__, llvmlite.__version__, sys.version, codegen.magic_tuple()
        key = hashlib.sha256(repr((machine, str(sig))).encode()).hexdigest()[:24]
        name = "".join(c for c in self.name if c.isalnum() or c in "._")
        name = f"{name}-{key}.loop"
        stamp = STAMP.copy()
        stamp.update(name.encode() + Path(self.source).read_bytes())
        return name, stamp.digest()

    def _save(self, name: str, stamp: bytes, result: CompileResult) -> Path:
        """Write a file, at once, into the first folder that takes it."""
        data = dumps(result._reduce())
        data = hashlib.sha256(stamp + data).digest() + data
        *others, last = cache_folders()
        for folder in others:
            with suppress(OSError):
                return _write(folder, name, data)
        return _write(last, name, data)


def _read(path: Path) -> bytes:
    """What a file holds, which is code; nothing if a stranger can have written it."""
    with path.open("rb") as file:
        status, folder = os.fstat(file.fileno()), path.parent.stat()
        known = not hasattr(os, "geteuid") or status.st_uid in (0, os.geteuid(), _OWNER)
        if known or not (status.st_mode | folder.st_mode) & 0o022:
            return file.read()
    strange = PermissionError(f"{path} is of another user, and others may write there")
    _say_once("fmkernels: a compiled loop is not loaded but compiled again: %s", strange)
    return b""


def _write(folder: Path, name: str, data: bytes) -> Path:
    unfinished = folder / f"{name}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(data)
        os.replace(unfinished, folder / name)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    return folder


def _say_once(line: str, error: Exception) -> None:
    if line not in _SAID:
        _SAID.add(line)
        LOG.warning(line, error)


_SAID: set[str] = set()


def parallel_for(
    loop: Callable, size: int, grain_size: int, tensors: Sequence[Tensor | None], *args: Any
) -> None:
    """Call ``loop(start, end, *tensors, *args)`` on ranges of range(size), in several threads.

    There are at most as many ranges as torch may use threads, each of at least ``grain_size``. The
    result must not depend on their number. The loop gets tensors as `located` gives them; ranges
    keep them alive: an interrupted call may return before its last ranges end.
    """
    count = min(torch.get_num_threads(), size // max(grain_size, 1))
    if count <= 1:
        loop(0, size, *located(*tensors), *args)
        return
    bounds = pairwise([size * i // count for i in range(count + 1)])
    ranges: deque[Callable[[], None]] = deque(
        partial(_run, loop, ends, tensors, args) for ends in bounds
    )
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    error = None
    try:
        _pool().help(count - 1, ranges, ended)
        _run_all(ranges, ended)
        for _ in range(count):
            error = ended.get()
            if error is not None:
                raise error
    finally:
        ranges.clear()
        del error  # its traceback refers to this frame


def located(*tensors: Tensor | None) -> list[tuple[int, int]]:
    """Tensors as loops take them: address, 0 where there is none, and the code of the dtype."""
    return [(0, UINT8) if x is None else (x.data_ptr(), KINDS[x.dtype]) for x in tensors]


def _run(loop: Callable, ends: tuple[int, int], tensors: Iterable, args: Iterable) -> None:
    loop(*ends, *located(*tensors), *args)


def _run_all(ranges: deque[Callable[[], None]], ended: SimpleQueue[BaseException | None]) -> None:
    """Run ranges until none is left or one fails. Each that has ended leaves None or its error."""
    while True:
        try:
            part = ranges.popleft()
        except IndexError:
            return
        try:
            part()
        except BaseException as error:
            ranges.clear()
            ended.put(error)
            return
        ended.put(None)


class _Pool:
    """Threads that help callers. Queues in C, unlike futures, survive an interrupt at any time."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple] = SimpleQueue()
        self.threads: list[Thread] = []

    def help(self, count: int, *task: Any) -> None:
        """Offer a task to so many threads; to fewer where no more can start."""
        with suppress(RuntimeError):
            while len(self.threads) < min(count, os.cpu_count() or 1):
                thread = Thread(target=self._work, name="fmkernels", daemon=True)
                thread.start()
                self.threads.append(thread)
        for _ in range(min(count, len(self.threads))):
            self.tasks.put(task)

    def _work(self) -> None:
        while True:
            _run_all(*self.tasks.get())


@cache
def _pool() -> _Pool:
    return _Pool()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
