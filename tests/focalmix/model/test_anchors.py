"""Anchors, matching, box coding and suppression, against plain loops over every anchor and every box."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels.focalmix.model.anchors import (
    Anchors,
    box_iou,
    decode_boxes,
    encode_boxes,
    match,
    nms,
)

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
    def test_run_over_levels_kinds_and_places_in_the_order_of_the_logits(self):
        anchors = Anchors.from_mm((2, 4), (4, 8, 6, 12), (2.0, 1.0, 1.0))
        expected = []
        for stride, diameters in ((2, (4, 8)), (4, (6, 12))):
            for diameter in diameters:
                for place in itertools.product(*(range(side // stride) for side in (8, 4, 12))):
                    center = [(i + 0.5) * stride for i in place]
                    half = [diameter / 2 / step for step in (2.0, 1.0, 1.0)]
                    expected.append([c - h for c, h in zip(center, half, strict=True)])
                    expected[-1] += [c + h for c, h in zip(center, half, strict=True)]
        torch.testing.assert_close(anchors.boxes((8, 4, 12)), torch.tensor(expected))
        assert anchors.grids((8, 4, 12)) == [(4, 2, 6), (2, 1, 3)]
        assert anchors.per_place == 2

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
        with pytest.raises(ValueError, match="as many diameters for each stride"):
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
        point = cubes((4, 4, 4, 0))
        assert box_iou(point, point).item() == 0

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


def matched_by_loops(anchors, patch, boxes, ignore, k):
    """The targets of one image and the pairs (anchor, box), box after box and anchor after anchor."""
    every = anchors.boxes(patch)
    centers = (every[:, :3] + every[:, 3:]) / 2
    sizes = [anchors.per_place * math.prod(grid) for grid in anchors.grids(patch)]
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
    candidates, held, own = [], set(), []
    for box in boxes:
        mine = []
        for start, size in zip(starts, sizes, strict=True):
            place = size // anchors.per_place
            distance = ((centers[start : start + place] - (box[:3] + box[3:]) / 2) ** 2).sum(1)
            nearest = distance.argsort(stable=True)[:k].tolist()
            mine += [start + kind * place + i for kind in range(anchors.per_place) for i in nearest]
        overlap = {i: iou_of(every[i], box) for i in mine}
        values = torch.tensor(list(overlap.values()), dtype=torch.float64)
        candidates.append((overlap, values.mean().item(), values.std(correction=0).item()))
        free = {i: value for i, value in overlap.items() if i not in held}
        own.append(max(free, key=free.get))
        held.add(own[-1])
    claims = {}
    for j, (overlap, mean, spread) in enumerate(candidates):
        for i, value in overlap.items():
            if value >= mean and targets[i] == 0:
                targets[i] = -1
            if value >= mean + spread and i not in held and value > claims.get(i, (-1.0, 0))[0]:
                claims[i] = (value, j)
    pairs = {(i, j) for j, i in enumerate(own)} | {(i, j) for i, (_, j) in claims.items()}
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
    @pytest.mark.parametrize("per_place", [1, 2])
    @pytest.mark.parametrize("seed", range(6))
    def test_equals_loops_over_anchors_and_boxes(self, seed, per_place, k):
        anchors = Anchors.from_mm(
            (2, 4, 8), (2.5, 4, 5, 7, 10, 13) if per_place == 2 else (2.5, 5, 10), (1, 1, 1)
        )
        boxes = [random_cubes(10 * seed, 3), NONE, random_cubes(10 * seed + 1, 7)]
        ignore = [random_cubes(10 * seed + 2, 2), random_cubes(10 * seed + 3, 1), NONE]
        matches = match(anchors, PATCH, boxes, ignore, candidates=k)
        flat = torch.cat([level.flatten(1) for level in matches.targets], 1)
        for image in range(3):
            targets, pairs = matched_by_loops(anchors, PATCH, boxes[image], ignore[image], k)
            assert flat[image].tolist() == targets.tolist()
            assert pairs_of(matches, image, boxes[image]) == pairs

    def test_targets_lie_where_the_logits_lie(self):
        matches = match(ANCHORS, (32, 32, 32), [cubes((11.2, 4.9, 21.3, 2.5))], [NONE])
        fine = matches.targets[0]
        assert [tuple(level.shape) for level in matches.targets] == [
            (1, 1, n, n, n) for n in (16, 8, 4)
        ]
        assert fine[0, 0, 5, 2, 10] == 1  # centre (11, 5, 21)
        assert (matches.targets[2] == 1).sum() == 0

    @pytest.mark.parametrize("length", [0.5, 1.5, 4.0, 9.0, 40.0])
    def test_every_box_has_an_anchor_wherever_it_lies(self, length):
        for center in itertools.product((0.0, 0.3, 15.9, 32.0), repeat=3):
            matches = match(ANCHORS, (32, 32, 32), [cubes((*center, length))], [NONE])
            assert sum((level == 1).sum() for level in matches.targets) >= 1

    def test_boxes_at_one_place_have_an_anchor_each(self):
        boxes = cubes(*[(16.2, 16.1, 16.3, 3.0)] * 5, (16.2, 16.1, 16.4, 3.1))
        matches = match(ANCHORS, (32, 32, 32), [boxes], [NONE])
        positive = matches.positive.view(len(boxes), -1)
        assert positive.any(1).all()
        assert sum(int((level == 1).sum()) for level in matches.targets) >= len(boxes)

    def test_ignored_boxes_do_not_hide_true_ones(self):
        box = cubes((16, 16, 16, 6))
        alone = match(ANCHORS, (32, 32, 32), [box], [NONE])
        covered = match(ANCHORS, (32, 32, 32), [box], [cubes((16, 16, 16, 12))])
        for free, hidden in zip(alone.targets, covered.targets, strict=True):
            assert ((free == 1) == (hidden == 1)).all()
        assert sum((level == -1).sum() for level in covered.targets) > 100

    def test_a_tiny_ignored_box_covers_an_anchor_of_each_level(self):
        matches = match(ANCHORS, (32, 32, 32), [NONE], [cubes((13.1, 20.6, 5.2, 0.1))])
        assert all((level == -1).sum() >= 1 for level in matches.targets)
        assert all((level == 1).sum() == 0 for level in matches.targets)

    def test_images_do_not_mix(self):
        boxes, ignore = (
            [random_cubes(3, 4), random_cubes(4, 2)],
            [random_cubes(5, 1), random_cubes(6, 3)],
        )
        both = match(ANCHORS, PATCH, boxes, ignore)
        for i in range(2):
            one = match(ANCHORS, PATCH, boxes[i : i + 1], ignore[i : i + 1])
            for level, alone in zip(both.targets, one.targets, strict=True):
                assert level[i].equal(alone[0])

    def test_batch_without_any_box(self):
        matches = match(ANCHORS, PATCH, [NONE, NONE], [NONE, NONE])
        assert all((level == 0).all() for level in matches.targets)
        assert len(matches.positive) == len(matches.anchor) == len(matches.boxes) == 0

    def test_refuses_more_candidates_than_it_looks_at(self):
        with pytest.raises(ValueError, match="candidates: expected 1 to 8, got 9"):
            match(ANCHORS, PATCH, [NONE], [NONE], candidates=9)


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
