"""What benchmarks stand on: the comparison of providers, the table and pictures, what `make gpu` checks of every op."""

import importlib
import json
import pkgutil
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import fmkernels.kernels
from benchmarks import bench_growth, bench_host_time, common, device_checks, plot
from benchmarks.common import OURS, Comparison, Provider
from tests.conftest import launches
from tests.support import on_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks would run on the GPU")


@pytest.fixture(autouse=True)
def copies_are_not_timed(monkeypatch):
    monkeypatch.setattr(common, "copy_bandwidth", lambda threads: 1e10)


def comparison(*providers: Provider, phases=("forward",), **given) -> Comparison:
    return Comparison(
        op="double",
        workload="small",
        inputs=lambda: (torch.randn(5, requires_grad="backward" in phases),),
        reference=lambda x: x.double() * 2,
        floor=dict.fromkeys(phases, 40),
        providers=providers,
        **given,
    )


def double(x):
    return x * 2


def test_one_round_is_enough():
    row = comparison(Provider(OURS, double)).row(OURS, "forward", min_rounds=1, max_time=0.0)
    assert len(row.samples) == 1
    assert row.info["p20_s"] == row.info["median_s"] == row.info["p80_s"] == row.samples[0]


def test_rounds_end_with_their_number():
    row = comparison(Provider(OURS, double)).row(OURS, "forward", min_rounds=3, max_time=60.0)
    assert len(row.samples) == 1000


def test_a_comparison_is_measured_once_even_where_every_provider_fails():
    calls = []

    def wrong(x):
        calls.append(x)
        return x * 3

    failing = comparison(Provider(OURS, wrong))
    for _ in range(3):
        with pytest.raises(AssertionError, match="not close"):
            failing.row(OURS, "forward", min_rounds=1, max_time=0.0)
    assert len(calls) == 1


def test_a_provider_that_fails_in_a_round_fails_every_row():
    calls = []

    def once(x):
        calls.append(x)
        if len(calls) > 2:
            raise RuntimeError("no more")
        return x * 2

    failing = comparison(Provider(OURS, once))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no more"):
            failing.row(OURS, "forward", min_rounds=5, max_time=0.0)
    assert len(calls) == 3


def test_a_provider_may_have_a_reference_of_its_own():
    other = Provider("three times", lambda x: x * 3, reference=lambda x: x.double() * 3)
    both = comparison(Provider(OURS, double), other, phases=("forward", "backward", "both"), host=True, elements=5)
    info = both.row("three times", "backward", min_rounds=2, max_time=0.0).info
    assert info["elements"] == 5 and info["host"] and info["median_s"] > 0


def test_a_comparison_runs_on_as_many_threads_as_it_says(monkeypatch):
    monkeypatch.setattr(common, "copy_bandwidth", lambda threads: threads * 1e10)
    seen, before = set(), torch.get_num_threads()

    def counted(x):
        seen.add(torch.get_num_threads())
        return x * 2

    two = replace(comparison(Provider(OURS, counted)), threads=2)
    info = two.row(OURS, "forward", min_rounds=1, max_time=0.0).info
    assert seen == {2} and torch.get_num_threads() == before
    assert info["threads"] == 2 and info["copy_bytes_per_s"] == 2e10 and info["launches"] is None
    (alone,) = common.on_one_thread(two)
    seen.clear()
    info = alone.row(OURS, "forward", min_rounds=1, max_time=0.0).info
    assert seen == {1} and info["threads"] == 1 and info["workload"] == "small, one thread"


@pytest.mark.parametrize("suite", [bench_growth, bench_host_time])
def test_every_series_begins_with_one_element(suite):
    smallest = {c.op if c.elements else c.workload: c for c in reversed(suite.EVERY)}
    assert len(smallest) == 5
    for first in smallest.values():
        assert first.elements in (1, None)
        results = first.checked(first.providers[0]).forward()
        assert [result.numel() for result in results] == [1] or "object_mixup3d" in f"{first}"


def test_sizes_grow():
    for op in {c.op for c in bench_growth.EVERY}:
        series = [c for c in bench_growth.EVERY if c.op == op]
        sizes = [c.elements for c in series]
        assert sizes == sorted(set(sizes)) and sizes[-1] > 10_000
        assert all(len(c.providers) == 2 and c.providers[0].name == OURS for c in series)


def row(op: str, workload: str, provider: str, milliseconds: float, **more) -> dict:
    return {
        "op": op, "workload": workload, "provider": provider, "phase": "forward", "median_s": milliseconds / 1e3,
        "p20_s": milliseconds / 1.1e3, "p80_s": milliseconds / 0.9e3, "bytes_per_s": 5e9, "share_of_copy": 0.25,
        "copy_bytes_per_s": 2e10, "peak_extra_bytes": None, "elements": None, "host": False,
        "threads": 2, "launches": None,
    } | more  # fmt: skip


UNCOUNTED = {"bytes_per_s": None, "share_of_copy": None}


