"""Draws of sample_donors: who may be a donor, how often; test_ops.py has what every op needs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from fmkernels import object_mixup3d, sample_donors
from tests.opinfo import donor_boxes
from tests.support.cases import cases

NAN, INF = torch.nan, torch.inf


def partners(boxes: torch.Tensor, donors: torch.Tensor) -> list[int | None]:
    """The index of each donor among the boxes."""
    found = (donors[:, None] == boxes).all(2)
    return [row.nonzero().item() if row.any() else None for row in found]


@pytest.mark.parametrize("draw", [sample_donors, reference.sample_donors])
@pytest.mark.parametrize("seed", range(5))
def test_only_others_of_the_label_are_drawn(draw, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = donor_boxes(9)
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 0, 5, 2])
    boxes[5, 3], boxes[6, 4], boxes[0, 0] = NAN, boxes[6, 1], -1  # not usable
    found = partners(boxes, draw(boxes, labels=labels, generator=generator))
    assert [found[k] for k in (0, 3, 5, 6, 7)] == [None] * 5
    assert found[1] == 4 and found[4] == 1 and found[2] == 8 and found[8] == 2


@pytest.mark.parametrize("draw", [sample_donors, reference.sample_donors])
def test_every_other_box_is_as_likely(draw):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    boxes, rounds = donor_boxes(5), 400
    counts = torch.zeros(5, 5)
    for _ in range(rounds):
        for k, j in enumerate(partners(boxes, draw(boxes, generator=generator))):
            counts[k, j] += 1
    assert not counts.diagonal().any()
    others = counts[~torch.eye(5, dtype=torch.bool)].view(5, 4)
    assert stats.chisquare(others, axis=1).pvalue.min() > 0.001


def test_boxes_are_drawn_independently():
    """Pairs of donors, of two boxes, are uniform too."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(1)
    boxes, counts = donor_boxes(4), torch.zeros(3, 3)
    for _ in range(900):
        first, second, *_ = partners(boxes, sample_donors(boxes, generator=generator))
        counts[first - 1, second - (second > 1)] += 1
    assert stats.chisquare(counts.flatten()).pvalue > 0.001


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", range(7))
def test_what_is_not_finite_is_no_donor(bad, column):
    boxes = donor_boxes(3)
    boxes[1, column] = bad
    assert partners(boxes, sample_donors(boxes)) == [2, None, 0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_boxes(count):
    donors = sample_donors(donor_boxes(count), labels=torch.ones(count, dtype=torch.uint8))
    assert donors.shape == (count, 7) and donors.dtype == torch.float32
    assert donors.isnan().all() if count < 2 else torch.equal(donors, donor_boxes(2).flip(0))


def test_the_same_state_draws_the_same():
    boxes = donor_boxes(50)
    generator = torch.Generator().manual_seed(3)
    first, second = (sample_donors(boxes, generator=generator) for _ in range(2))
    assert torch.equal(first, sample_donors(boxes, generator=generator.manual_seed(3)))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, sample_donors(boxes))


def test_it_is_what_object_mixup3d_takes():
    volumes = torch.arange(4 * 6**3, dtype=torch.float32).view(4, 1, 6, 6, 6)
    boxes = torch.tensor([[k, 0, 0, 0, 6, 6, 6] for k in range(3)] + [[3, 0, 0, 0, 6, 6, NAN]])
    donors = sample_donors(boxes)
    mixed = object_mixup3d(volumes, boxes, donors, torch.full((4,), 0.5))
    assert torch.equal(mixed[3], volumes[3])
    for k in range(3):
        torch.testing.assert_close(mixed[k], (volumes[k] + volumes[int(donors[k, 0])]) / 2)


CASE = st.fixed_dictionaries(
    {
        "count": st.integers(0, 40),
        "labels": st.one_of(st.none(), st.integers(1, 10)),
        "bad": st.lists(st.tuples(st.integers(0, 39), st.integers(0, 6)), max_size=10),
        "seed": st.integers(0, 2**16),
    }
)


def check_case(case, device="cpu"):
    """Any boxes and labels: each usable box gets another one of its label, if there is one."""
    generator = torch.Generator().manual_seed(case["seed"])
    boxes = donor_boxes(case["count"])
    usable = torch.ones(len(boxes), dtype=torch.bool)
    for row, column in case["bad"]:
        if row < len(boxes):
            boxes[row, column], usable[row] = (NAN, INF)[row % 2], False
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    if case["labels"] is not None:
        labels = torch.randint(case["labels"], (len(boxes),), generator=generator)
    given = None if case["labels"] is None else labels.to(device)
    donors = sample_donors(boxes.to(device), labels=given).cpu()
    for k, j in enumerate(partners(boxes, donors)):
        others = [i for i in range(len(boxes)) if i != k and usable[i] and labels[i] == labels[k]]
        assert j in others if usable[k] and others else j is None


@cases(100)
@given(case=CASE)
def test_any_case(case):
    check_case(case)
