"""What is particular to crop_and_resize3d; test_ops.py has the tests that every op needs."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import reference
from fmkernels import crop_and_resize3d
from fmkernels.kernels import crop_and_resize3d as kernels
from fmkernels.kernels import tuning
from tests.opinfo import FLOATS, VOXELS, make
from tests.support import on_gpu
from tests.support.cases import cases, kernel_cases
from tests.support.tolerance import TOLERANCE, assert_close

PRODUCTION = set(tuning.TABLE["crop_and_resize3d"].values())
CLAMPS = ["box", "volume"]
WINDOW = (-20.5, 30.0)
BOXES = [
    [0, 0, 1, 1, 4, 5, 6],  # whole voxels
    [1, 0.3, 1.7, -2.4, 4.9, 3.1, 9.8],
    [1, 3.2, 2.6, 0.55, 3.4, 2.9, 5.5],  # smaller than a voxel
    [0, 4.1, 0.2, 5.5, 1.3, 4.4, 2.5],  # partly inverted
]


SMALL_TILES = {
    "crop_and_resize3d": tuning.Launch(block=64, num_warps=2, max_tiles=3, enough_programs=1),
    "crop_and_resize3d_backward": tuning.Launch(512, 4, max_tiles=2, enough_programs=1),
}

WHOLE = [[1, 0, 1, 2, 5, 6, 7], [0, 2, 0, 0, 3, 6, 4], [1, 1, 1, 1, 5, 4, 7], [0, 0, 0, 0, 5, 6, 7]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small inputs have several tiles and programs; the production row has a test of its own."""
    if not on_gpu():
        for op, launch in SMALL_TILES.items():
            monkeypatch.setitem(tuning.TABLE, op, {tuning.DEFAULT: launch})


make = partial(make, scale=3.0)


def boxes_of(rows, device="cpu"):
    return torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 7)


def coordinate_error(shape, boxes):
    """How far off samples of each box may lie in voxels, as float32 holds coordinates; [K]."""
    start, end = boxes[:, 1:4].double(), boxes[:, 4:].double()
    edge = torch.tensor(shape[2:], device=boxes.device)
    outside = (start - start.clamp(min=0).minimum(edge)).abs()
    return (2.0**-22 * ((end - start).abs() + outside)).sum(1).clamp(max=1).nan_to_num(0)


def spread(volumes, window=None):
    """The largest difference between two voxels."""
    finite = volumes.double().nan_to_num(0, 0, 0)
    width = float(finite.max() - finite.min()) if finite.numel() else 0.0
    return min(width / (window[1] - window[0]), 1.0) if window else width


def assert_right(result, volumes, boxes, size, **arguments):
    arguments["dtype"] = torch.float64
    exact = reference.crop_and_resize3d(volumes, boxes, size, **arguments)
    slack = coordinate_error(volumes.shape, boxes) * spread(volumes, arguments.get("window"))
    assert_close(result, exact, arithmetic=volumes.dtype, slack=slack[:, None, None, None, None])


def compare(volumes, boxes, size, **arguments):
    result = crop_and_resize3d(volumes, boxes, size, **arguments)
    assert result.shape == (len(boxes), volumes.shape[1], *size) and result.is_contiguous()
    assert_right(
        result, volumes, boxes, size, **{k: v for k, v in arguments.items() if k != "dtype"}
    )
    return result


@pytest.mark.parametrize("clamp", CLAMPS)
def test_float64_on_the_cpu_is_exact(clamp):
    volumes, boxes = make((2, 2, 5, 6, 7), torch.float64), boxes_of(BOXES)
    exact = reference.crop_and_resize3d(volumes, boxes, (4, 3, 5), clamp=clamp)
    assert_close(crop_and_resize3d(volumes, boxes, (4, 3, 5), clamp=clamp), exact)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 2), (7, 1, 1), (3, 13, 11), (2, 2, 131)])
def test_sizes_of_crops(path, size, clamp):
    """Of one voxel, of more layers than a program has, of more positions than a program has."""
    compare(
        make((2, 2, 5, 6, 7), device=path.device),
        boxes_of(BOXES[1:3], path.device),
        size,
        clamp=clamp,
    )


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (5, 1, 2), (1, 7, 1)])
def test_sizes_of_volumes(path, shape, clamp):
    compare(
        make((2, 1, *shape), device=path.device),
        boxes_of(BOXES, path.device),
        (2, 3, 2),
        clamp=clamp,
    )


@pytest.mark.parametrize("launch", PRODUCTION)
def test_production_launch_parameters(path, launch, monkeypatch):
    """The most layers per program, with lanes of a block, of a quarter and of one warp."""
    monkeypatch.setitem(
        tuning.TABLE, "crop_and_resize3d", {tuning.DEFAULT: replace(launch, enough_programs=1)}
    )
    volumes, boxes = make((2, 1, 5, 6, 7), device=path.device), boxes_of(BOXES[1:2], path.device)
    for size in ((launch.max_tiles + 1, 16, 32), (launch.max_tiles + 1, 12, 12), (40, 4, 8)):
        compare(volumes, boxes, size)


