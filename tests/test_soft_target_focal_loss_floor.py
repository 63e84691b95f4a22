"""A late factor costs the loss one more pass over the gradient; offsets beyond 2^31 are right."""

import os
import subprocess
import sys

import pytest
import torch

from fmkernels import soft_target_focal_loss
from fmkernels.kernels.tuning import launch_parameters
from tests.support import on_gpu
from tests.support.cases import kernel_only
from tests.triton_checked.interpreter import checked

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the interpreter")

LAUNCH = launch_parameters("soft_target_focal_loss", torch.device("cpu"))
N = 3 * LAUNCH.block + 5


@kernel_only
@pytest.mark.parametrize(("factor", "passes"), [(1.0, 0), (3.0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_scales_the_saved_gradient_in_place(path, dtype, factor, passes):
    """By a factor of 1, as in a training step, it is not even read."""
    logits = torch.zeros(N, dtype=dtype, requires_grad=True)
    loss = soft_target_focal_loss(logits, torch.ones(N, dtype=dtype), reduction="sum")
    with checked(logits=logits) as report:
        (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(factor))
    assert report["logits"].read == 0
    assert report[gradient].read == report[gradient].written == passes * gradient.nbytes


@kernel_only
def test_offsets_beyond_two_to_the_31(path):
    n = 2**31 + 2 * LAUNCH.block + 3
    logits = torch.empty(n, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.empty(n, dtype=torch.uint8)
    logits.detach()[-3:], targets[-3:] = 1.5, 1
    x = logits.detach()[-3:].clone().requires_grad_()
    expected = soft_target_focal_loss(x, targets[-3:], reduction="none")
    (right,) = torch.autograd.grad(expected.sum(), x)
    with checked(programs=[-1]):
        losses = soft_target_focal_loss(logits.detach(), targets, reduction="none")
        loss = soft_target_focal_loss(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
    assert LAUNCH.tiles(n) == LAUNCH.max_tiles
    assert torch.equal(losses[-3:], expected) and torch.equal(gradient[-3:], right)


def test_debug_mode_compiles_range_checks_into_the_kernels():
    code = """
import triton
from tests.plans.soft_target_focal_loss import F32, backward, step
from tests.triton_checked.driver import recording

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
    checks = [f"fmkernels_sum_kernel {name}" for name in ("targets", "lam", "index")]
    assert done.stdout.splitlines() == [*checks, "fmkernels_elementwise_kernel targets"], (
        done.stderr
    )
