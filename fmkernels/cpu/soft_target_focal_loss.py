"""Soft-target focal loss on the CPU: the elements pass through the caches in blocks, all work done in place.

The formulation differs from the kernel's on purpose (log-sigmoid and a power here, exp2 and polynomials there), so
that each can catch the other's mistakes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.dtypes import compute_dtype

BLOCK = 1 << 15  # elements: a handful of float32 buffers of this size stay in a core's cache
SMALLEST, SMALLEST_DOUBLE = 1e-37, 1e-290  # keep p q / |d| finite in float32 and float64


class _Block(NamedTuple):
    level: int
    part: tuple[slice, slice]  # rows and columns of the level seen as [rows, inner]
    loss: Tensor  # weighted, 0 where ignored
    gradient: Tensor | None
    ignored: Tensor | None  # None where nothing is
    counted: int


def _blocks(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: Tensor | None,
    index: Tensor | None,
    rows: int,
    alpha0: float,
    alpha1: float,
    gamma: float,
    with_gradient: bool,
) -> Iterator[_Block]:
    """Loss and gradient (in the compute type) of block after block of every level."""
    dtype = compute_dtype(logits[0].dtype)
    for level, (x, y) in enumerate(zip(logits, targets, strict=True)):
        x, y = _as_rows(x, rows), _as_rows(y, rows)
        w = _as_rows(weights[level], rows) if weights else None  # [rows, 1 or inner]
        for part in _parts(rows, x.shape[1]):
            target = y[part].to(dtype)
            ignored = target < 0
            if lam is not None:
                share = lam[part[0], None].to(dtype)
                second = y[:, part[1]].index_select(0, index[part[0]]).to(dtype)
                ignored |= second < 0
                target = share * target + (1 - share) * second
            loss, gradient = _focal(x[part].to(dtype), target, alpha0, alpha1, gamma, with_gradient)
            if w is not None:
                factor = (w[part[0]] if w.shape[1] == 1 else w[part]).to(dtype)
                loss *= factor
                if gradient is not None:
                    gradient *= factor
            counted = ignored.numel() - int(ignored.sum())
            if counted < ignored.numel():
                loss.masked_fill_(ignored, 0)
                if gradient is not None:
                    gradient.masked_fill_(ignored, 0)
            yield _Block(level, part, loss, gradient, ignored if counted < ignored.numel() else None, counted)


def _as_rows(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, 0)


def _parts(rows: int, inner: int) -> Iterator[tuple[slice, slice]]:
    if inner == 0:
        return
    height, width = max(1, BLOCK // inner), min(BLOCK, inner)
    for top in range(0, rows, height):
        for left in range(0, inner, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, inner))


def _focal(
    x: Tensor, y: Tensor, alpha0: float, alpha1: float, gamma: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    limit = torch.finfo(torch.float32).max
    x = x.clamp(-limit, limit)
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    d = (1 - y).mul_(p).addcmul_(y, q, value=-1)
    cross_entropy = x.clamp(min=0).mul_(1 - y).addcmul_(x.clamp(max=0), y, value=-1)
    cross_entropy += x.abs_().neg_().exp_().log1p_()
    scale = (y * (alpha1 - alpha0)).add_(alpha0)
    distance = d.abs()
    if gamma == 2:
        scale_power = scale.mul_(distance).mul_(distance)
    elif gamma == 0:
        scale_power = scale
    else:
        scale_power = scale.mul_(distance**gamma)
    loss = scale_power * cross_entropy
    if not with_gradient:
        return loss, None
    if gamma == 0:
        return loss, scale.mul_(d)
    # d/dx [s |d|^g CE] = sign(d) (g loss p q / |d| + s |d|^(g+1)); at p = y it is 0, the cusp of gamma < 1 included
    smallest = SMALLEST_DOUBLE if d.dtype == torch.float64 else SMALLEST
    slope = p.mul_(q).div_(distance.clamp(min=smallest)).mul_(cross_entropy).mul_(scale_power).mul_(gamma)
    return loss, slope.addcmul_(scale_power, distance).mul_(d.sign_())


def launch_sum(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    normalizer: Tensor | None,
    lam: Tensor | None,
    index: Tensor | None,
    rows: int,
    alpha0: float,
    alpha1: float,
    gamma: float,
    mean: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As fmkernels.kernels.soft_target_focal_loss.launch_sum."""
    dtype = compute_dtype(logits[0].dtype)
    known = None if normalizer is None else max(float(normalizer), 1.0)
    gradients = [torch.empty_like(x) for x in logits] if with_gradient else []
    total, count = 0.0, 0
    for block in _blocks(logits, targets, weights, lam, index, rows, alpha0, alpha1, gamma, with_gradient):
        total += float(block.loss.sum(dtype=torch.float64))
        count += block.counted
        if block.gradient is not None:
            if known is not None:
                block.gradient.div_(known)
            _as_rows(gradients[block.level], rows)[block.part] = block.gradient
    left = 1.0
    if mean:
        left = float(max(count, 1)) if known is None else 1.0
        total /= left if known is None else known
    return torch.tensor(total, dtype=dtype), torch.tensor(left, dtype=dtype), gradients


def launch_elementwise(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    upstream: Sequence[Tensor],
    divisor: Tensor | None,
    lam: Tensor | None,
    index: Tensor | None,
    rows: int,
    alpha0: float,
    alpha1: float,
    gamma: float,
) -> list[Tensor]:
    """As fmkernels.kernels.soft_target_focal_loss.launch_elementwise."""
    out = [torch.empty_like(x) for x in logits]
    for block in _blocks(logits, targets, weights, lam, index, rows, alpha0, alpha1, gamma, bool(upstream)):
        if block.gradient is None:
            value = block.loss
        else:
            given = upstream[block.level]
            factor = given if given.dim() == 0 else _as_rows(given, rows)[block.part]
            factor = factor.to(block.gradient.dtype)
            value = block.gradient.mul_(factor if divisor is None else factor / max(float(divisor), 1.0))
            if block.ignored is not None:
                value.masked_fill_(block.ignored, 0)
        _as_rows(out[block.level], rows)[block.part] = value
    return out


def launch_scale(gradients: Sequence[Tensor], factor: Tensor, divisor: Tensor) -> None:
    """As fmkernels.kernels.soft_target_focal_loss.launch_scale."""
    scale = float(factor) / float(divisor)
    if scale != 1:
        for gradient in gradients:
            gradient.mul_(scale)
