"""predict_targets on the CPU path and through its kernel, against the float64 reference and torch.flip."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from fmkernels import predict_targets
from fmkernels.kernels.tuning import launch_parameters
from tests.support import on_gpu
from tests.support.cases import cases, kernel_cases
from tests.support.tolerance import assert_close

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BLOCK = launch_parameters("predict_targets", torch.device("cpu")).block
TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def make(shape, dtype=torch.float32, device="cpu", seed=0, spread=4.0):
    """Logits, and one random mask of flips per view."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
    flips = torch.randint(8, shape[:1], generator=generator, dtype=torch.uint8)
    return logits.to(device), flips.to(device)


def compare(logits, flips, **arguments):
    targets = predict_targets(logits, flips, **arguments)
    assert targets.dtype == torch.float32 and targets.shape == logits.shape[1:]
    assert_close(targets, reference.predict_targets(logits, flips, **arguments))
    return targets


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(4, 2, 3, 5, 6, 7), (3, 2, 1, 4, 2, 16)])
def test_matches_reference(path, dtype, temperature, shape):
    compare(*make(shape, dtype, path.device), temperature=temperature)


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("mask", range(8))
def test_every_flip_is_undone(path, mask, width):
    logits, _ = make((1, 2, 2, 3, 4, width), device=path.device)
    axes = [axis for bit, axis in ((1, 3), (2, 4), (4, 5)) if mask & bit]
    views = torch.cat([logits, logits.flip(axes)])
    flips = torch.tensor([0, mask], dtype=torch.uint8, device=path.device)
    assert_close(predict_targets(views, flips, temperature=1), torch.sigmoid(logits[0]))
    beyond = flips + torch.tensor([8, 128], dtype=torch.uint8, device=path.device)
    assert torch.equal(predict_targets(views, beyond), predict_targets(views, flips))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "layout", ["channels_last", "one anchor", "head", "transposed", "expanded", "sliced"]
)
def test_strided_views(path, layout, dtype):
    logits, flips = make((3, 2, 8, 4, 3, 8), dtype, path.device)
    flat = logits.flatten(0, 1)
    if layout == "channels_last":
        logits = flat.to(memory_format=torch.channels_last_3d).unflatten(0, (3, 2))
    elif layout == "one anchor":
        logits = logits[:, :, 3:4]
    elif layout == "head":  # some channels of a layer's output
        logits = flat.to(memory_format=torch.channels_last_3d)[:, 1:6].unflatten(0, (3, 2))
    elif layout == "transposed":
        logits = logits.permute(0, 2, 1, 5, 3, 4)
    elif layout == "expanded":
        logits = logits[:, :, :, :1].expand_as(logits)
    else:
        logits = logits[..., ::2, :, 1:]
    targets = compare(logits, flips)
    if layout == "channels_last":
        assert targets.stride() == logits[0].stride()


@pytest.mark.parametrize("offset", [1, 4])
def test_views_that_start_off_16_bytes(path, offset):
    logits, flips = make((2, 1, 1, 3, 4, 8), torch.bfloat16, path.device)
    shifted = torch.cat([logits.new_zeros(offset), logits.flatten()])[offset:].view(logits.shape)
    assert torch.equal(predict_targets(shifted, flips), predict_targets(logits, flips))


