"""Whole scans: every anchor once, whole objects at patch borders, small scans, world coordinates."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fmkernels.focalmix.data.volume import AIR, Volume
from fmkernels.focalmix.model.anchors import Anchors
from fmkernels.focalmix.model.detector import Detector
from fmkernels.focalmix.model.inference import _tiles, detect

ANCHORS = Anchors((2, 4), (((4.0,) * 3,), ((8.0,) * 3,)))
SETTINGS = dict(patch_size=(32, 32, 32), overlap=12, window=(-1200, 600), nms_threshold=0.1)
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))


def volume_of(shape, objects=(), spacing=(2.0, 1.0, 1.5), direction=FLIPPED) -> Volume:
    """Air with cubes of tissue: corner z, y, x and length in voxels."""
    voxels = np.full(shape, AIR, dtype=np.int16)
    for z, y, x, length in objects:
        voxels[z : z + length, y : y + length, x : x + length] = 400
    return Volume(voxels, spacing, (10.0, -20.0, 30.0), direction)


class Bright(nn.Module):
    """Not trained: logits rise with the mean brightness of 4 x 4 x 4 voxels around an anchor of the fine level."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[int] = []

    def forward(self, images):
        self.batches.append(len(images))
        mean = nn.functional.avg_pool3d(nn.functional.pad(images, [1] * 6), 4, 2)
        logits = [20 * mean - 15, torch.full_like(mean[..., ::2, ::2, ::2], -30.0)]
        return logits, [level.new_zeros(len(level), 1, 6, *level.shape[2:]) for level in logits]


def detector() -> Detector:
    torch.manual_seed(0)
    model = Detector((2, 4), 1, widths=(4, 8), blocks=(0, 0), channels=8)
    nn.init.normal_(model.logits.weight)
    nn.init.normal_(model.deltas.weight, std=0.1)
    return model


class TestTiles:
    @pytest.mark.parametrize("shape", [(32, 32, 32), (33, 64, 90), (10, 31, 200)])
    @pytest.mark.parametrize("overlap", [0, 12, 24])
    def test_cores_divide_the_scan_and_keep_their_distance_from_the_border(self, shape, overlap):
        owners = np.zeros(shape, dtype=int)
        points = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in shape), indexing="ij"), -1)
        for tile in _tiles(shape, (32, 32, 32), overlap):
            low, high = np.array(tile.core)
            mine = ((points >= low) & (points < high)).all(-1)
            owners += mine
            corner, end = np.array(tile.corner), np.array(tile.corner) + 32
            assert (points[mine] > corner).all() and (points[mine] < end).all()
            inner_low, inner_high = np.isfinite(low), np.isfinite(high)
            assert (low - corner >= overlap / 2)[inner_low].all() and (end - high >= overlap / 2)[
                inner_high
            ].all()
        assert (owners == 1).all()

    def test_no_more_patches_than_needed(self):
        assert len(list(_tiles((32, 10, 33), (32, 32, 32), 12))) == 2
        assert len(list(_tiles((52, 52, 52), (32, 32, 32), 12))) == 8
        assert len(list(_tiles((53, 52, 52), (32, 32, 32), 12))) == 12


class TestDetect:
    @pytest.mark.parametrize("corner", list(itertools.product((2, 18, 26, 28, 44), repeat=2)))
    def test_finds_an_object_wherever_it_lies_once_and_whole(self, corner):
        y, x = corner
        volume = volume_of((40, 60, 60), [(22, y, x, 6)])
        found = detect(Bright(), ANCHORS, volume, **SETTINGS)
        assert found.probabilities[0] > 0.9 and (found.probabilities[1:] < 0.5).all()
        center = found.boxes[0].reshape(2, 3).mean(0)
        np.testing.assert_allclose(center, [25, y + 3, x + 3], atol=1)

    def test_gives_world_coordinates(self):
        volume = volume_of((40, 60, 60), [(21, 31, 41, 4)])
        found = detect(Bright(), ANCHORS, volume, **SETTINGS)
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
        found = detect(detector(), ANCHORS, volume, **SETTINGS)
        middle = found.boxes.reshape(-1, 2, 3).mean(1)
        assert ((middle >= 0) & (middle < shape)).all()
        assert len(found.boxes) > 0 or shape == (1, 1, 1)  # no anchor is centred in a single voxel

    def test_the_number_of_patches_at_a_time_changes_nothing(self):
        rng = np.random.default_rng(0)
        volume = volume_of((40, 60, 70))
        volume.voxels[:] = rng.integers(-1000, 500, volume.voxels.shape)
        results = [
            detect(detector(), ANCHORS, volume, **SETTINGS, batch_size=n) for n in (1, 3, 100)
        ]
        for other in results[1:]:
            np.testing.assert_allclose(other.boxes, results[0].boxes, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(
                other.candidates, results[0].candidates, rtol=1e-4, atol=1e-3
            )

    def test_batches_hold_all_patches_once(self):
        model = Bright()
        detect(model, ANCHORS, volume_of((40, 60, 70)), **SETTINGS, batch_size=5)
        assert model.batches == [5, 5, 5, 3]

    def test_caps(self):
        rng = np.random.default_rng(0)
        volume = volume_of((40, 60, 70))
        volume.voxels[:] = rng.integers(-1000, 500, volume.voxels.shape)
        assert len(detect(detector(), ANCHORS, volume, **SETTINGS, keep=7).boxes) == 7
        assert 0 < len(detect(detector(), ANCHORS, volume, **SETTINGS, per_patch=1).boxes) <= 18

    def test_refuses_an_overlap_as_large_as_the_patch(self):
        with pytest.raises(ValueError, match="overlap: expected 0 to 31, got 32"):
            detect(Bright(), ANCHORS, volume_of((40, 40, 40)), **(SETTINGS | {"overlap": 32}))
