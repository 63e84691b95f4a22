"""``fmkernels doctor``: the report, and that self-tests catch wrong operations."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmkernels
import fmkernels.cpu.soft_target_focal_loss as loss
from fmkernels import doctor, functional
from fmkernels.cpu.compiled import cache_folders
from fmkernels.focalmix.cli import main
from fmkernels.kernels.tuning import TABLE
from tests.conftest import launches

OPS = sorted(functional.__all__)
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_the_cpu(monkeypatch):
    """The faults of this test are in the CPU path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_report(capsys):
    assert main(["doctor"]) == 0
    folder = cache_folders()[0]
    said = capsys.readouterr().out
    for words in (
        *(f"ok    {op} on cpu: " for op in OPS),
        f"fmkernels {fmkernels.__version__}, Python {sys.version.split()[0]}",
        f"torch {torch.__version__}",
        "numba ",
        "numpy ",
        "triton ",
        "SimpleITK",
        "CPU path, ",
        "compiled loops of the CPU path: ",
        f" in {folder}",
        "forward",
        "gradient",
        f"all {len(OPS)} self-tests passed",
    ):
        assert words in said
    assert said.count("```") == 2 and "WRONG" not in said


def test_folders_that_are_neither_read_nor_written_are_not_named(monkeypatch, tmp_path):
    package, user = tmp_path / "package", tmp_path / "user"
    monkeypatch.setattr("fmkernels.cpu.compiled.cache_folders", lambda: [package, user])
    assert list(doctor._compiled_loops()) == [f"compiled loops of the CPU path: 0 in {package}"]
    user.mkdir()
    (user / "one.loop").touch()
    assert [line.partition(": ")[2] for line in doctor._compiled_loops()] == [
        f"0 in {package}",
        f"1 in {user}",
    ]


def test_lines_about_compiling_are_not_in_the_block(monkeypatch, caplog):
    log = logging.getLogger("fmkernels")
    monkeypatch.setattr(doctor, "_TESTS", {"mixup3d": lambda _: log.warning("compiled") or ()})
    assert doctor.doctor() == 0 and not caplog.records
    log.warning("compiled")
    assert len(caplog.records) == 1


def off_by_a_little(launch, results: int):
    """A launcher whose first result is 0.1% too large."""

    def call(*args):
        launch(*args)
        tensors = [x for x in args if isinstance(x, (list, torch.Tensor))]
        first = next(x for x in tensors[-results:] if isinstance(x, list) or x.numel())
        for out in first if isinstance(first, list) else [first]:
            out.mul_(1.001)

    return call


ELSEWHERE = {
    "soft_target_focal_loss_backward",  # a loss that is reduced saves its gradient
    "soft_target_focal_loss_elementwise",  # the self-test reduces
    "soft_target_focal_loss_scale",  # returns nothing; has a test of its own
}
LAUNCHERS = [(cpu, name) for cpu, name, _ in launches() if name not in ELSEWHERE]


@pytest.mark.parametrize(("module", "name"), LAUNCHERS, ids=[name for _, name in LAUNCHERS])
def test_a_wrong_operation_is_caught(monkeypatch, capsys, module, name):
    op = module.__name__.rpartition(".")[2]
    results = len(getattr(torch.ops.fmkernels, name).default._schema.returns)
    monkeypatch.setattr(module, name, off_by_a_little(getattr(module, name), results))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    wrong = "gradient" if name.endswith("_backward") else "forward"
    assert f"WRONG {op} on cpu" in said
    assert f"{wrong} is wrong: error" in said and said.count("WRONG") == 1
    assert f"1 of {len(OPS)} self-tests failed" in said


def test_a_gradient_that_forgets_its_factor_is_caught(monkeypatch):
    monkeypatch.setattr(loss, "soft_target_focal_loss_scale", lambda *args: None)
    (result,) = (r for r in doctor.examine() if r.problem)
    assert result.op == "soft_target_focal_loss" and result.problem.startswith("gradient is wrong")


def test_not_a_number_is_caught(monkeypatch):
    monkeypatch.setattr(functional, "predict_targets", lambda views, *_, **__: views[0] * torch.nan)
    (result,) = (r for r in doctor.examine() if r.problem)
    assert result.op == "predict_targets" and "forward is wrong: error inf" in result.problem


def test_lambdas_of_another_distribution_are_caught(monkeypatch):
    drawn = functional.sample_mixup

    def skewed(*args, **kwargs):
        lam, index = drawn(*args, **kwargs)
        return 0.5 + (lam - 0.5) ** 2, index

    monkeypatch.setattr(functional, "sample_mixup", skewed)
    (result,) = (r for r in doctor.examine() if r.problem)
    assert result.op == "sample_mixup" and "mean of 0.75" in result.problem


def test_an_operation_that_raises_does_not_hide_the_others(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(functional, "mixup3d", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert (
        "RuntimeError: no kernel image\n" in said
        and "for this device" not in said
        and said.count("ok   ") == len(OPS) - 1
    )


def test_without_triton_a_gpu_says_so(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("fmkernels.kernels.")]:
        if not module.endswith("tuning"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = doctor._missing_kernels()
    assert missing.startswith("Triton is missing: ") and "triton" in missing
    result = doctor._examine("mixup3d", pytest.fail, torch.device("cuda", 0), "none", "", missing)
    assert result.problem == missing


@pytest.mark.parametrize(
    ("architecture", "row"), [("gfx942", "row gfx942"), ("sm_75", "row default")]
)
def test_rows_of_the_launch_table(monkeypatch, architecture, row):
    monkeypatch.setattr(doctor.tuning, "architecture", lambda device: architecture)
    launch = doctor._launch("crop_and_resize3d", CPU)
    for name in ("crop_and_resize3d", "crop_and_resize3d_backward"):
        used = TABLE[name].get(architecture, TABLE[name]["default"])
        assert f"{name} {row} {used}" in launch


def test_nothing_but_torch_and_numpy_is_needed():
    """In a new interpreter, without triton and the extra train."""
    code = """
import sys
for name in ("triton", "SimpleITK", "scipy", "matplotlib", "tensorboard", "tqdm"):
    sys.modules[name] = sys.modules["reference"] = sys.modules["tests"] = None
from fmkernels.focalmix.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton is not installed" in done.stdout
    absent = "not installed: SimpleITK, scipy, matplotlib, tensorboard, tqdm; training"
    assert absent in done.stdout


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_defaults_of_the_process_change_nothing(default):
    is_dtype = isinstance(default, torch.dtype)
    (torch.set_default_dtype if is_dtype else torch.set_default_device)(default)
    try:
        assert not [result for result in doctor.examine() if result.problem]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