@pytest.mark.parametrize("container", [list, tuple])
def test_levels(path, container):
    shapes = [(4, 2, 3, 8, 8, 8), (4, 2, 3, 5, 4, 3), (4, 2, 3, 0, 1, 1), (4, 2, 3, 1, 1, 1)]
    levels = container(make(shape, device=path.device)[0] for shape in shapes)
    flips = torch.tensor([0, 1, 6, 7], dtype=torch.uint8, device=path.device)
    targets = predict_targets(levels, flips)
    assert type(targets) is container
    for ours, theirs in zip(targets, reference.predict_targets(levels, flips), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("views", [1, 2, 7, 32, 70])
def test_any_number_of_views(path, views):
    compare(*make((views, 1, 2, 3, 2, 4), device=path.device, spread=30.0))


@pytest.mark.parametrize(
    "n", [1, 7, BLOCK // 64 - 1, BLOCK // 64, BLOCK // 64 + 1, BLOCK // 16 + 4]
)
def test_sizes_around_a_block(path, n):
    compare(*make((2, 3, 2, n, 8, 8), torch.bfloat16, path.device))
    compare(*make((2, 1, 1, 1, 1, n * 64 + 1), device=path.device))


def test_the_figure_of_the_paper(path):
    views = torch.logit(torch.tensor([0.9, 0.8], device=path.device)).reshape(2, 1, 1, 1, 1, 1)
    target = predict_targets(
        views, torch.zeros(2, dtype=torch.uint8, device=path.device), temperature=0.7
    )
    assert target.item() == pytest.approx(0.9226, abs=5e-5)


def test_temperature_1_is_the_mean_and_a_tiny_one_a_decision(path):
    logits, flips = make((3, 1, 2, 4, 5, 6), device=path.device)
    mean = reference.predict_targets(logits, flips, temperature=1)
    assert_close(predict_targets(logits, flips, temperature=1), mean)
    for temperature in (1e-4, 1e-30, 5e-324):
        decided = predict_targets(logits, flips, temperature=temperature)
        clear = (mean - 0.5).abs() > 1e-2
        assert torch.equal(decided[clear], (mean > 0.5).float()[clear])
        assert (
            predict_targets(torch.zeros_like(logits), flips, temperature=temperature) == 0.5
        ).all()


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_probabilities_keep_their_digits(path, dtype, temperature):
    logits = (
        torch.linspace(-87, 10, 4 * 600, dtype=dtype)
        .reshape(600, 4)
        .T.reshape(4, 1, 1, 1, 1, 600)
        .contiguous()
    )
    flips = torch.zeros(4, dtype=torch.uint8)
    exact = reference.predict_targets(logits, flips, temperature=temperature)
    targets = predict_targets(
        logits.to(path.device), flips.to(path.device), temperature=temperature
    ).cpu()
    error = (targets - exact).abs() / exact
    assert error[exact > 1e-37].max() <= 3e-5
    assert error[exact > 1e-6].max() <= 5e-6
    if dtype == torch.float64:  # computed in float64, rounded once
        assert error[exact > 1e-37].max() <= 2**-24 * 1.001


@pytest.mark.parametrize("temperature", [5e-324, 1e-3, 0.7, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_for_any_logit(path, dtype, temperature):
    top = torch.finfo(dtype).max
    values = torch.tensor(
        [-math.inf, -top, -1e4, -104, -88, -1, -0.0, 0, 1e-30, 1, 88, 104, 1e4, top, math.inf],
        dtype=torch.float64,
    )
    pairs = (
        torch.cartesian_prod(values, values).T.to(dtype).reshape(2, 1, 1, 1, 15, 15).to(path.device)
    )
    flips = torch.zeros(2, dtype=torch.uint8, device=path.device)
    targets = predict_targets(pairs, flips, temperature=temperature)
    assert ((targets >= 0) & (targets <= 1)).all()
    if temperature >= 0.7:
        assert_close(targets, reference.predict_targets(pairs, flips, temperature=temperature))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [3, 8])
def test_nan_stays_where_it_is(path, dtype, width):
    logits, flips = make((3, 1, 1, 2, 3, width), dtype, path.device)
    logits[1, 0, 0, 1, 2, 0] = math.nan
    expected = reference.predict_targets(logits, flips).isnan()
    assert expected.sum() == 1
    assert torch.equal(predict_targets(logits, flips).isnan(), expected)


@pytest.mark.parametrize("shape", [(2, 0, 1, 2, 2, 2), (2, 1, 0, 2, 2, 2), (2, 1, 1, 2, 2, 0)])
def test_empty(path, shape):
    targets = predict_targets(*make(shape, device=path.device))
    assert targets.shape == shape[1:] and targets.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_tolerance_rejects_zeros_and_a_shift_by_one_block(dtype):
    logits, flips = make((2, 4, 1, 1, 1, BLOCK), dtype)
    right = predict_targets(logits, flips)
    for wrong in (
        torch.zeros_like(right),
        right.flatten().roll(BLOCK).view_as(right),
        predict_targets(logits, 7 - flips),
    ):
        with pytest.raises(AssertionError):
            assert_close(wrong, right)


@pytest.mark.kernel
@pytest.mark.skipif(on_gpu(), reason="needs the interpreter")
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 20), (torch.bfloat16, 12)])
@pytest.mark.parametrize("anchors_last", [False, True])
@pytest.mark.parametrize("size", [7, 8])
def test_every_byte_is_moved_once(dtype, floor, anchors_last, size):
    from tests.support.launch import launch
    from tests.triton_checked.interpreter import checked

    views = torch.zeros(
        (4, 3, 1, 5, size, size, 8) if anchors_last else (4, 3, 8, 5, size, size, 1), dtype=dtype
    )
    flips = torch.tensor([0, 3, 4, 7], dtype=torch.uint8)
    anchors = views[0].numel()
    with checked(x=views, flips=flips, shuffle=0) as report:
        launch("predict_targets", [views], flips, 0.7)
    written = report["out"].written
    assert len(report.launches) == 1 and report.never_written("out") == 0
    assert report["x"].read == report["x"].read_once == views.nbytes
    assert (report["x"].read + written) == floor * anchors


