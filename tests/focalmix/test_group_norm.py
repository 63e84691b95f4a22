"""The detector's group normalisation against torch's in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fmkernels.focalmix.group_norm import GroupNorm

TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
}  # of the largest value; bfloat16 is rounded between the two


def make(dtype: torch.dtype, shape: tuple[int, ...], *, relu: bool, residual: bool):
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(shape[1] // 4, shape[1], relu=relu)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x, other, upstream = (
        torch.randn(shape, generator=generator)
        .mul(3)
        .add(5)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last_3d)
        for _ in range(3)
    )
    return norm, x.requires_grad_(), other.requires_grad_() if residual else None, upstream


def plain(norm: GroupNorm, x, residual):
    y = F.group_norm(
        x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    )
    y = y if residual is None else y + residual.double()
    return F.relu(y) if norm.relu else y


def close(got, expected, dtype, *, besides=None):
    error = (got.double() - expected).abs() / expected.abs().max().clamp(min=1)
    if besides is not None:
        error = error.masked_fill(besides, 0)
    return error.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "shape",
    [(3, 16, 6, 5, 4), (2, 4, 1, 1, 1), (1, 48, 3, 3, 3), (2, 260, 2, 3, 2), (1, 8, 30, 9, 7)],
)
@pytest.mark.parametrize(
    ("relu", "residual"), [(True, False), (True, True), (False, True), (False, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, shape, relu, residual):
    norm, x, other, upstream = make(dtype, shape, relu=relu, residual=residual)
    inputs = [x, norm.weight, norm.bias, *([other] if residual else [])]
    out = norm(x, other)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last_3d)
    expected = plain(norm, x, other)
    assert close(out, expected, dtype)
    at_the_kink = (
        (expected.abs() < 0.05) & (expected != 0)
        if relu
        else torch.zeros_like(expected, dtype=torch.bool)
    )
    upstream = upstream.masked_fill(at_the_kink | ((out > 0) != (expected > 0)), 0)
    got = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream.double())
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype in (dtype, torch.float32) and close(ours, theirs.double(), dtype)


@pytest.mark.parametrize(("mean", "deviation"), [(100, 1), (1, 0.01), (0, 1e-3)])
def test_a_mean_far_from_zero_costs_no_digits(mean, deviation):
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(2, 8, 16, 16, 16, generator=generator) for _ in range(2))
    x = (x * deviation + mean).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    norm = GroupNorm(2, 8, relu=False)
    out, expected = norm(x), plain(norm, x, None)
    assert (out - expected).abs().max() < 1e-6 * (
        1 + mean / deviation
    )  # what rounding x * scale + shift costs
    ours, theirs = (torch.autograd.grad(y, x, upstream.to(y.dtype))[0] for y in (out, expected))
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_what_the_loops_do_not_take_is_left_to_torch():
    norm, x, _, _ = make(torch.float32, (2, 8, 4, 4, 4), relu=False, residual=False)
    small = torch.ones(1, 8, 4, 4, 4)
    torch.testing.assert_close(norm(x, small), norm(x) + small)
    assert norm(torch.ones(2, 8)).shape == (2, 8) and norm(torch.ones(2, 8, 3)).shape == (2, 8, 3)
    with pytest.raises(RuntimeError):
        norm(torch.ones(2, 16, 2, 2, 2))
    with pytest.raises(RuntimeError):
        norm(x, torch.ones(2, 8, 5, 4, 4))
    graph = make_fx(norm)(x.detach())
    torch.testing.assert_close(graph(2 * x.detach()), norm(2 * x.detach()))


def test_any_layout_gives_the_same():
    norm, x, _, upstream = make(torch.float32, (2, 8, 5, 4, 3), relu=True, residual=False)
    results = []
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        given = x.detach().contiguous(memory_format=layout).requires_grad_()
        out = norm(given)
        results.append(
            (out, *torch.autograd.grad(out, given, upstream.contiguous(memory_format=layout)))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_number_of_threads_changes_nothing():
    norm, x, other, upstream = make(torch.float32, (5, 16, 20, 20, 20), relu=True, residual=True)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            out = norm(x, other)
            results.append(
                [out, *torch.autograd.grad(out, [x, other, norm.weight, norm.bias], upstream)]
            )
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_loops_it_is_the_same(monkeypatch):
    """What a GPU and torch.compile get."""
    norm, x, other, upstream = make(torch.float32, (2, 8, 5, 4, 3), relu=True, residual=True)
    fused = norm(x, other)
    monkeypatch.setattr("fmkernels.focalmix.group_norm._is_fused", lambda *_: False)
    composed = norm(x, other)
    assert (
        "_Fused" in type(fused.grad_fn).__name__ and "_Fused" not in type(composed.grad_fn).__name__
    )
    for a, b in zip(
        *(torch.autograd.grad(y, [x, other, norm.weight], upstream) for y in (fused, composed)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    norm = GroupNorm(2, 8, relu=True)
    assert norm(torch.empty(0, 8, 2, 2, 2)).shape == (0, 8, 2, 2, 2)
