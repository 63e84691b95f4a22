"""benchmarks.gpu with stages that need no GPU: time limits, outcomes and the record."""

import json
import sys
import tarfile
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import COMMANDS, Stage, run
from tests.conftest import kernels as all_kernels


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "SHORTEST", 0.2)
    done = run(
        [
            Stage("good", python("print('well'); print()"), 20),
            Stage("bad", python("print('what went wrong'); raise SystemExit(3)"), 20),
            Stage("absent", [], 20, missing="the tool was not found"),
            Stage("last", python("import os; print(os.environ['FMKERNELS_TEST_DEVICE'])"), 20),
        ],
        tmp_path,
        {"gpu": "none"},
    )
    assert {name: (stage["outcome"], stage["last_line"]) for name, stage in done.items()} == {
        "good": ("passed", "well"),
        "bad": ("failed", "what went wrong"),
        "absent": ("skipped", "the tool was not found"),
        "last": ("passed", "cuda"),
    }
    assert json.loads((tmp_path / "run.json").read_text()) == {"gpu": "none", "stages": done}
    assert "what went wrong" in capfd.readouterr().out
    assert all(name in gpu.table(done) for name in done)
    assert "what went wrong" in (tmp_path / "bad.log").read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_stage_times_out_and_the_next_has_its_own_time(stubborn, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST", 0.2)
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if stubborn else "pass"
    # a worker that outlives the stage keeps its output open and must not block the run
    worker = "subprocess.Popen(['sleep', '8'], start_new_session=True)" if stubborn else "pass"
    slow = python(
        f"import signal, subprocess, time; {ignore}; {worker}; "
        "print('begun', flush=True); time.sleep(20)"
    )
    began = time.monotonic()
    done = run([Stage("slow", slow, 1.5), Stage("next", python("print(1)"), 15)], tmp_path, {})
    assert time.monotonic() - began < 8
    assert [stage["outcome"] for stage in done.values()] == ["timed out", "passed"]
    assert done["slow"]["last_line"] in ("begun", "KeyboardInterrupt")


def test_time_left_goes_to_the_next_stage_and_none_is_borrowed(tmp_path, monkeypatch):
    given = []

    def fake(stage, seconds, log):
        given.append(seconds)
        clock[0] += {"quick": 1, "slow": 35, "late": 0}[stage.name]
        return {"outcome": "passed", "seconds": 0, "last_line": ""}

    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "_run", fake)
    run(
        [Stage("quick", [], 10), Stage("slow", [], 20), Stage("late", [], 4)],
        tmp_path,
        {},
    )
    assert given == [10, 29, -2]
    given.clear()
    clock[0] = 103.0  # importing took 3 seconds
    run([Stage("quick", [], 10), Stage("slow", [], 20)], tmp_path, {}, began=100.0)
    assert given == [7, 26]
    monkeypatch.undo()
    assert (
        gpu._run(Stage("late", python("print(1)"), 4), -2, tmp_path / "late.log")["outcome"]
        == "left out"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_less_than_9_minutes(command, tmp_path, monkeypatch):
    for sanitizer in ("", "compute-sanitizer"):
        monkeypatch.setattr(gpu, "_sanitizer", lambda path=sanitizer: path)
        stages = COMMANDS[command](tmp_path)
        assert sum(stage.seconds for stage in stages) + gpu.GRACE < 9 * 60
        missing = [stage.name for stage in stages if stage.missing]
        assert missing == (
            ["memcheck", "racecheck"] if command == "checks" and not sanitizer else []
        )


def test_every_suite_is_run(tmp_path):
    suites = {path.stem.removeprefix("bench_") for path in gpu.ROOT.glob("benchmarks/bench_*.py")}
    assert suites | {"plots"} == {stage.name for stage in COMMANDS["bench"](tmp_path)}
    (tests, *_) = COMMANDS["checks"](tmp_path)
    assert all((gpu.ROOT / word).is_file() for word in tests.command if word.startswith("tests/"))


def test_every_kernel_bears_the_name_that_the_sanitizer_looks_for():
    names = [kernel.__name__ for kernel in all_kernels()]
    assert len(names) >= 9 and all(name.startswith(gpu.KERNELS) for name in names)


@pytest.mark.parametrize(
    ("outcome", "code"), [("passed", 0), ("skipped", 0), ("failed", 1), ("timed out", 1)]
)
def test_a_command_leaves_one_archive(outcome, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test (9)")
    done = {"tests": {"outcome": outcome, "seconds": 1.0, "last_line": "the last line"}}

    def fake(stages, out, about, began):
        assert about["commit"] == "0123abcd" and about["command"] == "bench"
        assert began < time.monotonic()
        (out / "growth.md").write_text("| a table |")
        return done

    monkeypatch.setattr(gpu, "run", fake)
    arguments = ["bench", "--results", str(tmp_path / "new"), "--commit", "0123abcd"]
    assert gpu.main(arguments) == code
    out = capsys.readouterr().out
    assert 0 < out.index("| a table |") < out.index("the last line")
    (archive,) = (tmp_path / "new").iterdir()
    assert archive.name == "nvidia-test-9-bench.tar.gz" and archive.name in out
    with tarfile.open(archive) as files:
        assert "./growth.md" in files.getnames()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    assert gpu.main(["checks", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
