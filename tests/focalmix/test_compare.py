"""The comparison of methods: what is run, what is run again, and the table."""

import csv
import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from fmkernels.focalmix import compare as comparison
from fmkernels.focalmix.cli import main
from fmkernels.focalmix.compare import (
    ABLATIONS,
    BASELINE,
    FOCALMIX,
    as_csv,
    as_markdown,
    as_text,
    compare,
)
from fmkernels.focalmix.config import load_config
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.froc import average, evaluate
from fmkernels.focalmix.training import loop
from fmkernels.focalmix.training.checkpoint import BURN_IN, CHECKPOINT, PSEUDO_BOXES
from fmkernels.focalmix.training.loop import train
from tests.focalmix.conftest import SCANS, write_luna
from tests.focalmix.training.test_loop import (
    TINY,
    assert_same_weights,
    metrics,
    no_figures,  # noqa: F401
)

CONFIG = replace(
    TINY,
    train_subsets=(0, 1, 2),
    steps=2,
    unlabeled_batch_size=2,
    burn_in=0,
    rampup_steps=0,
    max_objects=1,
    views=2,
    warmup=0,
)


@pytest.fixture(scope="module")
def luna_folder(tmp_path_factory):
    return write_luna(tmp_path_factory.mktemp("compare") / "luna", SCANS)


@pytest.fixture
def trained(monkeypatch):
    """The configurations that are trained."""
    calls, stock = [], comparison.train

    def train(config, *args, **named):
        calls.append(config)
        return stock(config, *args, **named)

    monkeypatch.setattr(comparison, "train", train)
    return calls


def test_trains_each_once_and_writes_the_table(luna_folder, tmp_path, trained):
    rows = compare(
        CONFIG, luna_folder, tmp_path, labeled=[2], seeds=2, without=["views"], bootstraps=50
    )
    assert [(row.labeled, row.method) for row in rows] == [
        (2, BASELINE),
        (2, FOCALMIX),
        (2, "K = 1"),
    ]
    assert [(c.method, c.seed, c.views, c.labeled) for c in trained] == [
        *[("supervised", 0, 2, 2), ("focalmix", 0, 2, 2), ("focalmix", 0, 1, 2)],
        *[("supervised", 1, 2, 2), ("focalmix", 1, 2, 2), ("focalmix", 1, 1, 2)],
    ]
    assert {c.steps for c in trained} == {2}
    for picture in ("cpm.png", "labeled-2/froc.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for name, text in (("table.txt", as_text), ("table.md", as_markdown), ("table.csv", as_csv)):
        assert (tmp_path / name).read_text() == text(rows)
    trained.clear()
    assert compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=2, bootstraps=50) == rows[:2]
    assert not trained


def test_goes_on_where_it_was_stopped(luna_folder, tmp_path, trained, monkeypatch):
    stock = comparison._evaluate

    def stop(*args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return stock(*args)

    monkeypatch.setattr(comparison, "_evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=2, bootstraps=10)
    monkeypatch.setattr(comparison, "_evaluate", stock)
    compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=2, bootstraps=10)
    assert [(c.method, c.seed) for c in trained] == [
        *[("supervised", 0), ("focalmix", 0)],
        *[("supervised", 1), ("focalmix", 1)],
    ]


def test_burn_in_and_detection_are_done_once_and_change_nothing(luna_folder, tmp_path, monkeypatch):
    """By the first of FocalMix and two ablations, also if the comparison is stopped after it."""
    config = replace(CONFIG, burn_in=3, steps=5, log_every=1)
    begun, detected, stock = [], [], (comparison.train, loop._detect_all)

    def train_from(chosen, root, folder, **named):
        begun.append((chosen.loss, (folder / CHECKPOINT).exists()))
        return stock[0](chosen, root, folder, **named)

    def detect_all(chosen, model, data, series):
        detected.append((chosen.method, chosen.loss, chosen.views, list(series)))
        return stock[1](chosen, model, data, series)

    monkeypatch.setattr(comparison, "train", train_from)
    monkeypatch.setattr(loop, "_detect_all", detect_all)
    settings = dict(labeled=[2], seeds=1, bootstraps=10)
    out = tmp_path / "all"
    compare(config, luna_folder, out, **settings)
    runs = out / "labeled-2"
    for name in (BURN_IN, PSEUDO_BOXES):
        assert (runs / "supervised" / "seed-0" / name).exists()
    compare(config, luna_folder, out, without=["soft-loss", "views"], **settings)
    assert begun == [("soft", False), ("soft", True), ("hard", True), ("soft", True)]
    data = LUNA16(luna_folder)
    unlabeled = [call for call in detected if data.subset(call[-1][0]) in config.train_subsets]
    assert [call[:3] for call in unlabeled] == [("focalmix", "soft", 2)]

    train(replace(config, method="focalmix", labeled=2), luna_folder, tmp_path / "alone")
    train(
        replace(config, method="focalmix", labeled=2, views=1), luna_folder, tmp_path / "ablation"
    )
    for ours, theirs in (("focalmix", "alone"), ("without-views", "ablation")):
        shared, alone = runs / ours / "seed-0", tmp_path / theirs
        assert_same_weights(shared, alone)
        assert metrics(shared) == metrics(alone)
        for run in (shared, alone):  # FocalMix steps alone are timed, whoever trained the others
            assert json.loads((run / "timing.json").read_text())["steps"] == 2


def test_another_configuration_is_refused(luna_folder, tmp_path):
    compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=1, bootstraps=10)
    with pytest.raises(InputError, match=r"gamma: expected 2.0 as in the run it holds, got 1.0"):
        compare(
            replace(CONFIG, gamma=1.0), luna_folder, tmp_path, labeled=[2], seeds=1, bootstraps=10
        )
    with pytest.raises(InputError, match="test_subsets: expected at least one"):
        compare(replace(CONFIG, test_subsets=()), luna_folder, tmp_path, labeled=[2], seeds=1)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"views": 1}, "views"),
        ({"loss": "hard"}, "soft-loss"),
        ({"image_mixup": False}, "image-mixup"),
    ],
)
def test_a_part_that_is_missing_already_cannot_be_left_out(
    luna_folder, tmp_path, trained, changes, part
):
    with pytest.raises(
        InputError, match=f"{part}: expected a component that the options have switched on"
    ):
        compare(
            replace(CONFIG, **changes), luna_folder, tmp_path, labeled=[2], seeds=1, without=[part]
        )
    assert not trained


