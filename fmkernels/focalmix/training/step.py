"""The losses of a training step: of labelled patches alone, and FocalMix's of labelled and unlabelled ones together.

FocalMix is that of Wang et al., CVPR 2020. Choices of this project: which boxes of unlabelled images count as objects
(see `predict`), one share for each object, and that a mixed image weighs what the larger of its parts weighs.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmkernels import functional
from fmkernels.focalmix.config import Config
from fmkernels.focalmix.distributed import sum_of_ranks
from fmkernels.focalmix.model.anchors import Matches, box_iou, decode_boxes, encode_boxes, match
from fmkernels.focalmix.model.detector import apply_window, flipped
from fmkernels.focalmix.training import plain


class Losses(NamedTuple):
    """Scalars of a step whose sums over the processes are those of the joint batch."""

    classification: Tensor
    box: Tensor
    positives: Tensor


class Draw(NamedTuple):
    """What FocalMix leaves to chance, for B images, the labelled ones first, with room for ``objects`` in each."""

    flips: Tensor
    """uint8 [views], masks, on the host; the first view is not flipped."""
    lam: Tensor
    """float32 [B], the share of each image."""
    index: Tensor  # type: ignore[assignment] # not the method of a tuple
    """int64 [B], its partner."""
    object_lam: Tensor
    """float32 [B * objects], the share of each object."""
    preference: Tensor
    """float32 [B * objects, B * objects], how much each object wants each other as its donor; negative: not at all."""
    unlabeled_weight: Tensor
    """float32 scalar, of the loss of unlabelled images."""

    def to(self, device: torch.device) -> "Draw":
        if device.type == "cuda":  # or the copies wait for the device
            self = Draw(*(x.pin_memory() for x in self))
        return Draw(self.flips, *(x.to(device, non_blocking=True) for x in self[1:]))


def draw(config: Config, step: int, rank: int = 0, world: int = 1) -> Draw:
    """The draws of a step for one of the processes, on the CPU, decided by the seed, the step and the group.

    The joint batch has ``config.groups`` groups, equal parts of its labelled and of its unlabelled images, in order;
    images are mixed with images of their group. So several processes draw what one with the joint batch would.
    """
    labeled, unlabeled = config.batch_size // world, config.unlabeled_batch_size // world
    images, groups = torch.arange(labeled + unlabeled), config.groups // world
    parts = images[:labeled].chunk(groups), images[labeled:].chunk(groups)
    places = (labeled + unlabeled) * config.objects
    lam, index = (
        torch.empty(labeled + unlabeled),
        torch.empty(labeled + unlabeled, dtype=torch.int64),
    )
    object_lam, preference = torch.empty(places), torch.full((places, places), -1.0)
    for group, own in enumerate(map(torch.cat, zip(*parts, strict=True)), start=rank * groups):
        generator = _generator(config.seed, step, group)
        lam[own], partners = functional.sample_mixup(len(own), eta=config.eta, generator=generator)
        index[own] = own[partners]
        slots = (own[:, None] * config.objects + torch.arange(config.objects)).flatten()
        object_lam[slots], _ = functional.sample_mixup(
            len(slots), eta=config.eta, generator=generator
        )
        preference[slots[:, None], slots] = torch.rand(len(slots), len(slots), generator=generator)
    others = 1 + torch.randperm(7, generator=_generator(config.seed, step))
    flips = torch.cat([torch.zeros(1, dtype=torch.int64), others])[: config.views]
    risen = min(1.0, (step - config.burn_in + 1) / (config.ramp + 1))
    weight = torch.tensor(config.unlabeled_weight * risen)
    return Draw(
        flips.to(torch.uint8), lam, index, object_lam, preference.fill_diagonal_(-1.0), weight
    )


def _generator(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


def supervised_loss(model: nn.Module, batch: Mapping[str, Any], config: Config) -> Losses:
    """Focal loss of every anchor and smooth L1 loss of the boxes of the positive ones, on the device of the batch."""
    matches = match(config.anchors, config.patch_size, batch["boxes"], batch["ignore"])
    return _losses(
        model(apply_window(batch["image"], config.window)), matches.targets, matches, config
    )


def focalmix_loss(
    model: nn.Module,
    teacher: nn.Module,
    labeled: Mapping[str, Any],
    unlabeled: Tensor,
    config: Config,
    drawn: Draw,
) -> Losses:
    """FocalMix's step: predict targets, mix images, mix objects, compare. All images are int16 HU."""
    images = torch.cat([labeled["image"], unlabeled])

    matches = match(config.anchors, config.patch_size, labeled["boxes"], labeled["ignore"])
    predicted, found = predict(teacher, unlabeled, config, drawn.flips)
    targets = [torch.cat(level) for level in zip(matches.targets, predicted, strict=True)]

    mix = (drawn.lam, drawn.index) if config.image_mixup else None
    lam, index = mix or (
        torch.ones_like(drawn.lam),
        torch.arange(len(images), device=images.device),
    )
    ops = _ops(config)
    mixed = ops.mixup3d(images, lam, index, window=config.window)

    if config.object_mixup:
        objects = torch.cat([_first(labeled["boxes"], config.objects), found])
        boxes, donor_boxes = pair_objects(objects, drawn.preference)
        ops.object_mixup3d(
            mixed,
            boxes,
            donor_boxes,
            drawn.object_lam,
            donors=images,
            window=config.window,
            out=mixed,
        )

    weight = torch.ones(len(images), 1, 1, 1, 1, device=images.device)
    weight[len(labeled["image"]) :] = drawn.unlabeled_weight
    return _losses(model(mixed), targets, matches, config, mix=mix, weight=weight)


