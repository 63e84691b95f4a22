"""Every example runs and shows what it says, and so does the Python of README and docs."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fmkernels

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str) -> dict:
    """The variables of an example that has run, in this process."""
    torch._dynamo.reset()
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.+?)^```", text, re.M | re.S)


def falls(losses: list[float]) -> bool:
    return all(loss == loss for loss in losses) and losses[-1] < 0.9 * losses[0]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Examples would use a GPU, but its kernels cannot run beside interpreted ones."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_replace_focal_loss(capsys):
    after = run("replace_focal_loss")  # compares values and gradients itself
    assert (
        after["loss"].isfinite()
        and not after["logits"].grad[:, :, 0].any()
        and after["logits"].grad.any()
    )
    assert "hard targets" in capsys.readouterr().out


def test_mixup_loader():
    after = run("mixup_loader")
    losses = after["losses"]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert (
        after["mixed"].dtype == torch.float32
        and after["mixed"].min() >= 0
        and after["mixed"].max() <= 1
    )


def test_augment_ct():
    after = run("augment_ct")
    scans, flips, flipped, mixed = (after[name] for name in ("scans", "flips", "flipped", "mixed"))
    for scan, mask, result in zip(scans, flips.tolist(), flipped, strict=True):
        axes = [axis + 1 for axis in range(3) if mask >> axis & 1]
        expected = ((scan.float() + 1200) / 1800).clamp(0, 1).flip(axes).bfloat16()
        torch.testing.assert_close(result, expected)
    assert mixed.dtype == torch.bfloat16 and not torch.equal(mixed[:, :, 4:12], flipped[:, :, 4:12])


def test_second_stage():
    after = run("second_stage")
    assert after["crops"].shape == (3, 1, 24, 24, 24) and after["rois"].shape == (3, 8, 6, 6, 6)
    assert after["backbone"].weight.grad.abs().sum() > 0
    z1, z2 = after["wider"][0, [1, 4]].tolist()
    assert (z1, z2) == (6.5, 22.5)


def test_gradient_accumulation():
    after = run("gradient_accumulation")
    assert falls(after["losses"]) and after["scaler"].get_scale() > 1


def test_cuda_graph():
    name = "cuda_graph"
    if torch.cuda.is_available():
        assert run(name)["loss"].isfinite()
        return
    with pytest.raises(SystemExit) as end:
        run(name)
    assert not end.value.code


def test_compiled_step():
    if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        assert falls(run("compiled_step")["losses"])
    else:
        pytest.skip("torch.compile needs a C++ compiler, found none")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ddp", "the gradient of the joint batch"),
        ("fsdp", "the gradient of the joint batch, in shards"),
    ],
)
def test_ddp_and_fsdp(name, says):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, f"examples/{name}.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    # gloo sometimes aborts a process that is ending, after it has printed its line
    aborted = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2: {says}" in done.stdout


def test_exported_model():
    after = run("exported_model")  # compares gradients and results itself
    assert after["gradient"].norm() > 0


def test_lightning_module():
    pytest.importorskip("lightning")
    assert falls(run("lightning_module")["losses"])


def test_accelerate_loop():
    pytest.importorskip("accelerate")
    assert falls(run("accelerate_loop")["losses"])


def test_monai_focalmix():
    pytest.importorskip("monai")
    from monai.utils import optional_import

    if not optional_import("torchvision.models.detection._utils", name="Matcher")[1]:
        pytest.skip("MONAI's detector needs a torchvision that loads with this torch")
    after = run("monai_focalmix")
    assert falls(after["losses"])
    assert after["weight"] == 1 and all(
        y["anchor_targets"].shape == (2 * (4**3 + 2**3), 1) for y in after["found"]
    )


def test_the_diff_of_the_page_is_the_example():
    """Kept and added lines are lines of the example, in order; added ones are marked."""
    (diff,) = blocks("docs/monai.md", "diff")
    example = iter((EXAMPLES / "monai_focalmix.py").read_text(encoding="utf-8").splitlines())
    shown = [line for line in diff.splitlines() if line[0] in "+ "]
    assert sum(line[0] == "+" for line in shown) > 5
    for line in shown:
        assert any(
            code.split("  #")[0] == line[1:] and (line[0] == " " or "# +" in code)
            for code in example
        ), line


def test_the_diff_of_the_readme_is_part_of_that_of_the_page():
    (short,), (long,) = (blocks(page, "diff") for page in ("README.md", "docs/monai.md"))
    lines = iter(long.splitlines())
    for line in short.splitlines():
        assert line in lines, line


def test_every_example_is_tested_and_short():
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert re.search(rf"\b{path.stem}\b", tests)
        assert 20 <= len(lines) <= (80 if path.stem == "monai_focalmix" else 45), (
            f"{path.name} has {len(lines)} lines"
        )


def test_the_quick_start_runs_as_pasted():
    """In a fresh interpreter, which has imported nothing."""
    (block,) = blocks("README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", block],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.fullmatch(r"loss 0\.\d{4}\n", done.stdout), done


def test_python_in_the_pages():
    boxes = torch.tensor([[0.0, 1, 1, 1, 9, 9, 9], [1, 4, 4, 4, 10, 10, 10]])
    given = {
        "torch": torch,
        "soft_target_focal_loss": fmkernels.soft_target_focal_loss,
        "logits": [torch.zeros(2, 3, n, n, n, requires_grad=True) for n in (4, 2)],
        "targets": [torch.rand(2, 3, n, n, n) for n in (4, 2)],
        "number_of_positives": torch.tensor(5),
        "view_logits": torch.zeros(4, 2, 3, 4, 4, 4),
        "flips": torch.tensor([0, 1, 2, 4], dtype=torch.uint8),
        "scans": torch.zeros(2, 1, 16, 16, 16, dtype=torch.int16),
        "boxes": boxes,
        "donor_boxes": boxes.flip(0),
    }
    (loss,), (others,) = (
        blocks(f"docs/{page}.md", "python") for page in ("soft_targets", "quickstart")
    )
    for block in (loss, others):
        exec(block, given)
    given["loss"].backward()
    assert all(level.grad.any() for level in given["logits"])
    assert given["loss"].isfinite() and given["mixed"].dtype == torch.bfloat16
    assert given["lesions"].shape == (2, 1, 32, 32, 32)


def sigmoid_focal_loss(x, y, alpha=0.25, gamma=2, reduction="none"):
    """As torchvision defines it."""
    p = x.sigmoid()
    p_t, alpha_t = p * y + (1 - p) * (1 - y), alpha * y + (1 - alpha) * (1 - y)
    cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return getattr(alpha_t * (1 - p_t) ** gamma * cross_entropy, reduction)()


def test_what_is_replaced_gives_the_same():
    """Both halves of each block, before and after, on the same arguments."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 1, 1, 1, 9, 9, 9], [1, 4, 4, 4, 10, 10, 10]])
    arguments = {
        "F": F,
        "np": np,
        "torch": torch,
        "torchvision": SimpleNamespace(ops=SimpleNamespace(sigmoid_focal_loss=sigmoid_focal_loss)),
        "fmkernels": fmkernels,
        "model": lambda volumes: volumes.mean((2, 3, 4), keepdim=True),
        "logits": torch.randn(2, 1, 1, 1, 1),
        "targets": torch.rand(2, 1, 1, 1, 1).round(),
        "view_logits": torch.randn(4, 2, 3, 4, 4, 4),
        "flips": torch.tensor([0, 1, 2, 4], dtype=torch.uint8),
        "flipped": [[], [-3], [-2], [-1]],
        "T": 0.7,
        "scans": torch.rand(2, 1, 16, 16, 16),
        "boxes": boxes,
        "donor_boxes": torch.tensor([[0.0, 10, 10, 10, 15, 16, 14], [1, 11, 0, 0, 15, 4, 4]]),
        "lam": torch.tensor([0.6, 0.7]),
        "x": torch.randn(2, 4, 4, 4, 4),
        "groups": 2,
        "weight": torch.randn(4),
        "bias": torch.randn(4),
        "skip": torch.randn(2, 4, 4, 4, 4),
    }
    results = ("loss", None, "crops", "scans", "targets", "y")  # MixUp draws its numbers
    for block, result in zip(blocks("docs/replaces.md", "python"), results, strict=True):
        seen = []
        for part in block.split("# after"):
            given = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            exec(f"#{part}", given)
            seen.append(given[result] if result else None)
        before, after = (torch.cat(x) if isinstance(x, list) else x for x in seen)
        if result:
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
        else:
            assert given["loss"].isfinite() and given["mixed"].shape == (2, 1, 16, 16, 16)
