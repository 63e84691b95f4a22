"""A short run of the fuzzer finds nothing. It shrinks planted failures and prints scripts."""

from types import SimpleNamespace

import pytest

from fmkernels import functional
from fmkernels.focalmix.errors import InputError
from tests import fuzz, test_predict_targets


def test_five_seconds_find_nothing(capsys):
    code = fuzz.main(["--minutes", f"{5 / 60}", "--seed", "1"])
    report = capsys.readouterr().out
    assert code == 0, report
    counts = {
        line.split()[0]: int(line.split()[1])
        for line in report.splitlines()
        if line.endswith(" cases")
    }
    assert counts.pop("all") == sum(counts.values())
    assert counts.keys() == {*fuzz.CHECKS, *fuzz.originals()[1]} and all(counts.values())
    assert {*functional.__all__} <= counts.keys()


def test_every_target_is_tried_before_the_time_counts():
    assert all(
        found == (1, "") for found in fuzz.fuzz(0, 1, ["sample_mixup", "config", "header"]).values()
    )


def test_a_failure_is_shrunk_after_the_end(monkeypatch):
    """The script is about the smallest failure, not about a later case that passes."""
    now = [0.0]

    def planted(target, case):
        if len(case["damage"]) > 1:
            now[0] = 2.0
            raise AssertionError("planted")

    monkeypatch.setattr(fuzz, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(fuzz, "check", planted)
    count, report = fuzz.run("header", 1, end=1.0)
    assert count > 2 and report.startswith("# AssertionError: planted\n")
    assert report.endswith("check('header', {'damage': [('number', 0, 0), ('number', 0, 0)]})")


def again(report: str) -> None:
    """Run the printed script."""
    exec(report[report.index("import torch") :], {})


def test_a_wrong_operation_is_found(monkeypatch, capsys):
    stock = test_predict_targets.check_case

    def wrong(case, device="cpu"):
        stock(case, device)
        assert case["temperature"] > 0.3 or case["shape"][1] < 2

    monkeypatch.setattr(test_predict_targets, "check_case", wrong)
    assert fuzz.main(["--minutes", "1", "--seed", "1", "--only", "predict_targets"]) == 1
    report = capsys.readouterr().out
    assert "predict_targets" in report and "FAILED" in report and "'temperature': 0.05" in report
    assert "'shape': (1, 2, " in report  # the smallest possible
    with pytest.raises(AssertionError):
        again(report)


@pytest.mark.parametrize(
    "error", [KeyError("steps"), RecursionError(), MemoryError(), TimeoutError()]
)
def test_an_unexpected_exception_is_found(monkeypatch, capsys, error):
    stock = fuzz.load_config

    def wrong(run):
        try:
            return stock(run)
        except InputError:
            raise error from None

    monkeypatch.setattr(fuzz, "load_config", wrong)
    assert fuzz.main(["--minutes", "1", "--seed", "1", "--only", "config"]) == 1
    report = capsys.readouterr().out
    assert type(error).__name__ in report
    with pytest.raises(type(error)):
        again(report)


def test_hangs_and_memory_hogs_are_stopped(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def hang(run):
        while True:
            pass

    def fill(run):
        return bytearray(2 * fuzz.BYTES)

    for wrong, error in ((hang, TimeoutError), (fill, MemoryError)):
        monkeypatch.setattr(fuzz, "load_config", wrong)
        with pytest.raises(error):
            fuzz.check("config", {"damage": []})


@pytest.mark.parametrize("kind", ["number", "flip", "cut", "lose", "double", "insert"])
def test_damage_reaches_everything_and_the_file_is_restored(kind):
    content = b"a 12 b 3.5e2 c"
    results = {
        fuzz.damaged(content, kind, position, token)
        for position in range(40)
        for token in range(40)
    }
    assert len(results - {content}) > 2
    _, paths, contents = fuzz.originals()
    fuzz.check("config", {"damage": [(kind, 17, 3)]})
    assert paths["config"].read_bytes() == contents["config"]