@pytest.mark.kernel
@pytest.mark.skipif(on_gpu(), reason="needs the interpreter")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1100, 1400, 1401, 1), (2, 3, 2, 512, 512, 1024, 1)])
def test_more_than_2_to_the_31_elements(shape):
    """The last program alone: memory that is never touched is never there."""
    from tests.support.launch import launch
    from tests.triton_checked.interpreter import checked

    views, flips = (
        torch.empty(shape, dtype=torch.bfloat16),
        torch.full(shape[:1], 4, dtype=torch.uint8),
    )
    anchors = views[0].numel()
    views[:, -1, -1, -1, -1] = torch.arange(shape[5], dtype=torch.bfloat16).fmod(7)[:, None]
    with checked(x=views, flips=flips, programs=[-1]):
        (out,) = launch("predict_targets", [views], flips, 1.0)
    tail = min(BLOCK, shape[5]) // 4
    right = torch.sigmoid(views[0, -1, -1, -1, -1, :, 0].double()).flip(0)
    assert anchors * shape[0] > 2**31
    assert_close(out[-1, -1, -1, -1, -tail:, 0], right[-tail:])


def test_no_gradient(path):
    logits, flips = make((2, 1, 1, 2, 2, 2), device=path.device)
    leaf = logits.clone().requires_grad_()
    with pytest.raises(
        ValueError, match=r"predict_targets: no gradient to view_logits .* torch\.no_grad"
    ):
        predict_targets(leaf, flips)
    with torch.no_grad():
        assert torch.equal(predict_targets(leaf, flips), predict_targets(logits, flips))


def test_inputs_are_left_alone_and_results_repeat(path):
    logits, flips = make((3, 2, 2, 5, 4, 8), device=path.device)
    before = logits.clone()
    first = predict_targets(logits, flips)
    assert torch.equal(predict_targets(logits, flips), first) and torch.equal(logits, before)


