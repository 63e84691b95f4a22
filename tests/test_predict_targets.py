"""What is particular to predict_targets; test_ops.py has the tests that every op needs."""

import math
from collections import namedtuple
from contextlib import nullcontext

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

import reference
from fmkernels import apply_symmetry, predict_targets, soft_target_focal_loss
from fmkernels.kernels import predict_targets as kernels
from fmkernels.kernels.tuning import launch_parameters
from tests.opinfo import FLOATS
from tests.support import on_gpu
from tests.support.cases import cases, kernel_cases
from tests.support.launch import launch
from tests.support.tolerance import assert_close
from tests.triton_checked.interpreter import checked

BLOCK = launch_parameters("predict_targets", torch.device("cpu")).block


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


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("mask", range(8))
def test_every_flip_is_undone(path, mask, width):
    logits, _ = make((1, 2, 2, 3, 4, width), device=path.device)
    axes = [axis for bit, axis in ((1, 3), (2, 4), (4, 5)) if mask & bit]
    views = torch.cat([logits, logits.flip(axes)])
    flips = torch.tensor([0, mask], dtype=torch.uint8, device=path.device)
    assert_close(predict_targets(views, flips, temperature=1), torch.sigmoid(logits[0]))


@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("permutation", range(6))
def test_every_symmetry_is_undone(path, permutation, size, classes):
    """Whichever axis is the innermost of the view, in vectors and not, next to a flipped view."""
    logits, _ = make((1, 2, 4, size, size, size))
    codes = range(8 * permutation, 8 * (permutation + 1))
    probabilities = logits[0].sigmoid()
    if classes:
        probabilities = logits[0].unflatten(1, (2, 2)).softmax(2).flatten(1, 2)
    for last in (False, True) if path.name == "cpu" else (size == 8,):
        for code in codes if path.name == "cpu" else codes[permutation % 2 :: 3]:
            views = torch.stack([apply_symmetry(logits[0], c) for c in (code, 3)])
            if last:
                views = views.movedim(2, -1).contiguous().movedim(-1, 2)
            flips = torch.tensor([code, 3], dtype=torch.uint8, device=path.device)
            views = views.to(path.device)
            targets = predict_targets(views, flips, temperature=1, classes=classes)
            assert_close(targets.cpu(), probabilities)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_48_symmetries_at_once(path, dtype):
    logits, _ = make((48, 1, 1, 4, 4, 4), dtype, path.device)
    codes = torch.arange(48, dtype=torch.uint8, device=path.device)
    compare(logits, codes)
    views = torch.stack([apply_symmetry(logits[0], code) for code in range(48)])
    assert_close(predict_targets(views, codes, temperature=1), torch.sigmoid(logits[0].float()))


def bad_flips():
    cube, box = torch.zeros(2, 1, 2, 3, 3, 3), torch.zeros(2, 1, 2, 3, 4, 3)
    return [(cube, 48), (cube, 255), (box, 8), (box, 47), (box, 61)]


@pytest.mark.parametrize(("views", "code"), bad_flips())
@pytest.mark.parametrize("classes", [None, 2])
def test_codes_that_do_not_fit_are_errors(path, views, code, classes):
    if path.device.type == "cuda":
        pytest.skip("a device assertion, compiled in debug mode only, would end the process")
    flips = torch.tensor([1, code], dtype=torch.uint8)
    with pytest.raises((ValueError, AssertionError), match="predict_targets: flips must be in"):
        predict_targets(views, flips, classes=classes)
    compiled = torch.compile(predict_targets, fullgraph=True, backend="aot_eager")
    with pytest.raises((ValueError, AssertionError), match="predict_targets: flips must be in"):
        compiled(views, flips, classes=classes)


@pytest.mark.kernel
@pytest.mark.parametrize(("views", "code"), bad_flips())
@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
def test_without_debug_mode_codes_that_do_not_fit_give_nan(monkeypatch, views, code, classes):
    """And nothing out of bounds is read. A level that they do fit is right."""
    device = "cuda" if on_gpu() else "cpu"
    cube = make((2, 1, 2, 4, 4, 4))[0]
    flips = torch.tensor([code, 1], dtype=torch.uint8)
    levels, flips = [views.to(device), cube.to(device)], flips.to(device)
    with nullcontext() if on_gpu() else checked(shuffle=0):
        if not on_gpu():
            monkeypatch.setattr(tl, "device_assert", lambda *_, **__: None)
        bad, good = launch("predict_targets", levels, flips, 0.7, classes or 1)
    assert bad.isnan().all()
    if code < 48:
        assert_close(good, reference.predict_targets(cube, flips.cpu(), classes=classes).to(device))