def test_coordinates_are_half_pixel(path):
    """The box [8, 12) of a ramp, to 8 samples: the two conventions, to the last bit."""
    expected = {
        "box": [8, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11],
        "volume": [7.75, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11.25],
    }
    for axis in range(3):
        shape, size, box = [1, 1, 1], [1, 1, 1], [0, 0, 0, 0, 1, 1, 1]
        shape[axis], size[axis], box[1 + axis], box[4 + axis] = 16, 8, 8, 12
        ramp = torch.arange(16.0, device=path.device).reshape(1, 1, *shape)
        for clamp in CLAMPS:
            crop = crop_and_resize3d(ramp, boxes_of([box], path.device), size, clamp=clamp)
            assert crop.flatten().tolist() == expected[clamp]
            mirrored = boxes_of([[*box[:1], *box[4:], *box[1:4]]], path.device)
            back = crop_and_resize3d(ramp, mirrored, size, clamp=clamp).flatten().tolist()
            assert back == (expected[clamp][::-1] if clamp == "volume" else [10.0] * 8)


def test_clamps_at_the_ends_of_the_volume(path):
    ramp = torch.arange(4.0, device=path.device).reshape(1, 1, 1, 1, 4)
    boxes = boxes_of(
        [[0, 0, 0, -2, 1, 1, 6], [0, 0, 0, -9, 1, 1, -5], [0, 0, 0, 7, 1, 1, 9]], path.device
    )
    for clamp in CLAMPS:
        crops = crop_and_resize3d(ramp, boxes, (1, 1, 8), clamp=clamp).flatten(1).tolist()
        assert crops == [[0, 0, 0, 1, 2, 3, 3, 3], [0] * 8, [3] * 8]


def test_a_center_on_a_face_is_inside_at_the_start_only(path):
    ramp = torch.arange(8.0, device=path.device).reshape(1, 1, 1, 1, 8)
    crop = crop_and_resize3d(ramp, boxes_of([[0, 0, 0, 2.5, 1, 1, 5.5]], path.device), (1, 1, 6))
    assert crop.flatten().tolist() == [2.25, 2.75, 3.25, 3.75, 4, 4]


def test_boxes_without_a_center_take_the_nearest_voxel(path):
    ramp = torch.arange(8.0, device=path.device).reshape(1, 1, 1, 1, 8)
    extents = {
        (2.1, 2.4): 2, (2.6, 2.9): 2, (2.6, 3.3): 2, (2.7, 3.5): 3, (2.5, 2.5): 2, (3, 3): 3,
        (5, 2): 3, (6, 2): 4, (0.59999996, 1.4): 0, (0.6, 1.4): 1, (-3, -2): 0, (8.5, 8.6): 7,
        (7.6, 9): 7, (-1, 0.5): 0, (30, -20): 5,
    }  # fmt: skip
    boxes = boxes_of([[0, 0, 0, start, 1, 1, end] for start, end in extents], path.device)
    crops = compare(ramp, boxes, (1, 1, 2))
    assert crops.flatten(1).tolist() == [[voxel, voxel] for voxel in extents.values()]


@pytest.mark.parametrize("dtype", VOXELS)
def test_identity_crop_is_exact(path, dtype):
    volumes = make((2, 1, 3, 4, 5), dtype, path.device)
    if dtype.is_floating_point:
        limit = torch.finfo(dtype)
        volumes[0, 0, 0, 0, :5] = torch.tensor(
            [math.inf, limit.max, limit.min, limit.tiny, -math.inf]
        )
        volumes[1, 0, 1, 1, 1] = math.nan
    boxes = boxes_of([[1, 0, 0, 0, 3, 4, 5], [0, 0, 0, 0, 3, 4, 5]], path.device)
    for clamp in CLAMPS:
        crops = crop_and_resize3d(volumes, boxes, (3, 4, 5), clamp=clamp)
        torch.testing.assert_close(crops, volumes[[1, 0]], rtol=0, atol=0, equal_nan=True)
        part = crop_and_resize3d(
            volumes, boxes_of([[0, 1, 0, 2, 3, 4, 4]], path.device), (2, 4, 2), clamp=clamp
        )
        assert torch.equal(part, volumes[:1, :, 1:3, :, 2:4])


def test_identity_crop_is_exact_whatever_the_extent():
    """49 * (1 / 49) is not 1."""
    for dtype in (torch.float32, torch.float64):
        volumes = make((1, 1, 2, 49, 107), dtype)
        volumes[0, 0, 1, 9, 11] = math.inf
        assert torch.equal(
            crop_and_resize3d(volumes, boxes_of([[0, 0, 0, 0, 2, 49, 107]]), (2, 49, 107)), volumes
        )


def test_scaling_volume_and_box_changes_nothing(path):
    fine = (torch.arange(16.0, device=path.device) + 0.5) / 2 - 0.5
    volumes = (
        torch.arange(8.0, device=path.device).expand(1, 1, 8, 8, 8),
        fine.expand(1, 1, 16, 16, 16),
    )
    box = torch.tensor([[0, 2, 3, 1.5, 5, 6, 6.25]], device=path.device)
    crops = [
        crop_and_resize3d(
            volume, torch.cat([box[:, :1], box[:, 1:] * scale], 1), (2, 2, 5), clamp="volume"
        )
        for volume, scale in zip(volumes, (1, 2), strict=True)
    ]
    assert_close(*crops)


# --- the nearest voxel ---------------------------------------------------------------------------


def nearest(volumes, boxes, size, **arguments):
    """Crops of the nearest voxels, which equal the reference to the last bit."""
    crops = crop_and_resize3d(volumes, boxes, size, mode="nearest", **arguments)
    exact = reference.crop_and_resize3d(volumes, boxes, size, mode="nearest", **arguments)
    assert torch.equal(crops.double().nan_to_num(7), exact.double().nan_to_num(7))
    return crops


