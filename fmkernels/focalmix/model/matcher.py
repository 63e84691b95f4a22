"""Assignment of ground-truth boxes to anchors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels.focalmix.model.anchors import Anchors, box_iou, constant


@dataclass(frozen=True)
class Matches:
    """Training targets of a batch.

    The number of candidate pairs depends on the number of boxes only, so that matching never
    synchronizes with the host.
    """

    targets: list[Tensor]
    """Per level float32 ``[B, A, D, H, W]``: 1 = positive, 0 = background, -1 = ignored."""
    image: Tensor
    """int64 ``[n]``, the image of every candidate pair of an anchor and a box."""
    anchor: Tensor
    """int64 ``[n]``, the flat index of the anchor of each pair."""
    boxes: Tensor
    """float32 ``[n, 6]``, the box of each pair."""
    positive: Tensor
    """bool ``[n]``, whether the anchor is assigned to the box."""


def atss_match(
    anchors: Anchors,
    patch_size: Sequence[int],
    boxes: Sequence[Tensor],
    ignore: Sequence[Tensor],
    *,
    topk: int = 4,
) -> Matches:
    """Assign every anchor of a batch its target, by adaptive training sample selection.

    This follows ATSS (Zhang et al., CVPR 2020); the details are this project's choice. The
    candidates of a box are, on every level, the anchors of the ``topk`` cells closest to its
    center. Let m and s be the mean and the standard deviation of their IoU with the box: candidates
    with an IoU of at least m + s are positive, those between m and m + s are ignored. The best
    candidate that no earlier box of the list has taken is positive in any case; any other anchor
    claimed by several boxes goes to the one it overlaps most. Anchors centered in a box of
    ``ignore`` (enlarged to the stride where it is smaller) are ignored unless they are positive.
    All others are background.

    Args:
        anchors: the detector's anchors.
        patch_size: (D, H, W) of the patches.
        boxes: float32 ``[n, 6]`` per image, the objects.
        ignore: float32 ``[m, 6]`` per image, regions that are neither object nor background.
        topk: cells per level, 1 to 8.
    """
    if not 1 <= topk <= 8:
        raise ValueError(f"atss_match: topk: expected 1 to 8, got {topk}")
    grids = anchors.grids(patch_size)
    objects = torch.cat(list(boxes))
    device, batch = objects.device, len(boxes)
    anchor_boxes = anchors.boxes(patch_size, device)
    image = _image_index(boxes)
    index, valid = _closest(anchors, grids, (objects[:, :3] + objects[:, 3:]) / 2, topk)

    iou = box_iou(anchor_boxes[index], objects[:, None]).masked_fill(~valid, 0.0)  # [n, K]
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = iou.sum(1, keepdim=True) / count
    spread = (((iou - mean) ** 2).masked_fill(~valid, 0.0).sum(1, keepdim=True) / count).sqrt()

    # the best free candidate of each box, in list order
    key = image[:, None] * len(anchor_boxes) + index  # of the anchor within the batch
    best_of_box = torch.zeros_like(valid)
    taken = torch.zeros(batch * len(anchor_boxes), dtype=torch.bool, device=device)
    for j in range(len(objects)):
        free = valid[j] & ~taken[key[j]]
        best = iou[j].masked_fill(~free, -1.0).argmax(0, keepdim=True)
        best_of_box[j].scatter_(0, best, free.gather(0, best))
        taken.scatter_(0, key[j].gather(0, best), True)

    # all others go to the box with the highest IoU
    claim = torch.where(valid & (iou >= mean + spread) & ~taken[key], iou, -1.0)
    highest = _scatter_max(claim, key, taken.shape, -1.0)
    positive = best_of_box | ((claim >= 0) & (claim == highest[key]))
    between = valid & (iou >= mean)

    is_positive = _scatter_max(positive.float(), key, taken.shape, 0.0).view(batch, -1) > 0
    is_between = _scatter_max(between.float(), key, taken.shape, 0.0).view(batch, -1) > 0
    is_ignored = (is_between | (_covering(anchors, grids, ignore) > 0)) & ~is_positive
    flat = is_positive.float() - is_ignored.float()
    levels = flat.split([anchors.per_cell * math.prod(grid) for grid in grids], 1)
    targets = [
        level.reshape(batch, anchors.per_cell, *grid)
        for level, grid in zip(levels, grids, strict=True)
    ]
    candidates = index.shape[1]
    return Matches(
        targets,
        image.repeat_interleave(candidates),
        index.flatten(),
        objects.repeat_interleave(candidates, 0),
        positive.flatten(),
    )


def _image_index(boxes: Sequence[Tensor]) -> Tensor:
    """int64 ``[n]``: the image of each box of the concatenated list."""
    counts = torch.tensor([len(b) for b in boxes], dtype=torch.int64, device="cpu")
    index = torch.arange(len(boxes), device="cpu").repeat_interleave(counts)
    if boxes[0].device.type == "cuda":  # without pinned memory the copy synchronizes
        index = index.pin_memory()
    return index.to(boxes[0].device, non_blocking=True)


def _closest(
    anchors: Anchors, grids: Sequence[Sequence[int]], centers: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Flat indices ``[n, K]`` of the anchors in the cells closest to the centers, and their mask.

    The 8 closest points of a grid lie within two steps of the closest one: only those are compared.
    """
    steps = torch.arange(-2, 3, device=centers.device)
    window = torch.cartesian_prod(steps, steps, steps)  # [125, 3]
    index, valid, first = [], [], 0
    for stride, (d, h, w) in zip(anchors.strides, grids, strict=True):
        last = constant((d - 1, h - 1, w - 1), torch.int64, centers.device)
        cell = centers / stride - 0.5
        nearest = cell.round().long().clamp(min=torch.zeros_like(last), max=last)
        near = nearest[:, None] + window  # [n, 125, 3]
        outside = ((near < 0) | (near > last)).any(-1)
        distance = (near - cell[:, None]).square().sum(-1).masked_fill(outside, torch.inf)
        distance, choice = distance.topk(topk, largest=False)
        z, y, x = near.gather(1, choice[..., None].expand(-1, -1, 3)).unbind(-1)
        exists = distance < torch.inf
        flat = ((z * h + y) * w + x).masked_fill(~exists, 0)
        for _ in range(anchors.per_cell):
            index.append(first + flat)
            valid.append(exists)
            first += d * h * w
    return torch.cat(index, 1), torch.cat(valid, 1)


