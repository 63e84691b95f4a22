"""Who is mixed with whom, drawn by scores of all pairs."""

import torch
from torch import Tensor


def sample_donors(boxes, *, labels=None, generator=None) -> Tensor:
    """For each usable box the other usable one of its label with the highest score, else NaN."""
    count = len(boxes)
    labels = torch.zeros(count) if labels is None else labels
    score = torch.rand(count, count, generator=generator)
    donors = torch.full_like(boxes, torch.nan)
    for k in range(count):
        allowed = [
            j
            for j in range(count)
            if j != k and labels[j] == labels[k] and _usable(boxes[j]) and _usable(boxes[k])
        ]
        if allowed:
            donors[k] = boxes[max(allowed, key=lambda j: score[k, j].item())]
    return donors


def _usable(box) -> bool:
    b, z1, y1, x1, z2, y2, x2 = box.tolist()
    return bool(box.isfinite().all()) and b >= 0 and z2 > z1 and y2 > y1 and x2 > x1