@pytest.mark.parametrize("dtype", VOXELS)
def test_nearest_takes_voxels_as_they_are(path, dtype):
    labels = make((2, 2, 5, 6, 7), dtype, path.device)
    if dtype.is_floating_point:
        labels[0, 0, 1, 2, 3], labels[1, 1, 4, 5, 6], labels[0, 1, 0, 0, 0] = (
            math.nan,
            math.inf,
            -0.0,
        )
    boxes = boxes_of([*BOXES, *WHOLE, [0, 5, 6, 7, 0, 0, 0]], path.device)
    for clamp in CLAMPS:
        assert nearest(labels, boxes, (3, 4, 5), clamp=clamp).dtype == dtype
    same = nearest(labels, boxes_of([[0, 0, 0, 0, 5, 6, 7]], path.device), (5, 6, 7))
    assert torch.equal(same.signbit(), labels[:1].signbit())
    assert nearest(labels, boxes, (2, 3, 2), dtype=torch.float64).dtype == torch.float64


def test_nearest_takes_the_higher_of_two(path):
    labels = torch.arange(12, dtype=torch.int16, device=path.device).reshape(1, 1, 1, 1, 12)
    ties = {(0, 12): [2, 6, 10], (1, 3): [1, 2, 2], (3, 1): [2, 2, 1], (2, 8): [3, 5, 7]}
    boxes = boxes_of([[0, 0, 0, start, 1, 1, end] for start, end in ties], path.device)
    crops = nearest(labels, boxes, (1, 1, 3), clamp="volume")
    assert crops.flatten(1).tolist() == list(ties.values())
    for axis in range(3):
        turned = boxes[
            :, [0, *torch.arange(1, 4).roll(axis + 1), *torch.arange(4, 7).roll(axis + 1)]
        ]
        size = torch.tensor([1, 1, 3]).roll(axis + 1).tolist()
        column = labels.movedim(4, 2 + axis)
        assert (
            nearest(column, turned, size, clamp="volume").flatten(1).tolist()
            == crops.flatten(1).tolist()
        )


@pytest.mark.parametrize("size", [(2, 3, 2), (2, 9, 17)])
def test_nearest_equals_crop_and_interpolate(path, size):
    labels = make((2, 2, 5, 6, 7), device=path.device)
    crops = nearest(labels, boxes_of(WHOLE, path.device), size)
    for (b, z1, y1, x1, z2, y2, x2), crop in zip(WHOLE, crops, strict=True):
        part = labels[b : b + 1, :, z1:z2, y1:y2, x1:x2]
        assert torch.equal(crop[None], F.interpolate(part, size, mode="nearest-exact"))


def test_nearest_gives_zeros_for_unusable_boxes(path):
    labels = make((2, 1, 2, 3, 4), torch.uint8, path.device).add_(1)
    rows = [[0, 0, 0, 0, 2, 3, 4], [0, math.nan, 0, 0, 2, 3, 4], [2, 0, 0, 0, 2, 3, 4]]
    crops = nearest(
        labels, boxes_of([*rows, [0, 0, -math.inf, 0, 2, 3, 4]], path.device), (2, 3, 4)
    )
    assert torch.equal(crops[0], labels[0]) and not crops[1:].any()


def test_nearest_has_no_gradient(path):
    volumes = make((1, 1, 2, 3, 4), device=path.device).requires_grad_()
    box = boxes_of([[0, 0, 0, 0, 2, 3, 4]], path.device)
    with torch.no_grad():
        assert torch.equal(nearest(volumes, box, (2, 3, 4)), volumes)
    crops = torch.ops.fmkernels.crop_and_resize3d(
        volumes, box, True, True, None, output_size=(2, 3, 4), dtype=torch.float32
    )
    with pytest.raises(RuntimeError, match="no gradient through mode 'nearest'"):
        crops.sum().backward()


# --- outsiders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 3, 2), (2, 9, 17)])
def test_equals_crop_and_interpolate(path, size, dtype):
    volumes = make((2, 2, 5, 6, 7), dtype, path.device)
    crops = crop_and_resize3d(volumes, boxes_of(WHOLE, path.device), size)
    for (b, z1, y1, x1, z2, y2, x2), crop in zip(WHOLE, crops, strict=True):
        expected = F.interpolate(volumes[b : b + 1, :, z1:z2, y1:y2, x1:x2], size, mode="trilinear")
        assert_close(crop[None], expected, torch.float32)


@pytest.mark.parametrize("size", [(2, 3, 2), (2, 5, 9)])
def test_equals_grid_sample(path, size):
    volumes = make((2, 2, 5, 6, 7), device=path.device)
    boxes = boxes_of([*BOXES, [0, -9, 8, -3, 12, -7, 14]], path.device)
    crops = crop_and_resize3d(volumes, boxes, size, clamp="volume")
    for box, crop in zip(boxes.double(), crops, strict=True):
        axes = [
            2
            * (
                start
                + (torch.arange(n, dtype=torch.float64, device=path.device) + 0.5)
                * (end - start)
                / n
            )
            / extent
            - 1
            for start, end, n, extent in zip(
                box[1:4], box[4:], size, volumes.shape[2:], strict=True
            )
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)
        volume = volumes[int(box[0])].double()
        expected = F.grid_sample(
            volume[None], grid[None], padding_mode="border", align_corners=False
        )
        assert_close(crop[None], expected)


