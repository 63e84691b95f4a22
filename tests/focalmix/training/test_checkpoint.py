"""Checkpoints from elsewhere: none runs code, takes more memory than its file has bytes, or breaks anything else."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmkernels.focalmix.cli import main
from fmkernels.focalmix.config import MAX_FILE_BYTES, load_config
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.training import loop as loop
from fmkernels.focalmix.training.checkpoint import State, load_run
from tests.focalmix.training.test_loop import TINY

SERIES = ["1.2.3", "1.2.4"]
CPU = torch.device("cpu")


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repack(compression: int = zipfile.ZIP_STORED, **changes: bytes) -> Callable[[Path], None]:
    """Write the archive anew; ``data_pkl=...`` replaces the pickle, ``bulk=...`` adds a record."""

    def damage(path: Path) -> None:
        content = records(path)
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, value in content.items():
                archive.writestr(name, changes.get(name.split("/")[-1].replace(".", "_"), value))
            if "bulk" in changes:
                archive.writestr("archive/data/bulk", changes["bulk"])

    return damage


def overlap(path: Path) -> None:
    """A thousand names for the same bytes."""
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(1000):
            twin = zipfile.ZipInfo(f"archive/data/twin{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC", "compress_type"):
                setattr(twin, field, getattr(largest, field))
            archive.filelist.append(twin)
        archive._didModify = True


def hidden_call(path: Path) -> None:
    """The pickle under a name that torch finds too."""
    content = records(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            upper = name.endswith("data.pkl")
            archive.writestr(
                name.replace("data.pkl", "DATA.PKL") if upper else name,
                BYTEARRAY if upper else value,
            )


def lie(path: Path) -> None:
    """A tensor that claims more numbers than its record holds."""
    content = records(path)
    name = max(content, key=lambda name: len(content[name]) if "/data/" in name else 0)
    content[name] = content[name][:4]
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)


def flip(path: Path) -> None:
    """One bit of one weight."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        weight = content.index(archive.read(entry), entry.header_offset) + entry.file_size // 2
    content[weight] ^= 1
    path.write_bytes(content)