def test_opcheck(path):
    op = torch.ops.fmkernels.predict_targets.default
    logits, flips = make((3, 2, 2, 3, 4, 8, 1), device=path.device)
    strided = logits.movedim(2, 6).squeeze(5).unsqueeze(2)
    torch.library.opcheck(op, ([logits, strided, logits[..., :0, :]], flips, 0.5), test_utils=TESTS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(predict_targets, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (4, 7):
        logits, flips = make((2, 2, 3, n, 4, n + 1))
        levels = [
            logits,
            logits.flatten(0, 1).to(memory_format=torch.channels_last_3d).unflatten(0, (2, 2)),
        ]
        for ours, theirs in zip(
            compiled(levels, flips), predict_targets(levels, flips), strict=True
        ):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


VIEWS, FLIPS = torch.zeros(2, 1, 1, 2, 2, 2), torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "view_logits must be a tensor or a list", {"view_logits": 1.0}),
        (TypeError, "view_logits must be float16 or", {"view_logits": VIEWS.int()}),
        (
            TypeError,
            "view_logits must be float32, got float64",
            {"view_logits": [VIEWS, VIEWS.double()]},
        ),
        (ValueError, "view_logits must hold at least one", {"view_logits": []}),
        (
            ValueError,
            r"view_logits must be \[K, B, A, D, H, W\] .* got \(1, 1, 2, 2, 2\)",
            {"view_logits": VIEWS[0]},
        ),
        (
            ValueError,
            "view_logits must be .* K >= 1",
            {"view_logits": VIEWS[:0], "flips": FLIPS[:0]},
        ),
        (ValueError, "the same at every level", {"view_logits": [VIEWS, VIEWS[:1]]}),
        (ValueError, "view_logits must be on cpu", {"view_logits": [VIEWS, VIEWS.to("meta")]}),
        (TypeError, "flips must be a tensor", {"flips": [0, 1]}),
        (TypeError, "flips must be uint8, got int64", {"flips": FLIPS.long()}),
        (
            ValueError,
            r"flips must have shape \(2,\), got \(1,\)",
            {"flips": FLIPS[:1]},
        ),
        (ValueError, "flips must be on cpu", {"flips": FLIPS.to("meta")}),
        (TypeError, "temperature must be a number", {"temperature": "0.7"}),
        (TypeError, "temperature must be a number", {"temperature": torch.tensor(0.7)}),
        (ValueError, r"temperature must be in \(0, 1\], got 0", {"temperature": 0}),
        (ValueError, r"temperature must be in \(0, 1\], got 1.5", {"temperature": 1.5}),
        (ValueError, "temperature must be finite", {"temperature": math.nan}),
    ],
)
def test_bad_arguments(error, words, arguments):
    with pytest.raises(error, match=f"predict_targets: .*{words}"):
        predict_targets(**{"view_logits": VIEWS, "flips": FLIPS, **arguments})


SIZE = st.sampled_from([1, 2, 3, 4, 5, 8, 13, 16])  # empty tensors have a test of their own
CASE = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 5), SIZE, SIZE, SIZE, SIZE, SIZE),
        "order": st.permutations(range(6)),
        "step": st.sampled_from([1, 1, 2]),
        "dtype": st.sampled_from(FLOATS),
        "temperature": st.sampled_from([0.05, 0.3, 0.7, 1.0]),
        "spread": st.sampled_from([0.1, 3.0, 40.0]),
        "seed": st.integers(0, 2**16),
    }
)


def check_case(case, device="cpu"):
    """Any shape, in any order of memory."""
    order = case["order"]
    stored = [
        min(case["shape"][axis], 5) if axis in order[:2] else case["shape"][axis] for axis in order
    ]
    logits, _ = make(stored, case["dtype"], device, case["seed"], case["spread"])
    logits = logits[..., :: case["step"]].permute([order.index(axis) for axis in range(6)])
    flips = torch.randint(
        8, logits.shape[:1], generator=torch.Generator().manual_seed(case["seed"])
    )
    compare(logits, flips.to(torch.uint8).to(device), temperature=case["temperature"])


@cases(2000)
@given(case=CASE)
def test_any_case_on_the_cpu_path(case):
    check_case(case)


@kernel_cases(200)
@given(case=CASE)
def test_any_case_in_the_kernel(path, case):
    check_case(case, path.device)
