"""The network: shapes, starting point, what it must not depend on, and that it can learn."""

import pytest
import torch
import torch.nn.functional as F

from fmkernels.focalmix.config import PRESETS, Config
from fmkernels.focalmix.model.detector import Detector, apply_window, autocast, build_model

TINY = dict(widths=(4, 8, 8), blocks=(0, 1, 1), channels=8)


def detector(seed: int = 0, anchors_per_cell: int = 1, strides=(2, 4, 8), **settings) -> Detector:
    torch.manual_seed(seed)
    return Detector(strides, anchors_per_cell, **(TINY | settings))


def images(batch: int = 2, shape=(16, 24, 32), seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 1, *shape, generator=torch.Generator().manual_seed(seed))


class TestWindow:
    @pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
    def test_maps_and_clamps(self, dtype):
        volume = torch.tensor([-2000, -1200, -300, 600, 3000], dtype=dtype)
        before = volume.clone()
        windowed = apply_window(volume, (-1200, 600))
        torch.testing.assert_close(windowed, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
        assert volume.equal(before)


class TestDetector:
    @pytest.mark.parametrize("anchors_per_cell", [1, 2])
    def test_shapes_of_all_levels(self, anchors_per_cell):
        logits, deltas = detector(anchors_per_cell=anchors_per_cell)(images())
        grids = [(8, 12, 16), (4, 6, 8), (2, 3, 4)]
        assert [tuple(level.shape) for level in logits] == [
            (2, anchors_per_cell, *grid) for grid in grids
        ]
        assert [tuple(level.shape) for level in deltas] == [
            (2, anchors_per_cell, 6, *grid) for grid in grids
        ]

    def test_levels_may_be_the_coarse_ones_only(self):
        logits, _ = detector(strides=(4, 8))(images())
        assert [tuple(level.shape[2:]) for level in logits] == [(4, 6, 8), (2, 3, 4)]

    def test_starts_at_the_prior_and_with_the_anchors_as_boxes(self):
        logits, deltas = detector()(images())
        for level, boxes in zip(logits, deltas, strict=True):
            assert 0.005 < level.sigmoid().min() <= level.sigmoid().max() < 0.02
            assert boxes.abs().max() < 0.5

    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_an_image_does_not_depend_on_its_batch(self, norm):
        model = detector(norm=norm).eval()
        both, alone = model(images()), model(images()[1:])
        for pair in zip((*both[0], *both[1]), (*alone[0], *alone[1]), strict=True):
            torch.testing.assert_close(pair[0][1:], pair[1], rtol=1e-4, atol=1e-5)

    def test_memory_formats_agree(self):
        model = detector()
        plain = model(images())
        fast = model.to(memory_format=torch.channels_last_3d)(images())
        for a, b in zip((*plain[0], *plain[1]), (*fast[0], *fast[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_every_weight_gets_a_gradient(self):
        model = detector()
        logits, deltas = model(images())
        sum((level * torch.randn_like(level)).sum() for level in (*logits, *deltas)).backward()
        assert all(weight.grad.abs().max() > 0 for weight in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_computes_in_the_type_of_its_weights(self, dtype):
        logits, deltas = detector().to(dtype)(images().to(dtype))
        assert {level.dtype for level in (*logits, *deltas)} == {dtype}

    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_nothing_changes_its_type_between_convolutions_under_autocast(self, norm):
        seen = []
        model = detector(norm=norm)
        for layer in model.modules():
            if isinstance(layer, torch.nn.GroupNorm | torch.nn.BatchNorm3d):
                layer.register_forward_hook(
                    lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype))
                )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images())
        assert set(seen) == {(torch.bfloat16, torch.bfloat16)}

    def test_with_batch_statistics_a_window_sees_what_the_scan_shows(self):
        model = detector(norm="batch")
        model(images(8))
        model.eval()
        scan = images(1, (64, 64, 64))
        whole, window = model(scan), model(scan[..., 8:56, 8:56, 8:56])
        for stride, ours, theirs in zip((2, 4, 8), window[0], whole[0], strict=True):
            near, far = 24 // stride, 32 // stride  # the middle: borders see other neighbors
            middle = theirs[..., far, far, far]
            torch.testing.assert_close(ours[..., near, near, near], middle, rtol=1e-4, atol=1e-5)

    def test_each_level_has_batch_statistics_of_its_own(self):
        model = detector(norm="batch")
        model(images())
        found = [norm.layer for norm in model.norms]
        assert [int(layer.num_batches_tracked) for layer in found] == [1, 1, 1]
        assert not found[0].running_var.allclose(found[1].running_var)

    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_learns_where_a_bright_voxel_is(self, norm):
        model = detector(norm=norm)
        volume, target = images(1, (16, 16, 16)) * 0.2, torch.zeros(1, 1, 8, 8, 8)
        volume[0, 0, 8:10, 4:6, 10:12] = 1
        target[0, 0, 4, 2, 5] = 1
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(volume)[0][0], target).backward()
            optimizer.step()
        assert model.eval()(volume)[0][0].argmax() == target.argmax()

    def test_say_what_is_wrong(self):
        with pytest.raises(
            ValueError, match=r"strides: expected the last of \[2, 4, 8\], got \[2, 8\]"
        ):
            detector(strides=(2, 8))
        with pytest.raises(
            ValueError, match=r"blocks: expected 3 numbers, one per width, got \[1\]"
        ):
            detector(blocks=(1,))
        with pytest.raises(ValueError, match=r"multiples of 4, got widths \[4, 8, 8\], channels 6"):
            detector(channels=6)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_their_models(preset):
    model = build_model(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) < 10_000_000


@pytest.mark.parametrize(
    "capabilities",
    [
        {"amx_bf16": True},
        {"avx512_bf16": True, "amx_bf16": False},
        {"avx512_bf16": False, "amx_bf16": False},
        {},
    ],
)
def test_auto_is_bf16_on_cpus_with_instructions_for_it(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with autocast(Config(), torch.device("cpu")):
        enabled = torch.is_autocast_enabled("cpu")
        assert enabled is any(capabilities.values())
        assert not enabled or torch.get_autocast_dtype("cpu") is torch.bfloat16
