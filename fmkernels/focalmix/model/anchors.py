"""Anchors of the 3D detector: where they are, which box each has to find, how boxes are coded, non-maximum suppression.

Boxes are (z1, y1, x1, z2, y2, x2), voxel units, half-open, voxel i covering [i, i + 1). Anchors are boxes centred at
(i + 1/2) * stride on each axis, so that a flip of a patch whose size is a multiple of the stride maps anchors onto
anchors. Flat lists of anchors run over levels, then anchors of a place, then z, y, x: the order of
``torch.cat([logits.flatten(1) for logits in levels], 1)``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(16.0)  # a decoded box is at most 16 times as long as its anchor


@dataclass(frozen=True)
class Anchors:
    """Anchors of a feature pyramid.

    Args:
        strides: voxels between anchors, one per level, fine to coarse.
        sizes: for each level, the (z, y, x) lengths in voxels of the anchors at each place; as many on every level.
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        if (
            not self.strides
            or len(self.strides) != len(self.sizes)
            or len({len(level) for level in self.sizes}) != 1
        ):
            raise ValueError(
                f"Anchors: expected one list of sizes per stride, all of one length, got {len(self.strides)} strides "
                f"and lists of length {[len(level) for level in self.sizes]}"
            )

    @classmethod
    def from_mm(
        cls, strides: Sequence[int], diameters: Sequence[float], spacing: Sequence[float]
    ) -> "Anchors":
        """Cubes in mm: diameters level after level, ``len(diameters) / len(strides)`` for each; spacing z, y, x."""
        if not strides or not diameters or len(diameters) % len(strides):
            raise ValueError(
                f"Anchors: expected as many diameters for each stride, got {diameters} for {strides}"
            )
        per_level = len(diameters) // len(strides)
        cubes = [tuple(diameter / step for step in spacing) for diameter in diameters]
        levels = tuple(tuple(cubes[i : i + per_level]) for i in range(0, len(cubes), per_level))
        return cls(tuple(strides), levels)

    @property
    def per_place(self) -> int:
        """Number of anchors at each place of a level."""
        return len(self.sizes[0])

    def grids(self, patch_size: Sequence[int]) -> list[tuple[int, ...]]:
        """(D, H, W) of each level for a patch, whose sides must be multiples of every stride."""
        if any(side % stride for side in patch_size for stride in self.strides):
            raise ValueError(
                f"patch size: expected multiples of the strides {self.strides}, got {tuple(patch_size)}"
            )
        return [tuple(side // stride for side in patch_size) for stride in self.strides]

    def boxes(self, patch_size: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """All anchors of a patch, float32 ``[n, 6]``, in flat order."""
        levels = []
        for stride, sizes, grid in zip(
            self.strides, self.sizes, self.grids(patch_size), strict=True
        ):
            axes = [(torch.arange(n, device=device) + 0.5) * stride for n in grid]
            centers = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).reshape(1, -1, 3)
            halves = _constant(sizes, device).reshape(-1, 1, 3) / 2
            levels.append(torch.cat([centers - halves, centers + halves], -1).reshape(-1, 6))
        return torch.cat(levels)


@dataclass(frozen=True)
class Matches:
    """What each anchor of a batch has to say.

    ``targets``: per level float32 ``[B, A, D, H, W]``: 1 = finds a box, 0 = background, -1 = ignored.
    ``image``, ``anchor``: int64 ``[n]``, image and flat anchor index of every candidate pair of an anchor and a box;
    ``boxes``: float32 ``[n, 6]``, the box of that pair; ``positive``: bool ``[n]``, whether the anchor has to find it.
    The number of pairs depends on the number of boxes only, so that nothing waits for the device.
    """

    targets: list[Tensor]
    image: Tensor
    anchor: Tensor
    boxes: Tensor
    positive: Tensor


@functools.lru_cache(maxsize=256)
def _constant(values: tuple, device: torch.device | str | None) -> Tensor:
    """On the device once: a copy from the host waits for all that was launched before."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[..., 6]`` and ``[..., 6]``, broadcast; 0 where both are empty."""
    overlap = (
        (torch.minimum(a[..., 3:], b[..., 3:]) - torch.maximum(a[..., :3], b[..., :3]))
        .clamp(min=0)
        .prod(-1)
    )
    union = (a[..., 3:] - a[..., :3]).prod(-1) + (b[..., 3:] - b[..., :3]).prod(-1) - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas ``[..., 6]``: (centre of box - centre of anchor) / anchor length, then log(box length / anchor length)."""
    length = anchors[..., 3:] - anchors[..., :3]
    shift = (boxes[..., :3] + boxes[..., 3:] - anchors[..., :3] - anchors[..., 3:]) / 2 / length
    return torch.cat([shift, ((boxes[..., 3:] - boxes[..., :3]) / length).log()], -1)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of :func:`encode_boxes`; log lengths are held at ``log(16)`` so that no delta overflows."""
    length = anchors[..., 3:] - anchors[..., :3]
    center = (anchors[..., :3] + anchors[..., 3:]) / 2 + deltas[..., :3] * length
    half = deltas[..., 3:].clamp(max=MAX_LOG_SCALE).exp() * length / 2
    return torch.cat([center - half, center + half], -1)


def match(
    anchors: Anchors,
    patch_size: Sequence[int],
    boxes: Sequence[Tensor],
    ignore: Sequence[Tensor],
    *,
    candidates: int = 4,
) -> Matches:
    """Give every anchor of a batch its target.

    Adaptive selection in the manner of ATSS (Zhang et al., CVPR 2020); the details are this project's own choice. The
    candidates of a box are, on every level, the anchors at the ``candidates`` places closest to its centre. Let m and s
    be the mean and the standard deviation of their intersections over union with the box: candidates of at least m + s
    find the box, those between m and m + s are ignored. The best candidate that no earlier box of the list holds finds
    the box in any case; any other anchor claimed by several boxes goes to the one it overlaps most. Anchors centred in
    a box of ``ignore`` (enlarged to the stride where it is smaller) are ignored unless they find a box. All others are
    background.

    Args:
        anchors: the detector's anchors.
        patch_size: (D, H, W) of the patches.
        boxes: float32 ``[n, 6]`` per image, to be found.
        ignore: float32 ``[m, 6]`` per image, neither to be found nor background.
        candidates: places per level, 1 to 8.
    """
    if not 1 <= candidates <= 8:
        raise ValueError(f"match: candidates: expected 1 to 8, got {candidates}")
    grids = anchors.grids(patch_size)
    wanted = torch.cat(list(boxes))
    device, batch = wanted.device, len(boxes)
    every = anchors.boxes(patch_size, device)
    image = _image_of(boxes)
    index, valid = _closest(anchors, grids, (wanted[:, :3] + wanted[:, 3:]) / 2, candidates)

    iou = box_iou(every[index], wanted[:, None]).masked_fill(~valid, 0.0)  # [n, K]
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = iou.sum(1, keepdim=True) / count
    spread = (((iou - mean) ** 2).masked_fill(~valid, 0.0).sum(1, keepdim=True) / count).sqrt()
    key = image[:, None] * len(every) + index
    own = torch.zeros_like(valid)
    held = torch.zeros(batch * len(every), dtype=torch.bool, device=device)
    for j in range(len(wanted)):
        free = valid[j] & ~held[key[j]]
        best = iou[j].masked_fill(~free, -1.0).argmax(0, keepdim=True)
        own[j].scatter_(0, best, free.gather(0, best))
        held.scatter_(0, key[j].gather(0, best), True)

    claim = torch.where(valid & (iou >= mean + spread) & ~held[key], iou, -1.0)
    strongest = _scatter_max(claim, key, held.shape, -1.0)
    positive = own | ((claim >= 0) & (claim == strongest[key]))
    between = valid & (iou >= mean)
    found = _scatter_max(positive.float(), key, held.shape, 0.0).view(batch, -1)
    ignored = _scatter_max(between.float(), key, held.shape, 0.0).view(batch, -1) + _covered(
        anchors, grids, ignore
    )
    flat = torch.where(found > 0, 1.0, torch.where(ignored > 0, -1.0, 0.0))
    levels = flat.split([anchors.per_place * math.prod(grid) for grid in grids], 1)
    targets = [
        level.reshape(batch, anchors.per_place, *grid)
        for level, grid in zip(levels, grids, strict=True)
    ]
    pairs = index.shape[1]
    return Matches(
        targets,
        image.repeat_interleave(pairs),
        index.flatten(),
        wanted.repeat_interleave(pairs, 0),
        positive.flatten(),
    )


def _image_of(boxes: Sequence[Tensor]) -> Tensor:
    """int64 ``[n]``: the image of each box of the concatenated list."""
    index = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(b) for b in boxes]))
    if boxes[0].device.type == "cuda":  # or the copy waits for the device
        index = index.pin_memory()
    return index.to(boxes[0].device, non_blocking=True)


