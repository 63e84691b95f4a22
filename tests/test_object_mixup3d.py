"""What is particular to object_mixup3d; test_ops.py has the tests that every op needs."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from fmkernels import object_mixup3d
from fmkernels.kernels import object_mixup3d as kernels
from fmkernels.kernels import tuning
from tests.opinfo import FLOATS, VOXELS, make
from tests.support import on_gpu
from tests.support.cases import cases, kernel_cases
from tests.support.launch import launch
from tests.support.tolerance import assert_close
from tests.triton_checked.interpreter import KernelFault, checked

WINDOW = (-20.5, 30.0)
INF, NAN = math.inf, math.nan


make = partial(make, scale=1.0)


def rows(*boxes, device="cpu"):
    return torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 7)


def draw(pairs, shape, device="cpu", seed=0, donor_shape=None):
    """Boxes of any extent, inside and across the borders of volumes, overlapping; and weights."""
    generator = torch.Generator().manual_seed(seed)

    def some(shape):
        size = torch.tensor(shape[2:], dtype=torch.float32)
        start = torch.rand(pairs, 3, generator=generator) * (size + 2) - 2
        extent = torch.rand(pairs, 3, generator=generator) * (size / 2 + 2)
        batch = torch.randint(shape[0], (pairs, 1), generator=generator)
        return torch.cat((batch, start, start + extent), 1).to(device)

    return (
        some(shape),
        some(donor_shape or shape),
        torch.rand(pairs, generator=generator).to(device),
    )


def assert_right(result, *arguments, **named):
    """Within the tolerance of its type, that of float32 at best: coordinates are float32."""
    exact = reference.object_mixup3d(*arguments, **{**named, "dtype": torch.float64})
    slack = 0.0 if result.dtype.is_floating_point else 9e-4
    assert_close(result, exact, arithmetic=torch.float32, slack=slack)


def compare(*arguments, **named):
    """The result, once it agrees with the reference, and once the same comes out in place."""
    result = object_mixup3d(*arguments, **named)
    assert_right(result, *arguments, **{k: v for k, v in named.items() if k != "dtype"})
    volumes = arguments[0]
    if result.dtype == volumes.dtype:
        ours = volumes.clone(memory_format=torch.preserve_format)
        assert object_mixup3d(ours, *arguments[1:], **named, out=ours) is ours
        assert torch.equal(ours.nan_to_num(), result.nan_to_num())
    return result


@pytest.mark.parametrize("dtype", VOXELS)
def test_donors_of_another_type(path, dtype):
    volumes = make((2, 1, 5, 6, 7), dtype, path.device)
    # a pair of types compiles kernels, but both are converted for themselves
    compiled = {dtype, torch.float32, torch.int16}
    for donor_dtype in VOXELS if path.name == "cpu" else compiled:
        donors = make((2, 1, 6, 4, 8), donor_dtype, path.device, seed=1)
        boxes = draw(3, volumes.shape, path.device, donor_shape=donors.shape)
        assert compare(volumes, *boxes, donors=donors).dtype == dtype
        if dtype == donor_dtype or (dtype.is_floating_point and not donor_dtype.is_floating_point):
            result = compare(volumes, *boxes, donors=donors, window=WINDOW)
            assert result.dtype == (dtype if dtype.is_floating_point else torch.float32)
        else:
            with pytest.raises(ValueError, match="window must be None for donors of another dtype"):
                object_mixup3d(volumes, *boxes, donors=donors, window=WINDOW)


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (1, 7, 5), (16, 16, 16), (9, 12, 11), (13, 10, 17), (2, 3, 300), (20, 1, 1)]
)
def test_shapes(path, size):
    """Planes of one tile and of several, slices around a multiple of a program's."""
    volumes = make((2, 1, *size), device=path.device)
    whole = rows((0, 0, 0, 0, *size), (1, 0, 0, 0, *size), device=path.device)
    compare(volumes, whole, whole.flip(0), torch.tensor([0.25, 0.75], device=path.device))
    compare(volumes, *draw(4, volumes.shape, path.device))