@pytest.mark.parametrize(
    "box", [[0, 0.3, 1.25, 0.5, 4.75, 4.5, 6.5], [0, 1.5, 2.25, 3.125, 3.5, 2.75, 5.75]]
)
def test_equals_simple_itk(path, box):
    sitk = pytest.importorskip("SimpleITK")
    volume, size = make((1, 1, 5, 6, 7), torch.float64, path.device), (2, 3, 6)
    steps = [(end - start) / n for start, end, n in zip(box[1:4], box[4:], size, strict=True)]
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetSize(size[::-1])
    resample.SetOutputSpacing(steps[::-1])
    resample.SetOutputOrigin(
        [start + 0.5 * step - 0.5 for start, step in zip(box[1:4], steps, strict=True)][::-1]
    )
    expected = sitk.GetArrayFromImage(
        resample.Execute(sitk.GetImageFromArray(volume[0, 0].cpu().numpy()))
    )
    crops = crop_and_resize3d(volume, boxes_of([box], path.device), size, clamp="volume")
    assert_close(crops[0, 0].cpu(), torch.from_numpy(expected), torch.float32)


def test_equals_roi_align(path):
    ops = pytest.importorskip(
        "torchvision.ops", reason="torchvision is not installed", exc_type=ImportError
    )
    slices = make((2, 3, 6, 7), device=path.device)
    boxes = boxes_of([[1, 0, 1.2, 0.7, 1, 4.9, 6.1], [0, 0, 2, 1, 1, 5, 4.5]], path.device)
    rois = boxes[:, [0, 3, 2, 6, 5]]
    expected = ops.roi_align(slices, rois, (3, 4), sampling_ratio=1, aligned=True)
    assert_close(
        crop_and_resize3d(slices[:, :, None], boxes, (1, 3, 4), clamp="volume")[:, :, 0], expected
    )


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", CLAMPS)
def test_unusable_boxes_give_zeros(path, clamp):
    inf, nan = math.inf, math.nan
    whole = [0, 0, 0, 2, 3, 4]
    bad = [[b, *whole] for b in (-1, 2, 3, -0.5, nan, inf, -inf, 1e30)]
    for value in (nan, inf, -inf):
        bad += [[0, *whole[:i], value, *whole[i + 1 :]] for i in (0, 2, 4)]
    bad += [[0, -inf, 0, 0, inf, 3, 4], [0, inf, 0, 0, inf, 3, 4], [0, 0, -3e38, 0, 2, 3e38, 4]]
    volumes = make((2, 1, 2, 3, 4), device=path.device).add_(9)
    good = boxes_of([[1, *whole], [0.75, *whole]], path.device)
    for rows in (
        torch.cat([good[:1], boxes_of(bad, path.device), good[1:]]),
        boxes_of(bad, path.device),
    ):
        leaf = volumes.clone().requires_grad_()
        crops = crop_and_resize3d(leaf, rows, (2, 3, 4), clamp=clamp)
        kept = torch.cat([crops[:1], crops[-1:]]) if len(rows) > len(bad) else crops[:0]
        assert torch.equal(kept, volumes[[1, 0]] if len(kept) else kept)
        assert (crops[len(kept) // 2 :][: len(bad)] == 0).all()
        crops.sum().backward()
        assert (leaf.grad == (1 if len(kept) else 0)).all()


def test_huge_boxes(path):
    """Finite, however large: what is far beyond the volume is its end."""
    ramp = torch.arange(4.0, device=path.device).reshape(1, 1, 1, 1, 4)
    boxes = boxes_of(
        [[0, 0, 0, -1e38, 1, 1, 1e38], [0, 0, 0, 1e38, 1, 1, 2e38], [0, 0, 0, -3e38, 1, 1, -3e38]],
        path.device,
    )
    for clamp in CLAMPS:
        crops = crop_and_resize3d(ramp, boxes, (1, 1, 2), clamp=clamp)
        assert crops.flatten(1).tolist() == [[0, 3], [3, 3], [0, 0]]


def test_a_box_far_into_a_long_volume_keeps_its_fraction(path):
    """Counted from 0, float32 would leave 1/128 of a voxel there."""
    volume = torch.zeros(1, 1, 1, 1, 100_000, device=path.device)
    volume[..., 99_990:] = torch.arange(10.0, device=path.device)
    box = boxes_of([[0, 0, 0, 99_991, 1, 1, 99_998]], path.device)
    crop = crop_and_resize3d(volume, box, (1, 1, 21))
    expected = ((torch.arange(21, dtype=torch.float64) + 0.5) / 3 - 0.5).clamp(0, 6) + 1
    torch.testing.assert_close(crop.flatten().double().cpu(), expected, rtol=0, atol=1e-6)


def layouts(x):
    return {
        "channels last": x.to(memory_format=torch.channels_last_3d),
        "permuted": x.permute(0, 1, 4, 2, 3),
        "sliced": x[:, :, 1:, ::2],
        "flipped in memory": x.transpose(2, 4).contiguous().transpose(2, 4),
        "expanded": x[:, :1, :1].expand(-1, 2, 5, -1, -1),
        "expanded batch": x[:1].expand(2, -1, -1, -1, -1),
    }


def test_strided_input_is_not_copied(path, monkeypatch):
    volumes = make((2, 2, 5, 6, 7), device=path.device).to(memory_format=torch.channels_last_3d)
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("copied")
    )
    crop_and_resize3d(volumes, boxes_of(BOXES[:1], path.device), (2, 3, 5))


def test_integers_round_to_even_and_saturate(path):
    def half_way(a, b, dtype, result=None):
        volumes = (
            torch.tensor([a, b], dtype=dtype, device=path.device)
            .reshape(2, -1)
            .T.reshape(1, 1, -1, 1, 2)
        )
        box = boxes_of([[0, 0, 0, 0, len(a), 1, 2]], path.device)
        return crop_and_resize3d(volumes, box, (len(a), 1, 1), dtype=result).flatten().tolist()

    assert half_way([0, 1, 2, 3, -1, -2], [1, 2, 3, 4, 0, -1], torch.int16) == [0, 2, 2, 4, 0, -2]
    assert half_way([0, 1, 2, 253], [1, 2, 3, 254], torch.uint8) == [0, 2, 2, 254]
    assert half_way([300, -7, 255.5, 0.5], [300, -7, 255.5, 0.5], torch.float32, torch.uint8) == [
        255,
        0,
        255,
        0,
    ]
    big = [1e30, -1e30, math.inf, -math.inf, math.nan]
    for dtype in (torch.float32, torch.float64):
        assert half_way(big, big, dtype, torch.int16) == [32767, -32768, 32767, -32768, 0]


def test_what_is_not_finite_stays_where_it_is(path):
    volumes = make((1, 1, 4, 5, 6), device=path.device)
    volumes[0, 0, 1, 2, 3] = math.nan
    volumes[0, 0, 3, 4, 5] = math.inf
    volumes[0, 0, 0, 0, 0] = -math.inf
    boxes = boxes_of(
        [[0, 0, 0, 0, 4, 5, 6], [0, 1, 1, 1, 4, 5, 6], [0, 0.25, -0.5, 0.125, 3.5, 5.25, 6]],
        path.device,
    )
    for dtype in FLOATS:
        for window in (None, WINDOW):
            crops = compare(volumes.to(dtype), boxes, (2, 5, 8), window=window)
            assert not crops.isfinite().all() and crops.isfinite().sum() > crops.numel() / 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_rounds_to_zero_hides_what_is_not_finite(path, dtype, value):
    """In float32, sample 9 of 19 in [8, 9) and the middle of [1/2 - 2^-25, 5/2) are at centers."""
    volumes = torch.arange(16.0, device=path.device).to(dtype).reshape(1, 1, 1, 1, 16)
    volumes[..., [0, 7]] = value
    rows = boxes_of([[0, 0, 0, 8, 1, 1, 9], [0, 0, 0, 0.5 - 2**-25, 1, 1, 2.5]], path.device)
    samples = crop_and_resize3d(volumes, rows[:1], (1, 1, 19), clamp="volume")
    assert samples[..., 9].item() == 8 and not samples[..., :9].isfinite().any()
    assert samples[..., 9:].isfinite().all()
    if dtype != torch.float64 or path.name == "kernel":  # float64 has a weight for voxel 0
        for clamp in CLAMPS:
            assert crop_and_resize3d(volumes, rows[1:], (1, 1, 1), clamp=clamp).item() == 1


def test_windows_far_from_zero_and_narrow(path):
    volumes = torch.arange(29_990, 30_022, dtype=torch.int16, device=path.device).reshape(
        1, 1, 2, 2, 8
    )
    boxes = boxes_of([[0, 0, 0, 1.3, 2, 1.7, 7.2]], path.device)
    for window in ((30_000, 30_010), (30_000.25, 30_000.75), (-1e6, 1e6)):
        compare(volumes, boxes, (2, 2, 5), window=window)


def test_whole_voxels_of_every_face_but_one():
    whole, volumes = [0, 1, 1, 1, 4, 5, 6], make((1, 1, 5, 6, 7))
    for face, bound in (
        (i, b) for i in range(1, 7) for b in (whole[i] - 0.4, whole[i] + 0.4, whole[i] + 9, -2)
    ):
        compare(volumes, boxes_of([[*whole[:face], bound, *whole[face + 1 :]]]), (2, 3, 2))


def test_large_boxes():
    volumes = make((1, 2, 70, 7, 90))
    rows = [
        [0, 0.3, 0.2, 5.1, 69.4, 6.8, 88.2],
        [0, 0, 0, 0, 70, 7, 90],
        [0, 66.5, 1, 0, 3.2, 6, 88],
    ]
    for size in ((3, 4, 5), (80, 3, 70)):
        for clamp in CLAMPS:
            compare(volumes, boxes_of(rows), size, clamp=clamp)
            compare_gradients(volumes, boxes_of(rows), size, clamp=clamp)


# --- gradients -----------------------------------------------------------------------------------


def gradients(function, volumes, boxes, size, grad_output, **arguments):
    leaf = volumes.detach().clone().requires_grad_()
    crops = function(leaf, boxes, size, **arguments)
    if not crops.requires_grad:  # no box is usable
        return torch.zeros_like(leaf)
    return torch.autograd.grad(crops, leaf, grad_output.to(crops.dtype))[0]


def compare_gradients(volumes, boxes, size, **arguments):
    grad_output = make((len(boxes), volumes.shape[1], *size), volumes.dtype, volumes.device, seed=7)
    ours = gradients(crop_and_resize3d, volumes, boxes, size, grad_output, **arguments)
    exact = gradients(
        reference.crop_and_resize3d, volumes.double(), boxes, size, grad_output, **arguments
    )
    assert ours.dtype == volumes.dtype and ours.shape == volumes.shape
    slope = (
        1 / (arguments["window"][1] - arguments["window"][0]) if arguments.get("window") else 1.0
    )
    moved = (
        coordinate_error(volumes.shape, boxes) * grad_output.double().abs().flatten(1).sum(1)
    ).sum()
    rtol, atol = TOLERANCE[volumes.dtype]
    assert (
        (ours.double() - exact).abs() <= (atol * 4 + moved) * max(slope, 1) + rtol * exact.abs()
    ).all()
    return ours


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("window", [None, (-2.0, 3.0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_match_the_reference(path, dtype, window, clamp):
    volumes = make((2, 1, 5, 6, 7), dtype, path.device)
    compare_gradients(volumes, boxes_of(BOXES, path.device), (2, 3, 5), window=window, clamp=clamp)


@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 10, 2), (2, 3, 18)])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 3)])
def test_gradients_over_more_than_a_brick(path, shape, size):
    rows = [
        [1, -1, 0.4, 0.2, 7, 9.7, 17.3],
        [1, 0, 0, 0, *shape],
        [0, 2.7, 9.3, 1.1, 0.6, 1.2, 16.2],
    ]
    for clamp in CLAMPS:
        compare_gradients(
            make((2, 1, *shape), device=path.device), boxes_of(rows, path.device), size, clamp=clamp
        )


