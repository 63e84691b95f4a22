"""What the kernels of soft_target_focal_loss cost, held without a GPU: bytes, launches, registers, instructions."""

import pytest
import torch

from fmkernels import soft_target_focal_loss
from fmkernels.kernels import soft_target_focal_loss as kernels
from fmkernels.kernels.tuning import launch_parameters
from tests.support import on_gpu
from tests.support.driver import no_host_sync
from tests.support.interpreter import checked
from tests.support.plan import TARGETS, run_plan

pytestmark = pytest.mark.skipif(on_gpu(), reason="without a GPU: the interpreter counts, the compiler reports")

LAUNCH = launch_parameters("soft_target_focal_loss", torch.device("cpu"))
N = 3 * LAUNCH.block + 5
ONE = torch.ones(())
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.uint8: "uint8", torch.float16: "float16"}


def traffic_of_a_step(dtype, target_dtype, *, mean=False, normalizer=None, with_gradient=True, upstream=1.0):
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
        _, divisor, gradients = kernels.launch_sum(logits, targets, weights, None, *mix, *formula, True, True)
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
        (losses,) = kernels.launch_elementwise([logits], [targets], [], [], None, None, None, 1, 0.05, 0.95, 2.0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_op_synchronises_with_the_host(dtype, monkeypatch):
    """Everything above the launches, run as on a GPU: nothing there may read a value of a tensor."""
    from fmkernels.cpu import soft_target_focal_loss as cpu

    for name in ("launch_sum", "launch_elementwise", "launch_scale"):
        monkeypatch.setattr(cpu, name, getattr(kernels, name))
    for kernel in ("sum_kernel", "finish_kernel", "elementwise_kernel", "scale_kernel"):
        monkeypatch.setattr(kernels, kernel, Unlaunched())
    logits = [torch.zeros(2, 300, dtype=dtype, requires_grad=True) for _ in range(2)]
    targets = [torch.zeros(2, 300) for _ in range(2)]
    mix = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    with no_host_sync():
        for reduction in ("none", "sum", "mean"):
            normalizer = (targets[0] > 0.5).sum() if reduction == "mean" else None
            loss = soft_target_focal_loss(
                logits, targets, weight=torch.ones(2, 1), mix=mix, reduction=reduction, normalizer=normalizer
            )
            losses = [loss] if isinstance(loss, torch.Tensor) else loss
            torch.autograd.backward(losses, [torch.ones_like(v) for v in losses])


class Unlaunched:
    """A kernel that is never run."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def plan():
    return run_plan("tests.plans.soft_target_focal_loss")


def test_launches(plan):
    for name, case in plan.cases.items():
        kernels_launched = [kernel for kernel, _ in case.launches]
        if name.startswith(("sum", "mean")):
            assert kernels_launched == ["sum_kernel", "finish_kernel"], name
        else:
            assert len(kernels_launched) == 1, name


def test_sizes_share_their_variants(plan):
    assert plan.cases["sum float32 float32"].launches, "the sweep below would be empty"
    sweep = run_plan("tests.plans.soft_target_focal_loss_sizes", targets=("sm_90",), compiled=False)
    assert len([v for v in sweep.variants if v.kernel == "sum_kernel"]) <= 2  # int32 and int64 sizes


def test_compiled_code(plan):
    for variant in plan.variants:
        for target in TARGETS:
            code = variant.on[target]
            name = f"{variant.kernel} ({variant.case}) on {target}"
            assert code.spill_bytes == 0 and code.stack_bytes == 0, name
            assert code.conversions == 0, name
            if target != "gfx942" and "float64" not in variant.case:
                assert code.registers <= 96, name


def test_main_paths_are_vectorised(plan):
    """Every access to the elements moves 128 bits a thread (64 for 8 one-byte targets), at an odd size."""
    for variant in plan.variants:
        if variant.kernel == "finish_kernel":
            continue
        main = variant.on["sm_90"].main
        assert max(main.loads) == 128, variant.case
        if variant.kernel != "sum_kernel" or "forward only" not in variant.case:
            assert main.stores.get(128, 0) >= 1, variant.case
        assert sum(n for bits, n in main.loads.items() if bits < 64) <= 3, f"{variant.case}: {main.loads}"


# instructions per element on sm_90 where a program owns one tile, prologue and block-wide sum included
INSTRUCTIONS = {
    "sum float32 float32": 55,
    "sum bfloat16 bfloat16": 55,
    "sum bfloat16 uint8": 51,
    "sum, any gamma": 82,
    "losses": 40,
    "gradient again": 46,
    "gradient of losses": 45,
    "scale": 10,
}


@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_instructions_per_element(plan, case):
    variants = [v for v in plan.variants if v.case == case and v.kernel != "finish_kernel"]
    assert variants and all(v.per_element("sm_90") <= INSTRUCTIONS[case] for v in variants)
