"""What is particular to mixup3d; test_ops.py has the tests that every op needs."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

import reference
from fmkernels import mixup3d, sample_mixup
from fmkernels.kernels import mixup3d as kernels
from fmkernels.kernels import tuning
from fmkernels.ops import mixup3d as ops
from tests.opinfo import FLOATS, VOXELS, make
from tests.support import on_gpu
from tests.support.cases import cases, kernel_cases
from tests.support.launch import launch
from tests.support.tolerance import assert_close

WINDOW = (-20.5, 30.0)
BLOCK = tuning.launch_parameters("mixup3d", torch.device("cpu")).block
"""Vectors of a program, each of 1, 2 or 4 float32 voxels."""


make = partial(make, scale=3.0)


def draw(batch, device="cpu", donors=None, seed=0):
    """lam, any index map, flips."""
    generator = torch.Generator().manual_seed(seed)
    lam = torch.rand(batch, generator=generator)
    index = torch.randint(donors or max(batch, 1), (batch,), generator=generator)
    flips = torch.randint(8, (batch,), generator=generator).to(torch.uint8)
    return lam.to(device), index.to(device), flips.to(device)


def assert_right(result, volumes, lam, index, **arguments):
    exact = reference.mixup3d(volumes, lam, index, **{**arguments, "dtype": torch.float64})
    assert_close(result, exact, arithmetic=volumes.dtype)


def compare(volumes, lam, index, **arguments):
    result = mixup3d(volumes, lam, index, **arguments)
    assert_right(
        result, volumes, lam, index, **{k: v for k, v in arguments.items() if k != "dtype"}
    )
    return result


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (4, 4, 16), (3, 5, 16), (2, 3, 24), (3, 4, 7), (1, 1, 33), (5, 1, 6)]
)
@pytest.mark.parametrize("flipped", [False, True])
def test_shapes(path, shape, flipped):
    for dtype in (torch.float32, torch.int16):
        volumes = make((3, 2, *shape), dtype, path.device)
        lam, index, flips = draw(3, path.device)
        compare(volumes, lam, index, flips=flips if flipped else None)


MAPS = {
    "identity": lambda n: torch.arange(n),
    "reversed": lambda n: torch.arange(n).flip(0),
    "cycle": lambda n: (torch.arange(n) + 1) % n,
    "all the first": lambda n: torch.zeros(n, dtype=torch.int64),
    "all the last": lambda n: torch.full((n,), n - 1),
    "a tail into a cycle": lambda n: torch.tensor(
        [(i + 1) if i + 1 < n else n // 2 for i in range(n)]
    ),
    "pairs": lambda n: torch.tensor([min(i ^ 1, n - 1) for i in range(n)]),
}


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_any_index_map_in_place_equals_out_of_place(path, batch, flipped):
    volumes = make((batch, 1, 3, 4, 8), device=path.device)
    lam, _, flips = draw(batch, path.device)
    for number, index in enumerate(MAPS.values()):
        index = index(batch).to(path.device)
        arguments = {"flips": flips.roll(number) if flipped else None}
        expected = compare(volumes, lam, index, **arguments)
        ours = volumes.clone()
        assert mixup3d(ours, lam, index, out=ours, **arguments) is ours
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("flipped", [False, True])
def test_out_may_be_volumes_or_donors_or_both(path, flipped):
    volumes, donors = (
        make((4, 1, 3, 2, 8), device=path.device),
        make((4, 1, 3, 2, 8), device=path.device, seed=1),
    )
    lam, index, flips = draw(4, path.device)
    masks = (flips, flips.roll(1)) if flipped else None
    expected = compare(volumes, lam, index, donors=donors, flips=masks)
    for target in (volumes, donors):
        kept, own, other = target.clone(), volumes.clone(), donors.clone()
        out = own if target is volumes else other
        mixup3d(own, lam, index, donors=other, flips=masks, out=out)
        assert torch.equal(out, expected) and torch.equal(target, kept)
        untouched, before = (other, donors) if out is own else (own, volumes)
        assert torch.equal(untouched, before)
    both = volumes.clone()
    expected = mixup3d(volumes, lam, index, donors=volumes, flips=masks)
    assert torch.equal(mixup3d(both, lam, index, donors=both, flips=masks, out=both), expected)


@pytest.mark.parametrize("size", [(4, 6, 16), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8])
def test_every_flip_equals_torch_flip(path, dtype, size):
    flips = torch.arange(8, dtype=torch.uint8, device=path.device)
    one, zero = torch.ones(8, device=path.device), torch.zeros(8, device=path.device)
    index = torch.arange(8, device=path.device).flip(0)
    volumes = make((8, 2, *size), dtype, path.device)
    dims = [[axis for axis, bit in ((1, 1), (2, 2), (3, 4)) if mask & bit] for mask in range(8)]
    flipped = torch.stack([volume.flip(axes) for volume, axes in zip(volumes, dims, strict=True)])
    assert torch.equal(mixup3d(volumes, one, index, flips=flips), flipped)
    assert torch.equal(mixup3d(volumes, zero, index, flips=flips), flipped.flip(0))
    assert torch.equal(mixup3d(volumes, zero, index, flips=flips, out=volumes), flipped.flip(0))


@pytest.mark.parametrize("dtype", VOXELS)
def test_lam_of_one_and_zero_copies_exactly(path, dtype):
    volumes = make((3, 1, 2, 3, 5), dtype, path.device)
    lam = torch.tensor([1.0, 0.0, 1.0], device=path.device)
    index = torch.tensor([1, 2, 0], device=path.device)
    assert torch.equal(mixup3d(volumes, lam, index), volumes[[0, 2, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lam_of_any_float_type(path, dtype):
    volumes = make((2, 1, 2, 2, 4), torch.float64, path.device)
    lam, index = (
        torch.tensor([0.7, 0.25], dtype=dtype, device=path.device),
        torch.tensor([1, 0], device=path.device),
    )
    result = compare(volumes, lam, index)
    if dtype == torch.float64:  # 0.7 in double precision
        assert_close(result[0], 0.7 * volumes[0] + (1 - 0.7) * volumes[1])


def test_integers_round_to_even_and_saturate(path):
    def mixed(a, b, lam, dtype=torch.int16, result=None):
        volumes = torch.tensor([a, b], dtype=dtype, device=path.device).reshape(2, 1, 1, 1, -1)
        lam = torch.full((2,), lam, device=path.device)
        out = mixup3d(volumes, lam, torch.tensor([1, 0], device=path.device), dtype=result)
        return out[0].flatten().tolist()

    halves = mixed([0, 1, 2, 3, -1, -2, -3, 7], [1, 2, 3, 4, 0, -1, -2, 7], 0.5)
    assert halves == [0, 2, 2, 4, 0, -2, -2, 7]
    assert mixed([0, 1, 2, 253], [1, 2, 3, 254], 0.5, torch.uint8) == [0, 2, 2, 254]
    assert mixed([32767, -32768, 32767], [32767, -32768, -32768], 0.3) == [32767, -32768, -13107]
    assert mixed([300, -7, 255], [300, -7, 0], 0.75, result=torch.uint8) == [255, 0, 191]
    floats = [300, -7, 255.5, 0.5]
    assert mixed(floats, floats, 1.0, torch.float32, torch.uint8) == [255, 0, 255, 0]
    for dtype in (torch.float32, torch.float64):
        extremes = mixed([1e30, -1e30, math.nan], [0] * 3, 1.0, dtype, torch.int16)
        assert extremes == [32767, -32768, 0]
    assert mixed([16777217.5, 2.5], [0, 0], 1.0, torch.float64, torch.int16) == [32767, 2]


def test_voxels_that_are_not_finite(path):
    inf, nan = math.inf, math.nan
    volumes = torch.tensor(
        [[inf, -inf, nan, inf, 1, inf], [1, 2, 3, inf, nan, -inf]], device=path.device
    )
    volumes = volumes.reshape(2, 1, 1, 1, 6)
    lam, index = (
        torch.tensor([0.75, 0.5], device=path.device),
        torch.tensor([1, 0], device=path.device),
    )
    for dtype in FLOATS:
        compare(volumes.to(dtype), lam, index, window=(-1.0, 2.0))
        result, exact = (
            mixup3d(volumes.to(dtype), lam, index),
            reference.mixup3d(volumes, lam, index),
        )
        assert result[exact.isnan()].isnan().all()
        assert torch.equal(result.isfinite(), exact.isfinite())


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_voxels_of_weight_0_do_not_show(path, dtype, flipped):
    volumes = make((4, 1, 3, 2, 8), dtype, path.device).requires_grad_()
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype, device=path.device)
    with torch.no_grad():
        volumes[:2] = bad.repeat(32).view(2, 1, 3, 2, 8)
    lam = torch.tensor([0.0, 0.0, 1.0, 1.0], device=path.device)
    index = torch.tensor([2, 3, 0, 1], device=path.device)
    flips = torch.tensor([7, 0, 4, 3], dtype=torch.uint8, device=path.device) if flipped else None
    for window in (None, (-2.0, 3.0)):
        for donors in (None, volumes):
            masks = flips if donors is None else (flips, flips)
            arguments = {"donors": donors, "flips": masks, "window": window}
            result = compare(volumes, lam, index, **arguments)
            assert result.isfinite().all()
            # the gradient of sample 2 is 0 through index[0]; an infinite one stays in its sample
            grad_output = torch.ones_like(result)
            grad_output[3] = math.inf
            (grad,) = torch.autograd.grad(result, volumes, grad_output)
            assert (grad[:2] == 0).all() and grad[2].isfinite().all()
    ours = volumes.detach().clone()
    expected = mixup3d(ours, lam, index, flips=flips)
    assert torch.equal(mixup3d(ours, lam, index, flips=flips, out=ours), expected)
    if dtype != torch.float64:  # these weights are rounded to 0 and 1
        almost = torch.tensor([1e-60, 1e-60, 1 - 1e-12, 1 - 1e-12], device=path.device).double()
        assert torch.equal(mixup3d(volumes, almost, index, flips=flips), expected)


def test_what_float32_holds_does_not_overflow(path):
    volumes = torch.tensor([3e38, -3e38], device=path.device).reshape(2, 1, 1, 1, 1)
    lam, index = (
        torch.tensor([0.75, 0.5], device=path.device),
        torch.tensor([1, 0], device=path.device),
    )
    compare(volumes, lam, index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_mixed_in_float32_and_rounded_once(path, dtype):
    volumes = make((3, 1, 4, 5, 16), dtype, path.device)
    lam, index, flips = draw(3, path.device)
    for arguments in ({}, {"flips": flips}, {"window": WINDOW}):
        exact = mixup3d(volumes.float(), lam, index, **arguments)
        assert torch.equal(mixup3d(volumes, lam, index, **arguments), exact.to(dtype))
        assert torch.equal(mixup3d(volumes, lam, index, dtype=torch.float32, **arguments), exact)


def test_windows_far_from_zero_and_narrow(path):
    volumes = torch.arange(29_990, 30_022, dtype=torch.int16, device=path.device).reshape(
        2, 1, 2, 2, 4
    )
    lam, index = (
        torch.tensor([0.75, 0.5], device=path.device),
        torch.tensor([1, 0], device=path.device),
    )
    for window in ((30_000, 30_010), (30_000.25, 30_000.75), (-1e6, 1e6)):
        compare(volumes, lam, index, window=window)


def layouts(x):
    return {
        "channels last": x.to(memory_format=torch.channels_last_3d),
        "permuted": x.permute(0, 4, 2, 1, 3),
        "batch last": x.permute(1, 2, 3, 4, 0),
        "sliced": x[:, :, 1:, ::2],
        "every other": x[::2],
        "expanded": x[:, :1, :1].expand(-1, 3, 5, -1, -1),
        "expanded batch": x[:1].expand(4, -1, -1, -1, -1),
    }


@pytest.mark.parametrize("flipped", [False, True])
def test_dense_input_is_not_copied_and_keeps_its_memory_format(path, flipped, monkeypatch):
    volumes = make((2, 3, 6, 5, 4), device=path.device).to(memory_format=torch.channels_last_3d)
    lam, index, flips = draw(2, path.device)
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    result = mixup3d(volumes, lam, index, flips=flips if flipped else None)
    assert result.stride() == volumes.stride()


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK + 1, 4 * BLOCK - 4, 4 * BLOCK, 4 * BLOCK + 4])
def test_sizes_around_a_block(path, n):
    volumes = make((2, 1, 1, 1, n), device=path.device)
    lam, index, flips = draw(2, path.device)
    for masks in (None, flips):
        expected = compare(volumes, lam, index, flips=masks)
        ours = volumes.clone()
        assert torch.equal(mixup3d(ours, lam, index, flips=masks, out=ours), expected)


@pytest.mark.parametrize("limit", [("MAX_IN_PLACE", 10), ("MAX_TILE", 64), ("MAX_TILE", 256)])
def test_large_batches_in_place(path, limit, monkeypatch):
    """A batch that is copied; one with tiles shorter than a run; one that fits."""
    monkeypatch.setattr(ops if limit[0] == "MAX_IN_PLACE" else kernels, *limit)
    volumes = make((11, 1, 2, 2, 16), device=path.device)
    lam, index, _ = draw(11, path.device)
    expected = compare(volumes, lam, index)
    assert torch.equal(mixup3d(volumes, lam, index, out=volumes), expected)


def test_volumes_larger_than_a_block_of_the_cpu_path():
    for shape in (
        (3, 1, 130, 70, 64),
        (2, 2, 9, 200, 300),
        (2, 1, 1, 3, 400_001),
        (2, 1, 31, 257, 33),
    ):
        volumes = make(shape)
        lam, index, flips = draw(shape[0])
        for masks in (None, flips):
            expected = compare(volumes, lam, index, flips=masks)
            assert torch.equal(
                mixup3d(volumes, lam, index, flips=masks, out=volumes.clone()), expected
            )
            ours = volumes.clone()
            assert torch.equal(mixup3d(ours, lam, index, flips=masks, out=ours), expected)


@pytest.mark.parametrize("voxels", [1, 7, 40, 300])
def test_boxes_of_the_cpu_path(voxels, monkeypatch):
    monkeypatch.setattr("fmkernels.cpu.mixup3d.BOX", voxels)
    monkeypatch.setattr("fmkernels.cpu.mixup3d.MIN_BOX", 1)
    volumes = make((3, 2, 3, 4, 9))
    lam, index, flips = draw(3)
    for masks in (None, flips, flips.flip(0)):
        expected = compare(volumes, lam, index, flips=masks)
        ours = volumes.clone()
        assert torch.equal(mixup3d(ours, lam, index, flips=masks, out=ours), expected)


# --- gradients -----------------------------------------------------------------------------------


def gradients(function, volumes, donors, lam, index, upstream, **arguments):
    sources = [x for x in (volumes, donors) if x is not None]
    if function is reference.mixup3d:
        sources = [x.double() for x in sources]
    leaves = [x.detach().clone().requires_grad_() for x in sources]
    if donors is not None:
        arguments["donors"] = leaves[1]
    result = function(leaves[0], lam, index, **arguments)
    return torch.autograd.grad(result, leaves, upstream.to(result.dtype))


def test_gradient_at_the_edges_of_the_window(path):
    values = torch.tensor([-1.001, -1.0, 0.0, 3.0, 3.001, math.nan], device=path.device).reshape(
        1, 1, 1, 1, 6
    )
    values.requires_grad_()
    one, index = (
        torch.ones(1, device=path.device),
        torch.zeros(1, dtype=torch.int64, device=path.device),
    )
    mixup3d(values, one, index, window=(-1.0, 3.0)).sum().backward()
    assert values.grad.flatten().tolist() == [0, 0.25, 0.25, 0.25, 0, 0]


def test_gradient_through_a_cast_and_strided_tensors(path):
    lam, index, flips = draw(4, path.device)
    for layout in ("channels last", "sliced", "permuted"):
        volumes = (
            layouts(make((4, 3, 4, 4, 4), device=path.device))[layout].detach().requires_grad_()
        )
        result = mixup3d(volumes, lam, index, flips=flips, dtype=torch.bfloat16)
        result.backward(
            torch.ones((), dtype=torch.bfloat16, device=path.device).expand(result.shape)
        )
        exact = volumes.detach().double().requires_grad_()
        reference.mixup3d(exact, lam, index, flips=flips).sum().backward()
        assert volumes.grad.dtype == torch.float32
        assert_close(volumes.grad, exact.grad)


def test_volumes_may_change_before_the_backward_where_they_are_not_needed(path):
    leaf = make((2, 1, 2, 2, 4), device=path.device).requires_grad_()
    lam, index, _ = draw(2, path.device)
    volumes = leaf * 1
    result = mixup3d(volumes, lam, index)
    volumes.zero_()
    result.sum().backward()
    volumes = leaf * 1
    result = mixup3d(volumes, lam, index, window=(-2.0, 3.0))
    volumes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_gradients_only_where_they_are_asked_for(path):
    volumes, donors = (
        make((2, 1, 2, 2, 4), device=path.device),
        make((2, 1, 2, 2, 4), device=path.device, seed=1),
    )
    lam, index, _ = draw(2, path.device)
    donors.requires_grad_()
    result = mixup3d(volumes, lam, index, donors=donors)
    (gradient,) = torch.autograd.grad(result.sum(), donors)
    exact = torch.zeros(2, dtype=torch.float64).index_add_(0, index.cpu(), 1 - lam.cpu().double())
    assert_close(gradient.double().mean((1, 2, 3, 4)).cpu(), exact, torch.float32)
    with torch.no_grad():
        assert not mixup3d(volumes, lam, index, donors=donors).requires_grad


# --- torch.library, torch.compile ----------------------------------------------------------------


def mean_square(x, lam, index, flips):
    return mixup3d(x, lam, index, flips=flips, window=(-2.0, 3.0)).square().mean()


def test_func_grad(path):
    x, (lam, index, flips) = make((3, 1, 3, 2, 8), device=path.device), draw(3, path.device)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mean_square(leaf, lam, index, flips), leaf)
    assert torch.equal(torch.func.grad(mean_square)(x, lam, index, flips), expected)
    value_and_grads = torch.func.grad_and_value(
        lambda x, y: mixup3d(x, lam, index, donors=y).square().mean(), argnums=(0, 1)
    )
    pairs = [(x, x.flip(0).contiguous()), (x.flip(0).contiguous(), x)]
    for own, donors in pairs:
        leaves = own.clone().requires_grad_(), donors.clone().requires_grad_()
        expected = torch.autograd.grad(
            mixup3d(leaves[0], lam, index, donors=leaves[1]).square().mean(), leaves
        )
        assert all(map(torch.equal, value_and_grads(own, donors)[0], expected))


@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap(path, in_dim):
    x = make((2, 3, 1, 3, 2, 8), device=path.device)
    draws = [draw(3, path.device, seed=seed) for seed in (0, 1)]
    lam, index, flips = map(torch.stack, zip(*draws, strict=True))
    moved = x.movedim(0, in_dim)
    result = torch.func.vmap(
        lambda x, lam, index, flips: mixup3d(x, lam, index, flips=flips), (in_dim, 0, 0, 0)
    )(moved, lam, index, flips)
    grads = torch.func.vmap(torch.func.grad(mean_square), (in_dim, 0, 0, 0))(
        moved, lam, index, flips
    )
    for i, each in enumerate(draws):
        assert torch.equal(result[i], mixup3d(x[i], each[0], each[1], flips=each[2]))
        assert torch.equal(grads[i], torch.func.grad(mean_square)(x[i], *each))


NAMES = ("lam", "index", "flips")


class Mix(torch.nn.Module):
    def forward(self, x, lam, index, flips):
        return mixup3d(x, lam, index, flips=flips, window=WINDOW, dtype=torch.float16)


@pytest.mark.parametrize("strict", [False, True])
def test_export(path, strict):
    arguments = make((3, 1, 3, 2, 8), torch.int16, path.device), *draw(3, path.device)
    batch, depth = torch.export.Dim("batch", min=2), torch.export.Dim("depth", min=2)
    shapes = {"x": {0: batch, 2: depth}, **{name: {0: batch} for name in NAMES}}
    program = torch.export.export(Mix(), arguments, dynamic_shapes=shapes, strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("fmkernels.mixup3d.default") == 1
    for batch in (3, 5):
        arguments = make((batch, 1, 4, 2, 8), torch.int16, path.device), *draw(batch, path.device)
        assert torch.equal(program.module()(*arguments), Mix()(*arguments))


def test_compiled_autograd(path):
    leaf = make((3, 1, 3, 2, 8), device=path.device).requires_grad_()
    arguments = draw(3, path.device)
    (expected,) = torch.autograd.grad(mean_square(leaf, *arguments), leaf)
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        mean_square(leaf, *arguments).backward()
    assert torch.equal(leaf.grad, expected)


def test_sample_and_mix_compile_together(path):
    def step(x):
        lam, index = sample_mixup(len(x), device=x.device)
        return mixup3d(x, lam, index), lam, index

    torch._dynamo.reset()
    volumes = make((4, 1, 2, 2, 4), device=path.device)
    result, lam, index = torch.compile(step, fullgraph=True, backend="aot_eager")(volumes)
    assert_right(result, volumes, lam, index)


# --- bad arguments -------------------------------------------------------------------------------

X, LAM, INDEX = torch.zeros(2, 1, 2, 3, 4), torch.ones(2), torch.zeros(2, dtype=torch.int64)
FLIPS = torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize("bad", [-1, 2])
@pytest.mark.parametrize("donors", [False, True])
def test_index_out_of_range_is_an_error(path, bad, donors):
    if path.device.type == "cuda":
        pytest.skip("a device assertion, compiled in debug mode only, would end the process")
    with pytest.raises((ValueError, AssertionError), match="mixup3d: index"):
        mixup3d(X, LAM, INDEX + bad, donors=X.clone() if donors else None)


@pytest.mark.parametrize("bad", [-0.01, 1.01])
def test_lam_out_of_range_is_an_error(path, bad):
    if path.device.type == "cuda":
        pytest.skip("a device assertion, compiled in debug mode only, would end the process")
    with pytest.raises((ValueError, AssertionError), match=r"mixup3d: lam must lie in \[0, 1\]"):
        mixup3d(X, torch.tensor([0.5, bad]), INDEX)


@pytest.mark.skipif(on_gpu(), reason="the kernel is not to run")
@pytest.mark.parametrize("value", ["1", "0"])
def test_debug_mode_compiles_the_assertions(monkeypatch, value):
    options = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **given: options.append(given))
    monkeypatch.setenv("FMKERNELS_DEBUG", value)
    tuning.debug.cache_clear()
    try:
        launch("mixup3d", X, None, LAM, INDEX, None, None, (0, 1, 2, 4), None, dtype=X.dtype)
    finally:
        tuning.debug.cache_clear()
    assert [given["debug"] for given in options] == [value == "1"]


class Subclass(torch.Tensor):
    """A tensor with memory of another class, as MONAI's MetaTensor is."""


