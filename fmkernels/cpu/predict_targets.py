"""Pseudo-targets from flipped views on the CPU: block by block, so that the sums stay in the caches.

The formulation differs from the kernel's on purpose: the sigmoid of the mean's logit over T, where the kernel keeps
fractions and never leaves powers of two. Near y = 1 the mean's complement has lost digits, but only such as y itself,
rounded to float32, cannot show.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fmkernels.dtypes import compute_dtype

BLOCK = 1 << 15  # elements: a handful of float32 buffers of this size stay in a core's cache


def launch_predict_targets(view_logits: Sequence[Tensor], flips: Tensor, temperature: float) -> list[Tensor]:
    """As fmkernels.kernels.predict_targets.launch_predict_targets."""
    axes = [[axis - 4 for axis in range(3) if mask >> axis & 1] for mask in flips.tolist()]
    targets = [x.new_empty(x.shape[1:], dtype=torch.float32) for x in view_logits]
    for x, out in zip(view_logits, targets, strict=True):
        dtype, depth = compute_dtype(x.dtype), x.shape[3]
        for b, a, d in _parts(out):
            mirrored = slice(depth - d.stop, depth - d.start)
            total = 0
            for view, flipped in zip(x, axes, strict=True):
                part = view[b, a, mirrored if -4 in flipped else d]
                total += torch.sigmoid((part.flip(flipped) if flipped else part).to(dtype))
            out[b, a, d] = total.div_(len(axes)).logit_().div_(temperature).sigmoid_()
    return targets


def _parts(out: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Ranges of batch elements, anchors and slices, of about BLOCK elements together."""
    if not out.numel():
        return
    batch, anchors, depth = out.shape[:3]
    d = min(depth, max(1, BLOCK // out[0, 0, 0].numel()))
    a = min(anchors, max(1, BLOCK // out[0, 0, :d].numel()))
    b = max(1, BLOCK // out[0, :a, :d].numel()) if (a, d) == (anchors, depth) else 1
    for i in range(0, batch, b):
        for j in range(0, anchors, a):
            for k in range(0, depth, d):
                yield slice(i, i + b), slice(j, j + a), slice(k, min(k + d, depth))
