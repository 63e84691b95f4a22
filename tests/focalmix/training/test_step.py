"""The losses of a step: random numbers, pseudo-targets, pairs of objects, mixing, loss."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fmkernels import apply_symmetry, soft_target_focal_loss, undo_symmetry
from fmkernels.focalmix.config import Config
from fmkernels.focalmix.model.anchors import Anchors, box_iou
from fmkernels.focalmix.model.detector import apply_window, build_model
from fmkernels.focalmix.model.matcher import atss_match
from fmkernels.focalmix.training.plain import hard_target_focal_loss
from fmkernels.focalmix.training.plain import soft_target_focal_loss as plain_loss
from fmkernels.focalmix.training.step import (
    focalmix_loss,
    pair_objects,
    predict_unlabeled,
    sample_draws,
    supervised_loss,
)

TINY = Config(
    norm="group",  # so that images do not depend on their batch
    patch_size=(16, 16, 16),
    strides=(2, 4),
    diameters=(6.0, 12.0),
    widths=(4, 8),
    blocks=(0, 1),
    channels=4,
    roi_size=(16, 16, 16),
    overlap=4,
    batch_size=2,
    unlabeled_batch_size=4,
    method="focalmix",
    labeled=1,
    burn_in=0,
    rampup_steps=0,
    max_objects=3,
    confidence=0.3,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model(TINY)
    nn.init.normal_(model.logits.weight, std=0.5)  # probabilities of all kinds
    nn.init.constant_(model.logits.bias, 0.0)
    return model


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1200, 600, (count, 1, 16, 16, 16), generator=generator, dtype=torch.int16)


def labeled(seed=0):
    boxes = [
        torch.tensor([[2.0, 3, 4, 7, 8, 9], [9, 9, 9, 14, 14, 14]]),
        torch.tensor([[4.0, 4, 4, 10, 10, 10]]),
    ]
    return {"image": images(2, seed), "boxes": boxes, "ignore": [torch.empty(0, 6)] * 2}


class TestDraws:
    def test_is_decided_by_seed_and_step(self):
        first = sample_draws(TINY, 5)
        assert all(torch.equal(a, b) for a, b in zip(first, sample_draws(TINY, 5), strict=True))
        assert not torch.equal(first.lam, sample_draws(TINY, 6).lam)
        assert not torch.equal(first.lam, sample_draws(replace(TINY, seed=1), 5).lam)

    def test_has_one_view_that_is_not_flipped_and_others_that_differ(self):
        for views in range(1, 9):
            flips = sample_draws(replace(TINY, views=views), 3).flips
            assert (
                flips.dtype == torch.uint8 and flips[0] == 0 and len(set(flips.tolist())) == views
            )

    def test_rotated_views_are_among_all_48(self):
        for views in (4, 48):
            config = replace(TINY, rotations=True, views=views)
            flips = sample_draws(config, 3).flips
            assert flips.dtype == torch.uint8 and flips[0] == 0 and flips.max() >= 8
            assert len(set(flips.tolist())) == views and flips.max() < 48

    def test_mixes_within_groups_and_is_the_same_for_one_process_and_for_two(self):
        config = replace(TINY, groups=2)
        whole = sample_draws(config, 7)
        halves = [sample_draws(config, 7, rank, 2) for rank in range(2)]
        for rank, half in enumerate(halves):
            members = torch.tensor(
                [rank, 2 + 2 * rank, 3 + 2 * rank]
            )  # of the joint batch of 2 + 4
            assert torch.equal(half.lam, whole.lam[members])
            assert torch.equal(members[half.index], whole.index[members])
            first = members[:, None] * config.max_objects
            slots = (first + torch.arange(config.max_objects)).flatten()
            assert torch.equal(half.object_lam, whole.object_lam[slots])
            assert torch.equal(half.priority, whole.priority[slots[:, None], slots])
            others = torch.ones(len(whole.priority), dtype=torch.bool).index_fill(0, slots, False)
            assert (whole.priority[slots][:, others] < 0).all()
        assert torch.equal(halves[0].flips, whole.flips)

    def test_the_weight_of_unlabeled_images_ramps_up(self):
        config = replace(TINY, burn_in=10, rampup_steps=3, unlabeled_weight=2.0)
        assert [sample_draws(config, step).unlabeled_weight.item() for step in range(10, 15)] == [
            0.5,
            1.0,
            1.5,
            2.0,
            2.0,
        ]

    def test_labeled_images_can_stay_as_they_are(self):
        some, all_images = (
            sample_draws(replace(TINY, mixed_images=which), 3).lam for which in ("unlabeled", "all")
        )
        assert torch.equal(some[2:], all_images[2:])
        assert (some[:2] == 1).all() and (all_images[:2] < 1).any()

    def test_labeled_images_alone_are_mixed_with_each_other(self):
        draws = sample_draws(TINY, 0, only_labeled=True)
        assert draws.lam.shape == draws.index.shape == (2,)
        assert draws.priority.shape == (2 * TINY.max_objects,) * 2


class TestPredict:
    def test_targets_are_the_mean_of_the_views_sharpened(self, model):
        flips, axes = torch.tensor([0, 1, 6, 7], dtype=torch.uint8), [(), (2,), (3, 4), (2, 3, 4)]
        targets, _ = predict_unlabeled(model, images(2), TINY, flips)
        expected = [0.0, 0.0]
        for dims in axes:
            logits, _ = model(apply_window(images(2), TINY.window).flip(dims))
            expected = [
                e + level.sigmoid().flip(dims) / 4
                for e, level in zip(expected, logits, strict=True)
            ]
        for ours, mean in zip(targets, expected, strict=True):
            up, down = mean ** (1 / TINY.temperature), (1 - mean) ** (1 / TINY.temperature)
            assert not ours.requires_grad
            torch.testing.assert_close(ours, (up / (up + down)).detach(), rtol=1e-4, atol=1e-6)

    def test_batch_statistics_are_used_and_stay_as_they_are(self):
        torch.manual_seed(0)
        teacher = build_model(replace(TINY, norm="batch"))
        teacher(apply_window(images(8, 1), TINY.window))
        before = [buffer.clone() for buffer in teacher.buffers()]
        flips = torch.tensor([0, 3], dtype=torch.uint8)
        both, _ = predict_unlabeled(teacher, images(2), TINY, flips)
        alone, _ = predict_unlabeled(teacher, images(2)[1:], TINY, flips)
        assert teacher.training and all(map(torch.equal, teacher.buffers(), before))
        for levels in zip(both, alone, strict=True):
            torch.testing.assert_close(levels[0][1:], levels[1], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("ops", ["fused", "plain"])
    def test_rotated_views_are_turned_back(self, model, ops):
        codes = [0, 13, 26, 47]
        flips = torch.tensor(codes, dtype=torch.uint8)
        config = replace(TINY, ops=ops, temperature=1.0, rotations=True)
        targets, _ = predict_unlabeled(model, images(2), config, flips)
        windowed = apply_window(images(2), TINY.window)
        logits = [model(apply_symmetry(windowed, code))[0] for code in codes]
        for ours, *views in zip(targets, *logits, strict=True):
            turned = map(undo_symmetry, views, codes)
            mean = torch.stack(list(turned)).sigmoid().mean(0)
            torch.testing.assert_close(ours, mean.detach(), rtol=1e-4, atol=1e-6)

    def test_hard_targets_are_zero_or_one(self, model):
        targets, _ = predict_unlabeled(
            model, images(1), replace(TINY, pseudo_labels="hard"), sample_draws(TINY, 0).flips
        )
        assert {v for level in targets for v in level.unique().tolist()} == {0.0, 1.0}

    def test_targets_in_between_are_ignored(self, model):
        flips, config = sample_draws(TINY, 0).flips, replace(TINY, ignored_targets=(0.4, 0.6))
        targets, objects = predict_unlabeled(model, images(1), TINY, flips)
        for kind in ("soft", "hard"):
            chosen = replace(config, pseudo_labels=kind)
            fewer, same = predict_unlabeled(model, images(1), chosen, flips)
            for level, left in zip(targets, fewer, strict=True):
                ignored = (level > 0.4) & (level < 0.6)
                assert 0 < ignored.sum() < ignored.numel()
                kept = level if kind == "soft" else (level >= 0.5).float()
                assert torch.equal(left, torch.where(ignored, -1.0, kept))
            torch.testing.assert_close(same, objects, equal_nan=True)

    def test_objects_are_probable_and_apart(self, model):
        _, objects = predict_unlabeled(model, images(3), TINY, sample_draws(TINY, 0).flips)
        assert objects.shape == (3, TINY.max_objects, 6) and objects.isfinite().any()
        for own in objects:
            own = own[own.isfinite().all(1)]
            overlap = box_iou(own[:, None], own[None]).fill_diagonal_(0)
            assert (overlap <= TINY.nms_threshold).all()
        _, none = predict_unlabeled(
            model, images(3), replace(TINY, confidence=1.0), sample_draws(TINY, 0).flips
        )
        assert none.isnan().all()


def test_objects_are_paired_with_the_highest_priority():
    objects = torch.full((2, 2, 6), torch.nan)
    objects[0, 0], objects[0, 1], objects[1, 0] = (
        torch.zeros(6),
        torch.ones(6),
        torch.full((6,), 2.0),
    )
    priority = torch.tensor(
        [[-1, 0.1, 0.3, 0.9], [0.5, -1, 0.2, 0.9], [-1.0, -1, -1, 0.9], [0.4, 0.3, 0.2, -1]]
    )  # slot 4 is empty; no donor is allowed for slot 3
    boxes, donors = pair_objects(objects, priority)
    assert boxes[:3, 0].tolist() == [0, 0, 1] and boxes[:3, 1].tolist() == [0, 1, 2]
    assert donors[:2, :2].tolist() == [[1, 2], [0, 0]]
    assert donors[2].isnan().all() and boxes[3, 1:].isnan().all()


def test_the_loss_of_hard_targets_is_ours_for_those_and_another_for_soft_ones():
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(3, 1, 2, 2, 2, generator=generator),
        torch.randint(-1, 2, (3, 1, 2, 2, 2), generator=generator),
    )
    mix = torch.tensor([0.7, 0.6, 1.0]), torch.tensor([0, 1, 2])  # each with itself
    rest = {
        "alpha0": 0.25,
        "alpha1": 0.75,
        "gamma": 2.0,
        "normalizer": torch.tensor(3.0),
        "mix": mix,
    }
    rest["weight"] = torch.tensor([1.0, 0.5, 2.0]).view(-1, 1, 1, 1, 1)
    hard = [y.float()]
    soft = [torch.full_like(x, 0.5)]
    wanted = [soft_target_focal_loss([x], y, **rest) for y in (hard, soft)]
    torch.testing.assert_close([plain_loss([x], y, **rest) for y in (hard, soft)], wanted)
    torch.testing.assert_close(hard_target_focal_loss([x], hard, **rest), wanted[0])
    assert not torch.isclose(hard_target_focal_loss([x], soft, **rest), wanted[1], rtol=0.1)


class TestSupervisedLoss:
    def test_images_and_targets_are_mixed_as_in_a_focalmix_step(self, model):
        """That has unlabeled images too, which no labeled one is mixed with, and no weight."""
        draws = sample_draws(replace(TINY, unlabeled_weight=0.0), 0)
        draws = draws._replace(index=torch.tensor([1, 0, 2, 3, 4, 5]))
        objects = 2 * TINY.max_objects
        draws.priority[:objects, objects:] = -1.0
        own = sample_draws(TINY, 0, only_labeled=True)._replace(
            lam=draws.lam[:2],
            index=draws.index[:2],
            object_lam=draws.object_lam[:objects],
            priority=draws.priority[:objects, :objects],
        )
        ours = supervised_loss(model, labeled(), TINY, own)
        theirs = focalmix_loss(model, model, labeled(), images(4, 1), TINY, draws)
        torch.testing.assert_close(list(ours), list(theirs), rtol=1e-5, atol=1e-6)
        assert ours.classification != supervised_loss(model, labeled(), TINY).classification


class TestFocalMixLoss:
    def test_the_unlabeled_loss_can_be_divided_by_its_own_targets(self, model):
        config = replace(TINY, image_mixup=False, object_mixup=False)
        losses, draws = {}, sample_draws(config, 0)
        for name in ("labeled", "own"):
            for weight in (0.0, 1.0):
                chosen = replace(config, unlabeled_normalizer=name)
                changed = draws._replace(unlabeled_weight=torch.tensor(weight))
                loss = focalmix_loss(model, model, labeled(), images(4, 1), chosen, changed)
                losses[name, weight] = loss.classification.detach()
        torch.testing.assert_close(losses["own", 0.0], losses["labeled", 0.0])
        ratio = (losses["own", 1.0] - losses["own", 0.0]) / (
            losses["labeled", 1.0] - losses["labeled", 0.0]
        )
        targets, _ = predict_unlabeled(model, images(4, 1), config, draws.flips)
        positives = loss.positives
        assert ratio == pytest.approx(
            float(positives / sum(level.sum() for level in targets)), rel=1e-3
        )

    def test_without_mixing_and_unlabeled_weight_is_the_supervised_loss(self, model):
        config = replace(TINY, image_mixup=False, object_mixup=False, unlabeled_weight=0.0)
        ours = focalmix_loss(model, model, labeled(), images(4, 1), config, sample_draws(config, 0))
        for a, b in zip(ours, supervised_loss(model, labeled(), config), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("part", ["image_mixup", "object_mixup"])
    def test_each_kind_of_mixing_changes_the_loss(self, model, part):
        without = replace(TINY, image_mixup=False, object_mixup=False)
        losses = [
            focalmix_loss(
                model, model, labeled(), images(4, 1), config, sample_draws(TINY, 0)
            ).classification
            for config in (without, replace(without, **{part: True}))
        ]
        assert losses[0] != losses[1]

    def test_gradients_reach_the_model_and_not_the_teacher(self, model):
        teacher = build_model(TINY)
        losses = focalmix_loss(model, teacher, labeled(), images(4, 1), TINY, sample_draws(TINY, 0))
        (losses.classification + losses.box).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert all(p.grad is None for p in teacher.parameters())

    def test_images_mixed_with_themselves_stay_what_they_are(self, model):
        config = replace(TINY, object_mixup=False)
        draws = sample_draws(config, 0)
        ours = focalmix_loss(
            model, model, labeled(), images(4, 1), config, draws._replace(index=torch.arange(6))
        )
        plain = focalmix_loss(
            model, model, labeled(), images(4, 1), replace(config, image_mixup=False), draws
        )
        torch.testing.assert_close(ours.classification, plain.classification, rtol=1e-4, atol=1e-6)

    def test_images_and_targets_are_mixed_alike(self, model):
        """Compare with explicit mixing of float images and of the targets of each level."""
        config = replace(TINY, object_mixup=False)
        draws = sample_draws(config, 0)
        teacher, seen = build_model(TINY), []
        handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        ours = focalmix_loss(model, teacher, labeled(), images(4, 1), config, draws)
        handle.remove()
        x = apply_window(torch.cat([images(2), images(4, 1)]), TINY.window)
        lam = draws.lam.view(-1, 1, 1, 1, 1)
        mixed = lam * x + (1 - lam) * x[draws.index]
        torch.testing.assert_close(seen[-1], mixed)

        batch = labeled()
        matches = atss_match(
            Anchors.from_config(config), config.patch_size, batch["boxes"], batch["ignore"]
        )
        predicted, _ = predict_unlabeled(teacher, images(4, 1), config, draws.flips)
        expected = torch.zeros(())
        for logits, own, other in zip(model(mixed)[0], matches.targets, predicted, strict=True):
            y = torch.cat([own, other])
            ignored = (y < 0) | (y[draws.index] < 0)
            y = (lam * y + (1 - lam) * y[draws.index]).masked_fill(ignored, -1.0)
            weight = torch.tensor([1.0] * 2 + [draws.unlabeled_weight] * 4).view(-1, 1, 1, 1, 1)
            focal = {"alpha0": config.alpha0, "alpha1": config.alpha1, "gamma": config.gamma}
            expected = expected + soft_target_focal_loss(
                logits, y, weight=weight, reduction="sum", **focal
            )
        torch.testing.assert_close(
            ours.classification, expected / matches.positive.sum(), rtol=1e-4, atol=1e-6
        )

    def test_plain_pytorch_takes_the_same_step(self, model):
        # no predicted boxes: those of the labels are whole voxels, which plain PyTorch can crop
        config = replace(TINY, confidence=1.0)
        teacher, fused, plain = build_model(TINY), [], []
        for ops, into in (("fused", fused), ("plain", plain)):
            model.zero_grad()
            chosen = replace(config, ops=ops)
            losses = focalmix_loss(
                model, teacher, labeled(), images(4, 1), chosen, sample_draws(config, 0)
            )
            (losses.classification + losses.box).backward()
            into.extend([*losses, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)
