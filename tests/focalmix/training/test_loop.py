"""The training loop: what a run leaves behind, resuming bit for bit, several processes, and every way to stop."""

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
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fmkernels.focalmix.config import CONFIG, PRESETS, Config
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.distributed import choose_device
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.model.inference import Detections
from fmkernels.focalmix.training import loop as loop
from fmkernels.focalmix.training.checkpoint import (
    CHECKPOINT,
    autocast,
    build_model,
    learning_rate_factor,
    load_run,
)
from fmkernels.focalmix.training.loop import train
from fmkernels.focalmix.training.metrics import METRICS
from tests.focalmix.conftest import SCANS, write_luna

ROOT = Path(__file__).parents[3]
TINY = Config(
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
    search_size=(16, 16, 16),
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
    ramp=2,
    objects=2,
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
    return {**checkpoint["model"], **{f"average {k}": v for k, v in checkpoint["average"].items()}}


def trained_on(run: Path) -> list[str]:
    """The labelled series."""
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
    """The little data set, written and resampled once."""
    return write_luna(tmp_path_factory.mktemp("train") / "luna", SCANS)


@pytest.fixture(scope="module")
def finished(luna_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(TINY, luna_folder, run)
    return run


@pytest.fixture
def whole(finished, tmp_path) -> Path:
    """A run of all steps, never stopped."""
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
    assert 0 <= timing["share_waiting_for_data"] < 1
    config, model = load_run(whole)
    assert config == TINY and not any(name.startswith("module") for name in model.state_dict())


def test_training_lowers_the_loss(luna_folder, tmp_path):
    config = replace(
        TINY, steps=60, warmup=5, learning_rate=5e-3, positive=1.0, test_subsets=(), log_every=10
    )
    train(config, luna_folder, tmp_path / "run")
    losses = [float(row["loss"]) for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("stop", [4, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, luna_folder, tmp_path, monkeypatch, stop):
    """Killed right after a step: at a checkpoint, and between two (the steps since are done again)."""
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
    """The checkpoint before stays, also where the broken step is one that would be saved."""
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
        return losses._replace(
            box=losses.box + (parameter - parameter.detach()).sqrt().sum()
        )  # 0, its slope infinite

    monkeypatch.setattr(loop, f"{method}_loss", step)
    run = tmp_path / "run"
    what = "loss is nan" if where == "loss" else "norm of the gradient is (inf|nan)"
    with pytest.raises(FloatingPointError, match=rf"step 8: the {what}; .*bad_batch\.pt"):
        train(config, luna_folder, run)
    checkpoint = torch.load(run / CHECKPOINT, weights_only=True)
    assert checkpoint["step"] == 4
    assert all(
        v.isfinite().all() for part in ("model", "average") for v in checkpoint[part].values()
    )
    batch = torch.load(run / "bad_batch.pt", weights_only=True)
    assert batch["step"] == 8 and torch.equal(batch["labeled"]["image"], seen["labeled"])
    assert len(batch["labeled"]["boxes"]) == len(batch["labeled"]["series"]) == config.batch_size
    assert ("unlabeled" in batch) == (method == "focalmix")
    if method == "focalmix":
        assert torch.equal(batch["unlabeled"]["image"], seen["unlabeled"])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_scaler_that_leaves_out_every_step_is_told(luna_folder, tmp_path, monkeypatch):
    stock = loop.supervised_loss

    def step(model, *arguments):
        losses, parameter = stock(model, *arguments), next(model.parameters())
        return losses._replace(
            box=losses.box + (parameter - parameter.detach()).sqrt().sum()
        )  # 0, its slope infinite

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
    with pytest.raises(InputError, match="expected a new folder, or --resume"):
        train(TINY, luna_folder, whole)
    assert (whole / CHECKPOINT).read_bytes() == before


def test_other_scans_are_refused(whole, luna_folder, make_luna):
    other = make_luna({"nodules": [(8, 16, 15, 9)]}, {"subset": 9, "nodules": [(8, 16, 15, 9)]})
    with pytest.raises(InputError, match="series: expected the 3 training scans of the run"):
        train(TINY, other, whole, resume=True)


@pytest.mark.parametrize("part", [0.5, 0.97, 0.0])
def test_a_checkpoint_cut_short_is_refused(whole, luna_folder, part):
    data = (whole / CHECKPOINT).read_bytes()
    (whole / CHECKPOINT).write_bytes(data[: int(len(data) * part)])
    for use in (lambda: train(TINY, luna_folder, whole, resume=True), lambda: load_run(whole)):
        with pytest.raises(InputError, match=r"checkpoint.pt: expected a whole checkpoint"):
            use()


def test_a_checkpoint_cannot_run_code(whole):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(whole / "hacked"),)

    torch.save({"config": Evil()}, whole / CHECKPOINT)
    with pytest.raises(InputError, match="expected a whole checkpoint"):
        load_run(whole)
    assert not (whole / "hacked").exists()


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


@pytest.mark.parametrize("method", ["supervised", "focalmix"])
def test_two_processes_give_the_losses_of_one_with_the_joint_batch(luna_folder, tmp_path, method):
    config = replace(
        TINY if method == "supervised" else FOCALMIX, batch_size=4, steps=6, positive=1.0, groups=2
    )
    train(config, luna_folder, tmp_path / "one")
    (tmp_path / "rank.py").write_text(
        "import sys; from pathlib import Path\n"
        "from fmkernels.focalmix.config import load_config; from fmkernels.focalmix.training.loop import train\n"
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


def test_focalmix_resumed_equals_uninterrupted(luna_folder, tmp_path, monkeypatch):
    train(FOCALMIX, luna_folder, tmp_path / "whole")
    stock, calls = loop.focalmix_loss, []

    def step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(*args)

    monkeypatch.setattr(loop, "focalmix_loss", step)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 8"):
        train(FOCALMIX, luna_folder, tmp_path / "stopped")
    monkeypatch.undo()
    train(FOCALMIX, luna_folder, tmp_path / "stopped", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


def test_the_teacher_may_be_the_current_weights(luna_folder, tmp_path):
    config, runs = replace(FOCALMIX, log_every=1), []
    for teacher in ("ema", "current"):
        train(replace(config, teacher=teacher), luna_folder, tmp_path / teacher)
        runs.append(metrics(tmp_path / teacher))
    averaged, current = runs
    assert averaged[: config.burn_in] == current[: config.burn_in]
    assert all(
        a != b for a, b in zip(averaged[config.burn_in :], current[config.burn_in :], strict=True)
    )


def test_unlabelled_patches_are_placed_on_what_was_found(luna_folder, tmp_path, monkeypatch):
    """Something is found at the nodules, brighter than all else: unlabelled patches show one, all or few of them."""
    searched, seen = [], []

    def search_all(config, model, data, series):
        searched.append(list(series))
        boxes = {uid: data.volume(uid).boxes(data.nodules(uid)) for uid in series}
        return {
            uid: Detections(own, np.ones(len(own)), np.zeros((len(own), 4)))
            for uid, own in boxes.items()
        }

    def step(model, teacher, labeled, unlabeled, *args):
        seen.extend(image.max().item() > 30 for image in unlabeled)
        return stock(model, teacher, labeled, unlabeled, *args)

    stock = loop.focalmix_loss
    monkeypatch.setattr(loop, "_search_all", search_all)
    monkeypatch.setattr(loop, "focalmix_loss", step)
    config = replace(FOCALMIX, patch_size=(12, 12, 12), test_subsets=(), unlabeled_positive=1.0)
    train(config, luna_folder, tmp_path / "found")
    assert all(seen) and len(seen) == 6 * config.unlabeled_batch_size
    assert len(searched) == 1 and not set(searched[0]) & set(trained_on(tmp_path / "found"))
    seen.clear()
    train(replace(config, unlabeled_positive=0.0), luna_folder, tmp_path / "anywhere")
    assert not all(seen) and len(searched) == 1


def test_unlabeled_takes_so_many_of_the_other_scans(luna_folder, tmp_path, monkeypatch):
    searched, stock = [], loop._search_all
    monkeypatch.setattr(
        loop, "_search_all", lambda *args: searched.extend(args[-1]) or stock(*args)
    )
    train(replace(FOCALMIX, unlabeled=1, steps=3, test_subsets=()), luna_folder, tmp_path / "run")
    assert len(searched) == 1 and searched[0] not in trained_on(tmp_path / "run")
    with pytest.raises(
        InputError, match="unlabeled: expected at most the 2 other training scans, got 3"
    ):
        train(replace(FOCALMIX, unlabeled=3), luna_folder, tmp_path / "many")


def test_focalmix_needs_scans_without_labels(luna_folder, tmp_path):
    for labeled in (None, 4):
        with pytest.raises(InputError, match="labeled: expected fewer than the 4 training scans"):
            train(replace(FOCALMIX, labeled=labeled), luna_folder, tmp_path / "run")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_their_models(preset):
    config = PRESETS[preset]
    model = build_model(config)
    assert config.anchors.per_place >= 1
    assert sum(p.numel() for p in model.parameters()) < 10_000_000


def test_auto_is_bf16_where_the_cpu_is_made_for_it(monkeypatch):
    for capabilities in ({"amx_bf16": True}, {"amx_bf16": False}, {}):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities
        )
        with autocast(Config(), torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") is bool(capabilities.get("amx_bf16"))
            assert (
                not torch.is_autocast_enabled("cpu")
                or torch.get_autocast_dtype("cpu") is torch.bfloat16
            )


def test_schedules():
    cosine, step = Config(steps=100, warmup=9), Config(steps=100, warmup=0, schedule="step")
    factors = [learning_rate_factor(i, cosine) for i in range(101)]
    assert (
        factors[0] == pytest.approx(0.1)
        and factors[100] == pytest.approx(0)
        and max(factors) > 0.95
    )
    assert np.argmax(factors) in (8, 9, 10)
    assert [learning_rate_factor(i, step) for i in (0, 59, 60, 84, 85, 99)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]
    restart = Config(steps=100, warmup=0, burn_in=40, schedule="restart")
    assert [learning_rate_factor(i, restart) for i in (0, 20, 40, 70, 100)] == pytest.approx(
        [1, 0.5, 1, 0.5, 0]
    )
    assert learning_rate_factor(39, restart) < 0.01
    for burn_in in (0, 100, 150):  # one cosine alone
        once = Config(steps=100, warmup=0, burn_in=burn_in, schedule="restart")
        assert [learning_rate_factor(i, once) for i in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spacing", (1.0, 1.0)),
        ("spacing", (1.0, 0.0, 1.0)),
        ("window", (600.0, -1200.0)),
        ("patch_size", (60, 32, 32)),
        ("strides", (2, 3, 4)),
        ("diameters", (5.0, 10.0)),
        ("diameters", (5.0, -10.0, 20.0)),
        ("widths", (16, 30, 48)),
        ("blocks", (1, 1)),
        ("channels", 6),
        ("batch_size", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("positive", 1.5),
        ("gamma", -1.0),
        ("schedule", "linear"),
        ("ops", "fast"),
        ("unlabeled", 0),
        ("unlabeled_positive", 1.5),
        ("amp", "int8"),
        ("labeled", 0),
        ("overlap", 48),
        ("train_subsets", ()),
        ("test_subsets", (0,)),
        ("train_subsets", (0, 11)),
        ("seed", 2**63),
        ("steps", 2.5),
        ("steps", "5"),
        ("steps", True),
        ("spacing", 1.0),
        ("spacing", "1,1,1"),
        ("blocks", (1, -1, 1)),
        ("device", 3),
        ("method", "magic"),
        ("teacher", "none"),
        ("pseudo_labels", "loud"),
        ("views", 9),
        ("temperature", 0.0),
        ("eta", 0.0),
        ("image_mixup", 1),
        ("spacing", (1e-9, 1.0, 1.0)),
        ("spacing", (1e9, 1.0, 1.0)),
        ("window", (-math.inf, math.inf)),
        ("window", (math.nan, 600.0)),
        ("patch_size", (1024, 512, 1024)),
        ("search_size", (2**40, 8, 8)),
        ("patch_size", (64.0, 64, 64)),
        ("widths", (4096, 4096, 4096)),
        ("widths", (4,) * 9),
        ("widths", ()),
        ("blocks", (65, 1, 1)),
        ("channels", 2**20),
        ("diameters", (5.0,) * 60),
        ("diameters", (5.0, 10.0, 1e6)),
        ("diameters", (5.0, 10.0, math.inf)),
        ("batch_size", 2**20),
        ("unlabeled_batch_size", 2**20),
        ("objects", 2**20),
        ("workers", 2**20),
        ("steps", 2**40),
        ("steps", 10**400),
        ("gamma", 10**400),
        ("warmup", math.inf),
        ("seed", -(2**70)),
        ("cache", "a\0b"),
        ("cache", "\ud800"),
    ],
)
def test_bad_configurations(field, value):
    with pytest.raises(InputError, match=f"^{field}: expected .*got"):
        replace(Config(), **{field: value})


def test_configurations_take_what_means_the_same():
    given = Config(
        seed=np.int64(3),
        gamma=np.float32(2),
        train_subsets=range(7),
        spacing=[2, 2, 2],
        steps=np.int32(9),
    )
    assert given == Config(seed=3, steps=9) and all(type(v) is float for v in given.spacing)
    json.dumps(asdict(given))


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
    for name, value in checkpoint["average"].items():
        if value.is_floating_point():
            checkpoint["average"][name] = value * math.nan
    torch.save(checkpoint, whole / CHECKPOINT)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(TINY, luna_folder, whole, resume=True)


def test_bad_devices():
    with pytest.raises(InputError, match="device: expected auto, cpu or cuda"):
        choose_device("meta")
    with pytest.raises(InputError, match="device: expected"):
        choose_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="found none"):
            choose_device("cuda")