def test_a_program_takes_several_tiles(path, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    volumes = make((1, 2, 20, 12, 14), device=path.device)
    whole = rows((0, 0, 0, 0, 20, 12, 14), (0, 2, 1, 1, 19, 12, 13), device=path.device)
    compare(
        volumes,
        whole,
        draw(2, volumes.shape, path.device)[1],
        torch.tensor([0.5, 0.7], device=path.device),
    )


def test_tiles_of_any_depth(path, monkeypatch):
    """Those that the tuning sweep tries, without other boxes near and with them."""
    volumes = make((1, 1, 20, 12, 14), device=path.device)
    alone = rows((0, 0, 0, 0, 20, 12, 14), device=path.device)
    lam = torch.tensor([0.5], device=path.device)
    for block in (256, 1024, 2048):
        row = tuning.Launch(block=block, num_warps=4)
        monkeypatch.setitem(tuning.TABLE, "object_mixup3d", {tuning.DEFAULT: row})
        compare(volumes, alone, draw(1, volumes.shape, path.device)[1], lam)
        compare(volumes, *draw(3, volumes.shape, path.device))


def test_more_boxes_than_are_tested_at_once(path, monkeypatch):
    monkeypatch.setattr(kernels, "BOXES", 4)
    volumes = make((2, 1, 4, 5, 5), device=path.device)
    for pairs in (4, 5, 9):
        compare(volumes, *draw(pairs, volumes.shape, path.device, seed=pairs))


# --- semantics -----------------------------------------------------------------------------------


def test_a_voxel_belongs_to_a_box_if_its_center_does(path):
    volumes, donors = (
        torch.zeros(1, 1, 1, 1, 8, device=path.device),
        torch.ones(1, 1, 1, 1, 8, device=path.device),
    )
    source, zero = (
        rows((0, 0, 0, 0, 1, 1, 8), device=path.device),
        torch.zeros(1, device=path.device),
    )
    for start, end, voxels in (
        (2, 5, [2, 3, 4]),
        (2.5, 5.5, [2, 3, 4]),
        (2.50001, 5.50001, [3, 4, 5]),
        (2.6, 3.4, []),
        (2.4, 2.6, [2]),
        (-9, 1.5, [0]),
        (6.5, 1e30, [6, 7]),
        (7.5, 7.5, []),
        (-3, 0.5, []),
        (5, 2, []),
        (8, 9, []),
    ):
        result = object_mixup3d(
            volumes,
            rows((0, 0, 0, start, 1, 1, end), device=path.device),
            source,
            zero,
            donors=donors,
        )
        assert result.flatten().nonzero().flatten().tolist() == voxels, (start, end)


BAD = {
    "empty": (0, 2, 2, 2, 2, 4, 4),
    "inverted": (0, 4, 1, 1, 2, 4, 4),
    "outside": (0, 9, 1, 1, 12, 4, 4),
    "before": (0, -5, 1, 1, 0, 4, 4),
    "NaN": (0, 1, NAN, 1, 4, 4, 4),
    "infinite": (0, 1, 1, 1, INF, 4, 4),
    "infinite start": (0, -INF, 1, 1, 4, 4, 4),
    "batch below": (-1, 1, 1, 1, 4, 4, 4),
    "batch above": (2, 1, 1, 1, 4, 4, 4),
    "batch NaN": (NAN, 1, 1, 1, 4, 4, 4),
    "batch infinite": (INF, 1, 1, 1, 4, 4, 4),
}


def test_a_pair_with_an_unusable_box_changes_nothing(path):
    """Neither alone, nor where its box would overlap others."""
    volumes = make((2, 1, 6, 5, 5), device=path.device)
    good, other = (1, 1, 1, 1, 4, 4, 4), (1, 2, 2, 2, 6, 5, 5)
    bad = list(BAD.values())
    targets = rows(*bad, *[good] * len(bad), device=path.device)
    sources = rows(*[good] * len(bad), *bad, device=path.device)
    lam = torch.full((len(targets),), 0.25, device=path.device)
    assert torch.equal(compare(volumes, targets, sources, lam), volumes)
    first, last = rows(good, device=path.device), rows(other, device=path.device)
    result = compare(
        volumes,
        torch.cat((first, targets, last)),
        torch.cat((last, sources, first)),
        torch.cat((lam, lam[:2])),
    )
    assert torch.equal(
        result, object_mixup3d(volumes, torch.cat((first, last)), torch.cat((last, first)), lam[:2])
    )


def test_huge_boxes_are_clipped(path):
    volumes = make((2, 1, 5, 4, 6), device=path.device)
    huge = rows((0, *[-3e38] * 3, *[3e38] * 3), device=path.device)
    whole, half = (
        rows((1, 0, 0, 0, 5, 4, 6), device=path.device),
        torch.full((1,), 0.5, device=path.device),
    )
    result = compare(volumes, huge, whole, half)
    assert torch.equal(result[0], 0.5 * volumes[0] + 0.5 * volumes[1]) and torch.equal(
        result[1], volumes[1]
    )
    compare(volumes, whole, huge, half)


def test_a_donor_smaller_than_a_voxel_is_its_nearest_voxel(path):
    volumes = make((1, 1, 6, 6, 6), device=path.device)
    target, zero = (
        rows((0, 0, 0, 0, 3, 3, 3), device=path.device),
        torch.zeros(1, device=path.device),
    )
    result = compare(
        volumes, target, rows((0, 3.1, 4.6, 5.0, 3.2, 4.9, 5.4), device=path.device), zero
    )
    assert (result[0, 0, :3, :3, :3] == volumes[0, 0, 3, 4, 5]).all()


def test_donors_are_read_as_they_were(path):
    """A swap, a chain and a cycle in place: every donor is itself a target."""
    volumes = make((3, 1, 4, 4, 4), device=path.device)
    boxes = rows(*((k, 0, 0, 0, 4, 4, 4) for k in range(3)), device=path.device)
    for order in ([1, 0, 2], [1, 2, 2], [1, 2, 0], [2, 0, 1]):
        ours = volumes.clone()
        zero = torch.zeros(3, device=path.device)
        assert torch.equal(
            object_mixup3d(ours, boxes, boxes[order], zero, out=ours), volumes[order]
        )
    ours = volumes.clone()
    left, right = (0, 0, 0, 0, 4, 4, 2), (0, 0, 0, 2, 4, 4, 4)
    pair = rows(left, right, device=path.device)
    object_mixup3d(ours, pair, pair.flip(0), torch.zeros(2, device=path.device), out=ours)
    assert torch.equal(ours[0], volumes[0].roll(2, 3))
    halves = rows(
        (1, 0, 0, 0, 4, 4, 3), (1, 0, 0, 1, 4, 4, 4), device=path.device
    )  # a box that overlaps its donor
    compare(volumes, halves, halves.flip(0), torch.full((2,), 0.5, device=path.device))


def test_overlapping_targets_are_applied_in_list_order(path):
    volumes = torch.zeros(1, 1, 1, 1, 6, device=path.device)
    donors = torch.tensor([1.0, 2.0, 3.0], device=path.device).reshape(3, 1, 1, 1, 1)
    boxes = rows(
        (0, 0, 0, 0, 1, 1, 3), (0, 0, 0, 1, 1, 1, 5), (0, 0, 0, 2, 1, 1, 6), device=path.device
    )
    sources = rows(*((k, 0, 0, 0, 1, 1, 1) for k in range(3)), device=path.device)
    half = torch.full((3,), 0.5, device=path.device)
    result = compare(volumes, boxes, sources, half, donors=donors)
    assert result.flatten().tolist() == [0.5, 1.25, 2.125, 2, 2, 1.5]
    result = compare(volumes, boxes.flip(0), sources.flip(0), half, donors=donors)
    assert result.flatten().tolist() == [0.5, 1, 1.375, 1.75, 1.75, 1.5]


def test_overlaps_are_rounded_once(path):
    volumes = torch.zeros(1, 1, 1, 1, 4, dtype=torch.int16, device=path.device)
    donors = torch.tensor([1, 3], dtype=torch.int16, device=path.device).reshape(2, 1, 1, 1, 1)
    boxes = rows((0, 0, 0, 0, 1, 1, 4), (0, 0, 0, 0, 1, 1, 4), device=path.device)
    sources = rows((0, 0, 0, 0, 1, 1, 1), (1, 0, 0, 0, 1, 1, 1), device=path.device)
    lam = torch.tensor([0.5, 0.75], device=path.device)
    assert (
        compare(volumes, boxes, sources, lam, donors=donors) == 1
    ).all()  # 0.75 * 0.5 + 0.25 * 3 = 1.125


def test_many_boxes_on_the_same_voxels(path):
    volumes = make((1, 1, 5, 5, 5), device=path.device)
    boxes, sources, lam = draw(24, volumes.shape, path.device, seed=5)
    compare(
        volumes, boxes * torch.tensor([1] + [0.5] * 6, device=path.device), sources, 0.5 + lam / 2
    )


@pytest.mark.parametrize("dtype", VOXELS)
def test_lam_of_one_and_zero(path, dtype):
    volumes = make((2, 1, 4, 5, 6), dtype, path.device)
    boxes = rows((0, 0, 0, 0, 4, 5, 6), (1, 0, 0, 0, 4, 5, 6), device=path.device)
    result = object_mixup3d(
        volumes, boxes, boxes.flip(0), torch.tensor([1.0, 0.0], device=path.device)
    )
    assert torch.equal(result, volumes[[0, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lam_of_any_float_type(path, dtype):
    volumes = make((2, 1, 4, 5, 6), torch.float64, path.device)
    boxes, sources, lam = draw(3, volumes.shape, path.device)
    compare(volumes, boxes, sources, lam.to(dtype))


def test_integers_saturate_and_nan_becomes_zero(path):
    volumes = torch.tensor([32000, -32000, 5, 5], dtype=torch.int16, device=path.device)
    donors = torch.tensor([40000.0, -INF, 6, 8.5], device=path.device)
    volumes, donors = volumes.reshape(1, 1, 1, 1, 4), donors.reshape(1, 1, 1, 1, 4)
    whole = rows((0, 0, 0, 0, 1, 1, 4), device=path.device)
    lam = torch.tensor([0.5], device=path.device)
    result = object_mixup3d(volumes, whole, whole, lam, donors=donors)
    assert result.flatten().tolist() == [32767, -32768, 6, 7]  # 5.5 and 6.75
    floats = torch.tensor([1e30, -INF, NAN, 2.5], device=path.device).reshape(1, 1, 1, 1, 4)
    none = rows(device=path.device)
    result = object_mixup3d(floats, none, none, lam[:0], dtype=torch.int16)
    assert result.flatten().tolist() == [32767, -32768, 0, 2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_of_zero_hides_what_is_not_finite(path, dtype, value):
    """Targets 0 and 2 are not finite, and so are donors 0 and 3."""
    volumes, donors = (
        torch.arange(4.0, device=path.device).add(first).to(dtype).reshape(4, 1, 1, 1, 1)
        for first in (1, 11)
    )
    volumes[[0, 2]], donors[[0, 3]] = value, value
    pairs = rows(*((k, 0, 0, 0, 1, 1, 1) for k in range(4)), device=path.device)
    for lam, expected in (
        ([1.0, 1.0, 0.0, 0.0], [value, 2, 13, value]),
        ([0.0, 0.0, 1.0, 1.0], [value, 12, value, 4]),
        ([0.5, 0.5, 0.5, 0.5], [value, 7, value, value]),
    ):
        weights = torch.tensor(lam, device=path.device)
        for own in (volumes, volumes.clone()):
            out = own if own is not volumes else None
            result = object_mixup3d(own, pairs, pairs, weights, donors=donors, out=out)
            exact = reference.object_mixup3d(volumes, pairs, pairs, weights, donors=donors)
            right = torch.tensor(expected, dtype=torch.float64, device=path.device)
            for ours in (result.double().flatten(), exact.flatten()):
                assert torch.equal(ours.nan_to_num(99), right.nan_to_num(99))


def test_of_overlapping_targets_one_may_hide_what_another_shows(path):
    volumes, donors = make((1, 1, 1, 1, 4), device=path.device), make((2, 1, 1, 1, 1))
    donors = donors.to(path.device)
    donors[0] = NAN
    boxes = rows((0, 0, 0, 0, 1, 1, 3), (0, 0, 0, 1, 1, 1, 4), device=path.device)
    sources = rows((0, 0, 0, 0, 1, 1, 1), (1, 0, 0, 0, 1, 1, 1), device=path.device)
    lam = torch.tensor([0.5, 0.0], device=path.device)
    result = compare(volumes, boxes, sources, lam, donors=donors)
    assert result.isnan().flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [1.5, -0.25, INF])
def test_a_weight_outside_0_and_1_raises_on_the_cpu(dtype, value):
    volumes = make((2, 1, 3, 4, 5))
    boxes, sources, _ = draw(2, volumes.shape)
    before = volumes.clone()
    lam = torch.tensor([0.5, value], dtype=dtype)
    for out in (None, volumes):
        with pytest.raises(
            ValueError, match=rf"object_mixup3d: lam must be in \[0, 1\], got {value}"
        ):
            object_mixup3d(volumes, boxes, sources, lam, out=out)
    assert torch.equal(volumes, before)


@pytest.mark.kernel
@pytest.mark.skipif(on_gpu(), reason="a device assert would end the process")
@pytest.mark.parametrize(("lam", "right"), [(1.5, False), (-0.25, False), (1.0, True), (NAN, True)])
def test_a_weight_outside_0_and_1_fails_an_assert_in_the_kernel(lam, right):
    volumes = make((1, 1, 3, 4, 5))
    whole = rows((0, 0, 0, 0, 3, 4, 5))
    arguments = volumes, None, whole, whole, torch.tensor([lam]), None, None
    with checked():
        if right:
            launch("object_mixup3d", *arguments, dtype=torch.float32)
        else:
            with pytest.raises(KernelFault, match=r"device_assert: .*lam must be in \[0, 1\]"):
                launch("object_mixup3d", *arguments, dtype=torch.float32)


@pytest.mark.parametrize("debug", [False, True])
def test_the_assert_is_compiled_if_debug_says_so(monkeypatch, debug):
    monkeypatch.setattr(kernels, "debug", lambda: debug)
    options = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: options.update(kwargs)

    monkeypatch.setattr(kernels, "fmkernels_object_mixup_kernel", Kernel())
    volumes = make((1, 1, 3, 4, 5))
    launch(
        "object_mixup3d", volumes, None, *draw(1, volumes.shape), None, None, dtype=torch.float32
    )
    assert options["debug"] is debug


def test_not_finite_voxels_stay_where_they_are(path):
    """They show in the samples next to them, and in no other ones of a row."""
    volumes = make((2, 1, 4, 4, 9), device=path.device)
    volumes[1, 0, 2, 2, 7], volumes[0, 0, 3, 3, 8] = INF, NAN
    boxes = rows((0, 0, 0, 0, 4, 3, 7), (1, 0, 0, 0, 4, 3, 8), device=path.device)
    sources, half = (
        rows((1, 0, 0, 0, 4, 4, 9), (0, 0, 0, 0, 4, 4, 9), device=path.device),
        torch.full((2,), 0.5),
    )
    half = half.to(path.device)
    for dtype in FLOATS:
        result = compare(volumes.to(dtype), boxes, sources, half)
        assert result[0, 0, :, :3, :4].isfinite().all() and result[1, 0, :, :3, :4].isfinite().all()
        compare(volumes.to(dtype), boxes, sources, half, window=(-1.0, 2.0))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_voxels_in_no_box(path, window):
    """Copied, windowed and converted out of place; in place left alone, but for the window."""
    volumes = make((2, 2, 9, 33, 35), torch.int16, path.device)
    target, half = (
        rows((1, 2, 3, 4, 6, 9, 9), device=path.device),
        torch.full((1,), 0.5, device=path.device),
    )
    result = compare(volumes, target, target, half, window=window, dtype=torch.int16)
    outside = torch.ones(volumes.shape, dtype=torch.bool, device=path.device)
    outside[1, :, 2:6, 3:9, 4:9] = False
    plain = object_mixup3d(
        volumes, target[:0], target[:0], half[:0], window=window, dtype=torch.int16
    )
    assert torch.equal(result[outside], plain[outside])
    if window is None:
        assert torch.equal(plain, volumes)


# --- outsiders -----------------------------------------------------------------------------------


def test_equals_interpolate_and_lerp_on_boxes_of_whole_numbers(path):
    volumes = make((3, 1, 8, 9, 10), device=path.device)
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        low = torch.randint(0, 4, (5, 2, 3), generator=generator)
        high = low + torch.randint(1, 5, (5, 2, 3), generator=generator)
        batch = torch.randint(3, (5, 2, 1), generator=generator)
        both, lam = torch.cat((batch, low, high), 2), torch.rand(5, generator=generator)
        expected = volumes.double()
        for (b, z1, y1, x1, z2, y2, x2), (j, *source), weight in zip(
            *both.transpose(0, 1).tolist(), lam, strict=True
        ):
            d1, h1, w1, d2, h2, w2 = source
            crop = volumes[j, None, :, d1:d2, h1:h2, w1:w2].double()
            donor = torch.nn.functional.interpolate(
                crop, (z2 - z1, y2 - y1, x2 - x1), mode="trilinear"
            )[0]
            region = expected[b, :, z1:z2, y1:y2, x1:x2]
            region.copy_(torch.lerp(donor, region, weight.double().to(path.device)))
        targets, sources = both.float().unbind(1)
        result = object_mixup3d(
            volumes, targets.to(path.device), sources.to(path.device), lam.to(path.device)
        )
        assert_close(result, expected)


def test_equals_simpleitk_where_samples_stay_inside_the_box(path):
    sitk = pytest.importorskip("SimpleITK")
    volumes, donors = make((1, 1, 8, 8, 8)), make((1, 1, 20, 22, 24), seed=1)
    source = torch.tensor([1.3, 2.7, 0.9, 18.2, 21.4, 23.1])
    result = object_mixup3d(
        volumes.to(path.device),
        rows((0, 1, 2, 3, 7, 6, 8), device=path.device),
        torch.cat((torch.zeros(1), source))[None].to(path.device),
        torch.tensor([0.3], device=path.device),
        donors=donors.to(path.device),
    )
    n = torch.tensor([6, 4, 5])
    step = (source[3:].double() - source[:3].double()) / n
    first = source[:3].double() + 0.5 * step - 0.5
    image = sitk.GetImageFromArray(donors[0, 0].double().numpy())
    donor = sitk.Resample(
        image,
        n.flip(0).tolist(),
        sitk.Transform(),
        sitk.sitkLinear,
        first.flip(0).tolist(),
        step.flip(0).tolist(),
        image.GetDirection(),
    )
    expected = volumes.double()
    region = expected[0, 0, 1:7, 2:6, 3:8]
    region.copy_(0.3 * region + 0.7 * torch.from_numpy(sitk.GetArrayFromImage(donor)))
    assert_close(result.cpu(), expected)


def test_same_size_is_not_resampled(path):
    volumes = make((2, 1, 9, 10, 11), device=path.device)
    target = rows((0, 1, 2, 3, 8, 9, 10), device=path.device)
    source, zero = (
        rows((1, 2, 1, 0, 9, 8, 7), device=path.device),
        torch.zeros(1, device=path.device),
    )
    result = object_mixup3d(volumes, target, source, zero)
    assert torch.equal(result[0, :, 1:8, 2:9, 3:10], volumes[1, :, 2:9, 1:8, 0:7])


# --- memory --------------------------------------------------------------------------------------


def layouts(x):
    return {
        "channels last": x.to(memory_format=torch.channels_last_3d),
        "permuted": x.permute(0, 1, 4, 2, 3),
        "batch last": x.permute(1, 2, 3, 4, 0),
        "sliced": x[:, :, 1:, ::2],
        "every other": x[::2],
        "expanded": x[:, :1, :1].expand(-1, 3, 5, -1, -1),
    }


def test_memory_format_is_kept(path):
    volumes = make((2, 3, 6, 5, 7), torch.int16, path.device).to(
        memory_format=torch.channels_last_3d
    )
    result = compare(volumes, *draw(4, volumes.shape, path.device), window=WINDOW)
    assert result.stride() == volumes.stride()


def test_out_may_share_memory_with_the_donors(path):
    for window in (None, (-1.0, 2.0)):
        base = make((5, 1, 4, 3, 5), device=path.device)
        boxes, sources, lam = draw(3, (2, 1, 4, 3, 5), path.device)
        for donors in (
            lambda x: x[:2],
            lambda x: x[1:4],
            lambda x: x[3:],
            lambda x: x[:1, :, 1:3],
            lambda x: x,
        ):
            ours = base.clone()
            expected = object_mixup3d(
                base[:2], boxes, sources, lam, donors=donors(base), window=window
            )
            object_mixup3d(
                ours[:2], boxes, sources, lam, donors=donors(ours), window=window, out=ours[:2]
            )
            assert torch.equal(ours[:2], expected) and torch.equal(ours[2:], base[2:])
            ours = base.clone()
            object_mixup3d(
                base[:2].clone(),
                boxes,
                sources,
                lam,
                donors=donors(ours),
                window=window,
                out=ours[1:3],
            )
            assert torch.equal(ours[1:3], expected) and torch.equal(ours[3:], base[3:])


def test_overlapping_volumes_are_refused_or_right(path):
    base = make((5, 1, 3, 4, 4), device=path.device)
    boxes = draw(2, (2, 1, 3, 4, 4), path.device)
    with pytest.raises(
        ValueError,
        match="object_mixup3d: out may be volumes itself but must not overlap it otherwise",
    ):
        object_mixup3d(base[:2], *boxes, out=base[1:3])
    kept = base.clone()
    expected = object_mixup3d(kept[:2].mT, *boxes)
    object_mixup3d(base[:2].mT, *boxes, out=base[1:3])
    assert torch.equal(base[1:3], expected) and torch.equal(base[3:], kept[3:])


class Subclass(torch.Tensor):
    """A subclass that has memory, such as MONAI's MetaTensor."""


def test_memory_of_a_tensor_subclass_is_noticed(path):
    """In place, overlapping the donors, and overlapping the volumes otherwise."""
    base = make((5, 1, 3, 4, 4), device=path.device)
    boxes = draw(3, (2, 1, 3, 4, 4), path.device)
    expected = object_mixup3d(base[:2], *boxes)
    ours = base.clone().as_subclass(Subclass)
    result = object_mixup3d(ours[:2], *boxes, out=ours[:2])
    assert isinstance(result, Subclass) and torch.equal(ours[:2], expected)
    ours = base.clone().as_subclass(Subclass)
    object_mixup3d(base[:2], *boxes, donors=ours[:2], out=ours[:2])
    assert torch.equal(ours[:2], expected) and torch.equal(ours[2:], base[2:])
    with pytest.raises(ValueError, match="out may be volumes itself but must not overlap it"):
        object_mixup3d(ours[:2], *boxes, out=ours[1:3])
    last = ours.to(memory_format=torch.channels_last_3d)
    with pytest.raises(ValueError, match="out may be volumes itself but must not overlap it"):
        object_mixup3d(last[:2], *boxes, out=last[1:3])


def test_half_of_a_tensor_may_be_mixed_into_the_other_half():
    whole = make((1, 1, 4, 5, 16))
    volumes, out = whole[..., :8], whole[..., 8:]
    boxes = draw(2, volumes.shape)
    expected = object_mixup3d(volumes.clone(), *boxes)
    assert torch.equal(object_mixup3d(volumes, *boxes, out=out), expected)


def test_memory_of_another_width_is_refused():
    volumes = make((2, 1, 4, 4, 4))
    out = volumes.view(torch.bfloat16).flatten()[:128].view(2, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="must not overlap"):
        object_mixup3d(volumes, *draw(2, volumes.shape), dtype=torch.bfloat16, out=out)


def test_in_place_is_out_of_place_for_large_objects_of_any_layout():
    volumes = make((2, 1, 11, 9, 13)).transpose(-1, -2)
    boxes = draw(6, volumes.shape)
    expected = object_mixup3d(volumes, *boxes)
    assert torch.equal(object_mixup3d(volumes, *boxes, out=volumes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_the_number_of_threads_changes_no_bit(dtype, monkeypatch):
    """Parts begin within a volume and within a target, and targets overlap."""
    monkeypatch.setattr("fmkernels.cpu.object_mixup3d.GRAIN_SIZE", 1)
    volumes = make((2, 2, 9, 8, 7), dtype)
    boxes = draw(9, volumes.shape)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            ours = volumes.clone()
            object_mixup3d(ours, *boxes, out=ours)
            results += [ours, object_mixup3d(volumes, *boxes)]
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(results[0], volumes) and all(
        torch.equal(result, results[0]) for result in results
    )


# --- any case ------------------------------------------------------------------------------------

BOUND = st.one_of(
    st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0, 5.0, 6.5, 8.0, 11.0]),
    st.floats(-3, 12, width=32),
    st.sampled_from([NAN, INF, -INF, 3e38, -3e38, 2.4, 2.6]),
)
BATCH = st.sampled_from([0, 0, 0, 1, 1, 2, 0.5, -0.5, -1, 7, NAN])
BOX = st.tuples(BATCH, *[BOUND] * 6)
SIZE = st.tuples(
    st.sampled_from([1, 2, 3, 5, 9]),
    st.sampled_from([1, 2, 4, 7]),
    st.sampled_from([0, 1, 3, 8, 11]),
)


@st.composite
def boxes_mostly_usable(draw, pairs):
    """Two bounds in order, but for one time in four."""
    result = []
    for _ in range(pairs):
        batch, *bounds = draw(BOX)
        if draw(st.integers(0, 3)):
            lows, highs = zip(
                *(sorted(pair) for pair in zip(bounds[:3], bounds[3:], strict=True)), strict=True
            )
            bounds = [*lows, *highs]
        result.append((batch, *bounds))
    return result


CASE = st.integers(0, 4).flatmap(
    lambda pairs: st.fixed_dictionaries(
        {
            "boxes": boxes_mostly_usable(pairs),
            "donor_boxes": boxes_mostly_usable(pairs),
            "batch": st.sampled_from([1, 2, 3]),
            "channels": st.sampled_from([1, 1, 2]),
            "size": SIZE,
            "donors": st.none() | SIZE,
            "dtype": st.sampled_from(VOXELS),
            "result": st.sampled_from([None, None, *VOXELS]),
            "window": st.sampled_from([None, None, WINDOW, (-1, 1)]),
            "layout": st.sampled_from(
                ["contiguous", "contiguous", "channels last", "permuted", "sliced"]
            ),
            "lam": st.sampled_from(["random", "random", "zero", "one"]),
            "seed": st.integers(0, 99),
        }
    )
)


def check_case(case, device="cpu"):
    volumes = make(
        (case["batch"], case["channels"], *case["size"]), case["dtype"], device, case["seed"]
    )
    volumes = {"contiguous": volumes, **layouts(volumes)}[case["layout"]]
    donors = None
    if case["donors"]:
        donors = make(
            (2, case["channels"], *case["donors"]), case["dtype"], device, case["seed"] + 1
        )
    boxes, sources = rows(*case["boxes"], device=device), rows(*case["donor_boxes"], device=device)
    lam = torch.rand(len(boxes), generator=torch.Generator().manual_seed(case["seed"])).to(device)
    lam = {"random": lam, "zero": lam * 0, "one": lam * 0 + 1}[case["lam"]]
    compare(
        volumes, boxes, sources, lam, donors=donors, window=case["window"], dtype=case["result"]
    )


@cases(500)
@given(case=CASE)
def test_any_case_on_the_cpu_path(case):
    check_case(case)


@kernel_cases(60)
@given(case=CASE)
def test_any_case_in_the_kernel(path, case):
    check_case(case, path.device)