def test_overlap_of_tensor_subclasses(path):
    base = make((3, 1, 2, 3, 4), device=path.device).as_subclass(Subclass)
    lam, index, _ = draw(2, path.device)
    with pytest.raises(ValueError, match="overlaps a part of volumes"):
        mixup3d(base[:2], lam, index, out=base[1:])
    with pytest.raises(ValueError, match="overlaps a part of volumes"):
        mixup3d(base[:2].as_subclass(torch.Tensor), lam, index, out=base[1:])
    with pytest.raises(ValueError, match="overlaps a part of donors"):
        mixup3d(base[:2].clone(), lam, index, donors=base[:2], out=base[1:])
    expected = mixup3d(base[:2].as_subclass(torch.Tensor).clone(), lam, index)
    mixup3d(base[:2], lam, index, out=base[:2])
    assert torch.equal(base[:2].as_subclass(torch.Tensor), expected)


def test_overlap_of_metatensors():
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    base = MetaTensor(make((3, 1, 2, 3, 4)))
    lam, index, _ = draw(2)
    with pytest.raises(ValueError, match="overlaps a part of volumes"):
        mixup3d(base[:2], lam, index, out=base[1:])
    expected = mixup3d(base[:2].as_tensor().clone(), lam, index)
    assert torch.equal(mixup3d(base[:2], lam, index, out=base[:2]).as_tensor(), expected)