def test_the_weights_of_every_sample_add_up_to_one(path):
    """The weights of a sample add up to 1, so the gradients of a volume add up to its samples."""
    spans = [
        (1.3, 17.9),
        (0, 20),
        (2.1, 3.4),
        (-4.7, 13.3),
        (19, 0.6),
        (-30, 55),
        (7.5, 7.5),
        (-3, -3),
        (9, 9.0001),
    ]
    volumes = torch.zeros(
        len(spans), 1, 1, 1, 20, dtype=torch.float64, device=path.device, requires_grad=True
    )
    rows = boxes_of(
        [[k, 0, 0, start, 1, 1, end] for k, (start, end) in enumerate(spans)], path.device
    )
    for n in (1, 7, 50):
        for clamp in CLAMPS:
            crops = crop_and_resize3d(volumes, rows, (1, 1, n), clamp=clamp)
            (gradient,) = torch.autograd.grad(crops.sum(), volumes)
            torch.testing.assert_close(
                gradient.flatten(1).sum(1).cpu(), torch.full((len(spans),), n).double()
            )


@pytest.mark.parametrize("clamp", CLAMPS)
def test_gradients_of_flat_boxes(path, clamp):
    rows = [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 1.25, -9, 2.5, 1.25, -9, 2.5],
        [0, 0.5, 3.75, 99, 0.5, 3.75, 99],
    ]
    compare_gradients(
        make((1, 1, 3, 4, 5), device=path.device),
        boxes_of(rows, path.device),
        (2, 1, 3),
        clamp=clamp,
    )


