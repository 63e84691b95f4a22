"""Where output goes: files are replaced whole; links, devices and streams are written through."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.files import atomic_write, naming, open_stream

posix = pytest.mark.skipif(os.name == "nt", reason="needs links, pipes and devices of POSIX")


def write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, exists):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, link = folder / "target.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    if exists:
        target.write_text("old")
    write(link, "new")
    assert link.is_symlink() and target.read_text() == link.read_text() == "new"
    assert [*folder.iterdir()] == [target] and [*tmp_path.glob(".*")] == []


@posix
def test_a_pipe_is_written_through(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write(pipe, "contents")
    reader.join(30)
    assert got == ["contents"] and stat.S_ISFIFO(pipe.stat().st_mode)


@posix
def test_a_device_is_written_through():
    before = os.stat("/dev/null")
    write(Path("/dev/null"), "contents")
    assert os.stat("/dev/null") == before and stat.S_ISCHR(before.st_mode)


@posix
@pytest.mark.parametrize(
    ("name", "to"), [("/dev/stdout", "pipe"), ("/dev/fd/1", "file"), ("link", "file")]
)
def test_standard_output_is_written_through(tmp_path, name, to):
    """In the order in which it is written, also where it is a file."""
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    code = (
        "from fmkernels.focalmix.files import atomic_write\n"
        "print('before')\n"
        f"with atomic_write({name!r}) as temporary:\n"
        "    temporary.write_text('contents\\n')\n"
        "print('after')\n"
    )
    out = tmp_path / "out.txt"
    with open(out, "wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=file if to == "file" else subprocess.PIPE,
            check=True,
        )
    got = out.read_bytes() if to == "file" else done.stdout
    assert got == b"before\ncontents\nafter\n"


@posix
def test_a_disk_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "disk"
    path.touch()
    status = list(path.stat())
    status[0] = stat.S_IFBLK | 0o600
    monkeypatch.setattr(Path, "stat", lambda *_, **__: os.stat_result(status))
    with pytest.raises(InputError, match="disk: expected a file, got a block device"):
        open_stream(path)


def test_files_and_folders_are_no_streams(tmp_path):
    (tmp_path / "file").touch()
    assert open_stream(tmp_path) is open_stream(tmp_path / "file") is None
    assert open_stream(tmp_path / "new") is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        OSError("250 requested and 12 written"),
    ],
    ids=["of the system", "of numpy"],
)
def test_a_full_disk_says_where_and_how_much(tmp_path, error):
    path = tmp_path / "scan.npy"
    with pytest.raises(OSError) as raised, atomic_write(path) as temporary:
        temporary.write_bytes(bytes(2_500_000))
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    text = raised.value.strerror
    assert text.startswith("No space left on device (2.5 MB were written, ")
    assert text.endswith(" MB are free)")
    assert [*tmp_path.iterdir()] == []


def test_numpy_s_message_is_the_one_that_is_known(tmp_path):
    pytest.importorskip("resource")
    code = (
        "import numpy, resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from fmkernels.focalmix.files import atomic_write\n"
        f"with atomic_write({str(tmp_path / 'a.npy')!r}) as t, open(t, 'wb') as file:\n"
        "    numpy.save(file, numpy.zeros(100_000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "No space left on device (0.0 MB were written" in done.stderr, done.stderr


def test_other_errors_are_named_too(tmp_path):
    path = tmp_path / "missing" / "a.txt"
    with pytest.raises(FileNotFoundError) as raised, atomic_write(path):
        raise AssertionError("not reached")
    assert raised.value.filename == str(path)
    with pytest.raises(OSError, match="strange") as raised, naming(path):
        raise OSError("strange")
    assert raised.value.filename == str(path)