def test_nothing_is_written_before_all_arguments_are_checked(monkeypatch):
    base = make((5, 1, 2, 3, 4))
    donors, flips = base[1:3].mT.clone().mT, FLIPS + 1
    kept = base.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", None)  # no copy either
        patch.setattr(torch.Tensor, "copy_", None)
        with pytest.raises(ValueError, match="overlaps a part of volumes"):
            mixup3d(base[:2], LAM, INDEX, donors=donors, flips=(flips, flips), out=base[1:3])
    with pytest.raises(ValueError, match="index must lie in"):
        mixup3d(base[:2], LAM, INDEX + 7, flips=flips, out=base[:2])
    assert torch.equal(base, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_process_wide_defaults_change_nothing(path, dtype):
    volumes, (lam, index, flips) = make((3, 1, 2, 3, 4), device=path.device), draw(3, path.device)
    leaf = volumes.clone().requires_grad_()
    before = torch.get_default_dtype()

    def results():
        mixed = mixup3d(leaf, lam, index, flips=flips, window=WINDOW)
        (grad,) = torch.autograd.grad(mixed, leaf, volumes)
        ours = volumes.clone()
        return mixed, grad, mixup3d(ours, lam, index, flips=flips, out=ours)

    expected = results()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        ours = results()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(map(torch.equal, ours, expected))


def test_overlapping_memory_is_refused_or_right(path):
    base = make((5, 1, 2, 3, 4), device=path.device)
    lam, index, flips = draw(2, path.device)
    for out in (base[1:3], base.flatten()[4:52].view(2, 1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"mixup3d: out must .* overlaps a part of volumes"):
            mixup3d(base[:2], lam, index, out=out)
    for donors in (base[:3], base[1:3], base[2:]):
        with pytest.raises(ValueError, match=r"mixup3d: out must .* overlaps a part of donors"):
            mixup3d(
                base[3:].clone(),
                lam,
                index,
                donors=donors,
                out=base[2:4] if donors is not base[2:] else base[:2],
            )
    kept = base.clone()
    expected = mixup3d(kept[:2], lam, index, donors=kept[2:4], flips=(flips, flips))
    mixup3d(base[:2], lam, index, donors=base[2:4], flips=(flips, flips), out=base[:2])
    assert torch.equal(base[:2], expected) and torch.equal(base[2:], kept[2:])
    base = kept.clone()
    expected = mixup3d(kept[0:4:2], lam, index, flips=flips)
    mixup3d(base[0:4:2], lam, index, flips=flips, out=base[1:5:2])
    assert torch.equal(base[1:5:2], expected) and torch.equal(base[::2], kept[::2])
    view = base[:2]
    expected = mixup3d(view, lam, index, flips=flips)
    mixup3d(view, lam, index, flips=flips, out=base[:2])
    assert torch.equal(base[:2], expected)


def test_memory_of_another_width_is_refused():
    volumes = make((2, 1, 2, 2, 4))
    out = volumes.view(torch.float16).flatten()[: volumes.numel()].view(volumes.shape)
    lam, index, _ = draw(2)
    with pytest.raises(ValueError, match="must not overlap"):
        mixup3d(volumes, lam, index, dtype=torch.float16, out=out)


# --- any case ------------------------------------------------------------------------------------

CASE = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([0, 1, 2, 3, 5]),
        "channels": st.sampled_from([1, 2, 3]),
        "size": st.tuples(
            st.sampled_from([0, 1, 2, 3, 4, 7]),
            st.sampled_from([1, 2, 3, 5]),
            st.sampled_from([1, 2, 4, 7, 8, 13, 16, 31, 32]),
        ),
        "dtype": st.sampled_from(VOXELS),
        "result": st.sampled_from([None, *VOXELS]),
        "window": st.sampled_from([None, WINDOW, (-1, 1), (0.0, 50)]),
        "flipped": st.sampled_from(["no", "own", "both"]),
        "donors": st.sampled_from([None, None, 1, 4, 7]),
        "layout": st.sampled_from(
            ["contiguous", "contiguous", *layouts(torch.zeros(4, 3, 4, 4, 4))]
        ),
        "out": st.sampled_from(["new", "new", "volumes", "donors", "other"]),
        "lam": st.sampled_from(["random", "zero", "one"]),
        "seed": st.integers(0, 2**16),
    }
)