def test_gradients_of_many_boxes(path, monkeypatch):
    """More than one test of a brick takes, many over one another."""
    monkeypatch.setattr(kernels, "BOXES", 4)
    start = torch.rand(11, 3, generator=torch.Generator().manual_seed(0)) * 3
    rows = torch.cat([torch.arange(11)[:, None] % 3, start, start + 2.5], 1).to(path.device)
    compare_gradients(make((2, 2, 4, 5, 6), device=path.device), rows, (2, 1, 3))


def test_gradcheck_of_the_reference():
    volumes = make((2, 1, 2, 2, 3), torch.float64).requires_grad_()
    boxes = boxes_of([[0, 0, 0, 0, 2, 2, 3], [1, -0.4, 0.3, 0.2, 1.7, 2.9, 2.6]])
    for clamp in CLAMPS:
        crop = partial(reference.crop_and_resize3d, clamp=clamp)
        assert torch.autograd.gradcheck(lambda x, crop=crop: crop(x, boxes, (1, 3, 2)), volumes)


def test_gradient_at_the_edges_of_the_window(path):
    values = torch.tensor([-1.001, -1.0, 0.0, 3.0, 3.001, math.nan], device=path.device).reshape(
        1, 1, 1, 1, 6
    )
    values.requires_grad_()
    box = boxes_of([[0, 0, 0, 0, 1, 1, 6]], path.device)
    crop_and_resize3d(values, box, (1, 1, 6), window=(-1.0, 3.0)).sum().backward()
    assert values.grad.flatten().tolist() == [0, 0.25, 0.25, 0.25, 0, 0]


def test_an_infinite_gradient_stays_where_it_is(path):
    volumes = make((1, 1, 3, 3, 4), device=path.device).requires_grad_()
    for rows in ([0, 0, 0, 0, 3, 3, 4], [0, 0.5, 0.25, 0.5, 2.5, 2.75, 3.5]):
        crops = crop_and_resize3d(volumes, boxes_of([rows], path.device), (3, 3, 4))
        grad_output = torch.ones_like(crops)
        grad_output[0, 0, 1, 1, 1] = math.inf
        (gradient,) = torch.autograd.grad(crops, volumes, grad_output)
        exact = gradients(
            reference.crop_and_resize3d,
            volumes,
            boxes_of([rows], path.device),
            (3, 3, 4),
            grad_output,
        )
        assert (
            torch.equal(gradient.isfinite(), exact.isfinite()) and gradient.isfinite().sum() >= 28
        )