def replaced(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Save it with something else in it."""

    def damage(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def legacy(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def doubled(levels: int) -> list:
    """A list that is small in memory and has 2^levels parts to write out."""
    nest: list = []
    for _ in range(levels):
        nest = [nest, nest]
    return nest


def nested(levels: int) -> list:
    nest: list = []
    for _ in range(levels):
        nest = [nest]
    return nest


BYTEARRAY = (
    b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x40\x85R."  # bytearray(2 ** 38)
)
FLOATS = (
    b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R."  # torch.FloatTensor(2 ** 36)
)
LAUGHS = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b"."
HUGE = torch.zeros(1).expand(10**12)

BOMBS = {
    "compressed": (repack(zipfile.ZIP_DEFLATED), "compressed data"),
    "zeros": (repack(zipfile.ZIP_DEFLATED, bulk=bytes(10**7)), "compressed data"),
    "bzip2": (repack(zipfile.ZIP_BZIP2, bulk=bytes(10**6)), "compressed data"),
    "overlap": (overlap, r"\d+ bytes that unpack to \d+"),
    "bytearray": (repack(data_pkl=BYTEARRAY), "a call of '__builtin__ bytearray'"),
    "tensor class": (repack(data_pkl=FLOATS), "a call of 'torch FloatTensor'"),
    "another name": (hidden_call, "a call of '__builtin__ bytearray'"),
    "code": (
        repack(data_pkl=pickle.dumps(os.getcwd, protocol=2)),
        "a call of 'posix getcwd'|a call of 'nt getcwd'",
    ),
    "a later protocol": (repack(data_pkl=pickle.dumps(os.getcwd, protocol=4)), "a call of None"),
    "no pickle": (repack(data_pkl=b"\xff" * 99), "whole checkpoint"),
    "half a pickle": (repack(data_pkl=b"\x80\x02}"), "whole checkpoint"),
    "a list": (repack(data_pkl=LAUGHS), "whole checkpoint"),
    "a lie": (lie, "whole checkpoint"),
    "a bit": (flip, "Bad CRC-32"),
    "expanded": (replaced(lambda c: c.update(found=HUGE)), r"\d+ bytes that become tensors of \d+"),
    "expanded inside": (
        replaced(lambda c: c["optimizer"].update(x=[{"y": (HUGE,)}])),
        "become tensors of",
    ),
    "script": (script, "whole checkpoint"),
    "legacy": (legacy, "whole checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "whole checkpoint"),
    "empty archive": (lambda path: zipfile.ZipFile(path, "w").close(), "whole checkpoint"),
    "no weights": (replaced(lambda c: (c.pop("average"), c.pop("model"))), "whole checkpoint"),
    "other weights": (
        replaced(lambda c: (c["average"].popitem(), c["model"].popitem())),
        "whole checkpoint",
    ),
    "numbers": (replaced(lambda c: c.update(average=1, model=1)), "whole checkpoint"),
    "wider": (replaced(lambda c: c["config"].update(widths=(512, 1024))), "whole checkpoint"),
}
"""Of both uses: going on and detecting."""

DETECTED = {
    "widths": (("widths", (4_000_000, 8)), "widths: expected with blocks and channels at most"),
    "stages": (("widths", (4,) * 10_000), "widths: expected 1 to 8 numbers"),
    "blocks": (("blocks", (0, 10**9)), "blocks: expected 0 to 64"),
    "channels": (("channels", 4 * 10**9), "channels: expected a multiple of 4 up to 2048"),
    "search": (
        ("search_size", (4096, 4096, 4096)),
        "search_size: expected at most 268435456 voxels",
    ),
    "features": (("search_size", (320, 320, 320)), "fine"),
    "anchors": (("diameters", (5.0,) * 10**5), "diameters: expected at most 16 for each level"),
    "overlap": (("overlap", 16), "overlap: expected 0 to 15"),
    "laughs": (("strides", doubled(60)), r"strides: expected of type int, got \[\[\[\[\["),
    "deep": (("strides", nested(100)), "strides: expected of type int"),
    "digits": (("steps", 10**5000), "whole checkpoint|64 bits"),
    "nothing": (("steps", None), "steps: expected of type int, got None"),
    "a tensor": (("steps", torch.zeros(9)), "steps: expected of type int"),
    "a folder": (("cache", "a\0b"), "cache: expected the name of a folder"),
}
"""What the configuration in it may ask for."""

RESUMED = {
    "later": (("step", 9), "step 9 of 8"),
    "earlier": (("step", -1), "step -1 of 8"),
    "a word": (("step", "four"), "whole checkpoint"),
    "boxes": (("found", torch.zeros(3, 7)), r"boxes of torch.float32 \(3, 7\)"),
    "no boxes": (("found", torch.full((3, 8), torch.nan)), "boxes of"),
    "random state": (("rng", torch.zeros(3, dtype=torch.uint8)), "whole checkpoint"),
    "other scans": (
        ("series", ["9"]),
        "series: expected the 1 training scans of the run, got 2, not the same",
    ),
    "laughs": (("series", doubled(60)), "series: expected"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    State(TINY, CPU).save(tmp_path / "checkpoint.pt", TINY, SERIES)
    return tmp_path


def refused(use: Callable[[], object], path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        use()
    assert (
        str(error.value).startswith(f"{path}: ")
        and "\n" not in str(error.value)
        and len(str(error.value)) < 1000
    )


def test_the_good_one(run):
    config, model = load_run(run)
    fresh = State(TINY, CPU)
    assert config == TINY
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.model.parameters(), strict=True)
    )
    image = torch.rand(1, 1, 16, 16, 16)
    for ours, theirs in zip(model(image), fresh.model(image), strict=True):
        assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(ours, theirs, strict=True))
    fresh.load(run / "checkpoint.pt", SERIES)


@pytest.mark.parametrize("name", BOMBS)
def test_bad_checkpoints_are_refused(run, name):
    damage, message = BOMBS[name]
    path = run / "checkpoint.pt"
    damage(path)
    refused(lambda: load_run(run), path, message)
    if name != "wider":
        refused(lambda: State(TINY, CPU).load(path, SERIES), path, message)


@pytest.mark.parametrize("name", DETECTED)
def test_bad_configurations_in_checkpoints_are_refused(run, name):
    (field, value), message = DETECTED[name]
    replaced(lambda checkpoint: checkpoint["config"].update({field: value}))(run / "checkpoint.pt")
    if message == "fine":
        load_run(run)
    else:
        refused(lambda: load_run(run), run / "checkpoint.pt", message)


@pytest.mark.parametrize("name", RESUMED)
def test_bad_states_are_refused(run, name):
    (field, value), message = RESUMED[name]
    replaced(lambda checkpoint: checkpoint.update({field: value}))(run / "checkpoint.pt")
    refused(
        lambda: State(TINY, CPU).load(run / "checkpoint.pt", SERIES), run / "checkpoint.pt", message
    )


def test_bombs_take_no_memory(run, tmp_path):
    """Within what importing took and 64 MB more."""
    pytest.importorskip("resource", reason="Windows tells no largest size of a process")
    bombs = ["zeros", "bytearray", "tensor class", "another name", "expanded", "overlap"]
    for name in bombs:
        shutil.copytree(run, tmp_path / "bombs" / name, ignore=shutil.ignore_patterns("bombs"))
        BOMBS[name][0](tmp_path / "bombs" / name / "checkpoint.pt")
    code = (
        "import resource, sys\n"
        "from fmkernels.focalmix.errors import InputError\n"
        "from fmkernels.focalmix.training.checkpoint import load_run\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for run in sys.argv[1:]:\n"
        "    try:\n        load_run(run)\n    except InputError as error:\n        pass\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    argv = [sys.executable, "-c", code, *(str(tmp_path / "bombs" / name) for name in bombs)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    taken = dict(zip(bombs, map(int, done.stdout.split()), strict=True))
    assert max(taken.values()) < 64 * (1 << 10 if sys.platform == "linux" else 1 << 20), taken


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON, got maximum recursion depth"),
        (" " * (MAX_FILE_BYTES + 1), f"expected at most {MAX_FILE_BYTES} bytes of JSON"),
        ("\ud800", "expected JSON"),
        ('{"steps": 1' + "0" * 5000 + "}", "expected JSON, got Exceeds the limit"),
        ("null", "expected the fields of a configuration, got NoneType"),
    ],
)
def test_bad_configuration_files_are_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(lambda: load_config(tmp_path), path, message)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 TiB for an array\nof shape ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ],
)
def test_too_little_memory_is_one_line(error, tmp_path, monkeypatch, capsys):
    def raises(*args, **kwargs):
        raise error

    monkeypatch.setattr(loop, "train", raises)
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fmkernels: not enough memory (")


def test_other_errors_of_programming_are_not_hidden(tmp_path, monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loop, "train", raises)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(["train", str(tmp_path), "--out", str(tmp_path / "run")])
