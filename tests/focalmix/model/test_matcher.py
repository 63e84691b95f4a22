"""ATSS matching, against a plain loop over every anchor and every box."""

import itertools
import math

import pytest
import torch

from fmkernels.focalmix.model.anchors import Anchors
from fmkernels.focalmix.model.matcher import atss_match
from tests.focalmix.model.test_anchors import ANCHORS, NONE, PATCH, cubes, iou_of, random_cubes


def matched_by_loops(anchors, patch, boxes, ignore, k):
    """The targets of one image, and the positive pairs (anchor, box)."""
    every = anchors.boxes(patch)
    centers = (every[:, :3] + every[:, 3:]) / 2
    sizes = [anchors.per_cell * math.prod(grid) for grid in anchors.grids(patch)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    targets = torch.zeros(len(every))
    for box in ignore:
        center = (box[:3] + box[3:]) / 2
        for start, size, stride in zip(starts, sizes, anchors.strides, strict=True):
            for i in range(start, start + size):
                if all(
                    abs(centers[i, a] - center[a]) <= max((box[a + 3] - box[a]) / 2, stride / 2)
                    for a in range(3)
                ):
                    targets[i] = -1
    candidates, taken, best_of_box = [], set(), []
    for box in boxes:
        mine = []
        for start, size in zip(starts, sizes, strict=True):
            cells = size // anchors.per_cell
            distance = ((centers[start : start + cells] - (box[:3] + box[3:]) / 2) ** 2).sum(1)
            nearest = distance.argsort(stable=True)[:k].tolist()
            mine += [
                start + size_index * cells + i
                for size_index in range(anchors.per_cell)
                for i in nearest
            ]
        overlap = {i: iou_of(every[i], box) for i in mine}
        values = torch.tensor(list(overlap.values()), dtype=torch.float64)
        candidates.append((overlap, values.mean().item(), values.std(correction=0).item()))
        free = {i: value for i, value in overlap.items() if i not in taken}
        best_of_box.append(max(free, key=free.get))
        taken.add(best_of_box[-1])
    claims = {}
    for j, (overlap, mean, spread) in enumerate(candidates):
        for i, value in overlap.items():
            if value >= mean and targets[i] == 0:
                targets[i] = -1
            if value >= mean + spread and i not in taken and value > claims.get(i, (-1.0, 0))[0]:
                claims[i] = (value, j)
    pairs = {(i, j) for j, i in enumerate(best_of_box)} | {(i, j) for i, (_, j) in claims.items()}
    for i, _ in pairs:
        targets[i] = 1
    return targets, pairs


def pairs_of(matches, image, boxes):
    chosen = matches.positive & (matches.image == image)
    found = zip(matches.anchor[chosen].tolist(), matches.boxes[chosen], strict=True)
    return {
        (anchor, next(j for j, other in enumerate(boxes) if other.equal(box)))
        for anchor, box in found
    }


class TestMatch:
    @pytest.mark.parametrize("k", [1, 4, 8])
    @pytest.mark.parametrize("per_cell", [1, 2])
    @pytest.mark.parametrize("seed", range(6))
    def test_equals_loops_over_anchors_and_boxes(self, seed, per_cell, k):
        anchors = Anchors.from_mm(
            (2, 4, 8), (2.5, 4, 5, 7, 10, 13) if per_cell == 2 else (2.5, 5, 10), (1, 1, 1)
        )
        boxes = [random_cubes(10 * seed, 3), NONE, random_cubes(10 * seed + 1, 7)]
        ignore = [random_cubes(10 * seed + 2, 2), random_cubes(10 * seed + 3, 1), NONE]
        matches = atss_match(anchors, PATCH, boxes, ignore, topk=k)
        flat = torch.cat([level.flatten(1) for level in matches.targets], 1)
        for image in range(3):
            targets, pairs = matched_by_loops(anchors, PATCH, boxes[image], ignore[image], k)
            assert flat[image].tolist() == targets.tolist()
            assert pairs_of(matches, image, boxes[image]) == pairs

    def test_targets_lie_where_the_logits_lie(self):
        matches = atss_match(ANCHORS, (32, 32, 32), [cubes((11.2, 4.9, 21.3, 2.5))], [NONE])
        fine = matches.targets[0]
        assert [tuple(level.shape) for level in matches.targets] == [
            (1, 1, n, n, n) for n in (16, 8, 4)
        ]
        assert fine[0, 0, 5, 2, 10] == 1  # center (11, 5, 21)
        assert (matches.targets[2] == 1).sum() == 0

    @pytest.mark.parametrize("length", [0.5, 1.5, 4.0, 9.0, 40.0])
    def test_every_box_has_an_anchor_wherever_it_lies(self, length):
        for center in itertools.product((0.0, 0.3, 15.9, 32.0), repeat=3):
            matches = atss_match(ANCHORS, (32, 32, 32), [cubes((*center, length))], [NONE])
            assert sum((level == 1).sum() for level in matches.targets) >= 1

    def test_boxes_at_the_same_position_have_an_anchor_each(self):
        boxes = cubes(*[(16.2, 16.1, 16.3, 3.0)] * 5, (16.2, 16.1, 16.4, 3.1))
        matches = atss_match(ANCHORS, (32, 32, 32), [boxes], [NONE])
        positive = matches.positive.view(len(boxes), -1)
        assert positive.any(1).all()
        assert sum(int((level == 1).sum()) for level in matches.targets) >= len(boxes)

    def test_ignored_boxes_do_not_hide_true_ones(self):
        box = cubes((16, 16, 16, 6))
        alone = atss_match(ANCHORS, (32, 32, 32), [box], [NONE])
        covered = atss_match(ANCHORS, (32, 32, 32), [box], [cubes((16, 16, 16, 12))])
        for free, hidden in zip(alone.targets, covered.targets, strict=True):
            assert ((free == 1) == (hidden == 1)).all()
        assert sum((level == -1).sum() for level in covered.targets) > 100

    def test_a_tiny_ignored_box_covers_an_anchor_of_each_level(self):
        matches = atss_match(ANCHORS, (32, 32, 32), [NONE], [cubes((13.1, 20.6, 5.2, 0.1))])
        assert all((level == -1).sum() >= 1 for level in matches.targets)
        assert all((level == 1).sum() == 0 for level in matches.targets)

    def test_images_do_not_mix(self):
        boxes, ignore = (
            [random_cubes(3, 4), random_cubes(4, 2)],
            [random_cubes(5, 1), random_cubes(6, 3)],
        )
        both = atss_match(ANCHORS, PATCH, boxes, ignore)
        for i in range(2):
            one = atss_match(ANCHORS, PATCH, boxes[i : i + 1], ignore[i : i + 1])
            for level, alone in zip(both.targets, one.targets, strict=True):
                assert level[i].equal(alone[0])

    def test_batch_without_any_box(self):
        matches = atss_match(ANCHORS, PATCH, [NONE, NONE], [NONE, NONE])
        assert all((level == 0).all() for level in matches.targets)
        assert len(matches.positive) == len(matches.anchor) == len(matches.boxes) == 0

    def test_refuses_more_cells_than_it_compares(self):
        with pytest.raises(ValueError, match="atss_match: topk: expected 1 to 8, got 9"):
            atss_match(ANCHORS, PATCH, [NONE], [NONE], topk=9)