def test_gradient_through_a_cast_and_strided_tensors(path):
    for layout in ("channels last", "sliced"):
        volumes = (
            layouts(make((2, 2, 5, 6, 7), device=path.device))[layout].detach().requires_grad_()
        )
        boxes = boxes_of(BOXES[1:2], path.device)
        crops = crop_and_resize3d(
            volumes, boxes, (2, 3, 2), dtype=torch.bfloat16, window=(-2.0, 3.0)
        )
        crops.backward(torch.ones((), dtype=torch.bfloat16, device=path.device).expand(crops.shape))
        exact = volumes.detach().double().requires_grad_()
        reference.crop_and_resize3d(exact, boxes, (2, 3, 2), window=(-2.0, 3.0)).sum().backward()
        assert volumes.grad.dtype == torch.float32
        assert_close(volumes.grad, exact.grad)


def test_volumes_may_change_before_the_backward_where_they_are_not_needed(path):
    leaf = make((1, 1, 2, 2, 4), device=path.device).requires_grad_()
    box = boxes_of([[0, 0, 0, 0, 2, 2, 4]], path.device)
    volumes = leaf * 1
    crops = crop_and_resize3d(volumes, box, (2, 2, 4))
    volumes.zero_()
    crops.sum().backward()
    volumes = leaf * 1
    crops = crop_and_resize3d(volumes, box, (2, 2, 4), window=(-2.0, 3.0))
    volumes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        crops.sum().backward()


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    """Parts begin within a crop, and within a volume."""
    monkeypatch.setattr("fmkernels.cpu.crop_and_resize3d.GRAIN_SIZE", 1)
    volumes, boxes = (
        make((2, 2, 5, 6, 7)).requires_grad_(),
        boxes_of([*BOXES, *BOXES[::-1], [0, math.nan, *[0.0] * 5]]),
    )
    grad_output = make((len(boxes), 2, 3, 4, 5), seed=4)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            crops = crop_and_resize3d(volumes, boxes, (3, 4, 5), window=(-2.0, 3.0))
            results.append((crops, torch.autograd.grad(crops, volumes, grad_output)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True)
    )


# --- torch.func, torch.export, compiled autograd, pipelining --------------------------------------


def crops_of(x):
    """Crops of volumes, weighted so that each has a gradient of its own."""
    boxes = boxes_of(BOXES[1:3], x.device)
    crops = crop_and_resize3d(x, boxes, (2, 1, 3), window=(-2.0, 3.0), clamp="volume")
    return crops * torch.arange(crops.numel(), device=x.device).view_as(crops)


def loss_of(x):
    return crops_of(x).square().sum()


def eager_gradient(x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf), leaf)[0]


def test_torch_func(path):
    batch = torch.stack([make((2, 1, 3, 4, 5), device=path.device, seed=n) for n in range(3)])
    gradients = torch.stack([eager_gradient(x) for x in batch])
    assert gradients.any() and torch.equal(torch.func.grad(loss_of)(batch[0]), gradients[0])
    crops, backward = torch.func.vjp(crops_of, batch[1])
    assert torch.equal(backward(2 * crops)[0], gradients[1])
    for dim in (0, 2):
        moved = batch.movedim(0, dim)
        assert torch.equal(
            torch.vmap(crops_of, in_dims=dim)(moved), torch.stack([crops_of(x) for x in batch])
        )
        assert torch.equal(torch.vmap(torch.func.grad(loss_of), in_dims=dim)(moved), gradients)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss_of)(x).sum())(batch[0])


def test_vmap_over_boxes_and_volumes(path):
    volumes = make((2, 2, 1, 3, 4, 5), device=path.device)
    rows = torch.stack([boxes_of(BOXES[n : n + 2], path.device) for n in (0, 2)])

    def crop(x, boxes):
        return crop_and_resize3d(x, boxes, (2, 1, 3))

    pairs = [crop(x, boxes) for x, boxes in zip(volumes, rows, strict=True)]
    assert torch.equal(torch.vmap(crop)(volumes, rows), torch.stack(pairs))
    shared = [crop(volumes[0], boxes) for boxes in rows]
    assert torch.equal(torch.vmap(crop, (None, 0))(volumes[0], rows), torch.stack(shared))


class ConvThenCrop(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 1)

    def forward(self, x, boxes):
        return crop_and_resize3d(self.conv(x), boxes, (2, 1, 3), window=(-2.0, 3.0))


