"""The benchmarks' own tests: comparisons, tables and figures, checks for `make gpu`."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from triton.runtime.interpreter import InterpretedFunction

from benchmarks import bench_growth, bench_host_time, common, device_checks, plot
from benchmarks.common import OURS, Comparison, Provider, op_suites
from tests.conftest import kernels, launches
from tests.support import on_gpu

ROOT = Path(__file__).parents[1]

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
        with pytest.raises(AssertionError, match="off by"):
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
    both = comparison(
        Provider(OURS, double), other, phases=("forward", "backward", "both"), host=True, elements=5
    )
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


def test_the_wall_clock_waits_for_a_gpu(monkeypatch):
    whole = comparison(Provider(OURS, double), phases=("forward", "backward", "both"))
    assert not common.wall_time(whole)
    monkeypatch.setattr(common, "DEVICE", torch.device("cuda"))
    (timed,) = common.wall_time(whole)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(time.perf_counter()))
    run, _ = timed.ready(timed.providers[0])
    spans = run.round()
    begins, ends = waits[::2], waits[1::2]
    assert (
        len(begins) == len(ends) == 2
        and timed.op == "double, wall time"
        and not any(timed.floor.values())
    )
    for phase, begin, end in zip(("forward", "both"), begins, ends, strict=True):
        assert begin <= spans[phase][0] < end <= spans[phase][1]


@pytest.mark.parametrize("suite", [bench_growth, bench_host_time])
def test_every_series_begins_with_few_elements(suite):
    smallest = {c.op if c.elements else c.workload: c for c in reversed(suite.EVERY)}
    assert len(smallest) == len(SUITES)
    for first in smallest.values():
        results = first.checked(first.providers[0]).forward()
        assert sum(result.numel() for result in results) < 1000


def test_sizes_grow():
    for op in {c.op for c in bench_growth.EVERY}:
        series = [c for c in bench_growth.EVERY if c.op == op]
        sizes = [c.elements for c in series]
        assert sizes == sorted(set(sizes)) and sizes[-1] > 10_000
        assert all(len(c.providers) >= 2 and c.providers[0].name == OURS for c in series)


SUITES = tuple(op_suites().values())
SUITE = """
import pytest, torch
from benchmarks import common
from benchmarks.common import OURS, Comparison, Provider, rows

common._COPY_BYTES = 1 << 20

def absent(x):
    return pytest.importorskip("absent_rival")

small = Comparison(
    op="double",
    workload="small",
    inputs=lambda: (torch.ones(5),),
    reference=lambda x: x.double() * 2,
    floor={"forward": 40},
    providers=[
        Provider(OURS, lambda x: x * 2),
        Provider("wrong", lambda x: x * 3),
        Provider("absent", absent),
    ],
)

@pytest.mark.parametrize(("comparison", "provider", "phase"), rows([small]))
def test_small(record, comparison, provider, phase):
    record(comparison, provider, phase)
