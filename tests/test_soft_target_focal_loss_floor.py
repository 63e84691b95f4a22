"""Bytes, races and offsets of the kernels of soft_target_focal_loss, in the checked interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from fmkernels import soft_target_focal_loss
from fmkernels.kernels.soft_target_focal_loss import soft_target_focal_loss_scale
from fmkernels.kernels.tuning import launch_parameters
from tests.support import on_gpu
from tests.support.interpreter import checked
from tests.support.launch import launch

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the interpreter")

LAUNCH = launch_parameters("soft_target_focal_loss", torch.device("cpu"))
N = 3 * LAUNCH.block + 5
ONE = torch.ones(())
FORMULA = [], None, None, 1, 0.05, 0.95, 2.0  # without weights and mix


def traffic_of_a_step(
    dtype, target_dtype, *, mean=False, normalizer=None, with_gradients=True, grad_output=1.0
):
    """Bytes moved per element by forward and backward, without scalars and partial sums."""
    logits, targets = torch.randn(N).to(dtype), torch.rand(N).to(target_dtype)
    with checked() as report:
        _, divisor, gradients = launch(
            "soft_target_focal_loss", [logits], [targets], *FORMULA, normalizer, mean,
            with_gradients=with_gradients,
        )  # fmt: skip
        if with_gradients:
            soft_target_focal_loss_scale(gradients, torch.tensor(grad_output), divisor)
    large = [t for name, t in report.traffic.items() if name in ("x[0]", "y[0]", "grad[0]")]
    assert all(t.read == t.read_once or grad_output != 1 for t in large)
    return sum(t.read + t.written for t in large) / N


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "forward", "both"),
    [
        (torch.float32, torch.float32, 8, 12),
        (torch.bfloat16, torch.bfloat16, 4, 6),
        (torch.bfloat16, torch.uint8, 3, 5),
    ],
)
def test_moves_no_byte_more_than_needed(dtype, target_dtype, forward, both):
    assert traffic_of_a_step(dtype, target_dtype, with_gradients=False) == forward
    assert traffic_of_a_step(dtype, target_dtype) == both
    assert traffic_of_a_step(dtype, target_dtype, mean=True, normalizer=ONE * 7) == both
    # a factor that only the backward knows costs one more pass over the gradient
    assert traffic_of_a_step(dtype, target_dtype, grad_output=3.0) == both + 2 * dtype.itemsize


@pytest.mark.parametrize("shuffle", [0, 1])
def test_no_race_and_nothing_left_unwritten(shuffle):
    shapes = [(4, N), (4, LAUNCH.block), (4, 7)]
    logits, targets = [torch.randn(s) for s in shapes], [torch.rand(s) for s in shapes]
    weights, lam, index = [torch.rand(4) for _ in shapes], torch.rand(4), torch.tensor([3, 0, 0, 1])
    arguments = logits, targets, weights, lam, index, 4, 0.05, 0.95, 1.5
    with checked(shuffle=shuffle) as report:
        _, divisor, gradients = launch(
            "soft_target_focal_loss", *arguments, None, True, with_gradients=True
        )
        soft_target_focal_loss_scale(gradients, ONE * 2, divisor)
    assert all(report.never_written(f"grad[{i}]") == 0 for i in range(3))
    with checked(shuffle=shuffle) as report:
        launch("soft_target_focal_loss_backward", [ONE] * 3, *arguments, ONE)
    assert all(report.never_written(f"out[{i}]") == 0 for i in range(3))


def test_offsets_beyond_two_to_the_31():
    n = 2**31 + 2 * LAUNCH.block + 3
    logits, targets = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.uint8)
    logits[-3:], targets[-3:] = 1.5, 1
    with checked(programs=[-1]):
        (losses,) = launch("soft_target_focal_loss_elementwise", [logits], [targets], *FORMULA)
    expected = soft_target_focal_loss(logits[-3:], targets[-3:], reduction="none")
    assert torch.equal(losses[-3:], expected)
    tiles = LAUNCH.tiles(n)
    with checked(programs=[-1]):
        _, _, (gradient,) = launch(
            "soft_target_focal_loss", [logits], [targets], *FORMULA, None, False,
            with_gradients=True,
        )  # fmt: skip
    x = logits[-3:].clone().requires_grad_()
    soft_target_focal_loss(x, targets[-3:], reduction="sum").backward()
    assert tiles == LAUNCH.max_tiles and torch.equal(gradient[-3:], x.grad)


def test_debug_mode_compiles_range_checks_into_the_kernels():
    code = """
import triton
from tests.plans.soft_target_focal_loss import F32, backward, step
from tests.support.driver import recording

with recording("sm_90") as calls:
    step(F32, F32, rows=2, inner=2048)()
    backward(F32, F32)()
for variant in calls.variants:
    kernel = triton.compile(variant.source, target=variant.target, options=variant.options)
    if "__assertfail" not in kernel.asm["ptx"]:
        continue
    for name in ("targets", "lam", "index"):
        if f"{name} must be in" in kernel.asm["ttgir"]:
            print(variant.kernel, name)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["FMKERNELS_DEBUG"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    checks = [f"sum_kernel {name}" for name in ("targets", "lam", "index")]
    assert done.stdout.splitlines() == [*checks, "elementwise_kernel targets"], done.stderr
