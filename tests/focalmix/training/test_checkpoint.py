"""Checkpoints: whatever is wrong with a file becomes one line, and nothing of it is executed."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fmkernels.focalmix.cli import main
from fmkernels.focalmix.config import Config
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.training import loop
from fmkernels.focalmix.training.checkpoint import (
    State,
    learning_rate_factor,
    load_pseudo_boxes,
    load_run,
    save_pseudo_boxes,
)
from tests.focalmix.training.test_loop import TINY

SERIES = ["1.2.3", "1.2.4"]
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    State(TINY, CPU).save(tmp_path / "checkpoint.pt", TINY, SERIES)
    return tmp_path


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Save the checkpoint with other contents."""

    def damage(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def cut(fraction: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * fraction)])

    return damage


def flip(path: Path) -> None:
    """Flip one bit of one weight."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        weight = content.index(archive.read(entry), entry.header_offset) + entry.file_size // 2
    content[weight] ^= 1
    path.write_bytes(content)


def repack(**changes: bytes) -> Callable[[Path], None]:
    """Replace records of the archive: ``data_pkl`` is its pickle."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in records.items():
                archive.writestr(name, changes.get(name.split("/")[-1].replace(".", "_"), value))

    return damage


class Code:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def deep(levels: int) -> list:
    nest: list = []
    for _ in range(levels):
        nest = [nest, nest]  # small in memory, 2^levels parts to print
    return nest


BOTH = {
    "empty": cut(0),
    "half": cut(0.5),
    "almost whole": cut(0.97),
    "a bit": flip,
    "code": lambda path: torch.save({"config": Code(path.parent / "hacked")}, path),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "hacked"))),
    "no pickle": repack(data_pkl=b"\xff" * 99),
    "half a pickle": repack(data_pkl=b"\x80\x02}"),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a script": script,
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "no weights": changed(lambda c: (c.pop("ema"), c.pop("model"))),
    "other weights": changed(lambda c: (c["ema"].popitem(), c["model"].popitem())),
    "numbers": changed(lambda c: c.update(ema=1, model=1)),
}
"""Damage that both uses of a checkpoint report."""

LOADED = {
    "wider": ("widths", (512, 1024), "whole checkpoint"),
    "too wide for any memory": ("widths", (4 * 10**9, 4 * 10**9), "whole checkpoint"),
    "too many blocks to build": ("blocks", (0, 10**9), r"tensors for \(0, 1000000000\) blocks"),
    "a field": ("steps", None, "steps: expected type int, got None"),
    "a tensor": ("steps", torch.zeros(9), "steps: expected type int"),
    "digits": ("steps", 10**5000, "whole checkpoint|64 bits"),
    "nested": ("strides", deep(60), r"strides: expected type int, got \[\[\[\[\["),
    "unknown": ("leaps", 1, "expected options of this version, got leaps"),
}
"""Configurations that do not describe the weights: field, value, message."""

RESUMED = {
    "later": ("step", 9, "step 9 of 8"),
    "earlier": ("step", -1, "step -1 of 8"),
    "a word": ("step", "four", "whole checkpoint"),
    "random state": ("rng", torch.zeros(3, dtype=torch.uint8), "whole checkpoint"),
    "other sums": ("loss_sums", torch.zeros(5), "whole checkpoint"),
    "other scans": (
        "series",
        ["9"],
        "series: expected the 1 training scans of the run, got 2, not the same",
    ),
    "nested": ("series", deep(60), "series: expected"),
}
"""States that do not fit the run: field, value, message."""