def _closest(
    anchors: Anchors, grids: Sequence[Sequence[int]], centers: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Flat indices ``[n, K]`` of the anchors at the k places of each level closest to the centres, and which exist.

    The k <= 8 closest points of a grid lie within two steps of the closest, so that only those are looked at.
    """
    steps = torch.arange(-2, 3, device=centers.device)
    window = torch.cartesian_prod(steps, steps, steps)  # [125, 3]
    index, valid, first = [], [], 0
    for stride, (d, h, w) in zip(anchors.strides, grids, strict=True):
        last = _constant((d - 1, h - 1, w - 1), centers.device)
        place = centers / stride - 0.5
        near = (
            place.round().long().clamp(min=torch.zeros_like(last), max=last)[:, None] + window
        )  # [n, 125, 3]
        outside = ((near < 0) | (near > last)).any(-1)
        distance = (near - place[:, None]).square().sum(-1).masked_fill(outside, torch.inf)
        distance, choice = distance.topk(k, largest=False)
        z, y, x = near.gather(1, choice[..., None].expand(-1, -1, 3)).unbind(-1)
        exists = distance < torch.inf
        flat = ((z * h + y) * w + x).masked_fill(~exists, 0)
        for _ in range(anchors.per_place):
            index.append(first + flat)
            valid.append(exists)
            first += d * h * w
    return torch.cat(index, 1), torch.cat(valid, 1)


def _scatter_max(values: Tensor, key: Tensor, shape: torch.Size, least: float) -> Tensor:
    return torch.full(shape, least, device=values.device).scatter_reduce_(
        0, key.flatten(), values.flatten(), "amax"
    )


def _covered(anchors: Anchors, grids: Sequence[Sequence[int]], ignore: Sequence[Tensor]) -> Tensor:
    """float32 ``[B, anchors]``: how many boxes of ``ignore`` each anchor is centred in."""
    boxes = torch.cat(list(ignore))
    image = torch.nn.functional.one_hot(_image_of(ignore), len(ignore)).float()  # [m, B]
    center, half = (boxes[:, :3] + boxes[:, 3:]) / 2, (boxes[:, 3:] - boxes[:, :3]) / 2
    levels = []
    for stride, grid in zip(anchors.strides, grids, strict=True):
        reach = half.clamp(min=stride / 2)
        inside = [
            ((torch.arange(n, device=boxes.device) + 0.5) * stride - center[:, i, None]).abs()
            <= reach[:, i, None]
            for i, n in enumerate(grid)
        ]
        level = torch.einsum("mb,mz,my,mx->bzyx", image, *(axis.float() for axis in inside))
        levels.append(level.flatten(1).repeat(1, anchors.per_place))
    return torch.cat(levels, 1)


def nms(
    boxes: Tensor, scores: Tensor, *, threshold: float, limit: int = 1000, keep: int = 100
) -> Tensor:
    """Greedy non-maximum suppression in 3D: int64 indices of the boxes kept, highest score first.

    Of boxes that overlap by more than ``threshold`` (intersection over union) only the one of highest score stays; of
    equal scores the first. Only the ``limit`` highest are looked at and at most ``keep`` stay, in memory proportional
    to the number of boxes. The host reads the result of each step, so it is best given tensors on the CPU.

    Args:
        boxes: float ``[n, 6]``.
        scores: float ``[n]``.
    """
    order = scores.argsort(descending=True, stable=True)[:limit]
    kept: list[Tensor] = []
    while len(order) and len(kept) < keep:
        first, rest = order[0], order[1:]
        kept.append(first)
        order = rest[box_iou(boxes[first], boxes[rest]) <= threshold]
    return torch.stack(kept) if kept else order
