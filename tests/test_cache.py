"""Compiled loops in files: what is kept, and that no damaged file or folder matters."""

import errno
import hashlib
import importlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import pytest

from fmkernels.cpu import compiled
from fmkernels.cpu.compiled import njit
from fmkernels.focalmix.cli import main
from tests.test_cpu import forks

ROOT = Path(__file__).parents[1]


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def call(function=double, x=3):
    """Call a loop as a new process does; whether it was compiled."""
    loop = njit(function)
    assert loop(x) == function(x)
    return sum(loop.stats.cache_misses.values()) > 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for compiled loops; slow compilations are not logged."""
    compiled._SAID.clear()
    monkeypatch.setattr(compiled, "SLOW", 1e9)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    (folder,) = compiled.cache_folders()
    assert folder.parent == tmp_path
    return folder


@pytest.fixture
def lines(caplog):
    """What has been logged."""
    caplog.set_level(logging.WARNING, "fmkernels")
    return lambda: caplog.messages


def python(code, folder, *, source=ROOT):
    """Start a process that runs code with compiled loops in a folder."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(source)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What a process printed; it must succeed in time."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


def test_a_loop_is_compiled_once_for_its_types(folder):
    assert call() and not call()
    assert call(x=3.5) and not call(x=3.5) and not call()
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "truncated", "a bit", "of another loop", "no loop"])
def test_a_damaged_file_is_replaced(folder, damage, lines):
    call()
    (file,) = folder.iterdir()
    data = file.read_bytes()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "a bit":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "of another loop":
        call(triple)
        (other,) = set(folder.iterdir()) - {file}
        shutil.copy(other, file)
    else:  # with the right digest
        content = pickle.dumps(("library", "of", "another", "version"))
        _, stamp = njit(double)._cache._file(
            (numba.int64,), compiled.cpu_target.target_context.codegen()
        )
        file.write_bytes(hashlib.sha256(stamp + content).digest() + content)
    assert call() and not call()
    assert len(lines()) == (damage == "no loop")


@pytest.mark.parametrize(
    ("owner", "mode", "folder_mode", "loaded"),
    [
        ("another", 0o644, 0o755, True),
        ("another", 0o664, 0o755, False),
        ("another", 0o644, 0o777, False),
        ("own", 0o664, 0o777, True),
    ],
)
def test_a_file_that_a_stranger_can_have_written_is_not_loaded(
    folder, monkeypatch, lines, owner, mode, folder_mode, loaded
):
    call()
    (file,) = folder.iterdir()
    file.chmod(mode)
    folder.chmod(folder_mode)
    status = os.fstat
    if owner == "another":

        def of_another(number):
            fields = list(status(number))
            fields[4] = 54321
            return os.stat_result(fields)

        monkeypatch.setattr(os, "fstat", of_another)
    assert call() != loaded
    assert ["another user" in line for line in lines()] == [True] * (not loaded)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("fails", ["mkdir", "write_bytes", "replace"])
def test_a_full_or_foreign_folder_costs_one_line(folder, monkeypatch, lines, error, fails):
    def failing(*args, **kwargs):
        raise OSError(error, os.strerror(error), str(args[0]))

    monkeypatch.setattr(os if fails == "replace" else Path, fails, failing)
    assert call() and call() and call(triple)
    assert (
        len(lines()) == 1 and os.strerror(error) in lines()[0] and "NUMBA_CACHE_DIR" in lines()[0]
    )
    assert not folder.exists() or not list(folder.iterdir())


def test_a_folder_that_is_a_file_costs_one_line(folder, lines):
    folder.write_text("no folder")
    assert call() and call(triple)
    assert len(lines()) == 1


def test_loops_are_loaded_from_a_folder_that_cannot_be_written(folder, monkeypatch, lines):
    call()
    monkeypatch.setattr(Path, "write_bytes", None)
    assert not call() and not lines()