class Stem(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Conv3d(1, 1, 1), ConvThenCrop()

    def forward(self, x, boxes):
        return self.head(self.stem(x), boxes)


def assert_trains_alike(traced, module, *arguments):
    """The same result, and the same gradient of every parameter, None included."""
    results = []
    for each in (traced, module):
        each.zero_grad(set_to_none=True)
        result = each(*arguments)
        result.square().sum().backward()
        results.append((result, [p.grad.clone() for p in each.parameters()]))
    (ours, gradients), (eager, expected) = results
    assert torch.equal(ours, eager) and len(gradients) == len(expected)
    assert all(torch.equal(a, b) and b.any() for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_gradient(path, strict):
    torch.manual_seed(0)
    module = ConvThenCrop().to(path.device)
    arguments = make((2, 1, 3, 4, 5), device=path.device), boxes_of(BOXES[:2], path.device)
    dynamic = ({2: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    exported = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=strict)
    assert_trains_alike(exported.module(), module, *arguments)
    larger = make((2, 1, 5, 4, 5), device=path.device), boxes_of(BOXES[:3], path.device)
    assert_trains_alike(exported.module(), module, *larger)


def test_pipelining_keeps_the_gradient(path):
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    torch.manual_seed(0)
    module = Stem().to(path.device)
    arguments = make((2, 1, 3, 4, 5), device=path.device), boxes_of(BOXES[:2], path.device)
    split = {"head": pipelining.SplitPoint.BEGINNING}
    stage = pipelining.pipeline(module, arguments, split_spec=split).get_stage_module(1)
    features = module.stem(arguments[0]).detach()
    boxes_first = next(node.name for node in stage.graph.nodes) == "boxes"
    inputs = (arguments[1], features) if boxes_first else (features, arguments[1])
    results = stage(*inputs)
    (result,) = results if isinstance(results, tuple) else (results,)
    result.square().sum().backward()
    gradients = [p.grad.clone() for p in stage.parameters()]
    module.head.zero_grad(set_to_none=True)
    module.head(features, arguments[1]).square().sum().backward()
    expected = [p.grad for p in module.head.parameters()]
    assert len(gradients) == 2 and all(map(torch.equal, gradients, expected))


def test_compiled_autograd(path):
    volumes = make((2, 1, 3, 4, 5), device=path.device)
    torch._dynamo.reset()
    leaf = volumes.clone().requires_grad_()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x: loss_of(x).backward(), backend="aot_eager")(leaf)
    assert torch.equal(leaf.grad, eager_gradient(volumes))


def test_output_size_of_numpy_integers():
    volumes, boxes, size = make((2, 1, 5, 6, 7)), boxes_of(BOXES[:2]), (2, 3, 5)
    given = tuple(map(np.int64, size)), list(map(np.uint8, size)), torch.Size(size)
    for each in given:
        assert torch.equal(
            crop_and_resize3d(volumes, boxes, each), crop_and_resize3d(volumes, boxes, size)
        )
    for wrong in (np.float32(3), np.bool_(True)):
        with pytest.raises(TypeError, match="output_size h must be an int, got "):
            crop_and_resize3d(volumes, boxes, (2, wrong, 5))


# --- any case ------------------------------------------------------------------------------------

FINITE = st.floats(-4, 12, width=32)
BOUND = st.one_of(
    FINITE, FINITE, FINITE.map(round), FINITE.map(lambda x: round(2 * x) / 2), st.floats(width=32)
)
BATCH = st.one_of(
    st.integers(0, 2), st.integers(0, 1), st.sampled_from([-1.0, 0.5, 1.5, math.nan, math.inf, 1e9])
)
CASE = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([0, 1, 2]),
        "channels": st.sampled_from([1, 2]),
        "shape": st.tuples(*[st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8]).map(lambda n: n or 1)] * 3),
        "size": st.tuples(*[st.sampled_from([1, 2, 3, 4, 5, 7])] * 3),
        "boxes": st.lists(st.tuples(BATCH, *[BOUND] * 6), max_size=3),
        "dtype": st.sampled_from([*VOXELS, torch.float32]),
        "result": st.sampled_from([None, None, *VOXELS]),
        "window": st.sampled_from([None, None, WINDOW, (-1, 1)]),
        "clamp": st.sampled_from(CLAMPS),
        "layout": st.sampled_from(
            ["contiguous", "contiguous", *layouts(torch.zeros(2, 2, 5, 6, 7))]
        ),
        "seed": st.integers(0, 2**16),
    }
)


def check_case(case, device="cpu"):
    volumes = make(
        (case["batch"], case["channels"], *case["shape"]), case["dtype"], device, case["seed"]
    )
    volumes = {"contiguous": volumes, **(layouts(volumes) if volumes.numel() else {})}.get(
        case["layout"], volumes
    )
    boxes = boxes_of([list(box) for box in case["boxes"]], device)
    arguments = {"clamp": case["clamp"], "window": case["window"]}
    compare(volumes, boxes, case["size"], dtype=case["result"], **arguments)
    if case["dtype"].is_floating_point and case["seed"] % 2:
        compare_gradients(volumes, boxes, case["size"], **arguments)


def check_nearest_case(case, device="cpu"):
    """Boxes of halves of a voxel: float32 knows what is a tie."""
    labels = make((2, 1, *case["shape"]), case["dtype"], device, case["seed"])
    rows = [
        [b, *(round(2 * x) / 2 for x in box)]
        for b, *box in case["boxes"]
        if all(map(math.isfinite, box))
    ]
    boxes = boxes_of([row for row in rows if max(map(abs, row[1:])) < 1e4], device)
    nearest(labels, boxes, case["size"], clamp=case["clamp"])


@cases(200)
@given(case=CASE)
def test_any_nearest_case_on_the_cpu_path(case):
    check_nearest_case(case)


@kernel_cases(20)
@given(case=CASE)
def test_any_nearest_case_in_the_kernel(path, case):
    check_nearest_case({**case, "boxes": case["boxes"][:2]}, path.device)


@cases(500)
@given(case=CASE)
def test_any_case_on_the_cpu_path(case):
    check_case(case)


@kernel_cases(60)
@given(case=CASE)
def test_any_case_in_the_kernel(path, case):
    size = tuple(min(n, most) for n, most in zip(case["size"], (2, 3, 4), strict=True))
    check_case({**case, "channels": 1, "size": size, "boxes": case["boxes"][:2]}, path.device)