@torch.no_grad()
def predict(
    teacher: nn.Module, images: Tensor, config: Config, flips: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Targets of unlabelled images from flipped views, and the objects in them.

    Objects are the boxes of the first view at the anchors of the highest targets of at least ``config.confidence``, of
    which none overlaps one before it by more than ``config.nms_threshold``.

    Returns:
        targets: float32 [B, A, D, H, W] per level.
        objects: float32 [B, objects, 6]; NaN where there are fewer.
    """
    batch, ops = len(images), _ops(config)
    windowed = apply_window(images, config.window)
    logits, deltas = teacher(torch.cat([flipped(windowed, mask) for mask in flips.tolist()]))
    views = [level.unflatten(0, (len(flips), batch)) for level in logits]
    targets = ops.predict_targets(
        views, flips.to(images.device, non_blocking=True), temperature=config.temperature
    )
    deltas = torch.cat(
        [level[:batch].movedim(2, -1).reshape(batch, -1, 6) for level in deltas], 1
    ).float()
    boxes = decode_boxes(deltas, config.anchors.boxes(config.patch_size, images.device))
    scores, objects = torch.cat([level.flatten(1) for level in targets], 1), []
    for _ in range(config.objects):
        score, best = scores.max(1, keepdim=True)
        box = boxes.gather(1, best[..., None].expand(-1, -1, 6))
        objects.append(box.masked_fill((score < config.confidence)[..., None], torch.nan))
        scores = scores.masked_fill(box_iou(boxes, box) > config.nms_threshold, -1.0).scatter(
            1, best, -1.0
        )
    if config.pseudo_labels == "hard":
        targets = [(level >= 0.5).float() for level in targets]
    return targets, torch.cat(objects, 1)


def pair_objects(objects: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [n, 7] of objects [B, places, 6] and of the donor of each, the most wanted one; NaN where there is none."""
    image = torch.arange(len(objects), device=objects.device).repeat_interleave(objects.shape[1])
    boxes = torch.cat([image[:, None].float(), objects.flatten(0, 1)], 1)
    there = boxes.isfinite().all(1)
    best, donor = preference.masked_fill(~there, -1.0).max(1)
    return boxes, boxes[donor].masked_fill((best < 0)[:, None], torch.nan)


def _ops(config: Config) -> ModuleType:
    """Ours, or those they are compared with."""
    return {"fused": functional, "plain": plain}[config.ops]


def _first(boxes: Sequence[Tensor], count: int) -> Tensor:
    """float32 [B, count, 6]: the first boxes of each image; NaN where there are fewer."""
    padding = boxes[0].new_full((count, 6), torch.nan)
    return torch.stack([torch.cat([own, padding])[:count] for own in boxes])


def _losses(
    outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    targets: Sequence[Tensor],
    matches: Matches,
    config: Config,
    *,
    mix: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
) -> Losses:
    """Focal loss over all images, box loss over the matches of the labelled ones; both by the number of positives."""
    logits, deltas = outputs
    positives = matches.positive.sum().float()
    normalizer = sum_of_ranks(positives).clamp(min=1)
    ops = _ops(config)
    focal_loss = (
        ops.soft_target_focal_loss if config.loss == "soft" else plain.hard_target_focal_loss
    )
    classification = focal_loss(
        logits,
        targets,
        alpha0=config.alpha0,
        alpha1=config.alpha1,
        gamma=config.gamma,
        weight=weight,
        normalizer=normalizer,
        mix=mix,
    )
    flat = torch.cat([level.movedim(2, -1).reshape(len(level), -1, 6) for level in deltas], 1)
    anchors = config.anchors.boxes(config.patch_size, flat.device)[matches.anchor]
    wanted = encode_boxes(matches.boxes, anchors)
    error = F.smooth_l1_loss(
        flat[matches.image, matches.anchor].float(), wanted, reduction="none", beta=0.1
    ).sum(1)
    return Losses(classification, (error * matches.positive).sum() / normalizer, positives)