def run_of(rows: list[dict]) -> dict:
    return {
        "machine_info": {"cpu": {}, "processor": "A processor", "threads": 1, "versions": {"torch": "2"}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-23T12:00:00",
        "benchmarks": [{"extra_info": row} for row in rows],
    }


ROWS = [
    row("counted", "one", OURS, 2.0, launches=1), row("counted", "one", "rival", 8.0, launches=7),
    row("uncounted", "one", OURS, 3.0, **UNCOUNTED), row("uncounted", "two", "rival", 9.0, **UNCOUNTED),
    *(row("growing", f"of {n}", p, t * n, elements=n) for n in (1000, 1, 10) for p, t in ((OURS, 1.0), ("rival", 2.0))),
]  # fmt: skip


def test_each_kind_of_op_has_its_panel():
    panels = {axes.get_title().split(",")[0]: axes for axes in plot.figure(ROWS, "title").axes}
    assert [bar.get_height() for bar in panels["counted"].patches] == [25, 25]
    assert "copy" in panels["counted"].get_ylabel()
    assert [bar.get_height() for bar in panels["uncounted"].patches] == [3, 9]
    assert panels["uncounted"].get_ylabel() == "milliseconds"
    lines = {line.get_label(): line for line in panels["growing"].lines}
    assert list(lines[OURS].get_xdata()) == [1, 10, 1000] and list(lines["rival"].get_ydata()) == [2, 20, 2000]
    assert panels["growing"].get_xscale() == panels["growing"].get_yscale() == "log"


def test_plots_what_is_there_and_names_what_is_not(tmp_path, capsys):
    good, empty, broken = (tmp_path / f"{name}.json" for name in ("good", "empty", "broken"))
    good.write_text(json.dumps(run_of(ROWS)))
    empty.write_text(json.dumps(run_of([])))
    broken.write_text("{")
    missing = tmp_path / "missing.json"
    assert plot.main([str(path) for path in (missing, empty, broken, good)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == [str(missing), str(empty), str(broken)]
    assert "| counted | one | forward | rival | 8.000 |" in out and "| 4.00 |  | 7 |" in out
    assert "A copy moves 20.0 GB/s with 2 CPU threads." in out
    assert good.with_suffix(".png").stat().st_size > 10_000 and good.with_suffix(".md").read_text() in out
    assert plot.main([str(good)]) == 0


def test_the_calls_for_a_sanitizer_agree_with_the_reference(capsys):
    device_checks.calls()
    assert len(capsys.readouterr().out.splitlines()) == len(device_checks.comparisons())


@pytest.mark.skipif(on_gpu(), reason="the kernels of a GPU are not to run")
def test_the_calls_for_a_sanitizer_launch_every_kernel(monkeypatch):
    launched = set()
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *_, **__: launched.add(kernel.fn))
    for cpu, name, launch in launches():
        monkeypatch.setattr(cpu, name, launch)
    for each in device_checks.comparisons():
        run, _ = each.ready(device_checks.ours_of(each))
        run.round()
    kernels = {
        value.fn
        for module in pkgutil.iter_modules(fmkernels.kernels.__path__)
        for name, value in vars(importlib.import_module(f"fmkernels.kernels.{module.name}")).items()
        if name.endswith("_kernel")
    }
    assert len(kernels) >= 9 and launched == kernels


def test_a_graph_is_held_to_the_op_on_new_inputs(monkeypatch, capsys):
    """A graph that is replayed; and one that is not."""

    def replayed(call):
        results = call()
        return results, lambda: [old.copy_(new) for old, new in zip(results, call(), strict=True)]

    monkeypatch.setattr(device_checks, "captured", replayed)
    device_checks.graphs()
    assert len(capsys.readouterr().out.splitlines()) == len(device_checks.comparisons()) + 1
    monkeypatch.setattr(device_checks, "captured", lambda call: (call(), lambda: None))
    with pytest.raises(AssertionError, match="not equal"):
        device_checks.graphs()


def test_large_checks_hold_and_notice(monkeypatch, capsys):
    monkeypatch.setattr(device_checks, "PART", 2**14)
    monkeypatch.setattr(device_checks, "PIECE", 2**14)
    device_checks.large(2**16 + 2**14)
    assert capsys.readouterr().out.count("81,920 elements") == len(device_checks.LARGE) == 5
    names = ["soft_target_focal_loss", "predict_targets", "mixup3d", "crop_and_resize3d", "object_mixup3d"]
    for check, name in zip(device_checks.LARGE, names, strict=True):
        function = getattr(device_checks, name)

        def beyond(x, *args, function=function, **kwargs):
            """Wrong where there is more than in a part."""
            result = function(x, *args, **kwargs)
            return result + (x.numel() > 2**15) * torch.ones_like(result)

        monkeypatch.setattr(device_checks, name, beyond)
        with pytest.raises(AssertionError):
            check(2**16 + 2**14)
