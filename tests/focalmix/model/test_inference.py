"""Whole scans: every anchor once, whole objects at window borders, small scans, suppression."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.data.volume import AIR, Volume
from fmkernels.focalmix.model.detector import build_model
from fmkernels.focalmix.model.inference import _windows, detect, fit_window, nms
from tests.focalmix.model.test_anchors import NONE, cubes, iou_of, random_cubes

CONFIG = Config(
    spacing=(1.0, 1.0, 1.0),
    strides=(2, 4),
    diameters=(4.0, 8.0),
    widths=(4, 8),
    blocks=(0, 0),
    channels=8,
    roi_size=(32, 32, 32),
    overlap=12,
    amp="off",
)
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))


def volume_of(shape, objects=(), spacing=(2.0, 1.0, 1.5), direction=FLIPPED) -> Volume:
    """Air with cubes of tissue: corner z, y, x and length in voxels."""
    voxels = np.full(shape, AIR, dtype=np.int16)
    for z, y, x, length in objects:
        voxels[z : z + length, y : y + length, x : x + length] = 400
    return Volume(voxels, spacing, (10.0, -20.0, 30.0), direction)


class Bright(nn.Module):
    """Logits of the fine level rise with the mean brightness of 4x4x4 voxels at an anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[int] = []

    def forward(self, images):
        self.batches.append(len(images))
        mean = nn.functional.avg_pool3d(nn.functional.pad(images, [1] * 6), 4, 2)
        logits = [20 * mean - 15, torch.full_like(mean[..., ::2, ::2, ::2], -30.0)]
        return logits, [level.new_zeros(len(level), 1, 6, *level.shape[2:]) for level in logits]


def detector() -> nn.Module:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    nn.init.normal_(model.logits.weight)
    nn.init.normal_(model.deltas.weight, std=0.1)
    return model


class TestWindows:
    @pytest.mark.parametrize("shape", [(32, 32, 32), (33, 64, 90), (10, 31, 200)])
    @pytest.mark.parametrize("overlap", [0, 12, 24])
    def test_cores_divide_the_scan_and_keep_their_distance_from_the_border(self, shape, overlap):
        owners = np.zeros(shape, dtype=int)
        points = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in shape), indexing="ij"), -1)
        for window in _windows(shape, (32, 32, 32), overlap):
            low, high = np.array(window.core)
            mine = ((points >= low) & (points < high)).all(-1)
            owners += mine
            corner, end = np.array(window.corner), np.array(window.corner) + 32
            assert (points[mine] > corner).all() and (points[mine] < end).all()
            inner_low, inner_high = np.isfinite(low), np.isfinite(high)
            assert (low - corner >= overlap / 2)[inner_low].all() and (end - high >= overlap / 2)[
                inner_high
            ].all()
        assert (owners == 1).all()

    def test_as_few_windows_as_possible(self):
        assert len(list(_windows((32, 10, 33), (32, 32, 32), 12))) == 2
        assert len(list(_windows((52, 52, 52), (32, 32, 32), 12))) == 8
        assert len(list(_windows((53, 52, 52), (32, 32, 32), 12))) == 12

    @given(st.tuples(*[st.integers(1, 200)] * 3), st.sampled_from([16, 32, 96]), st.integers(0, 15))
    @settings(max_examples=60, deadline=None)
    def test_fitted_windows_are_as_many_and_could_not_be_smaller(self, shape, side, overlap):
        size = fit_window(shape, (side,) * 3, overlap, 8)
        assert all(fitted % 8 == 0 and overlap < fitted <= side for fitted in size)
        for length, fitted in zip(shape, size, strict=True):
            count = len(list(_windows((length,), (side,), overlap)))
            assert len(list(_windows((length,), (fitted,), overlap))) == count
            smaller = fitted - 8
            assert smaller <= overlap or count * (smaller - overlap) + overlap < length