"""


def row(op: str, workload: str, provider: str, milliseconds: float, **more) -> dict:
    return {
        "op": op,
        "workload": workload,
        "provider": provider,
        "phase": "forward",
        "median_s": milliseconds / 1e3,
        "p20_s": milliseconds / 1.1e3,
        "p80_s": milliseconds / 0.9e3,
        "bytes_per_s": 5e9,
        "share_of_copy": 0.25,
        "copy_bytes_per_s": 2e10,
        "peak_extra_bytes": None,
        "elements": None,
        "host": False,
        "threads": 2,
        "launches": None,
        "compiled": False,
    } | more


UNCOUNTED = {"bytes_per_s": None, "share_of_copy": None}


def run_of(rows: list[dict]) -> dict:
    return {
        "machine_info": {
            "cpu": {},
            "processor": "A processor",
            "threads": 1,
            "versions": {"torch": "2"},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-23T12:00:00",
        "left_out": {
            "timm": "could not import 'timm': No module named 'timm'",
            "growing, of 2": "no time was left",
        },
        "benchmarks": [{"extra_info": row} for row in rows],
    }


ROWS = [
    row("counted", "one", OURS, 2.0, launches=1),
    row("counted", "one", "rival", 8.0, launches=7),
    row("uncounted", "one", OURS, 3.0, **UNCOUNTED),
    row("uncounted", "two", "rival", 9.0, **UNCOUNTED),
    *(
        row("growing", f"of {n}", p, t * n, elements=n)
        for n in (1000, 1, 10)
        for p, t in ((OURS, 1.0), ("rival", 2.0))
    ),
]


def test_each_op_has_its_chart():
    charts = plot.figures(ROWS)
    counted, uncounted, growing = (charts[op].axes[0] for op in ("counted", "uncounted", "growing"))
    assert growing.get_title().startswith("growing, forward")
    assert [(line.get_label(), *line.get_xdata()) for line in counted.lines] == [
        (OURS, 25),
        ("rival", 25),
    ]
    assert "copy" in counted.get_xlabel()
    assert [(*line.get_xdata(), *line.get_ydata()) for line in uncounted.lines] == [(3, 0), (9, 1)]
    assert uncounted.get_xlabel() == "milliseconds"
    lines = {line.get_label(): line for line in growing.lines}
    assert list(lines[OURS].get_xdata()) == [1, 10, 1000] and list(lines["rival"].get_ydata()) == [
        2,
        20,
        2000,
    ]
    assert counted.lines[0].get_color() == uncounted.lines[0].get_color() == lines[OURS].get_color()
    assert growing.get_xscale() == growing.get_yscale() == "log"


def test_every_workload_is_drawn_in_the_phase_that_holds_all_of_it():
    trained = [
        row("op", "trained", OURS, 1.0, phase=phase) for phase in ("forward", "backward", "both")
    ]
    (axes,) = plot.figures([*trained, row("op", "other", OURS, 4.0)])["op"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "trained, forward and backward",
        "other, forward",
    ]
    assert list(axes.lines[0].get_ydata()) == [0, 1]


def test_plots_what_is_there_and_names_what_is_not(tmp_path, capsys):
    good, empty, broken = (tmp_path / f"{name}.json" for name in ("good", "empty", "broken"))
    good.write_text(json.dumps(run_of(ROWS)))
    empty.write_text(json.dumps(run_of([])))
    broken.write_text("{")
    missing = tmp_path / "missing.json"
    assert plot.main([str(path) for path in (missing, empty, broken, good)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == [
        str(missing),
        str(empty),
        str(broken),
    ]
    assert "| counted | one | forward | rival | 8.000 |" in out and "| 4.00 |  | 7 |" in out
    assert "A copy moves 20.0 GB/s with 2 CPU threads." in out
    assert "No time was left: growing, of 2. Not installed: timm." in out
    for op in ("counted", "uncounted", "growing"):
        assert (tmp_path / f"good-{op}.png").stat().st_size > 10_000
    assert good.with_suffix(".md").read_text() in out
    assert plot.main([str(good)]) == 0


RIVALS = [
    row("mixup3d", "float32 8 x 96^3", OURS, 2.0),
    row("mixup3d", "float32 8 x 96^3", "eager", 9.0),
    row("mixup3d", "float32 8 x 96^3", "best eager", 5.0),
    row("mixup3d", "float32 8 x 96^3", "monai", 7.0),
    row("mixup3d", "float32 8 x 96^3", "torch.compile", 4.0, compiled=True),
    row("host time of one element", "mixup3d", OURS, 0.02, host=True, **UNCOUNTED),
    row("host time of one element", "mixup3d", "cheapest", 0.01, host=True, **UNCOUNTED),
]


def test_the_short_table_holds_ours_to_the_best_of_each_kind(tmp_path):
    text = plot.speed(run_of([*RIVALS, *ROWS]))
    cells = "2 | 2.0 | 4.5, eager | 2.5, best eager | 2.0, torch.compile | 3.5, monai | 25.0 |"
    assert f"| `mixup3d` | float32 8 x 96^3 | forward | {cells}\n" in text
    assert (
        text.count("`mixup3d`") == 2 and "`mixup3d` 2.0." in text and "Not installed: timm." in text
    )
    (tmp_path / "docs").mkdir()
    path, page = tmp_path / "run.json", tmp_path / "docs" / "speed.md"
    path.write_text(json.dumps(run_of(RIVALS)))
    page.write_text("before\n<!-- speed: ../run.json -->\nold\n<!-- end of speed -->\nafter\n")
    for _ in range(2):
        assert plot.main([str(path), "--page", str(page)]) == 0
        assert "old" not in page.read_text() and "4.5, eager" in page.read_text()
        assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    page.write_text("without markers")
    assert (
        plot.main([str(path), "--page", str(page)]) == 1 and page.read_text() == "without markers"
    )


def test_the_short_table_asks_for_rows_that_there_are():
    every = {(c.op, c.workload): c for suite in SUITES for c in suite.EVERY}
    for op, workload, phase, plain in plot.SPEED:
        for each in (every[op, workload], every[op, f"{workload}, one thread"]):
            assert phase in each.floor and plain in [
                provider.name for provider in each.providers
            ], each


def test_the_chart_holds_ours_to_the_best_rival(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "BARS", ((2, "mixup"), (3, "not measured")))
    seen = []
    barh = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda *a, **k: seen.append(a[1:3]) or barh(*a, **k))
    one = [
        row(r["op"], f"{r['workload']}, one thread", r["provider"], r["median_s"] * 2)
        for r in RIVALS[:2]
    ]
    plot.chart(run_of([*RIVALS, *one]), tmp_path / "chart.png", dark=True)
    assert seen == [(0, 2.0)] and (tmp_path / "chart.png").stat().st_size > 5000


def test_the_page_has_the_table_of_every_committed_run():
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- speed: (\S+) -->\n(.*?)<!-- end of speed -->", text, re.S))
    found = sorted(ROOT.glob("benchmarks/results/*/benchmarks.json"))
    runs = {
        f"../{path.relative_to(ROOT).as_posix()}": path
        for path in found
        if path.parent.name != "local"
    }
    assert runs.keys() == {name for name, block in blocks.items() if block}
    for name, path in runs.items():
        run = json.loads(path.read_text(encoding="utf-8"))
        assert blocks[name] == f"{plot.speed(run)}\n"
        assert path.with_suffix(".md").read_text(encoding="utf-8") == plot.report(run)
        charts = {
            f"{path.stem}-{op.replace(' ', '-')}.png" for op in plot.figures(plot.rows_of(run))
        }
        assert charts == {chart.name for chart in path.parent.glob("*.png")}
        assert path.stat().st_size < 3 * 2**19
        assert all(f"({name.rpartition('/')[0]}/{chart})" in text for chart in charts)


@pytest.mark.parametrize("plugin", [True, False])
def test_a_run_records_what_it_left_out_and_nothing_that_names_the_machine(plugin, tmp_path):
    suite, report = tmp_path / "bench_small.py", tmp_path / "run.json"
    suite.write_text(SUITE)
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    pytest_ = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        suite,
    ]
    options = [
        "-o",
        "python_files=bench_*.py",
        "--benchmark-max-time=0",
        f"--benchmark-json={report}",
        *([] if plugin else ["-p", "no:benchmark"]),
    ]
    outer = {
        name for name in os.environ if name.startswith("PYTEST_")
    }  # under xdist, the plugin measures nothing
    environment = {name: os.environ[name] for name in os.environ.keys() - outer} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(
        [*pytest_, *options], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    run = json.loads(report.read_text())
    absent = "could not import 'absent_rival': No module named 'absent_rival'"
    assert run["left_out"] == {"double, small: wrong": "failed", "absent": absent}
    (entry,) = run["benchmarks"]
    assert entry["extra_info"]["provider"] == OURS
    assert entry["group"] == "double, small, forward" and entry["name"] in entry["fullname"]
    assert entry["stats"].keys() == {"rounds", "min", "max", "mean", "stddev"}
    assert entry["stats"]["min"] <= entry["extra_info"]["median_s"] <= entry["stats"]["max"]
    assert plot.main([str(report)]) == 0
    machine = run["machine_info"]
    assert machine.keys() == {"machine", "processor", "system", "cpu", "versions", "threads"}
    assert machine["versions"].keys() >= {"python", "torch", "numba", "numpy"}
    assert not run["commit_info"].keys() & {"project", "branch"}
    assert str(ROOT) not in report.read_text() and str(tmp_path) not in report.read_text()


def test_the_calls_for_a_sanitizer_agree_with_the_reference(capsys):
    device_checks.calls()
    assert len(capsys.readouterr().out.splitlines()) == len(device_checks.comparisons())


@pytest.mark.skipif(on_gpu(), reason="the kernels of a GPU are not to run")
def test_the_calls_for_a_sanitizer_launch_every_kernel(monkeypatch):
    launched = set()
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda kernel, *_, **__: launched.add(kernel.fn)
    )
    for cpu, name, launch in launches():
        monkeypatch.setattr(cpu, name, launch)
    for each in device_checks.comparisons():
        run, _ = each.ready(device_checks.ours_of(each))
        run.round()
    assert launched == kernels()


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


def test_large_checks_hold(monkeypatch, capsys):
    monkeypatch.setattr(device_checks, "PART", 2**14)
    device_checks.large(2**16 + 2**14)
    assert capsys.readouterr().out.count("81,920 elements") == len(SUITES)


@pytest.mark.parametrize("op", op_suites())
def test_large_checks_notice(op, monkeypatch):
    suite = op_suites()[op]
    function = getattr(suite, op)

    def beyond(x, *args, **kwargs):
        """Wrong where there is more than in a part."""
        result = function(x, *args, **kwargs)
        return result + (x.numel() > 2**15) * torch.ones_like(result)

    monkeypatch.setattr(suite, op, beyond)
    with pytest.raises(AssertionError):
        suite.large(2**16 + 2**14, 2**14)
