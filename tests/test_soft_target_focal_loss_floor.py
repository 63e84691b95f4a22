"""Bytes, races and offsets of the kernels of soft_target_focal_loss, in the checked interpreter."""

import pytest
import torch

from fmkernels import soft_target_focal_loss
from fmkernels.kernels import soft_target_focal_loss as kernels
from fmkernels.kernels.tuning import launch_parameters
from tests.support import on_gpu
from tests.triton_checked.interpreter import checked

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the interpreter")

LAUNCH = launch_parameters("soft_target_focal_loss", torch.device("cpu"))
N = 3 * LAUNCH.block + 5
ONE = torch.ones(())
NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
    torch.float16: "float16",
}


def traffic_of_a_step(
    dtype, target_dtype, *, mean=False, normalizer=None, with_gradient=True, upstream=1.0
):
    """Bytes read and written per element by forward and backward, the few scalars and partial sums left out."""
    logits, targets = torch.randn(N).to(dtype), torch.rand(N).mul(1.2).sub(0.2).to(target_dtype)
    with checked() as report:
        arguments = [logits], [targets], [], normalizer, None, None, 1, 0.05, 0.95, 2.0
        _, divisor, gradients = kernels.launch_sum(*arguments, mean, with_gradient)
        if with_gradient:
            kernels.launch_scale(gradients, torch.tensor(upstream), divisor)
    large = [t for name, t in report.traffic.items() if name in ("x[0]", "y[0]", "grad[0]")]
    assert all(t.read == t.read_once or upstream != 1 for t in large)
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
    assert traffic_of_a_step(dtype, target_dtype, with_gradient=False) == forward
    assert traffic_of_a_step(dtype, target_dtype) == both
    assert traffic_of_a_step(dtype, target_dtype, mean=True, normalizer=ONE * 7) == both
    # a factor that arrives only in the backward costs one more pass over the gradient
    assert traffic_of_a_step(dtype, target_dtype, upstream=3.0) == both + 2 * dtype.itemsize


@pytest.mark.parametrize("shuffle", [0, 1])
def test_no_race_and_nothing_left_unwritten(shuffle):
    shapes = [(4, N), (4, LAUNCH.block), (4, 7)]
    logits, targets = [torch.randn(s) for s in shapes], [torch.rand(s) for s in shapes]
    weights = [torch.rand(4) for _ in shapes]
    mix = torch.rand(4), torch.tensor([3, 0, 0, 1])
    formula = 4, 0.05, 0.95, 1.5
    with checked(shuffle=shuffle) as report:
        _, divisor, gradients = kernels.launch_sum(
            logits, targets, weights, None, *mix, *formula, True, True
        )
        kernels.launch_scale(gradients, ONE * 2, divisor)
    assert all(report.never_written(f"grad[{i}]") == 0 for i in range(3))
    with checked(shuffle=shuffle) as report:
        kernels.launch_elementwise(logits, targets, weights, [ONE] * 3, ONE, *mix, *formula)
    assert all(report.never_written(f"out[{i}]") == 0 for i in range(3))


def test_offsets_beyond_two_to_the_31():
    n = 2**31 + 2 * LAUNCH.block + 3
    logits, targets = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.uint8)
    logits[-3:], targets[-3:] = 1.5, 1
    with checked(programs=[-1]):
        (losses,) = kernels.launch_elementwise(
            [logits], [targets], [], [], None, None, None, 1, 0.05, 0.95, 2.0
        )
    expected = soft_target_focal_loss(logits[-3:], targets[-3:], reduction="none")
    assert torch.equal(losses[-3:], expected)
    tiles = LAUNCH.tiles(n)
    with checked(programs=[-1]):
        _, _, (gradient,) = kernels.launch_sum(
            [logits], [targets], [], None, None, None, 1, 0.05, 0.95, 2.0, False, True
        )
    x = logits[-3:].clone().requires_grad_()
    soft_target_focal_loss(x, targets[-3:], reduction="sum").backward()
    assert tiles == LAUNCH.max_tiles and torch.equal(gradient[-3:], x.grad)