def make_case(case, device):
    """volumes, lam, index; and the other arguments."""
    volumes = make(
        (case["batch"], case["channels"], *case["size"]), case["dtype"], device, case["seed"]
    )
    volumes = {"contiguous": volumes, **(layouts(volumes) if volumes.numel() else {})}.get(
        case["layout"], volumes
    )
    batch, donors = len(volumes), None
    if case["donors"]:
        donors = make((case["donors"], *volumes.shape[1:]), case["dtype"], device, case["seed"] + 1)
    lam, index, flips = draw(batch, device, case["donors"], case["seed"])
    lam = {"random": lam, "zero": lam * 0, "one": lam * 0 + 1}[case["lam"]]
    masks = None if case["flipped"] == "no" else flips
    if donors is not None and masks is not None:
        masks = (
            flips,
            draw(len(donors), device, seed=case["seed"] + 2)[2]
            if case["flipped"] == "both"
            else None,
        )
    return (volumes, lam, index), {
        "donors": donors,
        "flips": masks,
        "window": case["window"],
        "dtype": case["result"],
    }


def check_values(case, device):
    tensors, arguments = make_case(case, device)
    expected = compare(*tensors, **arguments)
    candidates = {
        "volumes": tensors[0],
        "donors": arguments["donors"],
        "other": torch.full_like(expected, 7),
    }
    out = candidates.get(case["out"])
    if (
        out is None
        or (out.dtype, out.shape) != (expected.dtype, expected.shape)
        or 0 in out.stride()
    ):
        return
    assert mixup3d(*tensors, out=out, **arguments) is out
    assert torch.equal(out, expected)


def check_gradients(case, device):
    (volumes, lam, index), arguments = make_case(case, device)
    dtype, donors = arguments["dtype"] or volumes.dtype, arguments.pop("donors")
    if not (len(volumes) and volumes.is_floating_point() and dtype.is_floating_point):
        return
    upstream = make(volumes.shape, dtype, device, seed=case["seed"] + 3)
    ours = gradients(mixup3d, volumes, donors, lam, index, upstream, **arguments)
    exact = gradients(reference.mixup3d, volumes, donors, lam, index, upstream, **arguments)
    for gradient, expected in zip(ours, exact, strict=True):
        assert_close(gradient, expected)


def check_case(case, device="cpu"):
    check_values(case, device)
    check_gradients(case, device)


@cases(500)
@given(case=CASE, voxels=st.sampled_from([32, 150, 1000, 1024]))
def test_any_case_on_the_cpu_path(case, voxels):
    """With boxes of about so many voxels."""
    with mock.patch.multiple("fmkernels.cpu.mixup3d", BOX=voxels, MIN_BOX=1):
        check_values(case, "cpu")
        check_gradients(case, "cpu")


@kernel_cases(60)
@given(case=CASE)
def test_any_case_in_the_kernel(path, case):
    check_values(case, path.device)
