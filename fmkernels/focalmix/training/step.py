"""The losses of a training step, supervised and FocalMix.

FocalMix follows Wang et al., CVPR 2020. Choices of this project: which predicted boxes count as
objects (see `predict_unlabeled`), one lambda per object, and that the loss of a mixed image has the
weight of the image with the larger lambda.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmkernels import functional
from fmkernels.focalmix.config import Config
from fmkernels.focalmix.distributed import sum_of_ranks
from fmkernels.focalmix.model.anchors import (
    Anchors,
    box_iou,
    decode_boxes,
    encode_boxes,
    flat_deltas,
)
from fmkernels.focalmix.model.detector import evaluating, input_dtype
from fmkernels.focalmix.model.matcher import Matches, atss_match
from fmkernels.focalmix.training import plain
from fmkernels.focalmix.training.seeds import derive_seed


class Losses(NamedTuple):
    """Scalars whose sums over the processes are the losses of the joint batch."""

    classification: Tensor
    box: Tensor
    positives: Tensor


class Draws(NamedTuple):
    """Random numbers of one FocalMix step for B images, labeled ones first, of N objects each."""

    flips: Tensor
    """uint8 [views], symmetries, on the CPU; the first view is the image as it is."""
    lam: Tensor
    """float32 [B], MixUp weight of each image."""
    index: Tensor  # type: ignore[assignment] # shadows the method of tuples
    """int64 [B], MixUp partner of each image."""
    object_lam: Tensor
    """float32 [B * N], MixUp weight of each object."""
    priority: Tensor
    """float32 [B * N, B * N], random score of every pair (object, donor); negative = excluded."""
    unlabeled_weight: Tensor
    """float32 scalar, weight of the loss of unlabeled images; not random."""

    def to(self, device: torch.device) -> "Draws":
        if device.type == "cuda":  # without pinned memory the copies synchronize
            self = Draws(*(x.pin_memory() for x in self))
        return Draws(self.flips, *(x.to(device, non_blocking=True) for x in self[1:]))


def sample_draws(
    config: Config, step: int, rank: int = 0, world_size: int = 1, *, only_labeled: bool = False
) -> Draws:
    """The random numbers of a step for one process, on the CPU, determined by seed and step.

    With ``only_labeled``, the batch has no unlabeled images.

    The joint batch consists of ``config.groups`` groups: equal parts of its labeled and of its
    unlabeled images, in order. Images are mixed within their group, with random numbers that depend
    on the group, so that several processes mix as one process with the joint batch would.
    """
    labeled = config.batch_size // world_size
    batch = labeled + (0 if only_labeled else config.unlabeled_batch_size // world_size)
    groups, count = config.groups // world_size, batch * config.max_objects
    images, slots = (torch.arange(n, device="cpu") for n in (batch, count))
    slots = slots.view(batch, -1)  # of the objects of each image
    parts = images[:labeled].tensor_split(groups), images[labeled:].tensor_split(groups)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    lam, index = torch.empty(batch, **float32), torch.empty_like(images)
    object_lam = torch.empty(count, **float32)
    priority = torch.full((count, count), -1.0, **float32)
    for group, members in enumerate(map(torch.cat, zip(*parts, strict=True)), start=rank * groups):
        generator = _generator(config.seed, step, group)
        sample: dict[str, Any] = {"eta": config.eta, "generator": generator, "device": "cpu"}
        lam[members], partners = functional.sample_mixup(len(members), **sample)
        index[members] = members[partners]
        group_slots = slots[members].flatten()
        size = len(group_slots)
        object_lam[group_slots], _ = functional.sample_mixup(size, **sample)
        scores = torch.rand(size, size, generator=generator, **float32)
        priority[group_slots[:, None], group_slots] = scores
    generator = _generator(config.seed, step)
    others = 1 + torch.randperm(47 if config.rotations else 7, generator=generator, device="cpu")
    flips = torch.cat([torch.zeros_like(others[:1]), others])[: config.views]
    ramp = min(1.0, (step - config.burn_in_steps + 1) / (config.rampup_steps + 1))
    weight = torch.tensor(config.unlabeled_weight * ramp, **float32)
    priority.fill_diagonal_(-1.0)  # no object is its own donor
    if config.mixed_images == "unlabeled":
        lam[:labeled] = 1.0
    return Draws(flips.to(torch.uint8), lam, index, object_lam, priority, weight)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(derive_seed(*key))


def supervised_loss(
    model: Callable, batch: Mapping[str, Any], config: Config, draws: Draws | None = None
) -> Losses:
    """Focal loss of every anchor, and smooth L1 loss of the boxes of positive anchors.

    With ``draws``, images and objects are mixed as in a FocalMix step.
    """
    matches, images = _match(batch, config), batch["image"]
    mix = (draws.lam, draws.index) if draws is not None and config.image_mixup else None
    inputs = mix_images(images, mix, config)
    if draws is not None and config.object_mixup:
        mix_objects(inputs, images, _first(batch["boxes"], config.max_objects), config, draws)
    return _losses(model(inputs), matches.targets, matches, config, mix=mix)


def focalmix_loss(
    model: Callable,
    teacher: nn.Module,
    labeled: Mapping[str, Any],
    unlabeled: Tensor,
    config: Config,
    draws: Draws,
) -> Losses:
    """The losses of a FocalMix step. All images are int16 HU, labeled ones come first."""
    images = torch.cat([labeled["image"], unlabeled])

    # 1. Targets: from the labels, and from the teacher's predictions
    matches = _match(labeled, config)
    pseudo_targets, pseudo_objects = predict_unlabeled(teacher, unlabeled, config, draws.flips)
    targets = [torch.cat(level) for level in zip(matches.targets, pseudo_targets, strict=True)]

    # 2. Image MixUp; the loss mixes the targets in the same way
    mix = (draws.lam, draws.index) if config.image_mixup else None
    mixed = mix_images(images, mix, config)

    # 3. Object MixUp; both are objects, so that the targets stay
    if config.object_mixup:
        objects = torch.cat([_first(labeled["boxes"], config.max_objects), pseudo_objects])
        mix_objects(mixed, images, objects, config, draws)

    # 4. Loss
    weight = torch.ones_like(draws.lam).view(-1, 1, 1, 1, 1)
    weight[len(labeled["image"]) :] = draws.unlabeled_weight
    if config.unlabeled_normalizer == "own":
        positives, pseudo = (
            sum_of_ranks(x) for x in (matches.positive.sum(), _sum(pseudo_targets))
        )
        weight[len(labeled["image"]) :] *= positives.clamp(min=1) / pseudo.clamp(min=1)
    return _losses(model(mixed), targets, matches, config, mix=mix, weight=weight)


def mix_images(images: Tensor, mix: tuple[Tensor, Tensor] | None, config: Config) -> Tensor:
    """Images in HU, windowed and mixed with weights and partners, or only windowed."""
    dtype = input_dtype(images)
    if mix is None:
        return _views(config)(images, [0], window=config.window, dtype=dtype)
    return _ops(config).mixup3d(images, *mix, window=config.window, dtype=dtype)


def mix_objects(
    mixed: Tensor, images: Tensor, objects: Tensor, config: Config, draws: Draws
) -> None:
    """Mix each object of the mixed images, in place, with another one of the images in HU."""
    boxes, donor_boxes = pair_objects(objects, draws.priority)
    _ops(config).object_mixup3d(
        mixed,
        boxes,
        donor_boxes,
        draws.object_lam,
        donors=images,
        window=config.window,
        out=mixed,
    )


@torch.no_grad()
def predict_unlabeled(
    teacher: nn.Module, images: Tensor, config: Config, flips: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Predict the targets of unlabeled images from several views, and the objects in the images.

    Objects are boxes of the first view, in descending order of their targets, as in non-maximum
    suppression: those with a target of at least ``config.confidence`` and an IoU with earlier ones
    of at most ``config.nms_threshold``.

    Returns:
        targets: float32 [B, A, D, H, W] per level.
        objects: float32 [B, max_objects, 6], padded with NaN.
    """
    batch, views = len(images), _views(config)
    with evaluating(teacher):
        logits, deltas = teacher(
            views(images, flips.tolist(), window=config.window, dtype=input_dtype(images))
        )
    view_logits = [level.unflatten(0, (len(flips), batch)) for level in logits]
    targets = _ops(config).predict_targets(
        view_logits, flips.to(images.device, non_blocking=True), temperature=config.temperature
    )
    anchors = Anchors.from_config(config).boxes(config.patch_size, images.device)
    boxes = decode_boxes(flat_deltas([level[:batch] for level in deltas]).float(), anchors)
    # one coordinate after the other in memory: the overlaps below read them by themselves
    boxes = boxes.movedim(-1, 0).contiguous().movedim(0, -1)
    scores, objects = torch.cat([level.flatten(1) for level in targets], 1), []
    for _ in range(config.max_objects):
        score, best = scores.max(1, keepdim=True)
        box = boxes.gather(1, best[..., None].expand(-1, -1, 6))
        objects.append(box.masked_fill((score < config.confidence)[..., None], torch.nan))
        suppressed = box_iou(boxes, box) > config.nms_threshold
        scores = scores.masked_fill(suppressed, -1.0).scatter(1, best, -1.0)
    low, high = config.ignored_targets
    ignored = [(level > low) & (level < high) for level in targets] if low < high else None
    if config.pseudo_labels == "hard":
        targets = [(level >= 0.5).float() for level in targets]
    if ignored is not None:
        targets = [
            level.masked_fill(where, -1.0) for level, where in zip(targets, ignored, strict=True)
        ]
    return targets, torch.cat(objects, 1)