def refused(use: Callable[[], object], path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        use()
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 1000


def test_a_good_one(run):
    config, model = load_run(run)
    fresh = State(TINY, CPU)
    assert config == TINY
    weights = zip(model.parameters(), fresh.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    image = torch.rand(1, 1, 16, 16, 16)
    for ours, theirs in zip(model(image), fresh.model(image), strict=True):
        assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(ours, theirs, strict=True))
    fresh.load(run / "checkpoint.pt", SERIES)


def test_a_checkpoint_of_an_earlier_version_lacks_options(run):
    changed(lambda checkpoint: checkpoint["config"].pop("rotations"))(run / "checkpoint.pt")
    assert load_run(run)[0] == TINY


@pytest.mark.parametrize("name", BOTH)
def test_damaged_and_foreign_files_are_refused(run, name):
    path = run / "checkpoint.pt"
    BOTH[name](path)
    for use in (lambda: load_run(run), lambda: State(TINY, CPU).load(path, SERIES)):
        refused(use, path, "expected a whole checkpoint of this version, got ")
    assert not (run / "hacked").exists()


@pytest.mark.parametrize("name", LOADED)
def test_configurations_that_do_not_fit_the_weights_are_refused(run, name):
    field, value, message = LOADED[name]
    path = run / "checkpoint.pt"
    changed(lambda checkpoint: checkpoint["config"].update({field: value}))(path)
    refused(lambda: load_run(run), path, message)


@pytest.mark.parametrize("name", RESUMED)
def test_states_that_do_not_fit_the_run_are_refused(run, name):
    field, value, message = RESUMED[name]
    path = run / "checkpoint.pt"
    changed(lambda checkpoint: checkpoint.update({field: value}))(path)
    refused(lambda: State(TINY, CPU).load(path, SERIES), path, message)


def test_pseudo_boxes(tmp_path):
    path, boxes = tmp_path / "pseudo_boxes.pt", torch.rand(3, 8)
    refused(lambda: load_pseudo_boxes(path, SERIES), path, "found no such file")
    save_pseudo_boxes(path, boxes, SERIES)
    assert torch.equal(load_pseudo_boxes(path, SERIES), boxes)
    refused(
        lambda: load_pseudo_boxes(path, SERIES[:1]),
        path,
        "series: expected the 2 unlabeled scans of the run, got 1, not the same",
    )
    for bad in (boxes[:, :7], boxes.double(), boxes / 0):
        save_pseudo_boxes(path, bad, SERIES)
        message = re.escape(f"boxes of {bad.dtype} {tuple(bad.shape)}")
        refused(lambda: load_pseudo_boxes(path, SERIES), path, message)


def test_schedules():
    cosine = Config(steps=100, warmup=9, schedule="cosine")
    step = Config(steps=100, warmup=0, schedule="step")
    factors = [learning_rate_factor(i, cosine) for i in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[100] == pytest.approx(0)
    assert max(factors) > 0.95 and np.argmax(factors) in (8, 9, 10)
    factors = [learning_rate_factor(i, step) for i in (0, 59, 60, 84, 85, 99)]
    assert factors == [1, 1, 0.1, 0.1, 0.01, 0.01]
    restart = Config(steps=100, warmup=0, burn_in=40, schedule="restart")
    factors = [learning_rate_factor(i, restart) for i in (0, 20, 40, 70, 100)]
    assert factors == pytest.approx([1, 0.5, 1, 0.5, 0])
    assert learning_rate_factor(39, restart) < 0.01
    for burn_in in (0, 100, 150):  # a single cosine
        once = Config(steps=100, warmup=0, burn_in=burn_in, schedule="restart")
        assert [learning_rate_factor(i, once) for i in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 TiB for an array\nof shape ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. "
            "DefaultCPUAllocator: can't allocate memory: ..."
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


def test_starting_anew_forgets_everything_but_step_and_schedule():
    first, config = State(TINY, CPU), TINY
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    for _ in range(2):
        sum(parameter.square().sum() for parameter in first.model.parameters()).backward()
        first.optimizer.step()
        first.scheduler.step()
        first.ema.update_parameters(first.model)
        first.step += 1
    first.start_anew(config)
    weights = first.model.state_dict()
    kernels = [name for name in before if before[name].dim() > 1]
    assert all(not torch.equal(weights[name], before[name]) for name in kernels)
    assert not first.optimizer.state and first.ema.n_averaged == 0
    assert first.step == first.scheduler.last_epoch == 2
    first.ema.update_parameters(first.model)
    averaged = first.ema.module.state_dict()
    assert all(torch.equal(averaged[name], weights[name]) for name in weights)

    again = State(TINY, CPU)
    again.step = 2
    again.start_anew(config)
    assert all(torch.equal(again.model.state_dict()[name], weights[name]) for name in weights)
