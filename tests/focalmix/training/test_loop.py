"""The training loop: the files of a run, resuming bit for bit, several processes, ways to stop."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fmkernels.focalmix.config import CONFIG, Config
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.errors import InputError, InputWarning
from fmkernels.focalmix.model.inference import Detections
from fmkernels.focalmix.training import loop, step
from fmkernels.focalmix.training.checkpoint import (
    BURN_IN,
    CHECKPOINT,
    PSEUDO_BOXES,
    load_run,
)
from fmkernels.focalmix.training.loop import train
from fmkernels.focalmix.training.metrics import METRICS
from tests.focalmix.conftest import SCANS, write_luna, write_scan

ROOT = Path(__file__).parents[3]
TINY = Config(
    norm="group",  # so that images do not depend on their batch
    spacing=(2.5, 2.0, 2.0),
    patch_size=(16, 16, 16),
    strides=(2, 4),
    diameters=(6.0, 12.0),
    widths=(4, 8),
    blocks=(0, 1),
    channels=4,
    batch_size=2,
    steps=8,
    warmup=2,
    train_subsets=(0, 1),
    validation_subsets=(),
    test_subsets=(9,),
    roi_size=(16, 16, 16),
    overlap=4,
    log_every=2,
    validate_every=4,
    checkpoint_every=4,
    workers=0,
    device="cpu",
    amp="off",
)
FOCALMIX = replace(
    TINY,
    method="focalmix",
    train_subsets=(0, 1, 2),
    labeled=2,
    unlabeled_batch_size=4,
    burn_in=2,
    rampup_steps=2,
    max_objects=2,
)
FILES = {
    CHECKPOINT,
    CONFIG,
    METRICS,
    "timing.json",
    "training.png",
    "candidates.csv",
    "evaluation.json",
    "froc.png",
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / CHECKPOINT, weights_only=True)
    return {**checkpoint["model"], **{f"ema {k}": v for k, v in checkpoint["ema"].items()}}


def trained_on(run: Path) -> list[str]:
    """The labeled series."""
    return torch.load(run / CHECKPOINT, weights_only=True)["series"]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows without their times."""
    with open(run / METRICS, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def luna_folder(tmp_path_factory) -> Path:
    """The small data set, written and resampled once."""
    return write_luna(tmp_path_factory.mktemp("train") / "luna", SCANS)


@pytest.fixture(scope="module")
def finished(luna_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(TINY, luna_folder, run)
    return run


@pytest.fixture(autouse=True)
def no_figures(monkeypatch) -> None:
    """Drawing takes most of the time of such small runs; that of `finished` has its figures."""
    names = ("draw_training", "draw_froc", "draw_examples", "slice_panel", "Panel")
    stub = SimpleNamespace(**dict.fromkeys(names, lambda *_: None))
    monkeypatch.setattr(loop, "figures", stub)


@pytest.fixture
def whole(finished, tmp_path) -> Path:
    """A run that was never stopped."""
    return shutil.copytree(finished, tmp_path / "whole")


def test_a_run_leaves_everything_behind(whole, luna_folder):
    assert {path.name for path in whole.iterdir()} >= FILES | {"sheet.png"}
    assert [row["step"] for row in metrics(whole)] == ["2", "4", "6", "8"]
    assert all(math.isfinite(float(row["loss"])) for row in metrics(whole))
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert 0 <= evaluation["cpm"] <= 1
    assert set(read_candidates(whole / "candidates.csv")) <= {"1.3.6.1.4.1.1005"}
    timing = json.loads((whole / "timing.json").read_text())
    assert {"data", "forward", "loss", "backward", "optimizer", "step"} <= timing[
        "milliseconds"
    ].keys()
    assert 0 <= timing["data_wait_fraction"] < 1
    config, model = load_run(whole)
    assert config == TINY and not any(name.startswith("module") for name in model.state_dict())


def test_training_lowers_the_loss(luna_folder, tmp_path):
    config = replace(
        TINY,
        steps=60,
        warmup=5,
        learning_rate=5e-3,
        positive_fraction=1.0,
        test_subsets=(),
        log_every=10,
    )
    train(config, luna_folder, tmp_path / "run")
    losses = [float(row["loss"]) for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("stop", [4, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, luna_folder, tmp_path, monkeypatch, stop):
    """Killed after a step: at a checkpoint, and between two (steps are repeated)."""
    run = tmp_path / "resumed"

    class Killed(BaseException):
        pass

    class Scheduler(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *args):
            super().step(*args)
            if self.last_epoch == stop + 1 and not (run / "killed").exists():
                (run / "killed").touch()
                raise Killed

    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", Scheduler)
    with pytest.raises(Killed):
        train(TINY, luna_folder, run)
    train(TINY, luna_folder, run, resume=True)
    assert (run / "killed").exists()
    assert_same_weights(whole, run)
    assert metrics(run) == metrics(whole)
    assert (run / "candidates.csv").read_bytes() == (whole / "candidates.csv").read_bytes()


def test_workers_change_nothing(whole, luna_folder, tmp_path):
    train(replace(TINY, workers=2), luna_folder, tmp_path / "workers")
    assert_same_weights(whole, tmp_path / "workers")


def test_another_seed_gives_another_run(whole, luna_folder, tmp_path):
    train(replace(TINY, seed=1), luna_folder, tmp_path / "seed")
    ours, theirs = weights(whole), weights(tmp_path / "seed")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_a_finished_run_changes_nothing(whole, luna_folder):
    before = weights(whole), metrics(whole)
    train(TINY, luna_folder, whole, resume=True)
    after = weights(whole)
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert metrics(whole) == before[1]


def test_a_signal_stops_after_a_checkpoint(whole, luna_folder, tmp_path, monkeypatch):
    run, stock = tmp_path / "stopped", loop.supervised_loss
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(*args)

    monkeypatch.setattr(loop, "supervised_loss", step)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 8"):
        train(TINY, luna_folder, run)
    assert torch.load(run / CHECKPOINT, weights_only=True)["step"] == 3
    train(TINY, luna_folder, run, resume=True)
    assert_same_weights(whole, run)
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("method", ["supervised", "focalmix"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_and_keeps_its_batch(
    luna_folder, tmp_path, monkeypatch, method, where
):
    """The previous checkpoint stays, even if the bad step is one that would be saved."""
    config = TINY if method == "supervised" else FOCALMIX
    config = replace(config, steps=12, burn_in=4, log_every=5)
    stock, calls, seen = (
        getattr(loop, f"{method}_loss"),
        itertools.count(1 if method == "supervised" else 5),
        {},
    )

    def step(model, *arguments):
        labeled, unlabeled = (arguments[0], None) if method == "supervised" else arguments[1:3]
        losses, number = stock(model, *arguments), next(calls)
        if number != 8:
            return losses
        seen.update(labeled=labeled["image"], unlabeled=unlabeled)
        if where == "loss":
            return losses._replace(box=losses.box * math.nan)
        parameter = next(model.parameters())
        # 0, with an infinite slope
        return losses._replace(box=losses.box + (parameter - parameter.detach()).sqrt().sum())

    monkeypatch.setattr(loop, f"{method}_loss", step)
    run = tmp_path / "run"
    what = "loss is nan" if where == "loss" else "norm of the gradient is (inf|nan)"
    with pytest.raises(FloatingPointError, match=rf"step 8: the {what}; .*bad_batch\.pt"):
        train(config, luna_folder, run)
    checkpoint = torch.load(run / CHECKPOINT, weights_only=True)
    assert checkpoint["step"] == 4
    assert all(v.isfinite().all() for part in ("model", "ema") for v in checkpoint[part].values())
    batch = torch.load(run / "bad_batch.pt", weights_only=True)
    assert batch["step"] == 8 and torch.equal(batch["labeled"]["image"], seen["labeled"])
    assert len(batch["labeled"]["boxes"]) == len(batch["labeled"]["series"]) == config.batch_size
    assert ("unlabeled" in batch) == (method == "focalmix")
    if method == "focalmix":
        assert torch.equal(batch["unlabeled"]["image"], seen["unlabeled"])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_scaler_that_skips_every_step_is_reported(luna_folder, tmp_path, monkeypatch):
    stock = loop.supervised_loss

    def step(model, *arguments):
        losses, parameter = stock(model, *arguments), next(model.parameters())
        # 0, with an infinite slope
        return losses._replace(box=losses.box + (parameter - parameter.detach()).sqrt().sum())

    monkeypatch.setattr(loop, "supervised_loss", step)
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the norm of the gradient is inf; .*bad_batch\.pt"
    ):
        train(
            replace(TINY, steps=40, log_every=10, validate_every=50, amp="fp16"),
            luna_folder,
            tmp_path / "run",
        )


def test_a_burn_in_that_is_not_finite_is_not_kept(luna_folder, tmp_path, monkeypatch):
    stock = loop.supervised_loss
    monkeypatch.setattr(
        loop, "supervised_loss", lambda *a: stock(*a)._replace(box=torch.tensor(math.inf))
    )
    with pytest.raises(
        FloatingPointError, match=r"step 1: the loss is inf; .*checkpoint\.pt is not yet written"
    ):
        train(replace(TINY, burn_in=3, log_every=8, checkpoint_every=8), luna_folder, tmp_path)
    assert not (tmp_path / "burn_in.pt").exists() and not (tmp_path / CHECKPOINT).exists()


def test_a_folder_with_another_run_is_refused(whole, luna_folder):
    before = (whole / CHECKPOINT).read_bytes()
    with pytest.raises(
        InputError, match=r"learning_rate: expected 0.004 as in the run it holds, got 0.1"
    ):
        train(replace(TINY, learning_rate=0.1), luna_folder, whole, resume=True)
    for config in (TINY, replace(TINY, learning_rate=0.1)):
        with pytest.raises(InputError, match="expected a new folder, or --resume"):
            train(config, luna_folder, whole)
    assert (whole / CHECKPOINT).read_bytes() == before


def test_other_scans_are_refused(whole, luna_folder, make_luna):
    other = make_luna({"nodules": [(8, 16, 15, 9)]}, {"subset": 9, "nodules": [(8, 16, 15, 9)]})
    with pytest.raises(InputError, match="series: expected the 3 training scans of the run"):
        train(TINY, other, whole, resume=True)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def replace_scan(folder: Path) -> None:
    """Another scan in the same file, of the same size."""
    raw = folder / "subset0" / f"{SCANS[0].uid}.raw"
    raw.write_bytes(raw.read_bytes()[::-1])


def reorder_rows(folder: Path) -> None:
    path = folder / "annotations.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: rewrite(folder / "annotations.csv", ",9.0\n", ",8.5\n"), "annotations"),
        (lambda folder: (folder / "annotations_excluded.csv").unlink(), "excluded"),
        (replace_scan, "scans"),
        (reorder_rows, ""),
    ],
)
def test_a_run_goes_on_with_the_same_data_alone(luna_folder, tmp_path, change, name):
    folder = shutil.copytree(luna_folder, tmp_path / "luna")
    config = replace(TINY, steps=2, checkpoint_every=1)
    train(config, folder, tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    change(moved)
    if not name:
        train(config, moved, tmp_path / "run", resume=True)
        return
    with pytest.raises(InputError, match=rf"data\.json: {name}: expected those that the run was"):
        train(config, moved, tmp_path / "run", resume=True)


def test_a_run_without_digests_of_its_data_warns(luna_folder, tmp_path):
    config = replace(TINY, steps=2, checkpoint_every=1)
    train(config, luna_folder, tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    with pytest.warns(InputWarning, match=r"run: expected data\.json, found none: the data may"):
        train(config, luna_folder, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "data.json").exists()


def test_labeled_draws_scans_by_the_seed(luna_folder, tmp_path):
    chosen = set()
    for seed in range(6):
        run = tmp_path / f"{seed}"
        train(
            replace(TINY, labeled=1, seed=seed, steps=1, test_subsets=(), train_subsets=(0, 1)),
            luna_folder,
            run,
        )
        (series,) = trained_on(run)
        chosen.add(series)
    assert 1 < len(chosen) <= 3
    with pytest.raises(InputError, match="labeled: expected at most 3 training scans, got 4"):
        train(replace(TINY, labeled=4), luna_folder, tmp_path / "many")


FRESH = replace(
    FOCALMIX, student="fresh", teacher="fixed", steps=6, checkpoint_every=1, supervised_mixup=True
)


def test_a_fresh_student_learns_from_the_weights_of_the_burn_in(luna_folder, tmp_path, monkeypatch):
    """Stopped after the burn-in, and one step later, it goes on with the same teacher."""
    teachers, students, stock = [], [], loop.focalmix_loss

    def step(model, teacher, *rest):
        teachers.append({name: value.clone() for name, value in teacher.state_dict().items()})
        students.append({name: value.clone() for name, value in model.state_dict().items()})
        return stock(model, teacher, *rest)

    monkeypatch.setattr(loop, "focalmix_loss", step)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(FRESH, luna_folder, whole)
    _, burn_in = load_run(whole, name=BURN_IN)
    assert len(teachers) == 4
    for teacher in teachers:
        assert all(torch.equal(teacher[name], burn_in.state_dict()[name]) for name in teacher)
    name = "stages.0.0.0.weight"
    assert not torch.allclose(students[0][name], burn_in.state_dict()[name], atol=0.01)

    class Killed(BaseException):
        pass

    def killed(*arguments):
        if calls[0] == 0:
            raise Killed
        calls[0] -= 1
        return stock(*arguments)

    monkeypatch.setattr(loop, "focalmix_loss", killed)
    for allowed in (0, 1):  # before the first step of the student, after it
        calls = [allowed]
        with pytest.raises(Killed):
            train(FRESH, luna_folder, resumed, resume=True)
    monkeypatch.setattr(loop, "focalmix_loss", stock)
    train(FRESH, luna_folder, resumed, resume=True)
    assert_same_weights(whole, resumed)
    assert metrics(whole) == metrics(resumed)


def test_a_fixed_teacher_can_be_followed_by_the_average(luna_folder, tmp_path, monkeypatch):
    teachers, stock = [], loop.focalmix_loss

    def step(model, teacher, *rest):
        teachers.append(teacher)
        return stock(model, teacher, *rest)

    monkeypatch.setattr(loop, "focalmix_loss", step)
    config = replace(FRESH, follow_after=3, test_subsets=())
    train(config, luna_folder, tmp_path)
    assert teachers[0] is teachers[1] is teachers[2] is not teachers[3]


def test_a_supervised_run_can_start_anew_after_the_burn_in(luna_folder, tmp_path):
    """The rival of a fresh student: the same steps without unlabeled images."""
    plain = replace(TINY, burn_in=4, steps=5, checkpoint_every=1, test_subsets=())
    train(plain, luna_folder, tmp_path / "plain")
    train(replace(plain, student="fresh"), luna_folder, tmp_path / "fresh")
    burn_ins = [
        torch.load(tmp_path / name / BURN_IN, weights_only=True)["model"]
        for name in ("plain", "fresh")
    ]
    name = "stages.0.0.0.weight"
    assert torch.equal(burn_ins[0][name], burn_ins[1][name])
    after = [weights(tmp_path / run)[name] for run in ("plain", "fresh")]
    assert torch.allclose(after[0], burn_ins[0][name], atol=0.05)
    assert not torch.allclose(after[1], burn_ins[0][name], atol=0.05)


def test_unlabeled_patches_lie_around_probable_detections(luna_folder, tmp_path, monkeypatch):
    boxes = torch.tensor([[0.0, 2, 2, 2, 9, 9, 9, 0.9**4], [0.0, 12, 12, 12, 19, 19, 19, 0.7**4]])
    monkeypatch.setattr(loop._Trainer, "_find_pseudo_boxes", lambda self: boxes)
    seen, stock = [], loop.UnlabeledPatches

    def patches(data, series, boxes, **options):
        seen.append(boxes[series[0]])
        return stock(data, series, boxes, **options)

    monkeypatch.setattr(loop, "UnlabeledPatches", patches)
    config = replace(FOCALMIX, steps=3, test_subsets=())
    for least in (0.0, 0.8):
        chosen = replace(config, pseudo_box_probability=least)
        train(chosen, luna_folder, tmp_path / f"{least}")
    assert [len(rows) for rows in seen] == [2, 1] and seen[1][0, 0] == 2


@pytest.mark.parametrize("method", ["supervised", "focalmix"])
def test_images_are_augmented_for_the_student_alone(luna_folder, tmp_path, monkeypatch, method):
    config = replace(FOCALMIX, method=method, steps=3, test_subsets=(), image_mixup=False)
    counts, stock = [], loop.augmented

    def augmented(model, config, key):
        def count(images):
            counts.append((key[1], len(images)))
            return stock(model, config, key)(images)

        return count

    monkeypatch.setattr(loop, "augmented", augmented)
    train(replace(config, noise=30.0), luna_folder, tmp_path / "noise")
    unlabeled = 4 if method == "focalmix" else 0
    assert counts == [(0, 2), (1, 2), (2, 2 + unlabeled)]
    train(config, luna_folder, tmp_path / "clean")
    name = "stages.0.0.0.weight"
    assert not torch.equal(weights(tmp_path / "noise")[name], weights(tmp_path / "clean")[name])


@pytest.mark.parametrize(("choice", "mode"), [("on", None), ("graph", "reduce-overhead")])
def test_a_compiled_detector_trains_to_the_same_weights(
    luna_folder, tmp_path, monkeypatch, choice, mode
):
    modes, compile_ = [], torch.compile

    def traced(forward, *, mode, dynamic):
        modes.append(mode)
        return compile_(forward, backend="aot_eager", dynamic=dynamic, fullgraph=True)

    config = replace(FOCALMIX, steps=4, test_subsets=())
    train(config, luna_folder, tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", traced)
    train(replace(config, compile=choice), luna_folder, tmp_path / "compiled")
    assert modes == [mode] * 2  # student and teacher
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-3, atol=1e-4)
    _, model = load_run(tmp_path / "compiled")
    assert model(torch.zeros(1, 1, 16, 16, 16))[0][0].isfinite().all()


def test_cudnn_tries_its_algorithms_during_a_run_only(luna_folder, tmp_path, monkeypatch):
    seen, supervised_loss = [], loop.supervised_loss

    def observed(*arguments):
        seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
        return supervised_loss(*arguments)

    monkeypatch.setattr(loop, "supervised_loss", observed)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    train(replace(TINY, steps=1, warmup=0, test_subsets=()), luna_folder, tmp_path / "run")
    assert seen == [(True, True)] and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("method", ["supervised", "focalmix"])
def test_two_processes_give_the_losses_of_one_with_the_joint_batch(luna_folder, tmp_path, method):
    config = replace(
        TINY if method == "supervised" else FOCALMIX,
        batch_size=4,
        steps=6,
        positive_fraction=1.0,
        groups=2,
    )
    train(config, luna_folder, tmp_path / "one")
    (tmp_path / "rank.py").write_text(
        "import sys; from pathlib import Path\n"
        "from fmkernels.focalmix.config import load_config\n"
        "from fmkernels.focalmix.training.loop import train\n"
        "if __name__ == '__main__':\n"
        "    one, luna, two = map(Path, sys.argv[1:])\n"
        "    train(load_config(one), luna, two)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            f"--master-port={port}",
            str(tmp_path / "rank.py"),
            str(tmp_path / "one"),
            str(luna_folder),
            str(tmp_path / "two"),
        ],
        env=environment,
        check=True,
        capture_output=True,
        timeout=240,
    )
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "loss_cls", "loss_box", "positives"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-4) for name in a)
    assert (tmp_path / "two" / "evaluation.json").exists()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_focalmix_resumed_equals_uninterrupted(luna_folder, tmp_path, monkeypatch, norm):
    config = replace(FOCALMIX, norm=norm)
    train(config, luna_folder, tmp_path / "whole")
    stock, calls = loop.focalmix_loss, []

    def step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(*args)

    monkeypatch.setattr(loop, "focalmix_loss", step)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 8"):
        train(config, luna_folder, tmp_path / "stopped")
    monkeypatch.undo()
    train(config, luna_folder, tmp_path / "stopped", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


def test_the_teacher_may_be_the_current_weights(luna_folder, tmp_path):
    config, runs = replace(FOCALMIX, log_every=1), []
    for teacher in ("ema", "current"):
        train(replace(config, teacher=teacher), luna_folder, tmp_path / teacher)
        runs.append(metrics(tmp_path / teacher))
    averaged, current = runs
    first = config.burn_in_steps
    assert averaged[:first] == current[:first]
    assert all(a != b for a, b in zip(averaged[first:], current[first:], strict=True))


def test_rotations_reach_the_patches_and_the_views(luna_folder, tmp_path, monkeypatch):
    config = replace(FOCALMIX, spacing=(2.0, 2.0, 2.0), rotations=True, views=5)
    seen, predict = {"labeled": set(), "unlabeled": set(), "views": set()}, step.predict_unlabeled

    def patches(name, make):
        def call(*args):
            dataset = make(*args)
            seen[name] |= {int(dataset[i]["flips"]) // 8 for i in range(16)}
            return dataset

        return call

    def noting(teacher, images, config, flips):
        seen["views"] |= set((flips // 8).tolist())
        return predict(teacher, images, config, flips)

    for name in ("labeled", "unlabeled"):
        monkeypatch.setattr(
            loop, f"_{name}_patches", patches(name, getattr(loop, f"_{name}_patches"))
        )
    monkeypatch.setattr(step, "predict_unlabeled", noting)
    train(config, luna_folder, tmp_path)
    assert all(len(numbers) > 3 for numbers in seen.values()), seen


@pytest.fixture
def detected(monkeypatch) -> list[str]:
    """The scans that the detector is run over."""
    series, stock = [], loop._detect_all

    def detect_all(config, model, data, scans, role):
        series.extend(scans)
        return stock(config, model, data, scans, role)

    monkeypatch.setattr(loop, "_detect_all", detect_all)
    return series


def test_unlabeled_patches_lie_around_detections(luna_folder, tmp_path, monkeypatch):
    """The detections are the nodules, brighter than all else: every patch shows one, or few do."""
    detected, seen, stock = [], [], loop.focalmix_loss

    def detect_all(config, model, data, series, role):
        assert role == "unlabeled"
        detected.append(list(series))
        boxes = {uid: data.volume(uid).boxes(data.nodules(uid)) for uid in series}
        return {
            uid: Detections(own, np.ones(len(own)), np.zeros((len(own), 4)))
            for uid, own in boxes.items()
        }

    def step(model, teacher, labeled, unlabeled, *args):
        seen.extend(image.max().item() > 30 for image in unlabeled)
        return stock(model, teacher, labeled, unlabeled, *args)

    monkeypatch.setattr(loop, "_detect_all", detect_all)
    monkeypatch.setattr(loop, "focalmix_loss", step)
    small = {"patch_size": (12, 12, 12), "roi_size": (12, 12, 12)}
    config = replace(FOCALMIX, **small, test_subsets=(), unlabeled_positive_fraction=1.0)
    train(config, luna_folder, tmp_path / "found")
    assert all(seen) and len(seen) == 6 * config.unlabeled_batch_size
    assert len(detected) == 1 and not set(detected[0]) & set(trained_on(tmp_path / "found"))
    seen.clear()
    train(replace(config, unlabeled_positive_fraction=0.0), luna_folder, tmp_path / "anywhere")
    assert not all(seen) and len(detected) == 1
    assert not (tmp_path / "anywhere" / PSEUDO_BOXES).exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_the_detection_phase(luna_folder, tmp_path, monkeypatch, detected, when):
    """Killed before or after the file is there, a resumed run detects again or uses the file."""

    class Killed(BaseException):
        pass

    def killed(path, boxes, series):
        if when == "after":
            stock(path, boxes, series)
        raise Killed

    config = replace(FOCALMIX, burn_in=3, test_subsets=())  # between two checkpoints
    train(config, luna_folder, tmp_path / "whole")
    run, stock, count = tmp_path / "killed", loop.save_pseudo_boxes, len(detected)
    monkeypatch.setattr(loop, "save_pseudo_boxes", killed)
    with pytest.raises(Killed):
        train(config, luna_folder, run)
    assert torch.load(run / CHECKPOINT, weights_only=True)["step"] == 3
    monkeypatch.setattr(loop, "save_pseudo_boxes", stock)
    train(config, luna_folder, run, resume=True)
    assert len(detected) == count * (2 if when == "after" else 3)
    assert_same_weights(tmp_path / "whole", run)
    assert metrics(tmp_path / "whole") == metrics(run)


def test_pseudo_boxes_belong_to_their_burn_in(luna_folder, tmp_path, detected):
    """A new run in the folder detects again; without its boxes a run cannot be resumed."""
    config = replace(FOCALMIX, steps=4, test_subsets=())
    train(config, luna_folder, tmp_path)
    count = len(detected)
    (tmp_path / CHECKPOINT).unlink()
    train(replace(config, seed=1), luna_folder, tmp_path)
    assert len(detected) == 2 * count == 4
    (tmp_path / PSEUDO_BOXES).unlink()
    with pytest.raises(InputError, match=rf"{PSEUDO_BOXES}: .*found no such file"):
        train(replace(config, seed=1), luna_folder, tmp_path, resume=True)


def test_full_shared_memory_is_named_in_one_line(luna_folder, tmp_path, monkeypatch):
    def read(self, i):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(loop.LabeledPatches, "__getitem__", read)
    with pytest.raises(ChildProcessError, match=r"/dev/shm full \(docker run --shm-size, or --wor"):
        train(TINY, luna_folder, tmp_path / "run")


def test_unlabeled_limits_the_number_of_scans(luna_folder, tmp_path, detected):
    train(replace(FOCALMIX, unlabeled=1, steps=3, test_subsets=()), luna_folder, tmp_path / "run")
    assert len(detected) == 1 and detected[0] not in trained_on(tmp_path / "run")
    with pytest.raises(
        InputError, match="unlabeled: expected at most the 2 other training scans, got 3"
    ):
        train(replace(FOCALMIX, unlabeled=3), luna_folder, tmp_path / "many")


def test_unlabeled_scans_from_elsewhere_beside_a_fully_labeled_set(
    luna_folder, luna_scans, tmp_path, detected
):
    other = tmp_path / "other"
    for k in range(4):
        write_scan(other / f"scan{k}.nii.gz", luna_scans[0])
    config = replace(FOCALMIX, labeled=None, steps=3, unlabeled_data=(str(other),))
    config = replace(config, test_subsets=())
    train(config, luna_folder, tmp_path / "all")
    assert detected == [f"scan{k}" for k in range(4)]
    assert trained_on(tmp_path / "all") == [scan.uid for scan in luna_scans[:4]]
    detected.clear()
    train(replace(config, unlabeled=3, labeled=2), luna_folder, tmp_path / "few")
    labeled = trained_on(tmp_path / "few")
    assert len(detected) == 3 and not set(detected) & set(labeled)
    assert len(list((other / ".cache-2.5x2x2").iterdir())) == 4
    write_scan(other / "scan4.nii.gz", luna_scans[1])
    with pytest.raises(InputError, match=r"data\.json: unlabeled: expected those that the run"):
        train(config, luna_folder, tmp_path / "all", resume=True)
    (other / "scan4.nii.gz").unlink()
    supervised = replace(config, method="supervised", unlabeled_data=(str(tmp_path / "nowhere"),))
    train(supervised, luna_folder, tmp_path / "supervised")  # reads no unlabeled scan
    with pytest.raises(InputError, match="nowhere: expected scans below this folder"):
        train(replace(supervised, method="focalmix"), luna_folder, tmp_path / "none")


def test_an_own_data_set_with_scans_without_labels(tmp_path, luna_scans, detected):
    root = tmp_path / "own"
    rows = ["scan,x,y,z,diameter,fold"]
    for k, scan in enumerate(luna_scans[:3]):
        image = write_scan(root / f"s{k}.nii.gz", scan)
        z, y, x, diameter = scan.nodules[0]
        point = image.TransformContinuousIndexToPhysicalPoint((x, y, z))
        rows.append(",".join(map(str, (f"s{k}", *point, diameter, 2 * k))))
    write_scan(root / "unread.nii.gz", luna_scans[3])
    (root / "annotations.csv").write_text("\n".join(rows))
    config = replace(FOCALMIX, labeled=None, steps=3, train_subsets=(0, 1, 2))
    config = replace(config, validation_subsets=(3,), test_subsets=(4, 5))
    with pytest.warns(
        InputWarning, match=r"no scans in \(3,\); the .* in \[0, 2, 4\]: .* without val"
    ):
        evaluation = train(config, root, tmp_path / "run")
    assert trained_on(tmp_path / "run") == ["s0", "s1"] and detected[:1] == ["unread"]
    assert evaluation.n_scans == 1 and evaluation.n_nodules == 1
    with pytest.raises(InputError, match=r"train_subsets: no scans in \(9,\); .* \[4\]"):
        train(replace(config, train_subsets=(9,)), root, tmp_path / "none")
    (root / "annotations.csv").unlink()
    with pytest.raises(InputError, match="own: expected scans with labels, found no table of them"):
        train(config, root, tmp_path / "none")


def test_focalmix_needs_scans_without_labels(luna_folder, tmp_path):
    for labeled in (None, 4):
        with pytest.raises(InputError, match="labeled: expected fewer than the 4 training scans"):
            train(replace(FOCALMIX, labeled=labeled), luna_folder, tmp_path / "run")


def test_a_run_without_a_single_nodule_is_refused(luna_folder, tmp_path):
    config = replace(TINY, train_subsets=(0, 1, 2), labeled=1)
    data = LUNA16(luna_folder, spacing=config.spacing, subsets=config.train_subsets)
    drawn = {
        seed: data.series[np.random.default_rng(seed).permutation(len(data))[0]]
        for seed in range(20)
    }
    seed = next(seed for seed, uid in drawn.items() if not len(data.nodules(uid)))
    with pytest.raises(InputError, match="train_subsets: expected at least one nodule"):
        train(replace(config, seed=seed), luna_folder, tmp_path / "run")


def test_a_torn_row_of_the_metrics_is_dropped(whole, luna_folder):
    path, before = whole / METRICS, metrics(whole)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:1])
    train(TINY, luna_folder, whole, resume=True)
    assert metrics(whole) == before[:-1]


def test_weights_that_are_not_finite_are_an_error_of_detection(whole, luna_folder, tmp_path):
    checkpoint = torch.load(whole / CHECKPOINT, weights_only=True)
    for name, value in checkpoint["ema"].items():
        if value.is_floating_point():
            checkpoint["ema"][name] = value * math.nan
    torch.save(checkpoint, whole / CHECKPOINT)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(TINY, luna_folder, whole, resume=True)
