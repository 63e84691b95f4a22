"""The ops behind soft_target_focal_loss: schemas, fakes and autograd.

Gradients are computed together with the loss, then multiplied in the backward by what arrives from above, in place
and only where that is not 1. 16-bit half precision would flush most saved gradients to zero before a GradScaler's
factor arrives, and a second backward needs what the first gave away: these two compute the gradient afresh.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_levels,
    check_no_grad,
    check_no_tangent,
    check_number,
    describe,
    shape_of,
)
from fmkernels.ops.library import define, fake
from fmkernels.ops.tensors import arrange, compute_dtype, in_structure, memory_order, restore

UNITS = (*FLOATS, torch.uint8, torch.bool)
_ROW_ELEMENTS = 128  # below this size, per-sample weights are expanded to per-element

_MODULE = "soft_target_focal_loss"
_INPUTS = "Tensor[] logits, Tensor[] targets, Tensor[] weights"
_FORMULA = "Tensor? lam, Tensor? index, SymInt rows, float alpha0, float alpha1, float gamma"

define(
    "soft_target_focal_loss_sum",
    f"({_INPUTS}, Tensor? normalizer, {_FORMULA}, bool mean, bool with_gradient) -> (Tensor, Tensor, Tensor[])",
    _MODULE,
    "launch_sum",
)
define(
    "soft_target_focal_loss_elementwise",
    f"({_INPUTS}, Tensor[] upstream, Tensor? divisor, {_FORMULA}) -> Tensor[]",
    _MODULE,
    "launch_elementwise",
)
define(
    "soft_target_focal_loss_scale",
    "(Tensor(a!)[] gradients, Tensor factor, Tensor divisor) -> ()",
    _MODULE,
    "launch_scale",
)


@fake("soft_target_focal_loss_sum")
def _(
    logits,
    targets,
    weights,
    normalizer,
    lam,
    index,
    rows,
    alpha0,
    alpha1,
    gamma,
    mean,
    with_gradient,
):
    scalar = logits[0].new_empty((), dtype=compute_dtype(logits[0].dtype))
    return (
        scalar,
        torch.empty_like(scalar),
        [torch.empty_like(x) for x in logits] if with_gradient else [],
    )


@fake("soft_target_focal_loss_elementwise")
def _(logits, targets, weights, upstream, divisor, lam, index, rows, alpha0, alpha1, gamma):
    return [torch.empty_like(x) for x in logits]


@fake("soft_target_focal_loss_scale")
def _(gradients, factor, divisor):
    return None


_ops = torch.ops.fmkernels


Formula = tuple[int, float, float, float]
"""What does not depend on the elements: rows, alpha0, alpha1, gamma."""


def _split(
    tensors: Sequence[Tensor], levels: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    return tensors[:levels], tensors[levels : 2 * levels], tensors[2 * levels :]


class _FirstOnly(torch.autograd.Function):
    """A gradient as it is; differentiating it again is an error, where leaving it out would be a silent mistake."""

    @staticmethod
    def forward(ctx, gradient, logits):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("soft_target_focal_loss: no second derivative is offered")


def _final(gradients: Sequence[Tensor], logits: Sequence[Tensor]) -> Sequence[Tensor]:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return [_FirstOnly.apply(g, x) for g, x in zip(gradients, logits, strict=True)]


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, formula, mean, levels, normalizer, lam, index, *tensors):
        logits, targets, weights = _split(tensors, levels)
        loss, divisor, gradients = _ops.soft_target_focal_loss_sum(
            logits,
            targets,
            weights,
            normalizer,
            lam,
            index,
            *formula,
            mean,
            logits[0].dtype != torch.float16,
        )
        ctx.formula, ctx.mean, ctx.levels, ctx.inputs = formula, mean, levels, len(tensors)
        if torch.compiler.is_compiling():
            ctx.gradients = None
            ctx.save_for_backward(divisor, normalizer, lam, index, *tensors, *gradients)
        else:
            ctx.gradients = gradients
            ctx.save_for_backward(divisor, normalizer, lam, index, *tensors)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        divisor, normalizer, lam, index, *saved = ctx.saved_tensors
        logits, targets, weights = _split(saved[: ctx.inputs], ctx.levels)
        with torch.no_grad():
            if ctx.gradients:  # given away once: what comes later must not find it multiplied
                gradients, ctx.gradients = ctx.gradients, None
                _ops.soft_target_focal_loss_scale(gradients, upstream, divisor)
            elif len(saved) > ctx.inputs:
                gradients = [(g * (upstream / divisor)).to(g.dtype) for g in saved[ctx.inputs :]]
            else:
                gradients = _ops.soft_target_focal_loss_elementwise(
                    logits, targets, weights, [upstream] * ctx.levels,
                    normalizer if ctx.mean and normalizer is not None else divisor, lam, index, *ctx.formula,
                )  # fmt: skip
        gradients = _final(gradients, logits)
        return (None,) * 6 + tuple(gradients) + (None,) * (len(targets) + len(weights))


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, formula, levels, lam, index, *tensors):
        logits, targets, weights = _split(tensors, levels)
        ctx.formula, ctx.levels = formula, levels
        ctx.save_for_backward(lam, index, *tensors)
        losses = _ops.soft_target_focal_loss_elementwise(
            logits, targets, weights, [], None, lam, index, *formula
        )
        return tuple(losses)

    @staticmethod
    def backward(ctx, *upstream):
        lam, index, *tensors = ctx.saved_tensors
        logits, targets, weights = _split(tensors, ctx.levels)
        with torch.no_grad():
            upstream = [u.contiguous() for u in upstream]
            gradients = _ops.soft_target_focal_loss_elementwise(
                logits, targets, weights, upstream, None, lam, index, *ctx.formula
            )
        gradients = _final(gradients, logits)
        return (None,) * 4 + tuple(gradients) + (None,) * (len(targets) + len(weights))


def reduced(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    normalizer: Tensor | None,
    lam: Tensor | None,
    index: Tensor | None,
    formula: Formula,
    mean: bool,
) -> Tensor:
    """The sum or mean over all levels; tensors dense and in the same order, see launch_sum."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in logits):
        return _Reduced.apply(
            formula, mean, len(logits), normalizer, lam, index, *logits, *targets, *weights
        )
    return _ops.soft_target_focal_loss_sum.default(
        logits, targets, weights, normalizer, lam, index, *formula, mean, False
    )[0]  # fmt: skip


