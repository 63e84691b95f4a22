"""Tensors as the launch functions take them: contiguous, the order of their axes being that of their memory."""

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation that makes a channels-last tensor contiguous; None for every other."""
    if x.is_contiguous():
        return None
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is None or not x.is_contiguous(memory_format=layout):
        return None
    return [0, *range(2, x.dim()), 1]


def arrange(x: Tensor, order: list[int] | None) -> Tensor:
    """The tensor permuted, and copied where that is not contiguous."""
    return (x if order is None else x.permute(order)).contiguous()


def restore(x: Tensor, order: list[int] | None) -> Tensor:
    """The inverse of `arrange`."""
    return x if order is None else x.permute(sorted(range(len(order)), key=order.__getitem__))
