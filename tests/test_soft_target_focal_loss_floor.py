"""Passes, launches and order of the sums of the loss; offsets beyond 2^31."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

import reference
from fmkernels import soft_target_focal_loss
from fmkernels.kernels import soft_target_focal_loss as kernels
from fmkernels.kernels.tuning import launch_parameters
from tests.support import on_gpu
from tests.support.cases import kernel_only
from tests.support.tolerance import assert_close
from tests.triton_checked.interpreter import KernelFault, checked

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
def test_one_launch_each_way(path):
    logits, targets = torch.zeros(N, requires_grad=True), torch.ones(N)
    with checked() as report:
        soft_target_focal_loss(logits, targets).backward()
    assert [launch.kernel for launch in report.launches] == [
        "fmkernels_sum_kernel",
        "fmkernels_scale_kernel",
    ]


@kernel_only
@pytest.mark.parametrize("normalizer", [None, 3.0])
def test_the_order_of_programs_changes_no_bit(path, normalizer, monkeypatch):
    """Where the last program adds the sums of all in several steps, too."""
    monkeypatch.setattr(kernels, "PARTIALS", tl.constexpr(4))
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 6 * LAUNCH.block + 3, generator=generator)
    targets[::7] = -1
    losses = []
    for seed in range(8):
        with checked(shuffle=seed):
            losses.append(
                soft_target_focal_loss(logits, targets.clamp(max=1), normalizer=normalizer)
            )
    exact = reference.soft_target_focal_loss(logits, targets.clamp(max=1), normalizer=normalizer)
    assert_close(losses[0], exact)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@triton.jit
def _relaxed(arrived):
    return tl.atomic_add(arrived, 1, sem="relaxed") == tl.num_programs(0) - 1


@kernel_only
def test_a_count_that_orders_nothing_is_a_race(path, monkeypatch):
    monkeypatch.setattr(kernels, "is_last", _relaxed)
    with pytest.raises(KernelFault, match="race: it reads a cell that program"):
        soft_target_focal_loss(torch.zeros(N), torch.ones(N))


@kernel_only
def test_few_programs_scale_all_gradients(path, monkeypatch):
    monkeypatch.setattr(kernels, "SCALE_BLOCK", 256)
    monkeypatch.setattr(kernels, "processors", lambda device: 1)
    sizes = [256 * 3 + 5, 0, 17, 256 * 4]
    logits = [torch.zeros(n, requires_grad=True) for n in sizes]
    targets = [torch.rand(n) for n in sizes]
    loss = soft_target_focal_loss(logits, targets, reduction="sum")
    with checked() as report:
        gradients = torch.autograd.grad(3 * loss, logits)
    (launch,) = report.launches
    assert launch.grid == (kernels.SCALE_PROGRAMS, 1, 1)
    for gradient, x, y in zip(gradients, logits, targets, strict=True):
        x = x.detach().requires_grad_()
        reference.soft_target_focal_loss(x, y, reduction="sum").backward()
        assert_close(gradient, 3 * x.grad)


@triton.jit
def _always(arrived):
    tl.debug_barrier()
    return tl.num_programs(0) > 0


@kernel_only
def test_offsets_beyond_two_to_the_31(path, monkeypatch):
    monkeypatch.setattr(kernels, "is_last", _always)  # of the programs, only the last one runs
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
