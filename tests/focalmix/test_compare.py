"""The comparison of methods: what is run, what is run again, and the table."""

import csv
import io
import itertools
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fmkernels.focalmix import compare as comparison
from fmkernels.focalmix.cli import _given, _parse, main
from fmkernels.focalmix.compare import (
    ABLATIONS,
    ALL_LABELS,
    BASELINE,
    EXTENSIONS,
    FOCALMIX,
    as_csv,
    as_markdown,
    as_text,
    compare,
)
from fmkernels.focalmix.config import Config, load_config
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.froc import evaluate
from fmkernels.focalmix.training import loop
from fmkernels.focalmix.training.checkpoint import BURN_IN, CHECKPOINT, PSEUDO_BOXES
from fmkernels.focalmix.training.loop import train
from tests.focalmix.conftest import SCANS, write_luna, write_scan
from tests.focalmix.training.test_loop import (
    ROOT,
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
    with open(tmp_path / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["method"], run["seed"]) for run in runs[:3]] == [
        *[(BASELINE, "0"), (BASELINE, "1"), (FOCALMIX, "0")]
    ]
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert set(timing["2"]) == {BASELINE, FOCALMIX, "K = 1"} and timing["2"][FOCALMIX] > 0
    cpms = [float(run["cpm"]) for run in runs if run["method"] == FOCALMIX]
    assert np.mean(cpms) == pytest.approx(rows[1].cpm) and len(runs) == 6
    assert [(c.method, c.seed, c.views, c.labeled) for c in trained] == [
        *[("supervised", 0, 2, 2), ("focalmix", 0, 2, 2), ("focalmix", 0, 1, 2)],
        *[("supervised", 1, 2, 2), ("focalmix", 1, 2, 2), ("focalmix", 1, 1, 2)],
    ]
    assert {c.steps for c in trained} == {2}
    for picture in ("cpm.png", "labeled-2/froc.png", "labeled-2/seeds.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for name, text in (("table.txt", as_text), ("table.md", as_markdown), ("table.csv", as_csv)):
        assert (tmp_path / name).read_text() == text(rows)
    trained.clear()
    assert compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=2, bootstraps=50) == rows[:2]
    assert not trained


def test_goes_on_where_it_was_stopped(luna_folder, tmp_path, trained, monkeypatch):
    stock = comparison.train

    def stop(*args, **named):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return stock(*args, **named)

    monkeypatch.setattr(comparison, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=2, bootstraps=10)
    monkeypatch.setattr(comparison, "train", stock)
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

    def detect_all(chosen, model, data, series, role):
        detected.append((chosen.method, chosen.loss, chosen.views, list(series)))
        return stock[1](chosen, model, data, series, role)

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


def test_several_runs_at_once_give_what_one_after_the_other_gives(luna_folder, tmp_path):
    """Burn-in and detection in the unlabeled scans are shared here too."""
    config = replace(CONFIG, burn_in=3, steps=5, log_every=1)
    settings = dict(labeled=[2], seeds=1, without=["views"], bootstraps=9)
    rows = compare(config, luna_folder, tmp_path / "one", **settings)
    assert compare(config, luna_folder, tmp_path / "two", jobs=2, **settings) == rows
    for name in ("supervised", "focalmix", "without-views"):
        one, two = (tmp_path / jobs / "labeled-2" / name / "seed-0" for jobs in ("one", "two"))
        assert_same_weights(one, two)
        log = (two / "log.txt").read_text()
        assert "training: " in log and "Traceback" not in log
        assert ("0/5" in log) == (name == "supervised")  # others begin after the burn-in
        assert (two / PSEUDO_BOXES).read_bytes() == (one / PSEUDO_BOXES).read_bytes()
        # the second FocalMix run finds the detections of the first one
        assert ("/2 [" in log) == (name == "focalmix")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_does_not_lose_the_others(luna_folder, tmp_path, capsys, jobs):
    config = replace(CONFIG, burn_in=1, steps=3, log_every=1, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"2 of 2 runs failed, the first one in .*step"):
        compare(config, luna_folder, tmp_path, labeled=[2], seeds=1, bootstraps=10, jobs=jobs)
    said = capsys.readouterr().out
    for number, method in ((1, "supervised"), (2, "FocalMix")):
        line = f"run {number} of 2: 2 labeled scans, {method}, seed 0: failed: FloatingPointError: "
        assert line in said