def test_a_burn_in_of_all_steps_is_no_focalmix(luna_folder, tmp_path, trained):
    with pytest.raises(InputError, match="burn_in: expected less than the 2 steps, got 3"):
        compare(replace(CONFIG, burn_in=3), luna_folder, tmp_path, labeled=[2], seeds=1)
    assert not trained


def test_an_impossible_draw_is_told_before_any_training(luna_folder, tmp_path, trained):
    """One of the four training scans has no nodule; the first seed does not choose it alone."""
    bare = next(
        seed for seed in itertools.count() if np.random.default_rng(seed).permutation(4)[0] == 3
    )
    assert bare > 0
    with pytest.raises(InputError, match=f"found none in the scans chosen by seed {bare}"):
        compare(CONFIG, luna_folder, tmp_path, labeled=[1], seeds=bare + 1)
    assert not trained


def froc(hits: int):
    """Of 20 scans with a nodule each, so many found and nothing wrong."""
    scans = [f"{i}" for i in range(20)]
    found = {uid: [[0, 0, 0, 0.5]] for uid in scans[:hits]}
    return evaluate(found, {uid: [[0, 0, 0, 6]] for uid in scans}, {}, scans, bootstraps=200)


def test_gains_are_paired():
    """The draws of scans that make one curve high make the other one high."""
    row = comparison._row(4, FOCALMIX, average([froc(12), froc(12)]), average([froc(10), froc(10)]))
    assert row.cpm == pytest.approx(0.6) and row.gain == pytest.approx(0.2)
    lower, upper = row.gain_interval
    assert 0 <= lower < 0.2 < upper  # never below zero: FocalMix finds all that the baseline finds
    unpaired = row.interval[0] / 0.5 - 1
    assert unpaired < lower
    alone = comparison._row(4, BASELINE, average([froc(10)]), average([froc(10)]))
    assert alone.gain is None and alone.gain_interval is None
    same = comparison._row(4, FOCALMIX, average([froc(10), froc(4)]), average([froc(10), froc(4)]))
    assert same.gain == pytest.approx(0) and same.gain_interval == (0, 0)


def test_a_gain_over_nothing_has_no_upper_end():
    """One nodule of 20: a third of the draws of scans miss it."""
    row = comparison._row(4, FOCALMIX, average([froc(3)]), average([froc(1)]))
    assert (
        row.gain == pytest.approx(2) and row.gain_interval[0] < 2 and row.gain_interval[1] == np.inf
    )
    assert "inf%" in as_text([row])


def test_one_process_compares(luna_folder, tmp_path, monkeypatch):
    torchrun = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ({"WORLD_SIZE": "2"} | torchrun).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="compare: expected one process"):
        compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=1)


def test_seeds_are_drawn_too():
    apart = comparison._row(
        4, FOCALMIX, average([froc(20), froc(0)]), average([froc(10), froc(10)])
    )
    assert np.allclose(apart.interval, (0, 1))


def test_tables_say_the_same():
    rows = [
        comparison._row(4, BASELINE, average([froc(10)]), average([froc(10)])),
        comparison._row(4, FOCALMIX, average([froc(12)]), average([froc(10)])),
    ]
    (_, first, second) = as_text(rows).splitlines()
    assert first.split()[:9] == ["4", "supervised", *["50.0"] * 7] and "+20.0%" in second
    table = as_markdown(rows).splitlines()
    assert len({line.count("|") for line in table}) == 1 and "| FocalMix | 60.0 |" in table[3]
    parsed = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert float(parsed[1]["gain"]) == pytest.approx(0.2) and parsed[0]["gain"] == ""


def test_command(luna_folder, tmp_path, capsys):
    settings = [
        "--patch-size=16,16,16",
        "--strides=2,4",
        "--diameters=6,12",
        "--widths=4,8",
        "--blocks=0,1",
    ]
    settings += [
        "--channels=4",
        "--batch-size=2",
        "--unlabeled-batch-size=2",
        "--steps=1",
        "--burn-in=0",
        "--views=2",
    ]
    settings += [
        "--train-subsets=0,1,2",
        "--validation-subsets=",
        "--test-subsets=9",
        "--overlap=4",
        "--workers=0",
    ]
    settings += ["--roi-size=16,16,16", "--spacing=2.5,2,2", "--device=cpu"]
    command = [
        "compare",
        str(luna_folder),
        "--out",
        str(tmp_path / "out"),
        "--seeds=1",
        "--labeled",
        "2",
        *settings,
    ]
    assert main([*command, "--without", *ABLATIONS]) == 0
    table = capsys.readouterr().out
    assert table.endswith("\n" + (tmp_path / "out" / "table.txt").read_text())
    assert all(name in table for name, _ in ABLATIONS.values())
    for part, (_, changes) in ABLATIONS.items():
        config = load_config(tmp_path / "out" / "labeled-2" / f"without-{part}" / "seed-0")
        assert all(getattr(config, option) == value for option, value in changes.items())
