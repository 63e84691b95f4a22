"""Find nodules in a whole scan: overlapping patches through the detector, candidates in world coordinates."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from torch import nn

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.data.volume import Volume, cut_patch
from fmkernels.focalmix.model.anchors import Anchors, decode_boxes, nms
from fmkernels.focalmix.model.detector import apply_window
from fmkernels.focalmix.training.checkpoint import autocast


@dataclass(frozen=True)
class Detections:
    """Candidates of one scan, most probable first.

    ``boxes``: float32 ``[n, 6]``, voxels of the resampled scan; ``probabilities``: float32 ``[n]``; ``candidates``:
    float64 ``[n, 4]``: x, y, z of the box centres in world mm, probability.
    """

    boxes: np.ndarray
    probabilities: np.ndarray
    candidates: np.ndarray


def search(config: Config, model: nn.Module, volume: Volume) -> Detections:
    """Detect in one scan with the settings of a run, on the device of the model."""
    device = next(model.parameters()).device
    with autocast(config, device):
        return detect(
            model,
            config.anchors,
            volume,
            patch_size=config.search_size,
            overlap=config.overlap,
            window=config.window,
            nms_threshold=config.nms_threshold,
        )


@torch.inference_mode()
def detect(
    model: nn.Module,
    anchors: Anchors,
    volume: Volume,
    *,
    patch_size: Sequence[int],
    overlap: int,
    window: tuple[float, float],
    nms_threshold: float,
    batch_size: int = 4,
    per_patch: int = 100,
    keep: int = 100,
) -> Detections:
    """Run the detector over a scan.

    Patches overlap by at least ``overlap`` voxels and each answers only for the anchors nearer to its middle than to
    that of any other patch, so that an object up to ``overlap`` voxels long is seen whole by the patch that answers for
    its centre. Beyond the scan there is air. Runs on the device of the model, under the autocast of the caller.

    Args:
        model: a :class:`~fmkernels.focalmix.model.detector.Detector`.
        anchors: the anchors it was trained with.
        volume: the resampled scan.
        patch_size: (D, H, W), multiples of the strides.
        overlap: voxels, less than any side of the patch.
        window: (lo, hi) HU.
        nms_threshold: intersection over union above which the less probable of two boxes goes.
        batch_size: patches at a time; changes speed and memory only.
        per_patch: the most boxes taken from a patch.
        keep: the most candidates returned.

    Raises:
        FloatingPointError: what the detector says is not finite.
    """
    if not 0 <= overlap < min(patch_size):
        raise ValueError(f"detect: overlap: expected 0 to {min(patch_size) - 1}, got {overlap}")
    device = next(model.parameters()).device
    every = anchors.boxes(patch_size, device)
    centers = (every[:, :3] + every[:, 3:]) / 2
    per_patch = min(per_patch, len(every))
    found_boxes, found_scores = [], []
    tiles = list(_tiles(volume.voxels.shape, patch_size, overlap))
    for first in range(0, len(tiles), batch_size):
        batch = tiles[first : first + batch_size]
        corners = torch.tensor([tile.corner for tile in batch], dtype=torch.float32, device=device)[
            :, None
        ]
        cores = torch.tensor([tile.core for tile in batch], dtype=torch.float32, device=device)[
            :, :, None
        ]
        patches = [cut_patch(volume.voxels, tile.corner, patch_size) for tile in batch]
        images = torch.from_numpy(np.stack(patches)[:, None])
        logits, deltas = model(apply_window(images.to(device), window))
        scores = torch.cat([level.flatten(1) for level in logits], 1).float()
        deltas = torch.cat([level.movedim(2, -1).reshape(len(batch), -1, 6) for level in deltas], 1)
        place = centers + corners
        owned = ((place >= cores[:, 0]) & (place < cores[:, 1])).all(-1)
        scores, choice = scores.masked_fill(~owned, -torch.inf).topk(per_patch)
        deltas = deltas.gather(1, choice[..., None].expand(-1, -1, 6)).float()
        found_boxes.append(
            (decode_boxes(deltas, every[choice]) + corners.repeat(1, 1, 2)).flatten(0, 1).cpu()
        )
        found_scores.append(scores.flatten().cpu())
    boxes, scores = torch.cat(found_boxes), torch.cat(found_scores).sigmoid()
    if not boxes.isfinite().all() or scores.isnan().any():
        raise FloatingPointError(
            "detect: the detector's output is not finite; it was trained at too high a rate"
        )
    middle = (boxes[:, :3] + boxes[:, 3:]) / 2
    inside = ((middle >= 0) & (middle < torch.tensor(volume.voxels.shape))).all(-1) & (scores > 0)
    boxes, scores, middle = boxes[inside], scores[inside], middle[inside]
    best = nms(boxes, scores, threshold=nms_threshold, keep=keep)
    world = volume.to_world(middle[best].double().numpy())
    candidates = np.column_stack([world, scores[best].double().numpy()])
    return Detections(boxes[best].numpy(), scores[best].numpy(), candidates)


@dataclass(frozen=True)
class _Tile:
    corner: tuple[int, ...]
    core: tuple[
        tuple[float, ...], tuple[float, ...]
    ]  # the anchors this patch answers for: from, to


def _tiles(shape: Sequence[int], patch_size: Sequence[int], overlap: int) -> Iterator[_Tile]:
    """Patches that cover a scan, evenly spread, and cores that divide all of space among them."""
    axes = []
    for size, patch in zip(shape, patch_size, strict=True):
        count = max(1, math.ceil((size - overlap) / (patch - overlap)))
        starts = (
            [round(i * (size - patch) / (count - 1)) for i in range(count)]
            if count > 1
            else [(size - patch) // 2]
        )
        borders = [-math.inf, *((a + b + patch) / 2 for a, b in pairwise(starts)), math.inf]
        axes.append([(start, *core) for start, core in zip(starts, pairwise(borders), strict=True)])
    for tile in product(*axes):
        corner, low, high = zip(*tile, strict=True)
        yield _Tile(corner, (low, high))