def test_why_a_process_failed(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("failed: OSError: an earlier one\nTraceback\nfailed: OSError: full\n\x1b[A")
    assert comparison._reason(log, 1) == "OSError: full"
    assert comparison._reason(log, -9) == "the process was ended by signal 9"
    log.write_text("nothing\n")
    assert comparison._reason(log, 3) == f"exit code 3, see {log}"


def test_extensions_change_what_they_say_and_share_what_is_the_same():
    config = replace(CONFIG, method="focalmix", burn_in=3, steps=9, spacing=(2.0, 2.0, 2.0))
    methods = comparison._methods(config, ABLATIONS, EXTENSIONS)
    runs = comparison._plan(config, Path("out"), methods, [2], 2, True)
    assert len({run.folder for run in runs}) == len(runs) == 2 * (len(methods) + 1)
    by_name = {run.method: run for run in runs if run.config.seed == 0}
    shared = by_name[BASELINE].folder
    alike = {"MixUp in supervised steps", "rotations", "contrast", "noise", "blur"}
    for name, run in by_name.items():
        suffix = name.rpartition(", ")[2]
        if name == ALL_LABELS:
            assert run.shared is None and run.config.labeled is None
        elif suffix in alike:
            assert run.shared == by_name[f"{BASELINE}, {suffix}"].folder != shared
        else:
            assert run.shared == shared, name
    assert by_name["burn-in alone"].config.steps == 3
    assert by_name["fresh supervised student"].config.student == "fresh"
    assert by_name["fresh student, teacher follows"].config.follow_after == 3
    assert by_name["FocalMix, noise"].config.method == "focalmix"
    for part in ("fresh-student", "noise"):
        (changes, *_) = EXTENSIONS[part](config).values()
        with pytest.raises(InputError, match=f"{part}: expected an extension that"):
            comparison._methods(replace(config, **changes), (), [part])


def test_the_baseline_is_not_a_fresh_student():
    config = replace(CONFIG, burn_in=1, student="fresh", teacher="fixed")
    methods = comparison._methods(config, (), ["fresh-supervised"])
    students = {name: replace(config, **changes).student for name, (_, changes) in methods.items()}
    assert students == {
        BASELINE: "continued",
        FOCALMIX: "fresh",
        "fresh supervised student": "fresh",
    }


def test_a_run_waits_for_what_it_shares(tmp_path):
    config = replace(CONFIG, burn_in=1)
    methods = comparison._methods(config, ["views"], ["fresh-supervised"])
    baseline, focalmix, views, rival = comparison._plan(config, tmp_path, methods, [2], 1, False)
    ready = comparison._is_ready
    assert ready(baseline, [], [focalmix]) and not ready(focalmix, [], [baseline])
    assert not ready(focalmix, [baseline], []) and ready(focalmix, [], [])
    baseline.folder.mkdir(parents=True)
    (baseline.folder / BURN_IN).touch()
    assert ready(focalmix, [baseline], []) and ready(rival, [baseline, focalmix], [])
    assert not ready(views, [baseline, focalmix], [])
    (baseline.folder / PSEUDO_BOXES).touch()
    assert ready(views, [baseline, focalmix], [])


def test_another_configuration_is_refused(luna_folder, tmp_path):
    compare(CONFIG, luna_folder, tmp_path, labeled=[2], seeds=1, bootstraps=10)
    with pytest.raises(InputError, match=r"gamma: expected 2.0 as in the run it holds, got 1.0"):
        compare(
            replace(CONFIG, gamma=1.0), luna_folder, tmp_path, labeled=[2], seeds=1, bootstraps=10
        )
    with pytest.raises(InputError, match="test_subsets: expected at least one"):
        compare(replace(CONFIG, test_subsets=()), luna_folder, tmp_path, labeled=[2], seeds=1)


def test_runs_of_other_data_are_refused(luna_folder, tmp_path, capsys):
    folder = shutil.copytree(luna_folder, tmp_path / "luna")
    settings = dict(labeled=[2], seeds=1, bootstraps=10)
    compare(replace(CONFIG, burn_in=1), folder, tmp_path / "out", **settings)
    assert "no checkpoint to resume" not in capsys.readouterr().err
    table = folder / "annotations.csv"
    kept = table.read_text()
    table.write_text(kept.replace(",9.0\n", ",8.5\n"))
    with pytest.raises(InputError, match=r"seed-0/data\.json: annotations: expected those that"):
        compare(replace(CONFIG, burn_in=1), folder, tmp_path / "out", **settings)
    table.write_text(kept)
    other = tmp_path / "other"
    write_scan(other / "new.nii.gz", SCANS[3])
    config = replace(CONFIG, burn_in=1, unlabeled_data=(str(other),))
    with pytest.raises(InputError, match=r"focalmix/seed-0/data\.json: unlabeled: expected"):
        compare(config, folder, tmp_path / "out", **settings)


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
    row = comparison._row(4, FOCALMIX, [froc(12), froc(12)], [froc(10), froc(10)])
    assert row.cpm == pytest.approx(0.6) and row.gain == pytest.approx(0.2)
    lower, upper = row.gain_interval
    assert 0 <= lower < 0.2 < upper  # never below zero: FocalMix finds all that the baseline finds
    unpaired = row.interval[0] / 0.5 - 1
    assert unpaired < lower
    alone = comparison._row(4, BASELINE, [froc(10)], [froc(10)])
    assert alone.gain is None and alone.gain_interval is None and alone.difference is None
    same = comparison._row(4, FOCALMIX, [froc(10), froc(4)], [froc(10), froc(4)])
    assert same.gain == pytest.approx(0) and same.gain_interval == (0, 0)
    assert same.difference_interval == pytest.approx((0, 0))


def test_the_interval_over_seeds_is_that_of_a_paired_t_test():
    """Differences of 0, 0.1 and 0.2: 0.1 with a standard error of 0.1 / sqrt(3), t(2) = 4.303."""
    row = comparison._row(4, FOCALMIX, [froc(8), froc(12), froc(16)], [froc(8), froc(10), froc(12)])
    assert row.difference == pytest.approx(0.1)
    reach = 4.30265 * 0.1 / 3**0.5
    assert row.difference_interval == pytest.approx((0.1 - reach, 0.1 + reach), abs=1e-5)
    one = comparison._row(4, FOCALMIX, [froc(12)], [froc(10)])
    assert one.difference == pytest.approx(0.1) and one.difference_interval is None


def test_a_part_is_compared_with_focalmix_too():
    results = {
        (4, BASELINE): [froc(8), froc(12)],
        (4, FOCALMIX): [froc(12), froc(12)],
        (4, "K = 1"): [froc(12), froc(10)],
    }
    baseline, focalmix, part = comparison._rows(results)
    assert baseline.to_focalmix is None and focalmix.to_focalmix is None
    assert part.to_focalmix == pytest.approx(-0.05)
    reach = 12.7062 * 0.05  # t(1), standard error of 0 and -0.1
    assert part.to_focalmix_interval == pytest.approx((-0.05 - reach, -0.05 + reach), abs=1e-5)
    assert part.difference == pytest.approx(0.05)
    assert as_text([part]).splitlines()[1].split()[-4:] == ["-0.050", "-0.685", "to", "+0.585"]
    parsed = next(csv.DictReader(io.StringIO(as_csv([part]))))
    assert float(parsed["to_focalmix"]) == pytest.approx(-0.05)


def test_the_share_of_the_way_to_all_labels():
    results = {
        (4, BASELINE): [froc(8), froc(12)],
        (4, FOCALMIX): [froc(10), froc(12)],
        (None, ALL_LABELS): [froc(14), froc(14)],
    }
    baseline, focalmix, every = comparison._rows(results)
    assert baseline.share is None and every.share is None and every.gain is None
    assert focalmix.share == pytest.approx(0.25)
    (_, _, line, last) = as_text([baseline, focalmix, every]).splitlines()
    assert (
        line.endswith("25%") and "nan" not in line and last.split()[:3] == ["all", "all", "labels"]
    )
    del results[None, ALL_LABELS]
    assert comparison._rows(results)[1].share is None


def test_a_gain_over_nothing_has_no_upper_end():
    """One nodule of 20: a third of the draws of scans miss it."""
    row = comparison._row(4, FOCALMIX, [froc(3)], [froc(1)])
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
    apart = comparison._row(4, FOCALMIX, [froc(20), froc(0)], [froc(10), froc(10)])
    assert np.allclose(apart.interval, (0, 1))


def test_tables_say_the_same():
    rows = [
        comparison._row(4, BASELINE, [froc(10)], [froc(10)]),
        comparison._row(4, FOCALMIX, [froc(12)], [froc(10)]),
    ]
    (_, first, second) = as_text(rows).splitlines()
    assert first.split()[:10] == ["4", "supervised", *["50.0"] * 7, "0.500"] and "+20.0%" in second
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
    assert main([*command, "--without", *ABLATIONS, "--all-labels"]) == 0
    table, said = capsys.readouterr()
    chance, *written = said.splitlines()[-4:]
    assert "fewer than 3 seeds decide nothing" in chance
    folder = tmp_path / "out"
    pictures = folder / "labeled-2" / "froc.png", folder / "labeled-2/focalmix/seed-0/sheet.png"
    assert written == [f"fmkernels: wrote {path}" for path in (folder, *pictures)]
    assert pictures[0].is_file()  # no_figures leaves the sheet out
    assert table.endswith("\n" + (tmp_path / "out" / "table.txt").read_text())
    assert all(name in table for name, _ in ABLATIONS.values())
    for part, (_, changes) in ABLATIONS.items():
        config = load_config(tmp_path / "out" / "labeled-2" / f"without-{part}" / "seed-0")
        assert all(getattr(config, option) == value for option, value in changes.items())


def dry_run(*arguments: str) -> str:
    """The commands of a target of the Makefile."""
    make = ["make", "--dry-run", "--always-make", *arguments, "PYTHON=python"]
    # the make that runs these tests hands its own flags and its level on
    env = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    made = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return made.stdout


def test_make_train_says_what_comes_before_it_installs_and_what_next():
    lines = dry_run("train", "SCANS=50", "LABELED=5").splitlines()
    said = [line for line in lines if line.startswith("echo")]
    assert lines[:2] == said[:2] and lines[-2:] == said[-2:] and len(said) == 4
    assert "50 synthetic" in said[0] and "5 labeled" in said[1] and "minutes on 2 cores" in said[1]
    assert "SEEDS=5" in said[2] and "fmkernels check" in said[3]
    assert any("pip install" in line for line in lines[2:])


@pytest.mark.parametrize("target", ["experiment", "tuning"])
def test_make_asks_for_comparisons_that_exist(target, tmp_path):
    """Every command of the target is parsed, and its options make a plan of runs."""
    printed = dry_run(target, "JOBS=3")
    commands = [
        shlex.split(line)[3:]
        for line in printed.replace("\\\n", " ").splitlines()
        if line.startswith("python -m fmkernels ")
    ]
    assert {command[0] for command in commands} == {"phantom", "compare"}
    for command in commands:
        arguments = _parse(command)
        if command[0] == "phantom":
            continue
        config = replace(Config(), **{k: v for k, v in _given(arguments).items() if k != "labeled"})
        methods = comparison._methods(config, arguments.without, arguments.extended)
        count = len(arguments.labeled) * len(methods) + arguments.all_labels
        runs = comparison._plan(
            config, tmp_path, methods, arguments.labeled, arguments.seeds, arguments.all_labels
        )
        assert len(runs) == count * arguments.seeds and arguments.jobs == 3