@pytest.mark.skipif(on_gpu(), reason="the kernel is not to run")
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("classes", [1, 2])
def test_debug_mode_compiles_the_assertion(monkeypatch, debug, classes):
    options = []
    monkeypatch.setattr(kernels, "debug", lambda: debug)
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **given: options.append(given))
    launch(
        "predict_targets",
        [torch.zeros(2, 1, 2, 3, 3, 3)],
        torch.zeros(2, dtype=torch.uint8),
        0.7,
        classes,
    )
    assert [given["debug"] for given in options] == [debug]


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("classes", [2, 3, 5, 15, 30])
def test_classes(path, classes, layout):
    logits, flips = make((3, 2, 30, 4, 3, 5), device=path.device)
    if layout == "channels_last":
        flat = logits.flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)
        logits = flat.unflatten(0, (3, 2))
    elif layout == "transposed":
        logits = logits.permute(*((0, 2, 1) if classes == 2 else (0, 1, 2)), 5, 3, 4)
    elif layout == "sliced":
        logits = logits[..., ::2, :, 1:]
    targets = compare(logits, flips, classes=classes)
    if layout == "channels_last":
        assert targets.stride() == logits[0].stride()
    sums = targets.unflatten(1, (-1, classes)).sum(2)
    assert_close(sums, torch.ones_like(sums, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
def test_two_classes_are_the_sigmoid_form(path, temperature):
    logits, flips = make((3, 2, 2, 4, 3, 8), device=path.device, spread=6.0)
    pairs = torch.stack([torch.zeros_like(logits), logits], 3).flatten(2, 3)
    softmax = predict_targets(pairs, flips, temperature=temperature, classes=2)
    sigmoid = predict_targets(logits, flips, temperature=temperature)
    assert_close(softmax[:, 1::2], sigmoid.double())
    assert_close(softmax[:, ::2], 1 - sigmoid.double())


def test_many_classes(path):
    """More than a block holds."""
    compare(*make((2, 1, BLOCK + 1, 1, 1, 2), device=path.device), classes=BLOCK + 1)


@pytest.mark.parametrize("n", [BLOCK // 4 - 1, BLOCK // 4, BLOCK // 4 + 1])
def test_classes_around_a_block(path, n):
    compare(*make((2, 2, 6, 1, 1, n), device=path.device), classes=3)


@pytest.mark.parametrize("temperature", [5e-324, 1e-3, 0.7, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_classes_are_finite_for_any_logit(path, dtype, temperature):
    values = torch.tensor([-math.inf, -1e4, -104, -1, 0, 88, 1e4, math.inf], dtype=torch.float64)
    triples = torch.cartesian_prod(values, values, values).T.to(dtype)
    views = triples.reshape(1, 1, 3, 1, 1, 512).to(path.device)
    flips = torch.zeros(1, dtype=torch.uint8, device=path.device)
    targets = predict_targets(views, flips, temperature=temperature, classes=3)
    assert ((targets >= 0) & (targets <= 1)).all()
    assert_close(targets.sum(1), torch.ones(1, 1, 1, 512, dtype=torch.float64).to(path.device))
    if temperature >= 0.7:
        expected = reference.predict_targets(views, flips, temperature=temperature, classes=3)
        assert_close(targets, expected)


@pytest.mark.parametrize("classes", [3, 2])
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
def test_nan_is_that_of_its_anchor(path, classes):
    logits, flips = make((3, 1, 6, 2, 3, 4), device=path.device)
    logits[1, 0, 4, 1, 2, 0] = math.nan
    expected = reference.predict_targets(logits, flips, classes=classes).isnan()
    assert expected.sum() == classes
    assert torch.equal(predict_targets(logits, flips, classes=classes).isnan(), expected)


@pytest.mark.parametrize("container", [list, tuple])
def test_levels(path, container):
    shapes = [(4, 2, 3, 8, 8, 8), (4, 2, 3, 5, 4, 3), (4, 2, 3, 0, 1, 1), (4, 2, 3, 1, 1, 1)]
    levels = container(make(shape, device=path.device)[0] for shape in shapes)
    flips = torch.tensor([0, 1, 6, 7], dtype=torch.uint8, device=path.device)
    targets = predict_targets(levels, flips)
    assert type(targets) is container
    for ours, theirs in zip(targets, reference.predict_targets(levels, flips), strict=True):
        assert_close(ours, theirs)


def test_levels_of_any_tuple_give_a_tuple():
    Levels = namedtuple("Levels", "fine coarse")
    views = Levels(torch.zeros(2, 1, 1, 4, 4, 4), torch.zeros(2, 1, 1, 2, 2, 2))
    targets = predict_targets(views, torch.tensor([0, 5], dtype=torch.uint8))
    assert [y.shape[-1] for y in targets] == [4, 2]
    losses = soft_target_focal_loss(views, Levels(*map(torch.zeros_like, views)), reduction="none")
    assert [type(x) for x in (losses, targets)] == [tuple, tuple]


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
    """Of any bits: those of 0 / 0 end in zeros, these do not."""
    logits, flips = make((3, 1, 1, 2, 3, width), dtype, path.device)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    logits.view(integers)[1, 0, 0, 1, 2, 0] = torch.iinfo(integers).max
    expected = reference.predict_targets(logits, flips).isnan()
    assert expected.sum() == 1
    assert torch.equal(predict_targets(logits, flips).isnan(), expected)


@pytest.mark.kernel
@pytest.mark.skipif(on_gpu(), reason="needs the interpreter")
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 20), (torch.bfloat16, 12)])
@pytest.mark.parametrize("anchors_last", [False, True])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("flips", [(0, 3, 4, 7), (0, 14, 25, 47)])
@pytest.mark.parametrize("classes", [1, 4])
def test_every_byte_is_moved_once(dtype, floor, anchors_last, size, flips, classes):
    views = torch.zeros(4, 2, 8, size, size, size, dtype=dtype)
    if anchors_last:
        views = views.movedim(2, -1).contiguous().movedim(-1, 2)
    flips = torch.tensor(flips, dtype=torch.uint8)
    with checked(x=views, flips=flips, shuffle=0) as report:
        launch("predict_targets", [views], flips, 0.7, classes)
    written = report["out"].written
    assert len(report.launches) == 1 and report.never_written("out") == 0
    assert report["x"].read == report["x"].read_once == views.nbytes
    assert (report["x"].read + written) == floor * views[0].numel()


@pytest.mark.kernel
@pytest.mark.skipif(on_gpu(), reason="needs the interpreter")
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize(
    ("shape", "code"),
    [
        ((1, 1, 2, 1100, 1400, 1401), 4),
        ((2, 3, 2, 512, 512, 1024), 4),
        ((1, 1, 2, 1296, 1296, 1296), 8 + 2),
    ],
)
def test_more_than_2_to_the_31_elements(shape, code, classes):
    """The last program alone: memory that is never touched is never there."""
    views = torch.empty(shape, dtype=torch.bfloat16)
    flips = torch.full(shape[:1], code, dtype=torch.uint8)
    width = shape[5]
    row = torch.arange(width, dtype=torch.bfloat16).fmod(7)
    channel = views[:, -1, -1 if classes == 1 else 0]  # [K, D, H, W]
    if code == 4:
        channel[:, -1, -1] = row
    else:  # the original's W is H of the view
        channel[:, -1, :, -1] = row
    with checked(x=views, flips=flips, programs=[-1]):
        (out,) = launch("predict_targets", [views], flips, 1.0, classes)
    assert views.numel() > 2**31
    tail = min(BLOCK // classes, width) // 4
    logit = row.flip(0)[-tail:].double() * (1 if classes == 1 else -1)
    assert_close(out[-1, -1, -1, -1, -tail:], logit.sigmoid())


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


SIZE = st.sampled_from([1, 2, 3, 4, 5, 8, 13, 16])  # empty tensors have a test of their own
CASE = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 5), SIZE, SIZE, SIZE, SIZE, SIZE),
        "cube": st.booleans(),
        "classes": st.sampled_from([None, None, 2, 4]),
        "order": st.permutations(range(6)),
        "step": st.sampled_from([1, 1, 2]),
        "dtype": st.sampled_from(FLOATS),
        "temperature": st.sampled_from([0.05, 0.3, 0.7, 1.0]),
        "spread": st.sampled_from([0.1, 3.0, 40.0]),
        "seed": st.integers(0, 2**16),
    }
)


def check_case(case, device="cpu"):
    """Any shape, in any order of memory, any codes and classes that fit."""
    order, shape = case["order"], case["shape"]
    if case["cube"]:
        shape = (*shape[:3], *shape[3:4] * 3)
    stored = [min(shape[axis], 5) if axis in order[:2] else shape[axis] for axis in order]
    logits, _ = make(stored, case["dtype"], device, case["seed"], case["spread"])
    logits = logits[..., :: case["step"]].permute([order.index(axis) for axis in range(6)])
    most = 48 if len(set(logits.shape[3:])) == 1 else 8
    generator = torch.Generator().manual_seed(case["seed"])
    flips = torch.randint(most, logits.shape[:1], generator=generator).to(torch.uint8).to(device)
    classes = case["classes"]
    if classes and logits.shape[2] % classes:
        classes = None
    compare(logits, flips, temperature=case["temperature"], classes=classes)


@cases(500)
@given(case=CASE)
def test_any_case_on_the_cpu_path(case):
    check_case(case)


@kernel_cases(30)
@given(case=CASE)
def test_any_case_in_the_kernel(path, case):
    check_case(case, path.device)
