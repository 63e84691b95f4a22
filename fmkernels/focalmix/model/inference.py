"""Detection in whole scans: a sliding window, non-maximum suppression, world coordinates."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor, nn

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.data.volume import Volume, cut_patch
from fmkernels.focalmix.model.anchors import Anchors, box_iou, decode_boxes, flat_deltas
from fmkernels.focalmix.model.detector import apply_window, autocast, evaluating


@dataclass(frozen=True)
class Detections:
    """Candidates of one scan, most probable first."""

    boxes: np.ndarray
    """float32 ``[n, 6]``, in voxels of the resampled scan."""
    probabilities: np.ndarray
    """float32 ``[n]``."""
    candidates: np.ndarray
    """float64 ``[n, 4]``: x, y, z of the box centers in world mm, probability."""


@torch.inference_mode()
def detect(
    config: Config,
    model: nn.Module,
    volume: Volume,
    *,
    batch_size: int = 4,
    per_patch: int = 1000,
    keep: int = 100,
) -> Detections:
    """Run the detector over a scan, on the device of the model.

    Sliding windows overlap by at least ``config.overlap`` voxels. They are as few as windows of
    ``config.roi_size`` can be, and no larger than needed for that (see `fit_window`). Each one is
    responsible for the anchors that are closer to its middle than to that of any other window,
    so that an object of up to ``config.overlap`` voxels lies entirely in the window responsible for
    its center. The scan is padded with air.

    Args:
        config: the configuration that the model was trained with.
        model: a :class:`~fmkernels.focalmix.model.detector.Detector`.
        volume: the resampled scan.
        batch_size: windows per forward pass; changes speed and memory only.
        per_patch: maximum number of boxes from one window.
        keep: maximum number of candidates.

    Raises:
        FloatingPointError: the output of the detector is not finite.
    """
    device = next(model.parameters()).device
    shape = volume.voxels.shape
    size = fit_window(shape, config.roi_size, config.overlap, config.strides[-1])
    anchors = Anchors.from_config(config).boxes(size, device)
    centers = (anchors[:, :3] + anchors[:, 3:]) / 2
    per_patch = min(per_patch, len(anchors))
    all_boxes, all_scores = [], []
    windows = list(_windows(shape, size, config.overlap))
    batches = math.ceil(len(windows) / batch_size)
    for i in range(batches):  # of about the same size: PyTorch's CPU path is slow for one image
        batch = windows[i::batches]
        corners = _rows([window.corner for window in batch], device)[:, None]  # [B, 1, 3]
        cores = _rows([window.core for window in batch], device)[:, :, None]  # [B, 2, 1, 3]
        patches = [cut_patch(volume.voxels, window.corner, size) for window in batch]
        images = torch.from_numpy(np.stack(patches)[:, None])
        with autocast(config, device), evaluating(model):
            logits, deltas = model(apply_window(images.to(device), config.window))
        scores = torch.cat([level.flatten(1) for level in logits], 1).float()
        positions = centers + corners
        is_inside = ((positions >= cores[:, 0]) & (positions < cores[:, 1])).all(-1)
        scores, choice = scores.masked_fill(~is_inside, -torch.inf).topk(per_patch)
        chosen = flat_deltas(deltas).gather(1, choice[..., None].expand(-1, -1, 6)).float()
        boxes = decode_boxes(chosen, anchors[choice]) + corners.repeat(1, 1, 2)
        all_boxes.append(boxes.flatten(0, 1).cpu())
        all_scores.append(scores.flatten().cpu())
    boxes, scores = torch.cat(all_boxes), torch.cat(all_scores).sigmoid()
    if not boxes.isfinite().all() or scores.isnan().any():
        raise FloatingPointError(
            "detect: the output of the detector is not finite; try training with a lower "
            "learning rate"
        )
    middle = (boxes[:, :3] + boxes[:, 3:]) / 2
    inside = (middle >= 0) & (middle < _rows(shape, torch.device("cpu")))
    inside = inside.all(-1) & (scores > 0)
    boxes, scores, middle = boxes[inside], scores[inside], middle[inside]
    best = nms(boxes, scores, threshold=config.nms_threshold, keep=keep)
    world = volume.to_world(middle[best].double().numpy())
    candidates = np.column_stack([world, scores[best].double().numpy()])
    return Detections(boxes[best].numpy(), scores[best].numpy(), candidates)


def _rows(values: Sequence, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def nms(
    boxes: Tensor, scores: Tensor, *, threshold: float, limit: int = 1000, keep: int = 100
) -> Tensor:
    """Greedy non-maximum suppression in 3D: int64 indices of the boxes kept, highest score first.

    Of boxes whose IoU exceeds ``threshold``, only the one with the highest score is kept; of equal
    scores the first. Boxes that are not finite and boxes with a NaN score are dropped. Only the
    ``limit`` highest scores are considered. The memory is proportional to the number of boxes. The
    host reads the result of each step, so CPU tensors are fastest.

    Args:
        boxes: ``[n, 6]``.
        scores: ``[n]``.
        threshold: maximum IoU of two boxes that are kept.
        limit: number of boxes that are considered, 0 or more.
        keep: maximum number of boxes that are kept, 0 or more.
    """
    for name, value in (("limit", limit), ("keep", keep)):
        if value < 0:
            raise ValueError(f"nms: {name}: expected 0 or more, got {value}")
    order = scores.argsort(descending=True, stable=True)
    usable = boxes.isfinite().all(-1) & ~scores.isnan()
    order = order[usable[order]][:limit]
    kept: list[Tensor] = []
    while len(order) and len(kept) < keep:
        best, rest = order[0], order[1:]
        kept.append(best)
        order = rest[box_iou(boxes[best], boxes[rest]) <= threshold]
    return torch.stack(kept) if kept else order[:0]


@dataclass(frozen=True)
class _Window:
    corner: tuple[int, ...]
    core: tuple[tuple[float, ...], tuple[float, ...]]
    """Lowest and highest anchor centers that the window is responsible for."""


def fit_window(
    shape: Sequence[int], roi_size: Sequence[int], overlap: int, stride: int
) -> tuple[int, ...]:
    """The smallest windows, in multiples of ``stride``, of which as few cover a scan as of these.

    Evenly spread windows of ``roi_size`` would overlap by far more than ``overlap`` where the scan
    is a little longer than some of them.

    Example:
        >>> fit_window((100, 170, 30), (96, 96, 96), overlap=12, stride=8)
        (56, 96, 32)
    """
    sizes = []
    for length, side in zip(shape, roi_size, strict=True):
        count = max(1, math.ceil((length - overlap) / (side - overlap)))
        least = max((length + (count - 1) * overlap) / count, overlap + 1)
        sizes.append(min(side, stride * math.ceil(least / stride)))
    return tuple(sizes)


def _windows(shape: Sequence[int], roi_size: Sequence[int], overlap: int) -> Iterator[_Window]:
    """Evenly spread windows that cover a scan; their cores partition the space."""
    axes = []
    for size, side in zip(shape, roi_size, strict=True):
        count = max(1, math.ceil((size - overlap) / (side - overlap)))
        starts = (
            [round(i * (size - side) / (count - 1)) for i in range(count)]
            if count > 1
            else [(size - side) // 2]
        )
        borders = [-math.inf, *((a + b + side) / 2 for a, b in pairwise(starts)), math.inf]
        axes.append([(start, *core) for start, core in zip(starts, pairwise(borders), strict=True)])
    for axis in product(*axes):
        corner, low, high = zip(*axis, strict=True)
        yield _Window(corner, (low, high))