def elementwise(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: Tensor | None,
    index: Tensor | None,
    formula: Formula,
) -> Sequence[Tensor]:
    """The loss of every element of every level, in the type of the logits."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in logits):
        return _Elementwise.apply(formula, len(logits), lam, index, *logits, *targets, *weights)
    return _ops.soft_target_focal_loss_elementwise.default(
        logits, targets, weights, [], None, lam, index, *formula
    )  # fmt: skip


def soft_target_focal_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    alpha0: float = 0.05,
    alpha1: float = 0.95,
    gamma: float = 2.0,
    weight: Tensor | Sequence[Tensor] | None = None,
    normalizer: float | Tensor | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor | Any:  # a sequence where the logits are one and nothing is reduced
    r"""Focal loss for targets anywhere in [0, 1], with its minimum exactly at p = y.

    .. math::
        \mathrm{SFL} = [\alpha_0 + y (\alpha_1 - \alpha_0)] \; |y - p|^\gamma \;
                       (-y \, \log(p) - (1 - y) \, \log(1 - p)), \qquad p = \sigma(\mathrm{logits})

    For y in {0, 1}, alpha0 = 1 - a and alpha1 = a it is the usual focal loss. Loss and gradient come from one pass;
    arithmetic is float32 (float64 for float64) whatever the storage.

    Args:
        logits: any shape; float16, bfloat16, float32 or float64. Or a sequence of such tensors, the levels of a
            feature pyramid: all in one launch.
        targets: the shape (or sequence of shapes) of the logits; any float type, uint8 or bool; y in [0, 1]. A
            negative target is ignored: no loss, no gradient, not counted.
        alpha0: weight of the loss at y = 0.
        alpha1: weight of the loss at y = 1; linear in between.
        gamma: focusing exponent, >= 0. At p = y with gamma < 1 the loss has a cusp: the gradient there is 0.
        weight: factor of each element, broadcastable to the logits (to every level, or one per level).
        normalizer: with reduction "mean", divide by max(normalizer, 1) instead of by the number of elements not
            ignored; a number, or a 0-d tensor on the logits' device (the number of positives, say), never read back.
        mix: ``(lam, index)``, each of shape [B], for logits [B, ...]: the targets used are
            ``lam[b] * y[b] + (1 - lam[b]) * y[index[b]]``, ignored where either is ignored. Indices must lie in
            [0, B).
        reduction: "none" (shape and type of the logits), "sum" or "mean" (0-d; float32, float64 for float64). The
            mean of nothing is 0.

    Returns:
        The loss. With reduction "none" and a sequence of logits, a sequence of the same kind.

    Gradients flow to the logits, under any incoming gradient and as often as asked; asking for another one, or for
    a second derivative, raises. NaN logits or targets give NaN, and so does what weights, shares and normalizers touch
    that are not finite; infinite logits count as the largest finite float32.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch::

        p = torch.sigmoid(logits)
        ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = (alpha0 + targets * (alpha1 - alpha0)) * (targets - p).abs() ** gamma * ce
        loss = loss.masked_fill(targets < 0, 0).sum() / (targets >= 0).sum().clamp(min=1)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR 2020. The defaults
    of alpha0, alpha1 and gamma are this project's choice.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> targets = torch.tensor([[0.0, 0.7, 1.0], [0.0, -1.0, 0.2]])
        >>> loss = soft_target_focal_loss(logits, targets)
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad[1, 1].item()
        (0.043, 0.0)
    """
    name = "soft_target_focal_loss"
    xs, ys = check_levels(name, "logits", logits), check_levels(name, "targets", targets)
    if isinstance(logits, Tensor) != isinstance(targets, Tensor) or len(xs) != len(ys):
        raise ValueError(
            f"{name}: targets must have the structure of logits, {describe(logits)}, got {describe(targets)}"
        )
    first = xs[0]
    for x, y in zip(xs, ys, strict=True):
        check_no_tangent(name, "logits", x)
        check_dtype(name, "logits", x, (first.dtype,) if first.dtype in FLOATS else FLOATS)
        check_dtype(name, "targets", y, (ys[0].dtype,) if ys[0].dtype in UNITS else UNITS)
        check_device(name, "logits", x, first.device)
        check_device(name, "targets", y, first.device)
        if y.shape != x.shape:
            raise ValueError(
                f"{name}: targets must have the shape of logits, {shape_of(x)}, got {shape_of(y)}"
            )
        check_no_grad(name, "targets", y)
    alpha0 = check_number(name, "alpha0", alpha0)
    alpha1 = check_number(name, "alpha1", alpha1)
    gamma = check_number(name, "gamma", gamma)
    if gamma < 0:
        raise ValueError(f"{name}: gamma must be >= 0, got {gamma}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'{name}: reduction must be "none", "sum" or "mean", got {reduction!r}')
    lam, index = _check_mix(name, mix, xs)
    weights = _check_weight(name, weight, xs)
    divisor = _check_normalizer(name, normalizer, reduction, first)

    rows = 1 if lam is None else first.shape[0]
    per_row = False
    if weights:
        inner = [x.numel() // x.shape[0] if x.dim() and x.shape[0] else 0 for x in xs]
        same_batch = first.dim() > 0 and all(x.shape[:1] == first.shape[:1] for x in xs)
        per_sample = same_batch and all(map(_is_per_sample, weights, xs))
        if per_sample and max(inner) >= _ROW_ELEMENTS:
            rows = first.shape[0]
        per_row = all(w.numel() == 1 for w in weights) or (per_sample and rows > 1)
    if rows == 0:
        rows, lam, index = 1, None, None
    orders = [memory_order(x) for x in xs]
    dense_weights = [
        w.reshape(-1).expand(rows).contiguous() if per_row else arrange(w.expand(x.shape), order)
        for w, x, order in zip(weights, xs, orders, strict=len(weights) > 0)
    ]
    dense = [arrange(x, order) for x, order in zip(xs, orders, strict=True)]
    dense_targets = [arrange(y, order) for y, order in zip(ys, orders, strict=True)]
    formula = rows, float(alpha0), float(alpha1), float(gamma)
    if reduction != "none":
        return reduced(
            dense, dense_targets, dense_weights, divisor, lam, index, formula, reduction == "mean"
        )
    losses = elementwise(dense, dense_targets, dense_weights, lam, index, formula)
    losses = [restore(loss, order) for loss, order in zip(losses, orders, strict=True)]
    return in_structure(logits, losses)


def _check_mix(
    name: str, mix: tuple[Tensor, Tensor] | None, xs: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    if mix is None:
        return None, None
    if (
        not isinstance(mix, (list, tuple))
        or len(mix) != 2
        or not all(isinstance(v, Tensor) for v in mix)
    ):
        raise TypeError(f"{name}: mix must be a pair of tensors (lam, index), got {describe(mix)}")
    lam, index = mix
    check_dtype(name, "mix lam", lam, FLOATS)
    check_dtype(name, "mix index", index, (torch.int64,))
    check_no_grad(name, "mix lam", lam)
    for x in xs:
        if x.dim() == 0 or lam.shape != x.shape[:1] or index.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: mix needs logits [B, ...] with lam and index of shape [B], "
                f"got logits {shape_of(x)}, lam {shape_of(lam)}, index {shape_of(index)}"
            )
        check_device(name, "mix lam", lam, x.device)
        check_device(name, "mix index", index, x.device)
    return lam.contiguous(), index.contiguous()


def _check_weight(
    name: str, weight: Tensor | Sequence[Tensor] | None, xs: Sequence[Tensor]
) -> Sequence[Tensor]:
    if weight is None:
        return []
    weights = (
        [weight] * len(xs) if isinstance(weight, Tensor) else check_levels(name, "weight", weight)
    )
    if len(weights) != len(xs):
        raise ValueError(
            f"{name}: weight must be one tensor or one per level, {len(xs)}, got {len(weights)}"
        )
    for w, x in zip(weights, xs, strict=True):
        check_dtype(name, "weight", w, (weights[0].dtype,) if weights[0].dtype in UNITS else UNITS)
        check_device(name, "weight", w, x.device)
        check_no_grad(name, "weight", w)
        fits = w.dim() <= x.dim() and all(
            a in (1, b) for a, b in zip(reversed(w.shape), reversed(x.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"{name}: weight must broadcast to the logits' shape {shape_of(x)}, got {shape_of(w)}"
            )
    return weights


def _check_normalizer(
    name: str, normalizer: float | Tensor | None, reduction: str, x: Tensor
) -> Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f'{name}: normalizer goes with reduction "mean", got {reduction!r}')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() or normalizer.is_complex():
            raise ValueError(
                f"{name}: normalizer must be a number or a real 0-d tensor, "
                f"got {normalizer.dtype} of shape {shape_of(normalizer)}"
            )
        check_device(name, "normalizer", normalizer, x.device)
        check_no_grad(name, "normalizer", normalizer)
        return normalizer
    normalizer = check_number(name, "normalizer", normalizer)
    return (
        x.new_ones((), dtype=compute_dtype(x.dtype)) * normalizer
    )  # torch.full would compile anew for every number


def _is_per_sample(w: Tensor, x: Tensor) -> bool:
    return w.numel() == 1 or (0 < w.dim() == x.dim() and w.shape[0] == x.shape[0] == w.numel())
