"""The ops behind soft_target_focal_loss: schemas, fakes and autograd.

Gradients are computed together with the loss, then multiplied in the backward by what arrives from above, in place
and only where that is not 1. 16-bit half precision would flush most saved gradients to zero before a GradScaler's
factor arrives, and a second backward needs what the first gave away: these two compute the gradient afresh.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.dtypes import compute_dtype
from fmkernels.ops.library import define, fake

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
