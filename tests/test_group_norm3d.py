"""What is particular to group_norm3d; test_ops.py has the tests that every op needs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from fmkernels import group_norm3d, nn
from tests.opinfo import FLOATS, make, rand
from tests.support import on_gpu
from tests.support.cases import cases, kernel_cases, kernel_only
from tests.support.tolerance import assert_close
from tests.triton_checked.interpreter import checked

LAYOUTS = torch.contiguous_format, torch.channels_last_3d


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_does_not_cancel(path, layout, mean):
    """Of the variance as a difference of mean squares, no digit would be left."""
    x = make((2, 4, 5, 9, 8), scale=1.0) + mean
    x = x.to(path.device, memory_format=layout).requires_grad_()
    y = group_norm3d(x, 2)
    rounding = abs(mean) * 2**-22  # of the mean
    exact = x.detach().double().requires_grad_()
    expected = reference.group_norm3d(exact, 2)
    assert_close(y, expected, slack=rounding)
    grad_output = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
    (ours,) = torch.autograd.grad(y, x, grad_output)
    (right,) = torch.autograd.grad(expected, exact, grad_output.double())
    assert_close(ours, right, slack=rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_as_the_first_value_does_not_cancel(path, layout):
    """As the pivot of all values, it would leave half of the digits of the variance."""
    x = make((1, 2, 40, 16, 16), scale=1.0)
    x[..., 0, 0, 0] = 1e5
    x = x.to(path.device, memory_format=layout)
    assert_close(group_norm3d(x, 1), reference.group_norm3d(x, 1))


@pytest.mark.parametrize(("channels", "groups"), [(24, 6), (24, 8), (24, 1), (16, 16), (7, 7)])
def test_both_layouts_give_the_same(path, channels, groups):
    shape, found = (1, channels, 3, 5, 4), []
    tensors = (make(shape), make((channels,), seed=1), make(shape, seed=2))
    for layout in LAYOUTS:
        x, weight, residual = (t.clone().to(path.device).requires_grad_() for t in tensors)
        x_, residual_ = (t.contiguous(memory_format=layout) for t in (x, residual))
        y = group_norm3d(x_, groups, weight, residual=residual_, activation="leaky_relu")
        grad_output = (rand(*shape) / 4).to(path.device)
        gradients = torch.autograd.grad(y, (x, weight, residual), grad_output)
        assert y.is_contiguous(memory_format=layout)
        found.append((y, *gradients))
    for first, second in zip(*found, strict=True):
        assert_close(second, first.double())


def test_groups_across_tiles(path):
    """A tile has 128 channels, a group 35."""
    exact = [make(shape, torch.float64, seed=1) for shape in ((2, 140, 2, 3, 2), (140,))]
    x, weight = (t.float().to(path.device).requires_grad_() for t in exact)
    exact = [t.float().double().requires_grad_() for t in exact]
    y = group_norm3d(x.contiguous(memory_format=LAYOUTS[1]), 4, weight)
    expected = reference.group_norm3d(exact[0], 4, exact[1])
    assert_close(y.cpu(), expected)
    grad_output = torch.cos(expected.detach())
    gradients = torch.autograd.grad(y, (x, weight), grad_output.to(y))
    right = torch.autograd.grad(expected, exact, grad_output.float().double())
    for ours, theirs in zip(gradients, right, strict=True):
        assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_the_backward_keeps_input_weight_moments_and_the_result_of_an_activation(path, activation):
    leaf = make((2, 6, 3, 2, 4), device=path.device).requires_grad_()
    x, residual = leaf * 2, leaf * 3
    weight, bias = (torch.ones(6, device=path.device, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = group_norm3d(x, 3, weight, bias, residual=residual, activation=activation)
    (moments,) = (t for t in kept if t.shape == (2, 2, 3))
    assert moments.dtype == torch.float32
    expected = [x, weight, moments, *[y] * (activation is not None)]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]


def test_without_an_activation_the_gradient_to_the_residual_is_the_incoming_one(path):
    x = make((2, 6, 3, 2, 4), device=path.device)
    residual = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(group_norm3d(x, 3, residual=residual), residual, x)
    assert gradient.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_keeps_the_dtype_of_x(path, dtype):
    norm = nn.GroupNorm3d(2, 4, activation="relu").to(path.device)
    x = make((1, 4, 2, 3, 4), dtype, path.device).requires_grad_()
    with torch.autocast(path.device.type, dtype=torch.bfloat16):
        y = norm(x, residual=x.float())
    assert y.dtype == dtype and torch.equal(y, norm(x, residual=x))
    y.sum().backward()
    assert x.grad.dtype == dtype and norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm3d"])
def test_modules_replace_those_of_torch(path, kind, affine):
    if kind == "GroupNorm":
        theirs, ours = torch.nn.GroupNorm(2, 6, affine=affine), nn.GroupNorm3d(2, 6, affine=affine)
    else:
        theirs, ours = (m.InstanceNorm3d(6, eps=0.1, affine=affine) for m in (torch.nn, nn))
    if affine:
        theirs.weight.data, theirs.bias.data = make((6,)), make((6,), seed=1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = make((2, 6, 3, 4, 5))
    assert_close(ours.to(path.device)(x.to(path.device)).cpu(), theirs(x).double())


def test_modules_show_their_arguments():
    assert repr(nn.GroupNorm3d(2, 6)) == "GroupNorm3d(2, 6, eps=1e-05, affine=True)"
    assert repr(nn.GroupNorm3d(2, 6, affine=False, activation="relu")) == (
        "GroupNorm3d(2, 6, eps=1e-05, affine=False, activation='relu')"
    )
    assert repr(nn.InstanceNorm3d(6, activation="leaky_relu", negative_slope=0.2)) == (
        "InstanceNorm3d(6, eps=1e-05, affine=False, activation='leaky_relu', negative_slope=0.2)"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((4, 6), {}, "num_groups must divide the number of channels, 6, got 4"),
        ((2, 6), {"eps": -1.0}, "eps must be >= 0"),
        ((2, 6), {"activation": "gelu"}, "activation must be one of"),
        ((2, 6), {"negative_slope": -1.0}, "negative_slope must be >= 0"),
    ],
)
def test_modules_check_their_arguments_at_construction(arguments, options, words):
    with pytest.raises(ValueError, match=f"GroupNorm3d: {words}"):
        nn.GroupNorm3d(*arguments, **options)
    if arguments == (2, 6):
        with pytest.raises(ValueError, match=f"InstanceNorm3d: {words}"):
            nn.InstanceNorm3d(6, **options)


@kernel_only
@pytest.mark.skipif(on_gpu(), reason="needs the interpreter")
def test_offsets_beyond_two_to_the_31(path):
    """Of the last of many samples, which one program computes."""
    x = torch.empty((2**20 + 3, 16, 128), dtype=torch.bfloat16).mT.requires_grad_()
    x.detach()[-1] = make((128, 16))
    last = x.detach()[-1:].clone().requires_grad_()
    expected = group_norm3d(last, 16, activation="relu")
    (right,) = torch.autograd.grad(expected, last, last.detach())
    with checked(programs=[-1]):
        y = group_norm3d(x, 16, activation="relu")
        (gradient,) = torch.autograd.grad(y, x, x.detach())
    assert torch.equal(y[-1:], expected) and torch.equal(gradient[-1:], right)


@kernel_only
@pytest.mark.skipif(on_gpu(), reason="needs the interpreter")
@pytest.mark.parametrize("channels", [1, 2])  # contiguous, channels last
def test_rows_beyond_two_to_the_31(path, channels):
    """Of the last chunk, whose moments are not those of the whole."""
    x = torch.empty((1, 2**31 + 5, channels), dtype=torch.bfloat16).mT.requires_grad_()
    x.detach()[..., -3:] = 1
    with checked(programs=[-1]):
        y = group_norm3d(x, 1)
        (gradient,) = torch.autograd.grad(y, x, x.detach())
    for result in (y, gradient):
        assert (result[..., -3:] != 0).all() and (result[..., :3] == 0).all()


CASE = st.fixed_dictionaries(
    {
        "samples": st.integers(0, 3),
        "width": st.integers(1, 9),
        "groups": st.integers(1, 9),
        "sizes": st.lists(st.integers(1, 9), min_size=1, max_size=3),
        "last": st.booleans(),
        "dtype": st.sampled_from(FLOATS),
        "mean": st.sampled_from([0.0, 3.0]),
        "affine": st.booleans(),
        "residual": st.booleans(),
        "activation": st.sampled_from([None, "relu", "leaky_relu"]),
        "eps": st.sampled_from([0.01, 1.0]),
        "seed": st.integers(0, 2**16),
    }
)


def check_case(case, device="cpu"):
    """Any shape in both layouts; gradients relative to the largest, of which each is a sum."""
    channels, seed = case["width"] * case["groups"], case["seed"]
    shape = (case["samples"], channels, *case["sizes"])

    def tensor(i: int, mean: float = 0.0) -> Tensor:
        x = make(shape, case["dtype"], device, seed + i, scale=1.0) + mean
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if case["last"] else x
        return x.requires_grad_()

    x, residual = tensor(0, case["mean"]), tensor(1) if case["residual"] else None
    parameters = [make((channels,), seed=seed + i).to(device).requires_grad_() for i in (2, 3)]
    weight, bias = parameters if case["affine"] else (None, None)
    options = {"residual": residual, "activation": case["activation"], "eps": case["eps"]}
    y = group_norm3d(x, case["groups"], weight, bias, **options)
    expected = reference.group_norm3d(x, case["groups"], weight, bias, **options)
    assert_close(y, expected, arithmetic=case["dtype"])
    near = expected.detach().abs() < 0.05  # a kink of the activation
    grad_output = make(shape, case["dtype"], device, seed + 4).masked_fill(near, 0)
    inputs = [t for t in (x, residual, weight, bias) if t is not None]
    ours = torch.autograd.grad(y, inputs, grad_output)
    theirs = torch.autograd.grad(expected, inputs, grad_output.double())
    for actual, right in zip(ours, theirs, strict=True):
        largest = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        assert_close(actual.double() / largest, right / largest, actual.dtype)


@cases(100)
@given(case=CASE)
def test_any_case_on_the_cpu_path(case):
    check_case(case)


@kernel_cases(15)
@given(case=CASE)
def test_any_case_in_the_kernel(path, case):
    check_case(case, path.device)
