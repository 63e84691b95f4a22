"""Flip back, average, sharpen: in float64."""

import torch
from torch import Tensor


def predict_targets(view_logits, flips, *, temperature=0.7) -> Tensor:
    """y^(1/T) / (y^(1/T) + (1 - y)^(1/T)) of the mean probability y.

    The larger of y and 1 - y is divided out.
    """
    if not isinstance(view_logits, Tensor):
        return type(view_logits)(
            predict_targets(level, flips, temperature=temperature) for level in view_logits
        )
    views = []
    for view, mask in zip(view_logits.double(), flips.tolist(), strict=True):
        axes = [axis for bit, axis in ((1, 2), (2, 3), (4, 4)) if mask & bit]
        views.append(torch.sigmoid(view.flip(axes)))
    y = torch.stack(views).mean(dim=0)
    larger = torch.maximum(y, 1 - y)
    power, complement = (y / larger) ** (1 / temperature), ((1 - y) / larger) ** (1 / temperature)
    return power / (power + complement)