def test_the_next_folder_is_tried(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(compiled, "cache_folders", lambda: [tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_text("no folder")
    assert call() and not call() and not lines()
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_folders(monkeypatch):
    package = Path(compiled.__file__).parent
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    first, second = compiled.cache_folders()
    assert first == package / "__pycache__" and second.parent.name == "numba"
    monkeypatch.setattr(numba.config, "CACHE_DIR", "somewhere")
    assert compiled.cache_folders() == [Path("somewhere", second.name)]


def test_source_counts_and_its_times_do_not(folder, tmp_path, monkeypatch):
    """Container layers keep whole seconds. Any file of the CPU path may be part of a loop."""
    file = tmp_path / "loops_of_a_test.py"
    file.write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module(file.stem).double
    assert call(function)
    os.utime(file, (1e9, 1e9))
    assert not call(function)
    file.write_text("def double(x):\n    return 2 * x  # changed\n")
    assert call(function) and not call(function)
    changed = compiled.STAMP.copy()
    changed.update(b"a changed file")
    monkeypatch.setattr(compiled, "STAMP", changed)
    assert call(function) and not call(function)
    assert len(list(folder.iterdir())) == 1  # old versions are replaced


def test_processes_that_write_at_once(tmp_path):
    (tmp_path / "loops.py").write_text("def double(x):\n    return 2 * x\n")
    code = """
        import loops
        from fmkernels.cpu.compiled import njit

        for x in (3, 3.5, 3j):
            loop = njit(loops.double)
            assert loop(x) == 2 * x
            print(sum(loop.stats.cache_misses.values()))
    """
    source = f"{tmp_path}{os.pathsep}{ROOT}"
    for process in [python(code, tmp_path, source=source) for _ in range(3)]:
        finish(process)
    assert finish(python(code, tmp_path, source=source))[0] == "0\n" * 3


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_slow_compilation_is_one_line(folder, monkeypatch, lines, seconds):
    monkeypatch.setattr(compiled, "SLOW", seconds)
    call()
    call()
    assert len(lines()) == (seconds == 0)
    for line in lines():
        for words in ("compiled test_cache.double", str(folder), "NUMBA_CACHE_DIR", "warmup"):
            assert words in line


def test_the_first_call_of_an_op(tmp_path):
    """Compiling it is one line on stderr, also where nobody has set logging up; loading it is fast.

    Numba loads its compiler, and scipy with it, when it compiles.
    """
    code = """
        import sys, torch, fmkernels.cpu.compiled as compiled
        from fmkernels import soft_target_focal_loss
        compiled.SLOW = 0.0
        print(soft_target_focal_loss(torch.zeros(3), torch.ones(3)).item() > 0)
        print("numba.np.linalg" in sys.modules)
    """
    out, err = finish(python(code, tmp_path))
    assert out == "True\nTrue\n" and err.count("\n") == 1
    assert err.startswith("fmkernels: compiled soft_target_focal_loss._run for the CPU in ")
    assert finish(python(code, tmp_path)) == ("True\nFalse\n", "")


def test_an_error_in_a_loaded_loop():
    """Exceptions of loops need what Numba registers when it compiles."""
    code = """
        import torch
        from fmkernels import soft_target_focal_loss
        x = torch.zeros(2, 3)
        for _ in range(2):
            try:
                soft_target_focal_loss(x, x, mix=(torch.ones(2), torch.tensor([5, 0])))
            except ValueError as error:
                print(error)
    """
    out, _ = finish(python(code, ""))
    assert out == "soft_target_focal_loss: mix index must lie in [0, B)\n" * 2


def test_warmup_leaves_nothing_to_compile():
    """In the dtypes that people train in, with any options."""
    code = """
        import torch, fmkernels.warmup
        from numba.core.dispatcher import Dispatcher
        from fmkernels.cpu import (
            crop_and_resize3d, group_norm3d, mixup3d, object_mixup3d, predict_targets,
            soft_target_focal_loss,
        )

        def compiled():
            modules = (
                crop_and_resize3d, group_norm3d, mixup3d, object_mixup3d, predict_targets,
                soft_target_focal_loss,
            )
            loops = [x for m in modules for x in vars(m).values() if isinstance(x, Dispatcher)]
            return sum(len(loop.signatures) for loop in loops)

        assert fmkernels.warmup.warmup() == 0
        before = compiled()
        from fmkernels import functional as F
        lam, index = torch.full((4,), 0.7), torch.tensor([1, 0, 3, 3])
        flips = torch.tensor([0, 3, 5, 7]).byte()
        boxes = torch.tensor([[k, 0.5, 0, 1, 3.5, 4, 4] for k in range(4)])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = (torch.arange(4 * 64).reshape(4, 1, 4, 4, 4) / 128).to(dtype).requires_grad_()
            y = x.detach().clamp(0, 1)
            for y in (y.float(), y, y == 1, (y == 1).byte()):
                weight = torch.ones(4, 1, 1, 1, 1)
                for options in (
                    {}, {"reduction": "none"}, {"weight": weight}, {"mix": (lam, index)},
                    {"gamma": 1.5},
                ):
                    F.soft_target_focal_loss(x, y, **options).sum().backward()
            views = x.detach()[:, None]
            F.predict_targets(views, flips)
            F.predict_targets(views.transpose(2, 5), flips)
            F.predict_targets(x.detach().expand(4, 4, 4, 4, 4, 4), flips, classes=2)
            v = x.repeat(1, 6, 1, 1, 1)
            for v in (v, v.contiguous(memory_format=torch.channels_last_3d)):
                for options in ({}, {"residual": v}, {"activation": "leaky_relu"}):
                    for weight in (None, torch.ones(6, dtype=dtype)):
                        F.group_norm3d(v, 2, weight, **options).sum().backward()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.uint8):
            x = torch.arange(4 * 64).reshape(4, 1, 4, 4, 4).to(dtype)
            dtypes = {"dtype": torch.bfloat16}, {"dtype": torch.int16}
            for options in ({}, {"window": (0.0, 9.0)}, *dtypes):
                F.mixup3d(x, lam, index, **options)
                F.mixup3d(x, lam, index, flips=flips, **options)
                F.mixup3d(x, lam, index, donors=x.clone(), **options)
                F.crop_and_resize3d(x, boxes, (3, 2, 4), **options)
                F.crop_and_resize3d(x.transpose(2, 4), boxes, (3, 2, 4), **options)
                if "window" not in options:
                    F.crop_and_resize3d(x, boxes, (3, 2, 4), mode="nearest", **options)
                F.object_mixup3d(x, boxes, boxes.flip(0), lam, **options)
                if dtype.is_floating_point and options.get("dtype") != torch.int16:
                    v = x.clone().requires_grad_()
                    F.mixup3d(v, lam, index, flips=flips, **options).sum().backward()
                    F.crop_and_resize3d(v, boxes, (3, 2, 4), **options).sum().backward()
        print(before, compiled())
    """
    before, after = finish(python(code, ""))[0].splitlines()[-1].split()
    assert before == after and int(before) >= 9


def test_warmup_says_what_it_does(capsys):
    from fmkernels import functional, warmup

    assert set(warmup.OPS) == set(functional.__all__)
    assert main(["warmup", "--ops", "mixup3d", "sample_mixup"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("[1/2] mixup3d ... ")
    assert str(compiled.cache_folders()[0]) in said[2]
    with pytest.raises(SystemExit, match="2"):
        main(["warmup", "--ops", "mixup"])


def test_warmup_without_numba_is_an_error_in_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fmkernels.warmup", raising=False)
    monkeypatch.setitem(sys.modules, "fmkernels.cpu.compiled", None)
    assert main(["warmup"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def assert_child_mixes(code: str) -> None:
    """Both the process of the code, which imports mixup3d, and a child that it forks mix."""
    forked = """
        child = os.fork()
        signal.alarm(200)  # ends a child that hangs
        mixed = mixup3d(torch.ones(2, 1, 2, 2, 2), torch.ones(2), torch.tensor([1, 0]))
        assert mixed.eq(1).all()
        if child:
            print(os.waitpid(child, 0)[1])
        else:
            os._exit(0)
    """
    assert finish(python(textwrap.dedent(code) + textwrap.dedent(forked), ""))[0] == "0\n"


@forks
def test_a_child_forked_while_a_thread_imports():
    """It hung at its first op, for a lock that the thread had taken."""
    code = """
        import os, signal, threading, time, torch
        from fmkernels import mixup3d
        from fmkernels.ops import library

        def import_slowly(name):
            began.set()
            time.sleep(0.5)
            return import_module(name)

        def mix():
            x = torch.ones(2, 1, 2, 2, 2)
            assert mixup3d(x, torch.ones(2), torch.tensor([1, 0])).eq(1).all()

        began, import_module = threading.Event(), library.import_module
        library.import_module = import_slowly
        threading.Thread(target=mix).start()
        began.wait()
    """
    assert_child_mixes(code)


@forks
def test_a_child_forked_while_a_thread_compiles():
    """It hung when it compiled or loaded a loop, for a lock that the thread had taken."""
    code = """
        import os, signal, threading, time, torch
        from numba.core.compiler_lock import global_compiler_lock
        from fmkernels import mixup3d, soft_target_focal_loss

        def compile_slowly():
            with global_compiler_lock:
                began.set()
                time.sleep(0.5)

        soft_target_focal_loss(torch.zeros(3), torch.ones(3))
        began = threading.Event()
        threading.Thread(target=compile_slowly).start()
        began.wait()
    """
    assert_child_mixes(code)


@forks
def test_a_child_forked_while_a_thread_imports_and_then_compiles():
    """It hung: when the fork began, there was no lock of a compiler that it could have taken."""
    code = """
        import os, signal, threading, time

        began, compiling = threading.Event(), threading.Event()
        os.register_at_fork(before=lambda: compiling.wait(1))  # called last

        import torch
        from fmkernels import mixup3d
        from fmkernels.ops import library

        def import_and_compile_slowly():
            with library._IMPORT_LOCK:
                began.set()
                time.sleep(0.5)
                from fmkernels.cpu import mixup3d
            from numba.core.compiler_lock import global_compiler_lock
            with global_compiler_lock:
                compiling.set()
                time.sleep(0.5)

        threading.Thread(target=import_and_compile_slowly).start()
        began.wait()
    """
    assert_child_mixes(code)


RACE = """
    import sys, threading, torch
    from fmkernels import crop_and_resize3d, mixup3d, object_mixup3d, predict_targets
    from fmkernels import soft_target_focal_loss

    x, flips, lam = torch.ones(2, 1, 4, 4, 4), torch.zeros(2, dtype=torch.uint8), torch.ones(2)
    boxes = torch.tensor([[0.0, 0, 0, 0, 4, 4, 4], [1.0, 0, 0, 0, 4, 4, 4]])
    others = [
        lambda: mixup3d(x, lam, torch.tensor([1, 0])),
        lambda: crop_and_resize3d(x, boxes, (4, 4, 4)),
        lambda: predict_targets(x[:, None], flips),
        lambda: object_mixup3d(x, boxes, boxes, lam),
    ]
    calls = [lambda: soft_target_focal_loss(x, x), others[{number} % len(others)]]
    barrier, done = threading.Barrier(2), []

    def run(call):
        barrier.wait()
        done.append(call())

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    for call in [calls[0], *others]:
        call()  # later ones work, too
    print(len(done))
"""


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_threads_whose_first_ops_race(count):
    numbers = list(range(count))
    while numbers:
        pair, numbers = numbers[:2], numbers[2:]
        for process in [python(RACE.replace("{number}", str(n)), "") for n in pair]:
            assert finish(process)[0] == "2\n"