def _scatter_max(values: Tensor, key: Tensor, shape: torch.Size, fill: float) -> Tensor:
    result = torch.full(shape, fill, dtype=values.dtype, device=values.device)
    return result.scatter_reduce_(0, key.flatten(), values.flatten(), "amax")


def _covering(anchors: Anchors, grids: Sequence[Sequence[int]], ignore: Sequence[Tensor]) -> Tensor:
    """float32 ``[B, n]``: the number of boxes of ``ignore`` that each anchor is centered in."""
    boxes = torch.cat(list(ignore))
    if not len(boxes):
        return boxes.new_zeros(len(ignore), anchors.per_cell * sum(map(math.prod, grids)))
    image = F.one_hot(_image_index(ignore), len(ignore)).float()  # [m, B]
    center, half = (boxes[:, :3] + boxes[:, 3:]) / 2, (boxes[:, 3:] - boxes[:, :3]) / 2
    levels = []
    for stride, grid in zip(anchors.strides, grids, strict=True):
        reach = half.clamp(min=stride / 2)
        inside = [
            (
                (torch.arange(n, dtype=torch.float32, device=boxes.device) + 0.5) * stride
                - center[:, i, None]
            ).abs()
            <= reach[:, i, None]
            for i, n in enumerate(grid)
        ]
        level = torch.einsum("mb,mz,my,mx->bzyx", image, *(axis.float() for axis in inside))
        levels.append(level.flatten(1).repeat(1, anchors.per_cell))
    return torch.cat(levels, 1)
