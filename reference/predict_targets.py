"""Undo the symmetries, average, sharpen: in float64."""

import torch
from torch import Tensor

from reference.undo_symmetry import undo_symmetry


def predict_targets(view_logits, flips, *, temperature=0.7, classes=None) -> Tensor:
    """y_i^(1/T) / sum_j y_j^(1/T) of the mean probabilities y_j; for one class, y and 1 - y.

    The largest y_j is divided out.
    """
    if not isinstance(view_logits, Tensor):
        return type(view_logits)(
            predict_targets(level, flips, temperature=temperature, classes=classes)
            for level in view_logits
        )
    views = [
        undo_symmetry(view, code)
        for view, code in zip(view_logits.double(), flips.tolist(), strict=True)
    ]
    x = torch.stack(views)
    if classes is None:
        y = torch.sigmoid(x).mean(dim=0)
        y = torch.stack([y, 1 - y], dim=2)  # [B, A, 2, D, H, W]
    else:
        limit = torch.finfo(torch.float32).max  # infinite logits count as this
        anchors = x.shape[2] // classes
        x = x.clamp(-limit, limit).unflatten(2, (anchors, classes))
        y = torch.softmax(x, dim=3).mean(dim=0)
    power = (y / y.amax(dim=2, keepdim=True)) ** (1 / temperature)
    targets = power / power.sum(dim=2, keepdim=True)
    return targets[:, :, 0] if classes is None else targets.flatten(1, 2)
