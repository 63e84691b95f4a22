"""The textbook formula in float64; the gradient comes from autograd on it."""

import torch
from torch import Tensor


def soft_target_focal_loss(
    logits,
    targets,
    *,
    alpha0=0.05,
    alpha1=0.95,
    gamma=2.0,
    weight=None,
    normalizer=None,
    mix=None,
    reduction="mean",
) -> Tensor:
    """[alpha0 + y (alpha1 - alpha0)] |y - p|^gamma CE(y, p) with p = sigmoid(x), in float64.

    CE(y, p) is -y log p - (1 - y) log(1 - p).
    """
    if not isinstance(logits, Tensor):
        return _over_levels(
            logits, targets, alpha0, alpha1, gamma, weight, normalizer, mix, reduction
        )
    x, y = logits.double(), targets.double()
    ignored = y < 0
    if mix is not None:
        lam, index = mix
        lam = lam.double().reshape(-1, *[1] * (y.dim() - 1))
        ignored = ignored | ignored[index]
        y = lam * y + (1 - lam) * y[index]
    y = y.masked_fill(ignored, 0)
    p = torch.sigmoid(x)
    log_p, log_q = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    cross_entropy = -y * log_p - (1 - y) * log_q
    distance = (y - p).abs()
    power = torch.ones_like(distance) if gamma == 0 else distance**gamma
    loss = (alpha0 + y * (alpha1 - alpha0)) * power * cross_entropy
    if weight is not None:
        loss = loss * weight.double()
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = (
        (~ignored).sum().double() if normalizer is None else torch.as_tensor(normalizer).double()
    )
    return loss.sum() / count.clamp(min=1)


def _over_levels(logits, targets, alpha0, alpha1, gamma, weight, normalizer, mix, reduction):
    weights = [weight] * len(logits) if weight is None or isinstance(weight, Tensor) else weight
    each = [
        soft_target_focal_loss(
            x, y, alpha0=alpha0, alpha1=alpha1, gamma=gamma, weight=w, mix=mix, reduction="none"
        )
        for x, y, w in zip(logits, targets, weights, strict=True)
    ]
    if reduction == "none":
        return each
    total = sum(loss.sum() for loss in each)
    if reduction == "sum":
        return total
    if normalizer is None:
        ignored = [y < 0 if mix is None else (y < 0) | (y[mix[1]] < 0) for y in targets]
        normalizer = sum((~i).sum() for i in ignored)
    return total / torch.as_tensor(normalizer).double().clamp(min=1)
