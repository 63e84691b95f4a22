"""benchmarks.tune without a GPU: made-up times, real choices, and kernels that take its rows."""

import importlib
import math

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from benchmarks import bench_predict_targets, tune
from benchmarks.common import Sweep
from benchmarks.tune import MARGIN, SWEEPS, Timing, choose
from fmkernels.kernels import tuning
from fmkernels.kernels.tuning import DEFAULT, TABLE, Launch
from tests.support import floor, on_gpu

DEFAULT_ROW, OTHER, THIRD = Launch(1024, 4), Launch(512, 4), Launch(2048, 8)


def timing(
    launch: Launch, *times: float, rounds: int = 50, noise: float = 0.005, seed: int = 0
) -> Timing:
    """A time for each workload with some noise, which depends on the seed."""
    generator = np.random.default_rng((seed, launch.block))
    return Timing(
        launch,
        np.array(times)[:, None] * (1 + noise * generator.standard_normal((len(times), rounds))),
    )


def test_a_row_can_be_pasted_into_the_table():
    launch = Launch(256, 8, max_registers=64, max_tiles=16, enough_programs=65536)
    line = tune.row("mixup3d", "sm_90", launch)
    assert eval(f"{{{line}}}") == {"mixup3d": {"sm_90": launch}}
    assert "enough" not in tune.row("mixup3d", "sm_90", OTHER)
    assert eval(f"{{{tune.row('mixup3d', 'sm_90', None)}\n}}") == {}


def test_chooses_the_fastest_beyond_the_noise():
    default, again = timing(DEFAULT_ROW, 1.0, 9.0), timing(DEFAULT_ROW, 1.0, 9.0, seed=1)
    assert choose(default, again, [timing(OTHER, 0.9, 8.0), timing(THIRD, 0.8, 7.0)]) == THIRD
    assert choose(default, again, [timing(OTHER, 0.9, 8.0), timing(THIRD, 1.8, 17.0)]) == OTHER
    assert choose(default, again, []) is None


@pytest.mark.parametrize("seed", range(20))
def test_keeps_the_default_within_the_noise(seed):
    default, again = (timing(DEFAULT_ROW, 1.0, noise=0.1, seed=seed + n) for n in (0, 100))
    assert choose(default, again, [timing(OTHER, 0.95, noise=0.1, seed=seed)]) is None
    default, again = (timing(DEFAULT_ROW, 1.0, noise=1e-4, seed=seed + n) for n in (0, 100))
    assert choose(default, again, [timing(OTHER, 1 - MARGIN / 2, noise=1e-4)]) is None


def test_keeps_the_default_where_a_workload_would_lose():
    default, again = timing(DEFAULT_ROW, 1.0, 1.0), timing(DEFAULT_ROW, 1.0, 1.0, seed=1)
    assert choose(default, again, [timing(OTHER, 0.6, 1.1)]) is None


def test_drift_that_all_settings_share_decides_nothing():
    drift = np.linspace(1, 3, 50)
    default, again, other = (
        Timing(t.launch, t.times * drift)
        for t in (timing(DEFAULT_ROW, 1.0), timing(DEFAULT_ROW, 1.0, seed=1), timing(OTHER, 0.9))
    )
    assert choose(default, again, [other]) == OTHER


def test_every_sweep_is_a_row_and_holds_the_default():
    assert {sweep.op for sweep in SWEEPS} == TABLE.keys() == TUNED.keys()
    for sweep in SWEEPS:
        default = TABLE[sweep.op][DEFAULT]
        settings = sweep.settings(default)
        assert default.num_warps in sweep.shapes[default.block]
        assert default not in settings and len(settings) == len(set(settings)) > 3
        assert all(32 * s.num_warps * (s.max_registers or 0) <= 65536 for s in settings)


SMALL = Sweep(
    "predict_targets",
    {512: (2,), 1024: (2, 4)},
    lambda: [(bench_predict_targets.comparison(bench_predict_targets.Workload(4, 1)), "forward")],
)


def test_a_tuning_run(monkeypatch):
    """Only the times are made up. One setting fails, one is wrong, one is faster."""
    monkeypatch.setattr(tune, "ROUNDS", 12)
    ours = bench_predict_targets.comparison.__globals__["PROVIDERS"]["fmkernels"]
    sweep = Sweep(SMALL.op, {256: (2,), 512: (2,), 1024: (2, 4)}, SMALL.cases)

    def call(logits, flips):
        launch = TABLE["predict_targets"][DEFAULT]
        if launch.block == 512:
            raise RuntimeError("out of resource: registers\nmore")
        return ours(logits, flips) + (launch.block == 256)

    monkeypatch.setitem(bench_predict_targets.PROVIDERS, "fmkernels", call)
    monkeypatch.setattr(
        tune.Run,
        "round",
        lambda _: {"forward": (0.0, 1.0 / (8 - TABLE["predict_targets"][DEFAULT].num_warps))},
    )
    before = {op: dict(rows) for op, rows in TABLE.items()}
    rows, record = tune.tune([sweep], "sm_90", limit=60)
    assert before == TABLE and rows == {"predict_targets": Launch(1024, 2)}
    result = record["ops"]["predict_targets"]
    assert {row["block"]: row["reason"].split(":")[0] for row in result["left_out"]} == {
        256: "AssertionError",
        512: "RuntimeError",
    }
    assert [round(row["time_to_default"], 3) for row in result["settings"]] == [1, 0.667, 1]
    monkeypatch.setitem(
        TABLE, "predict_targets", {**TABLE["predict_targets"], "sm_90": Launch(1024, 2)}
    )
    assert tune.tune([sweep], "sm_90", limit=60)[0] == rows


def test_out_of_time_the_row_in_use_is_still_compared_with_the_default(monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 12)
    monkeypatch.setitem(
        TABLE, "predict_targets", {**TABLE["predict_targets"], "sm_90": Launch(512, 2)}
    )
    _, record = tune.tune([SMALL], "sm_90", limit=0)
    assert [row["block"] for row in record["ops"]["predict_targets"]["settings"]] == [
        1024,
        512,
        1024,
    ]
    assert {row["reason"] for row in record["ops"]["predict_targets"]["left_out"]} == {
        "out of time"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


TUNED = {
    row: tuned
    for op in floor.plans()
    for row, tuned in importlib.import_module(f"tests.plans.{op}").tuned().items()
}


@pytest.mark.skipif(on_gpu(), reason="compiled kernels must not run")
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.op)
def test_a_kernel_takes_every_setting_of_its_row(sweep, monkeypatch):
    """Down to the launch, with the row of an architecture. The kernels do not run."""
    taken = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **options: taken.append(options))
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    call, names = TUNED[sweep.op]
    for setting in sweep.settings(TABLE[sweep.op][DEFAULT]):
        taken.clear()
        monkeypatch.setitem(TABLE, sweep.op, {**TABLE[sweep.op], "sm_90": setting})
        call()
        found = [
            (math.prod(o[n] for n in names), o.get("num_warps"), o.get("maxnreg"))
            for o in taken
            if o.keys() >= set(names)
        ]
        assert (setting.block, setting.num_warps, setting.max_registers) in found