def _sum(targets: Sequence[Tensor]) -> Tensor:
    """The sum of all targets that are not ignored."""
    return torch.stack([level.clamp(min=0).sum() for level in targets]).sum()


def pair_objects(objects: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the donor with the highest priority for every object.

    Args:
        objects: [B, N, 6], padded with NaN.
        priority: [B * N, B * N], see `Draws`.

    Returns:
        Boxes [B * N, 7] of the objects and of their donors; NaN where there is no donor.
    """
    image = torch.arange(len(objects), device=objects.device).repeat_interleave(objects.shape[1])
    boxes = torch.cat([image[:, None].to(objects.dtype), objects.flatten(0, 1)], 1)
    is_object = boxes.isfinite().all(1)
    best, donor = priority.masked_fill(~is_object, -1.0).max(1)
    return boxes, boxes[donor].masked_fill((best < 0)[:, None], torch.nan)


def views_of(
    images: Tensor, codes: Sequence[int], *, window: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """The images after each symmetry in turn, windowed: [K * B, C, D, H, W]."""
    count, device = len(images), images.device
    views = images.new_empty((len(codes), *images.shape), dtype=dtype)
    keep = torch.ones(count, dtype=torch.float32, device=device), torch.arange(count, device=device)
    for view, code in zip(views, codes, strict=True):
        mask = code % 8
        permuted = functional.apply_symmetry(images, code - mask) if code >= 8 else images
        flips = torch.full((count,), mask, dtype=torch.uint8, device=device) if mask else None
        functional.mixup3d(permuted, *keep, flips=flips, window=window, dtype=dtype, out=view)
    return views.flatten(0, 1)


def _views(config: Config) -> Callable[..., Tensor]:
    return {"fused": views_of, "plain": plain.views_of}[config.ops]


def _match(batch: Mapping[str, Any], config: Config) -> Matches:
    anchors = Anchors.from_config(config)
    return atss_match(anchors, config.patch_size, batch["boxes"], batch["ignore"])


def _ops(config: Config) -> ModuleType:
    """The fused operations, or their equivalents in plain PyTorch."""
    return {"fused": functional, "plain": plain}[config.ops]


def _first(boxes: Sequence[Tensor], count: int) -> Tensor:
    """float32 [B, count, 6]: the first boxes of each image, padded with NaN."""
    padding = boxes[0].new_full((count, 6), torch.nan)
    return torch.stack([torch.cat([rows, padding])[:count] for rows in boxes])


def _losses(
    outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    targets: Sequence[Tensor],
    matches: Matches,
    config: Config,
    *,
    mix: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
) -> Losses:
    """Focal loss of all images and box loss of the labeled ones, over the number of positives."""
    logits, deltas = outputs
    positives = matches.positive.sum().float()
    normalizer = sum_of_ranks(positives).clamp(min=1)
    is_soft = config.loss == "soft"
    focal_loss = _ops(config).soft_target_focal_loss if is_soft else plain.hard_target_focal_loss
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
    predicted = flat_deltas(deltas)[matches.image, matches.anchor].float()
    anchors = Anchors.from_config(config).boxes(config.patch_size, predicted.device)
    expected = encode_boxes(matches.boxes, anchors[matches.anchor])
    error = F.smooth_l1_loss(predicted, expected, reduction="none", beta=0.1).sum(1)
    return Losses(classification, (error * matches.positive).sum() / normalizer, positives)
