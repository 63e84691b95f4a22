"""What is particular to soft_target_focal_loss; test_ops.py has the tests that every op needs."""

import contextlib
import gc
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

import reference
from fmkernels import nn, soft_target_focal_loss
from fmkernels.kernels import soft_target_focal_loss as kernels
from fmkernels.kernels.tuning import Launch, launch_parameters
from tests.opinfo import FLOATS
from tests.support.cases import cases, kernel_cases, kernel_only
from tests.support.tolerance import assert_close
from tests.triton_checked.builder import CheckedBuilder

TARGETS = [*FLOATS, torch.uint8, torch.bool]
GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.3]
BLOCK = launch_parameters("soft_target_focal_loss", torch.device("cpu")).block


def make(shape, dtype=torch.float32, target_dtype=torch.float32, device="cpu", seed=0, spread=4.0):
    """Logits, and targets: some 0, some 1, some ignored, others in between."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
    targets = torch.rand(shape, generator=generator)
    draw = torch.rand(shape, generator=generator)
    targets[draw < 0.3] = 0
    targets[draw > 0.8] = 1
    if target_dtype.is_floating_point:
        targets[(draw > 0.5) & (draw < 0.6)] = -1
        targets = targets.to(target_dtype)
    else:
        targets = (targets > 0.5).to(target_dtype)
    return logits.to(device), targets.to(device)


def run(function, logits, targets, grad_outputs=None, **arguments):
    """Loss, gradients, and the given or random gradients of the result."""
    single = isinstance(logits, torch.Tensor)
    leaves = [x.detach().requires_grad_() for x in ([logits] if single else logits)]
    loss = function(leaves[0] if single else leaves, targets, **arguments)
    losses = [loss] if isinstance(loss, torch.Tensor) else loss
    if grad_outputs is None:
        generator = torch.Generator().manual_seed(5)
        grad_outputs = [torch.rand(v.shape, generator=generator).to(v.device) + 0.5 for v in losses]
    torch.autograd.backward(losses, [g.to(v) for g, v in zip(grad_outputs, losses, strict=True)])
    return loss, [x.grad for x in leaves], grad_outputs


def compare(logits, targets, dtype, **arguments):
    loss, gradients, grad_outputs = run(soft_target_focal_loss, logits, targets, **arguments)
    expected, expected_gradients, _ = run(
        reference.soft_target_focal_loss, logits, targets, grad_outputs, **arguments
    )
    if isinstance(loss, torch.Tensor):
        loss, expected = [loss], [expected]
    for ours, theirs in zip(loss, expected, strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs.to(ours.device), dtype)
    return gradients


@pytest.mark.parametrize("target_dtype", TARGETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pair_of_types(path, dtype, target_dtype):
    logits, targets = make((2, 333), dtype, target_dtype, device=path.device)
    compare(logits, targets, dtype)


def weights_for(shape, device):
    generator = torch.Generator().manual_seed(3)
    shapes = [
        (),
        (1,),
        (shape[0], *[1] * (len(shape) - 1)),
        shape[1:],
        shape,
        (shape[0], 1, *shape[2:]),
    ]
    return [torch.rand(s, generator=generator).to(device) for s in shapes]


@pytest.mark.parametrize("shape_of_weight", range(6))
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 4, 4), (5, 7), (3, 160)])
def test_weight_and_mix(path, shape_of_weight, mixed, shape):
    logits, targets = make(shape, device=path.device)
    weight = weights_for(shape, path.device)[shape_of_weight]
    mix = None
    if mixed:
        lam = torch.linspace(0.5, 1, shape[0], device=path.device)
        mix = (
            lam,
            torch.tensor([1, 0, 0, 2, 4][: shape[0]], device=path.device).clamp(max=shape[0] - 1),
        )
    for reduction in ("none", "mean"):
        compare(logits, targets, torch.float32, weight=weight, mix=mix, reduction=reduction)


@pytest.mark.parametrize("normalizer", [0.0, 0.3, 7, 12.5])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizer(path, normalizer, as_tensor):
    logits, targets = make((2, 77), device=path.device)
    given_value = torch.tensor(normalizer, device=path.device) if as_tensor else normalizer
    loss, gradients, grad_outputs = run(
        soft_target_focal_loss, logits, targets, normalizer=given_value
    )
    total, total_gradients, _ = run(
        reference.soft_target_focal_loss, logits, targets, grad_outputs, reduction="sum"
    )
    assert_close(loss, total / max(normalizer, 1))
    assert_close(gradients[0], total_gradients[0] / max(normalizer, 1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("container", [list, tuple])
def test_levels_equal_concatenation(path, reduction, container):
    shapes = [(2, 3, 9, 9, 9), (2, 3, 3, 3, 3), (2, 3, 1, 1, 1)]
    made = [make(shape, seed=i, device=path.device) for i, shape in enumerate(shapes)]
    logits, targets = container(x for x, _ in made), container(y for _, y in made)
    weight = torch.tensor([0.3, 2.0], device=path.device).reshape(2, 1, 1, 1, 1)
    mix = (torch.tensor([0.9, 0.6], device=path.device), torch.tensor([1, 0], device=path.device))
    for arguments in (
        {},
        {"weight": weight},
        {"weight": [weight] * 3, "mix": mix},
        {"weight": list(targets)},
    ):
        compare(logits, targets, torch.float32, reduction=reduction, **arguments)
    coarse_to_fine = container(reversed(logits)), container(reversed(targets))
    dense = [y[:1, :1].abs() for y in coarse_to_fine[1]]
    for arguments in ({"weight": dense}, {"weight": weight, "mix": mix}):
        compare(*coarse_to_fine, torch.float32, reduction=reduction, **arguments)
    loss = soft_target_focal_loss(logits, targets, reduction=reduction)
    if reduction == "none":
        assert type(loss) is container and [v.shape for v in loss] == [x.shape for x in logits]
    else:
        flat = [torch.cat([v.flatten() for v in values]) for values in (logits, targets)]
        assert_close(loss, soft_target_focal_loss(*flat, reduction=reduction))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0, 1.5, 2.0, 5.0, 40.0])
def test_float32_gradients_are_accurate_and_finite(path, gamma):
    targets = torch.cat(
        [torch.tensor([0.0, 1.0]), torch.rand(30, generator=torch.Generator().manual_seed(1))]
    )
    logits = torch.linspace(-60, 60, 1201)
    x, y = (v.flatten().to(path.device) for v in torch.meshgrid(logits, targets, indexing="ij"))
    ones = [torch.ones((), device=path.device)]
    _, (ours,), _ = run(soft_target_focal_loss, x, y, ones, gamma=gamma, reduction="sum")
    _, (exact,), _ = run(
        reference.soft_target_focal_loss, x.double(), y, ones, gamma=gamma, reduction="sum"
    )
    normal = exact.abs() > 1e-36  # below, float32 has no digits to be right with
    error = ((ours - exact).abs() / exact.abs())[normal]
    assert error.quantile(0.99) <= 1e-5
    assert error.median() <= 2e-6

    extreme = torch.tensor([-3e38, -1e5, -104.0, -88.0, -0.0, 0.0, 1e-30, 88.0, 104.0, 1e5, 3e38])
    x, y = (v.flatten().to(path.device) for v in torch.meshgrid(extreme, targets, indexing="ij"))
    loss, (gradient,), _ = run(
        soft_target_focal_loss, x, y, [torch.ones_like(x)], gamma=gamma, reduction="none"
    )
    assert gradient.isfinite().all() and loss.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
def test_overflowing_losses_keep_finite_gradients(path, gamma):
    logits = torch.tensor([-3e38, -math.inf, math.inf, 3e38], device=path.device)
    targets = torch.tensor([1.0, 1.0, 0.0, 0.0], device=path.device)
    _, (gradient,), _ = run(
        soft_target_focal_loss,
        logits,
        targets,
        [torch.ones(4)],
        gamma=gamma,
        alpha0=4,
        alpha1=4,
        reduction="none",
    )
    assert_close(gradient, torch.tensor([-4.0, -4.0, 4.0, 4.0]).to(path.device))


def test_levels_of_different_batch_sizes(path):
    shapes = [(4, 12, 12), (3, 6, 5), ()]
    made = [make(shape, seed=i, device=path.device) for i, shape in enumerate(shapes)]
    logits, targets = [x for x, _ in made], [y for _, y in made]
    for order in (slice(None), slice(None, None, -1)):
        for reduction in ("none", "sum"):
            weight = torch.tensor(0.5, device=path.device)
            compare(
                logits[order], targets[order], torch.float32, weight=weight, reduction=reduction
            )


def test_ignored_elements_get_no_gradient_whatever_arrives(path):
    logits, targets = (
        torch.zeros(4, device=path.device),
        torch.tensor([-1.0, 0.3, -1.0, 0.2], device=path.device),
    )
    grad_outputs = [torch.tensor([math.inf, 1.0, math.nan, 1.0])]
    _, (gradient,), _ = run(soft_target_focal_loss, logits, targets, grad_outputs, reduction="none")
    assert (gradient[::2] == 0).all() and gradient.isfinite().all()


def test_a_program_may_take_several_tiles(path, monkeypatch):
    monkeypatch.setattr(
        kernels, "launch_parameters", lambda *_: Launch(256, 4, max_tiles=3, enough_programs=1)
    )
    for n in (256 * 3, 256 * 7 + 5, 256 * 9, 100):
        logits, targets = make((2, n), device=path.device)
        mix = (torch.full((2,), 0.75, device=path.device), torch.tensor([1, 0], device=path.device))
        compare(logits, targets, torch.float32)
        compare(logits, targets, torch.float32, mix=mix, reduction="sum")


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 1.0])
def test_loss_at_the_target_is_zero(path, gamma):
    logits = torch.zeros(3, device=path.device)
    assert (
        soft_target_focal_loss(logits, torch.full_like(logits, 0.5), gamma=gamma, reduction="none")
        == 0
    ).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0])
def test_gradient_at_the_cusp_is_zero(path, gamma):
    logits = torch.zeros(3, device=path.device)
    _, (gradient,), _ = run(
        soft_target_focal_loss, logits, torch.full_like(logits, 0.5), gamma=gamma, reduction="sum"
    )
    assert (gradient == 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_logits(path, value):
    logits = torch.tensor([value, value, value], device=path.device)
    loss, (gradient,), _ = run(
        soft_target_focal_loss,
        logits,
        torch.tensor([0.0, 0.5, 1.0], device=path.device),
        reduction="none",
    )
    right = 2 if value > 0 else 0
    assert loss[right] == 0 and (loss.isfinite() & gradient.isfinite()).all()


def test_nan_propagates(path):
    logits = torch.tensor([math.nan, 0.0, math.nan, 0.0], device=path.device)
    targets = torch.tensor([0.5, math.nan, -1.0, 0.5], device=path.device)
    loss, (gradient,), _ = run(soft_target_focal_loss, logits, targets, reduction="none")
    assert loss.isnan().tolist() == gradient.isnan().tolist() == [True, True, False, False]
    assert loss[2] == gradient[2] == 0


@pytest.mark.parametrize("target", [0.1, 0.7, 0.95])
def test_minimum_is_at_the_target(path, target):
    p = torch.arange(1, 1000, device=path.device) / 1000
    loss = soft_target_focal_loss(torch.logit(p), torch.full_like(p, target), reduction="none")
    assert p[loss.argmin()].item() == pytest.approx(target)


def test_hard_targets_give_the_usual_focal_loss(path):
    logits, targets = make((4, 50), target_dtype=torch.bool, device=path.device)
    hard = targets.float()
    ce = F.binary_cross_entropy_with_logits(logits, hard, reduction="none")
    p_t = torch.where(targets, torch.sigmoid(logits), torch.sigmoid(-logits))
    expected = torch.where(targets, 0.25, 0.75) * (1 - p_t) ** 2 * ce
    assert_close(
        soft_target_focal_loss(logits, targets, alpha0=0.75, alpha1=0.25, reduction="none"),
        expected,
    )


def test_equals_torchvision_where_installed(path):
    ops = pytest.importorskip("torchvision.ops", exc_type=ImportError)
    logits, targets = make((4, 50), target_dtype=torch.bool, device=path.device)
    expected = ops.sigmoid_focal_loss(
        logits, targets.float(), alpha=0.25, gamma=2.0, reduction="none"
    )
    assert_close(
        soft_target_focal_loss(logits, targets, alpha0=0.75, alpha1=0.25, reduction="none"),
        expected,
    )


def test_equal_alphas_give_the_quality_focal_loss(path):
    logits, targets = make((4, 50), device=path.device)
    targets = targets.abs()
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    expected = (targets - torch.sigmoid(logits)).abs() ** 2 * ce
    assert_close(
        soft_target_focal_loss(logits, targets, alpha0=1, alpha1=1, reduction="none"), expected
    )


def test_holds_only_its_gradient_until_the_backward():
    """And hands that out, unless the graph is retained."""
    logits, targets = make((3, 400))
    x, received = logits.requires_grad_(), []
    hidden, targets = x * 1, targets.clone()
    hidden.register_hook(lambda gradient: received.append(gradient.data_ptr()))
    inputs = [StorageWeakRef(v.untyped_storage()) for v in (hidden, targets)]
    loss = soft_target_focal_loss(hidden, targets)
    del hidden, targets
    assert all(ref.expired() for ref in inputs)
    saved = loss.grad_fn.saved_tensors
    assert sorted(v.numel() for v in saved) == [1, x.numel()]
    places = [v.data_ptr() for v in saved]
    del saved
    loss.backward(retain_graph=True)
    loss.backward()
    assert [pointer in places for pointer in received] == [False, True]


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_float16_gradients_survive_a_grad_scaler(path, scale, reduction):
    logits = (
        torch.randn(60_000, generator=torch.Generator().manual_seed(0))
        .sub(4.6)
        .half()
        .to(path.device)
    )
    targets = torch.zeros(60_000, dtype=torch.uint8, device=path.device)
    factor = scale if reduction == "mean" else scale / 60_000
    grad_outputs = [torch.tensor(factor, device=path.device)]
    _, (ours,), _ = run(soft_target_focal_loss, logits, targets, grad_outputs, reduction=reduction)
    _, (exact,), _ = run(
        reference.soft_target_focal_loss,
        logits.double(),
        targets,
        grad_outputs,
        reduction=reduction,
    )
    if scale > 1:
        assert (ours.double() - exact).norm() <= 2e-3 * exact.norm()
    else:  # half precision itself cannot hold them: that is what the scaler is for
        assert (ours.double() - exact).abs().max() <= 2**-24


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_second_derivative_raises(path, dtype, reduction):
    logits, targets = make((3, 4), dtype, device=path.device)

    def loss(x):
        return soft_target_focal_loss(x, targets, reduction=reduction).float().sum()

    def penalty(x):
        return torch.func.grad(loss)(x).float().pow(2).sum()

    x = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert_close(gradient, torch.autograd.grad(loss(x), x)[0])
    with pytest.raises(RuntimeError, match="no second derivative is offered"):
        (loss(x) + gradient.float().pow(2).sum()).backward()
    with pytest.raises(RuntimeError, match="no second derivative is offered"):
        torch.func.grad(penalty)(logits)
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.hessian(loss)(logits)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_function_transforms(path, dtype, reduction):
    logits, targets = make((3, 4, 5), dtype, device=path.device)
    lam = torch.linspace(0.5, 1, 4, device=path.device)
    index = torch.tensor([3, 2, 1, 0], device=path.device)

    def loss(x, y):
        losses = soft_target_focal_loss([x, x], [y, y], mix=(lam, index), reduction=reduction)
        return sum(v.float().sum() for v in losses) if reduction == "none" else losses

    gradients = []
    for x, y in zip(logits, targets, strict=True):
        x = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(x, y), x)[0])
        assert_close(torch.func.grad(loss)(x.detach(), y), gradients[-1])
    gradients = torch.stack(gradients)
    assert_close(torch.vmap(torch.func.grad(loss))(logits, targets), gradients)
    of_columns = torch.vmap(torch.func.grad(loss), in_dims=2)
    assert_close(of_columns(logits.movedim(0, 2), targets.movedim(0, 2)), gradients)
    of_sum = torch.func.grad(lambda x: torch.vmap(loss)(x, targets).sum())
    assert_close(of_sum(logits), gradients)
    rows = torch.func.jacrev(loss)(logits[0], targets[0])
    assert_close(rows, gradients[0])


def test_batched_incoming_gradients(path):
    logits, targets = make((3, 4), device=path.device)
    loss = soft_target_focal_loss(logits.requires_grad_(), targets)
    factors = torch.tensor([1.0, 3.0], device=path.device)
    once, three = torch.autograd.grad(
        loss, logits, factors, is_grads_batched=True, retain_graph=True
    )[0]
    (expected,) = torch.autograd.grad(loss, logits)
    assert_close(once, expected)
    assert_close(three, expected * 3)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.loss = nn.SoftTargetFocalLoss()

    def forward(self, x, y):
        return self.loss(x * self.scale, y)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_gradients(strict):
    head, inputs = Head(), make((3, 40))
    head(*inputs).backward()
    exported = torch.export.export(head, inputs, strict=strict).module()
    for _ in range(2):
        exported.zero_grad()
        exported(*inputs).backward()
        assert_close(exported.scale.grad, head.scale.grad)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_autograd(dtype, reduction):
    logits, targets = make((3, 40), dtype)
    x = logits.requires_grad_()
    loss = soft_target_focal_loss(x, targets, reduction=reduction).float().sum() * 3
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    (expected,) = torch.autograd.grad(loss, x)
    assert_close(first, expected)
    assert_close(second, expected)


def test_permuted_input_is_not_copied(path):
    logits, targets = make((2, 3, 6, 5, 4), device=path.device)
    logits = logits.to(memory_format=torch.channels_last_3d)
    loss = soft_target_focal_loss(
        logits, targets.to(memory_format=torch.channels_last_3d), reduction="none"
    )
    assert loss.stride() == logits.stride()


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("rows", [1, 3])
def test_sizes_around_a_block(path, n, rows):
    logits, targets = make((rows, n), device=path.device)
    mix = None
    if rows > 1:
        mix = (
            torch.full((rows,), 0.75, device=path.device),
            torch.arange(rows, device=path.device).flip(0),
        )
    compare(logits, targets, torch.float32, mix=mix, reduction="none")
    compare(logits, targets, torch.float32, mix=mix)


def test_opcheck_with_gradients(path):
    """All but a derivative of all results: that of the gradients, of second order, raises."""
    tests = "test_schema", "test_autograd_registration", "test_faketensor"

    def check(name, *arguments, **options):
        op = getattr(torch.ops.fmkernels, name).default
        torch.library.opcheck(op, arguments, options, test_utils=tests)

    logits, targets = make((3, 40), device=path.device)
    weight = torch.rand(3, device=path.device)
    mix = torch.rand(3, device=path.device), torch.tensor([2, 2, 0], device=path.device)
    leaves = [logits.clone().requires_grad_(), logits.flip(0).requires_grad_()]
    inputs = leaves, [targets, targets], [weight, weight], *mix, 3, 0.05, 0.95, 2.0
    normalizer = torch.tensor(4.0, device=path.device)
    check("soft_target_focal_loss", *inputs, normalizer, True, with_gradients=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_without_graph_breaks(path, reduction, dtype):
    def step(x, y, w, lam, index):
        arguments = {"normalizer": (y > 0.5).sum()} if reduction == "mean" else {}
        return soft_target_focal_loss(
            [x, x * 2], [y, y / 2], weight=w, mix=(lam, index), reduction=reduction, **arguments
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (200, 330):
        logits, targets = make((3, n), dtype, device=path.device)
        weight = torch.rand(3, 1, generator=torch.Generator().manual_seed(1)).to(path.device)
        lam, index = (
            torch.full((3,), 0.9, device=path.device),
            torch.tensor([1, 2, 0], device=path.device),
        )
        results = []
        for function in (step, compiled):
            x = logits.clone().requires_grad_()
            loss = function(x, targets, weight, lam, index)
            total = loss if isinstance(loss, torch.Tensor) else sum(v.float().sum() for v in loss)
            (total * 3).backward()
            results.append((total, x.grad))
        assert_close(results[1][0], results[0][0])
        assert_close(results[1][1], results[0][1])


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
def test_compiles_to_machine_code():
    """Inductor, which generates C++ on the CPU: forward, and a backward without side effects."""

    def step(x, y):
        return soft_target_focal_loss(torch.tanh(x), y, normalizer=(y > 0.5).sum())

    torch._dynamo.reset()
    logits, targets = make((3, 200))
    expected = logits.clone().requires_grad_()
    (step(expected, targets) * 3).backward()
    x = logits.clone().requires_grad_()
    (torch.compile(step, fullgraph=True)(x, targets) * 3).backward()
    assert_close(x.grad, expected.grad)


def test_module_is_the_function(path):
    logits, targets = make((3, 40), device=path.device)
    module = nn.SoftTargetFocalLoss(alpha0=0.3, alpha1=0.6, gamma=1.5, reduction="sum")
    expected = soft_target_focal_loss(
        logits, targets, alpha0=0.3, alpha1=0.6, gamma=1.5, reduction="sum"
    )
    assert torch.equal(module(logits, targets), expected)
    assert repr(module) == "SoftTargetFocalLoss(alpha0=0.3, alpha1=0.6, gamma=1.5, reduction='sum')"


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "alpha0 must be a number, got str", {"alpha0": "0.1"}),
        (ValueError, "alpha1 must be finite", {"alpha1": math.nan}),
        (ValueError, "gamma must be >= 0, got -1", {"gamma": -1}),
        (ValueError, "reduction must be .* got 'avg'", {"reduction": "avg"}),
    ],
)
def test_module_checks_its_arguments(error, words, arguments):
    with pytest.raises(error, match=f"SoftTargetFocalLoss: {words}"):
        nn.SoftTargetFocalLoss(**arguments)


X, Y = torch.zeros(2, 3), torch.full((2, 3), 0.5)
LAM, INDEX = torch.ones(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("scalar", [np.float32, np.float64, np.int64])
def test_takes_numpy_scalars(scalar):
    x, y = torch.linspace(-2, 2, 5), torch.linspace(0, 1, 5)
    numbers = {"alpha0": 0, "alpha1": 1, "gamma": 2, "normalizer": 3}
    ours = soft_target_focal_loss(x, y, **{name: scalar(value) for name, value in numbers.items()})
    assert torch.equal(ours, soft_target_focal_loss(x, y, **numbers))
    hyperparameters = [scalar(numbers[name]) for name in ("alpha0", "alpha1", "gamma")]
    assert torch.equal(nn.SoftTargetFocalLoss(*hyperparameters)(x, y, normalizer=scalar(3)), ours)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("index must", {"mix": (LAM, INDEX - 1)}),
        ("index must", {"mix": (LAM, INDEX + 2)}),
        ("lam must be in", {"mix": (LAM * 1.25, INDEX)}),
        ("lam must be in", {"mix": (LAM * -0.5, INDEX)}),
        ("targets must be in", {"targets": Y + 0.75}),
        ("targets must be in", {"targets": Y + 0.75, "mix": (LAM, INDEX)}),
        ("targets must be in", {"targets": (Y * 510).to(torch.uint8)}),
        ("targets must be in", {"targets": (Y * 510).bfloat16()}),
        ("targets must be in", {"targets": (Y * 510).half()}),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_values_out_of_range_are_an_error(path, reduction, words, arguments):
    if path.device.type == "cuda":
        pytest.skip("a device assertion, compiled in by FMKERNELS_DEBUG=1, would end the process")
    with pytest.raises((AssertionError, ValueError), match=words):
        soft_target_focal_loss(**{"logits": X, "targets": Y, "reduction": reduction, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"mix": (LAM, INDEX - 1)},
        {"mix": (LAM, INDEX + 2)},
        {"mix": (LAM * 1.25, INDEX)},
        {"targets": Y + 0.75},
    ],
)
def test_an_error_keeps_no_memory(arguments):
    def fail():
        given = {"logits": X + 1, "targets": Y + 0, **arguments}
        with contextlib.suppress(ValueError):
            return soft_target_focal_loss(**given)
        return [StorageWeakRef(given[name].untyped_storage()) for name in ("logits", "targets")]

    kept = fail()
    gc.collect()
    given = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    assert sum(not ref.expired() for ref in kept) == len(given)


@kernel_only
def test_negative_mixed_targets_are_not_ignored(path, monkeypatch):
    """Without device assertions lam may be above 1: wrong, but ignored only where a target is."""
    monkeypatch.setattr(CheckedBuilder, "create_assert", lambda *args: None)
    logits = torch.linspace(-1, 1, 6, device=path.device).reshape(2, 3)
    targets = torch.tensor([[0.0, 0.2, -1.0], [1.0, 0.9, 0.3]], device=path.device)
    mix = torch.full((2,), 1.25, device=path.device), torch.tensor([1, 0], device=path.device)
    expected = reference.soft_target_focal_loss(logits, targets, mix=mix, reduction="none")
    assert (expected == 0).tolist() == [[False, False, True], [False, False, True]]
    compare(logits, targets, torch.float32, mix=mix, reduction="none")
    compare(logits, targets, torch.float32, mix=mix)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_and_normalizers_that_are_not_finite(path, value):
    """As IEEE arithmetic and the reference have it."""
    logits = torch.tensor([0.5, -1.0, 0.0, 2.0], device=path.device)
    targets = torch.tensor([0.2, 0.9, 0.5, -1.0], device=path.device)  # loss 0 at the third
    weight = torch.tensor([value, 1.0, value, value], device=path.device)
    arguments = {"weight": weight, "reduction": "none"}
    loss = soft_target_focal_loss(logits, targets, **arguments)
    assert_close(loss, reference.soft_target_focal_loss(logits, targets, **arguments))
    assert loss.isnan().tolist() == [math.isnan(value), False, True, False]
    normalizer = torch.tensor(value, device=path.device)
    compare(logits[:3], targets[:3], torch.float32, normalizer=normalizer)


FIELDS = {
    "shape": st.one_of(
        st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 13, 16]), max_size=3),
        st.tuples(st.sampled_from([1, 3]), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1])),
    ),
    "levels": st.sampled_from([None, None, 1, 2, 3]),
    "layout": st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    "dtype": st.sampled_from(FLOATS),
    "target_dtype": st.sampled_from(TARGETS),
    "alphas": st.sampled_from([(0.05, 0.95), (1.0, 1.0), (0.0, 2.0)]),
    "gamma": st.sampled_from([*GAMMAS, 0.1, 7.0]),
    "reduction": st.sampled_from(["none", "sum", "mean", "normalized"]),
    "weight": st.sampled_from([None, "sample", "element"]),
    "mixed": st.booleans(),
    "spread": st.sampled_from([0.1, 3.0, 40.0]),
    "seed": st.integers(0, 2**16),
}
CASE = st.fixed_dictionaries(FIELDS)
# what compiles a kernel, in fewer combinations; test_every_pair_of_types has all pairs
COMPILED = {
    "levels": st.sampled_from([None, 3]),
    "types": st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.uint8),
            (torch.float16, torch.float16),
            (torch.float64, torch.bool),
        ]
    ),
}


@cases(500)
@given(case=CASE)
def test_any_case_on_the_cpu_path(case):
    check_case(case)


@kernel_cases(60)
@given(case=st.fixed_dictionaries(FIELDS | COMPILED))
def test_any_case_in_the_kernel(path, case):
    dtype, target_dtype = case["types"]
    check_case({**case, "dtype": dtype, "target_dtype": target_dtype}, path.device)


def make_strided(shape, layout, *arguments):
    """As `make`, in another order of memory or with gaps."""
    stored = list(shape)
    if shape and layout == "transposed":
        stored[0], stored[-1] = stored[-1], stored[0]
        return [x.transpose(0, -1) for x in make(stored, *arguments)]
    if shape and layout == "sliced":
        stored[-1] *= 2
        return [x[..., ::2] for x in make(stored, *arguments)]
    if shape and layout == "expanded":
        stored[-1] = min(stored[-1], 1)
        return [x.expand(shape) for x in make(stored, *arguments)]
    return make(shape, *arguments)


def check_case(case, device="cpu"):
    shapes = [
        [*case["shape"][:1], *[n + i for n in case["shape"][1:]]]
        for i in range(case["levels"] or 1)
    ]
    options = case["dtype"], case["target_dtype"], device
    pairs = [
        make_strided(shape, case["layout"], *options, case["seed"] + i, case["spread"])
        for i, shape in enumerate(shapes)
    ]
    logits, targets = map(list, zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(case["seed"])
    batch = shapes[0][0] if shapes[0] else 0
    alpha0, alpha1 = case["alphas"]
    arguments = {"alpha0": alpha0, "alpha1": alpha1, "reduction": case["reduction"]}
    if case["reduction"] == "normalized":
        arguments |= {
            "reduction": "mean",
            "normalizer": torch.rand((), generator=generator).to(device) * 9,
        }
    if case["weight"]:
        sizes = (
            shapes
            if case["weight"] == "element"
            else [[n if d == 0 else 1 for d, n in enumerate(s)] for s in shapes]
        )
        arguments["weight"] = [torch.rand(size, generator=generator).to(device) for size in sizes]
    if case["mixed"] and batch:
        index = torch.randint(batch, (batch,), generator=generator)
        arguments["mix"] = (torch.rand(batch, generator=generator).to(device), index.to(device))
    if case["levels"] is None:
        (logits,), (targets,) = logits, targets
        if case["weight"]:
            (arguments["weight"],) = arguments["weight"]
    clear = away_from_the_cusp(case["gamma"], logits, targets, arguments)
    arguments["gamma"] = case["gamma"]
    loss, gradients, grad_outputs = run(soft_target_focal_loss, logits, targets, **arguments)
    expected, exact, _ = run(
        reference.soft_target_focal_loss, logits, targets, grad_outputs, **arguments
    )
    if case["reduction"] == "none":
        for ours, theirs, chosen in zip(*map(_as_list, (loss, expected)), clear, strict=True):
            assert_close(ours[chosen], theirs[chosen])
    else:
        assert_close(loss, expected)
    for ours, theirs, chosen in zip(gradients, exact, clear, strict=True):
        assert ours.isfinite().all()
        assert_close(ours[chosen], theirs[chosen])


def _as_list(x):
    return [x] if isinstance(x, torch.Tensor) else x


def away_from_the_cusp(gamma, logits, targets, arguments):
    """Where |y - p| is above 1%, if gamma < 2: near 0, |y - p|^gamma depends on rounding."""
    without, linear = (
        reference.soft_target_focal_loss(
            logits, targets, **{**arguments, "gamma": g, "reduction": "none", "normalizer": None}
        )
        for g in (0.0, 1.0)
    )
    return [
        b >= (0.01 * a if gamma < 2 else 0)
        for a, b in zip(_as_list(without), _as_list(linear), strict=True)
    ]


def test_what_a_hook_keeps_is_not_written_into():
    logits, kept = torch.randn(50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = soft_target_focal_loss(logits, torch.rand(50))
    before = [x.clone() for x in kept]
    (gradient,) = torch.autograd.grad(7 * loss, logits)
    assert all(map(torch.equal, kept, before)) and not torch.equal(gradient, before[-1])
