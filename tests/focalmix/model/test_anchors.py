"""Anchors and box coding, against plain loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels.focalmix.model.anchors import Anchors, box_iou, decode_boxes, encode_boxes

ANCHORS = Anchors((2, 4, 8), (((2.5,) * 3,), ((5.0,) * 3,), ((10.0,) * 3,)))
PATCH = (32, 16, 24)
NONE = torch.zeros(0, 6)


def cubes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    """Boxes from centre z, y, x and length."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return torch.cat([table[:, :3] - table[:, 3:] / 2, table[:, :3] + table[:, 3:] / 2], 1)


def random_cubes(seed: int, n: int, patch=PATCH, low=1.5, high=12.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(n, 3, generator=generator) * torch.tensor(patch)
    half = (low + (high - low) * torch.rand(n, 1, generator=generator)) / 2
    return torch.cat([centers - half, centers + half], 1)


def iou_of(a, b) -> float:
    a, b = [float(v) for v in a], [float(v) for v in b]
    overlap = math.prod(max(0.0, min(a[i + 3], b[i + 3]) - max(a[i], b[i])) for i in range(3))
    volume = sum(math.prod(c[i + 3] - c[i] for i in range(3)) for c in (a, b))
    return overlap / (volume - overlap)


class TestAnchors:
    def test_run_over_levels_sizes_and_cells_in_the_order_of_the_logits(self):
        anchors = Anchors.from_mm((2, 4), (4, 8, 6, 12), (2.0, 1.0, 1.0))
        expected = []
        for stride, diameters in ((2, (4, 8)), (4, (6, 12))):
            for diameter in diameters:
                for cell in itertools.product(*(range(side // stride) for side in (8, 4, 12))):
                    center = [(i + 0.5) * stride for i in cell]
                    half = [diameter / 2 / step for step in (2.0, 1.0, 1.0)]
                    expected.append([c - h for c, h in zip(center, half, strict=True)])
                    expected[-1] += [c + h for c, h in zip(center, half, strict=True)]
        torch.testing.assert_close(anchors.boxes((8, 4, 12)), torch.tensor(expected))
        assert anchors.grids((8, 4, 12)) == [(4, 2, 6), (2, 1, 3)]
        assert anchors.per_cell == 2

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_a_flip_of_the_patch_maps_anchors_onto_anchors(self, axis):
        boxes = ANCHORS.boxes(PATCH)
        flipped = boxes.clone()
        flipped[:, axis], flipped[:, axis + 3] = (
            PATCH[axis] - boxes[:, axis + 3],
            PATCH[axis] - boxes[:, axis],
        )
        assert sorted(map(tuple, flipped.tolist())) == sorted(map(tuple, boxes.tolist()))
        start = 0
        for grid in ANCHORS.grids(PATCH):
            level = torch.arange(start, start + math.prod(grid)).reshape(grid)
            torch.testing.assert_close(boxes[level.flip(axis).flatten()], flipped[level.flatten()])
            start += math.prod(grid)

    def test_say_what_is_wrong(self):
        with pytest.raises(
            ValueError, match=r"multiples of the strides \(2, 4, 8\), got \(32, 20, 32\)"
        ):
            ANCHORS.grids((32, 20, 32))
        with pytest.raises(ValueError, match="the same number of diameters for every stride"):
            Anchors.from_mm((2, 4), (4, 8, 12), (1, 1, 1))
        with pytest.raises(ValueError, match="one list of sizes per stride"):
            Anchors((2, 4), (((1.0, 1.0, 1.0),),))


class TestBoxes:
    def test_iou_equals_a_loop(self):
        a, b = random_cubes(0, 12, (16, 16, 16)), random_cubes(1, 9, (16, 16, 16))
        expected = [[iou_of(x, y) for y in b] for x in a]
        assert torch.tensor(expected).count_nonzero() > 20
        torch.testing.assert_close(
            box_iou(a[:, None], b), torch.tensor(expected), rtol=1e-4, atol=1e-6
        )

    def test_iou_of_empty_boxes_is_zero(self):
        point, swapped = cubes((4, 4, 4, 0)), cubes((4, 4, 4, -3))
        for empty in (point, swapped):
            assert box_iou(empty, empty).item() == 0
            assert box_iou(empty, cubes((4, 4, 4, 5))).item() == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
    def test_iou_of_large_boxes_does_not_overflow(self, dtype):
        a, b = cubes((100, 100, 100, 128)).to(dtype), cubes((100, 100, 164, 128)).to(dtype)
        assert box_iou(a, b).dtype == torch.float32
        assert box_iou(a, b).item() == pytest.approx(1 / 3) == iou_of(a[0], b[0])
        assert box_iou(a.double(), b).dtype == torch.float64

    def test_encoded_by_hand(self):
        anchor = torch.tensor([[0.0, 0.0, 0.0, 4.0, 8.0, 2.0]])
        box = torch.tensor([[1.0, 0.0, 2.0, 5.0, 16.0, 3.0]])
        expected = torch.tensor([[1 / 4, 4 / 8, 1.5 / 2, 0.0, math.log(2), math.log(0.5)]])
        torch.testing.assert_close(encode_boxes(box, anchor), expected)

    @given(st.integers(0, 2**32))
    @settings(max_examples=30, deadline=None)
    def test_decoding_inverts_encoding(self, seed):
        boxes, anchors = random_cubes(seed, 20), random_cubes(seed + 1, 20)
        torch.testing.assert_close(
            decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-4
        )

    def test_no_delta_overflows(self):
        boxes = decode_boxes(torch.full((1, 6), 1e4), cubes((0, 0, 0, 1)))
        assert boxes.isfinite().all()
        torch.testing.assert_close(boxes[:, 3:] - boxes[:, :3], torch.full((1, 3), 16.0))