class TestDetect:
    @pytest.mark.parametrize("corner", list(itertools.product((2, 18, 26, 28, 44), repeat=2)))
    def test_finds_an_object_wherever_it_lies_once_and_whole(self, corner):
        y, x = corner
        volume = volume_of((40, 60, 60), [(22, y, x, 6)])
        found = detect(CONFIG, Bright(), volume)
        assert found.probabilities[0] > 0.9 and (found.probabilities[1:] < 0.5).all()
        center = found.boxes[0].reshape(2, 3).mean(0)
        np.testing.assert_allclose(center, [25, y + 3, x + 3], atol=1)

    def test_gives_world_coordinates(self):
        volume = volume_of((40, 60, 60), [(21, 31, 41, 4)])
        found = detect(CONFIG, Bright(), volume)
        assert (
            found.candidates.shape == (len(found.boxes), 4) and found.candidates.dtype == np.float64
        )
        index = found.boxes.reshape(-1, 2, 3).mean(1) - 0.5
        expected = np.array([[10.0, -20.0, 30.0]]) + index[:, ::-1] * (1.5, 1.0, 2.0) * (-1, -1, 1)
        np.testing.assert_allclose(found.candidates[:, :3], expected, atol=1e-4)
        np.testing.assert_array_equal(
            found.candidates[:, 3], found.probabilities.astype(np.float64)
        )
        assert (np.diff(found.probabilities) <= 0).all()

    @pytest.mark.parametrize("shape", [(5, 40, 31), (8, 8, 8), (32, 32, 32)])
    def test_scans_smaller_than_a_patch(self, shape):
        volume = volume_of(shape, [(0, 0, 0, min(4, *shape))])
        found = detect(CONFIG, detector(), volume)
        middle = found.boxes.reshape(-1, 2, 3).mean(1)
        assert ((middle >= 0) & (middle < shape)).all()
        assert len(found.boxes) > 0

    def test_the_number_of_windows_at_a_time_changes_nothing(self):
        rng = np.random.default_rng(0)
        volume = volume_of((40, 60, 70))
        volume.voxels[:] = rng.integers(-1000, 500, volume.voxels.shape)
        results = [detect(CONFIG, detector(), volume, batch_size=n) for n in (1, 3, 100)]
        for other in results[1:]:
            np.testing.assert_allclose(other.boxes, results[0].boxes, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(
                other.candidates, results[0].candidates, rtol=1e-4, atol=1e-3
            )

    def test_windows_are_no_larger_than_needed(self):
        model, shapes = Bright(), []
        model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        detect(CONFIG, model, volume_of((33, 60, 20)), batch_size=100)
        assert shapes == [(6, 1, 24, 28, 20)]

    def test_batches_hold_all_windows_once(self):
        model = Bright()
        detect(CONFIG, model, volume_of((40, 60, 70)), batch_size=5)
        assert model.batches == [5, 5, 4, 4]

    def test_caps(self):
        rng = np.random.default_rng(0)
        volume = volume_of((40, 60, 70))
        volume.voxels[:] = rng.integers(-1000, 500, volume.voxels.shape)
        assert len(detect(CONFIG, detector(), volume, keep=7).boxes) == 7
        assert 0 < len(detect(CONFIG, detector(), volume, per_patch=1).boxes) <= 18


def suppressed_by_loops(boxes, scores, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        if all(iou_of(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


class TestNms:
    @given(
        st.integers(0, 2**32),
        st.integers(1, 40),
        st.sampled_from([0.0, 0.1, 0.3, 0.7]),
        st.booleans(),
    )
    @settings(max_examples=60, deadline=None)
    def test_equals_loops(self, seed, n, threshold, ties):
        boxes = random_cubes(seed, n, (12, 12, 12), 3.0, 8.0)
        scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
        scores = (scores * 4).round() if ties else scores
        assert nms(boxes, scores, threshold=threshold).tolist() == suppressed_by_loops(
            boxes, scores, threshold
        )

    def test_keeps_boxes_that_overlap_exactly_by_the_threshold(self):
        boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0.0, 0, 0, 2, 2, 4]])
        assert nms(boxes, torch.tensor([0.1, 0.2]), threshold=0.5).tolist() == [1, 0]
        assert nms(boxes, torch.tensor([0.1, 0.2]), threshold=0.49).tolist() == [1]

    def test_limit_and_keep_take_the_highest(self):
        boxes, scores = cubes(*[(10.0 * i, 0, 0, 2) for i in range(10)]), torch.arange(10) % 7 / 10
        assert nms(boxes, scores, threshold=0.1, limit=3).tolist() == [6, 5, 4]
        assert nms(boxes, scores, threshold=0.1, keep=4).tolist() == [6, 5, 4, 3]

    def test_many_boxes_need_little_memory(self):
        boxes = random_cubes(0, 100_000, (500, 500, 500))
        kept = nms(
            boxes, torch.rand(100_000, generator=torch.Generator().manual_seed(1)), threshold=0.1
        )
        assert len(kept) == 100

    def test_nothing(self):
        assert nms(NONE, torch.zeros(0), threshold=0.1).tolist() == []
        assert nms(NONE, torch.zeros(0), threshold=0.1).dtype == torch.int64

    def test_no_box_may_be_kept(self):
        boxes, scores = cubes((0, 0, 0, 2)), torch.ones(1)
        assert nms(boxes, scores, threshold=0.1, keep=0).tolist() == []
        assert nms(boxes, scores, threshold=0.1, limit=0).tolist() == []
        for name in ("keep", "limit"):
            with pytest.raises(ValueError, match=f"nms: {name}: expected 0 or more, got -1"):
                nms(boxes, scores, threshold=0.1, **{name: -1})

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_is_dropped_alone(self, value):
        boxes = cubes((0, 0, 0, 4), (0, 0, 0, 4), (9, 9, 9, 4), (0, 0, 1, 4))
        scores = torch.tensor([0.5, 0.9, 0.7, 0.6])
        boxes[1, 4] = value
        assert nms(boxes, scores, threshold=0.1).tolist() == [2, 3]
        assert nms(boxes, scores, threshold=0.1, limit=2).tolist() == [2, 3]

    def test_a_box_whose_score_is_nan_is_dropped_alone(self):
        boxes = cubes((0, 0, 0, 4), (0, 0, 0, 4))
        assert nms(boxes, torch.tensor([0.5, torch.nan]), threshold=0.1).tolist() == [0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_volumes_of_half_precision_boxes_do_not_overflow(self, dtype):
        boxes = cubes((100, 100, 100, 128), (100, 100, 102, 128), (300, 100, 100, 128))
        scores = torch.tensor([0.5, 0.9, 0.7], dtype=dtype)
        assert nms(boxes.to(dtype), scores, threshold=0.5).tolist() == [1, 2]
