"""soft_target_focal_loss: loss and gradient of all levels of a feature pyramid in one pass.

The forward also computes d(loss) / d(logits) and saves nothing else. The last backward multiplies
it in place by the incoming gradient, unless that is 1, and hands it out. Where the graph is
retained, the product is a new tensor. In float16, most of a saved gradient would be zero before the
factor of a GradScaler arrives: there the inputs are saved, and the backward computes the gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import _C, Tensor

from fmkernels.dtypes import compute_dtype
from fmkernels.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_levels,
    check_no_dtensor,
    check_no_grad,
    check_no_tangent,
    check_number,
    common_dtype,
    describe,
    shape_of,
    varying,
)
from fmkernels.ops.library import functional_op, mutating_op, save_for_backward
from fmkernels.ops.tensors import (
    arrange,
    has_memory,
    in_structure,
    memory_order,
    restore,
)

_TARGETS = (*FLOATS, torch.uint8, torch.bool)
_MIN_ROW = 128  # elements; in shorter rows, weights per sample are expanded to weights per element


@overload
def soft_target_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha0: float = 0.05,
    alpha1: float = 0.95,
    gamma: float = 2.0,
    weight: Tensor | Sequence[Tensor] | None = None,
    normalizer: float | Tensor | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor: ...
@overload
def soft_target_focal_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    alpha0: float = 0.05,
    alpha1: float = 0.95,
    gamma: float = 2.0,
    weight: Tensor | Sequence[Tensor] | None = None,
    normalizer: float | Tensor | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    reduction: Literal["sum", "mean"] = "mean",
) -> Tensor: ...
@overload
def soft_target_focal_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    alpha0: float = 0.05,
    alpha1: float = 0.95,
    gamma: float = 2.0,
    weight: Tensor | Sequence[Tensor] | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    reduction: Literal["none"],
) -> Sequence[Tensor]: ...
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
) -> Tensor | Sequence[Tensor]:
    r"""Focal loss for targets anywhere in [0, 1], with its minimum exactly at p = y.

    .. math::
        \mathrm{SFL} = [\alpha_0 + y (\alpha_1 - \alpha_0)] \; |y - p|^\gamma \;
                       (-y \, \log(p) - (1 - y) \, \log(1 - p)), \qquad p = \sigma(\mathrm{logits})

    For targets of 0 and 1 this is the usual focal loss. The ``alpha`` of torchvision, MONAI and
    fvcore maps to ``alpha1 = alpha`` and ``alpha0 = 1 - alpha``. Loss and gradient come from one
    pass; arithmetic is float32 (float64 for float64) whatever the storage.

    Args:
        logits: any shape; float16, bfloat16, float32 or float64. Or a sequence of such tensors, the
            levels of a feature pyramid: all in one launch. Levels of different dtypes, as autocast
            may make them, are converted to the wider one.
        targets: the shape (or sequence of shapes) of the logits; any float dtype, uint8 or bool; y
            in [0, 1]. A negative target is ignored: no loss, no gradient, not counted. Targets
            above 1, such as masks of 0 and 255 or an ignore label of 255, raise on the CPU. On a
            GPU they give meaningless losses, unless the environment variable FMKERNELS_DEBUG=1
            compiles device assertions into the kernels.
        alpha0: weight of the loss at y = 0.
        alpha1: weight of the loss at y = 1; linear in between.
        gamma: focusing exponent, >= 0. For gamma < 1 the loss has a cusp at p = y; the gradient
            there is 0.
        weight: factor of each element, broadcastable to the logits (one tensor for all levels, or
            one per level).
        normalizer: with reduction "mean", divide by max(normalizer, 1) instead of by the number of
            elements that are not ignored. A number, or a 0-d tensor on the device of the logits,
            which is never read back to the host: for example the number of positives.
        mix: ``(lam, index)``, each of shape [B], for logits [B, ...]. The targets become
            ``lam[b] * y[b] + (1 - lam[b]) * y[index[b]]``, ignored where one of the two is ignored.
            ``lam`` must lie in [0, 1] and ``index`` in [0, B); both are checked as the targets are.
        reduction: "none" (shape and dtype of the logits), "sum" or "mean" (0-d; float32, or float64
            for float64). The mean of no elements is 0.

    Returns:
        The loss. With reduction "none" and a sequence of logits, a sequence of the same type.

    Only logits get a gradient. Backward may run any number of times and with any incoming gradient;
    a second derivative raises. Infinite logits count as the largest finite float32. Otherwise the
    rules of IEEE arithmetic apply: NaN propagates from every input that counts. An infinite weight
    gives an infinite loss, or NaN where the loss is 0. A normalizer of inf gives 0; one of -inf
    counts as 1, like all below 1. With "sum" and "mean", an incoming gradient that is not finite
    and a normalizer of NaN also make the gradients of ignored elements NaN.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch::

        p = torch.sigmoid(logits)
        ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = (alpha0 + targets * (alpha1 - alpha0)) * (targets - p).abs() ** gamma * ce
        loss = loss.masked_fill(targets < 0, 0).sum() / (targets >= 0).sum().clamp(min=1)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR
    2020. The defaults of alpha0, alpha1 and gamma are this project's choice.

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
            f"{name}: targets must have the structure of logits, {describe(logits)}, "
            f"got {describe(targets)}"
        )
    first, one_dtype = xs[0], True
    for x, y in zip(xs, ys, strict=True):
        check_no_tangent(name, "logits", x)
        check_dtype(name, "logits", x, FLOATS)
        one_dtype &= x.dtype == first.dtype
        check_dtype(name, "targets", y, (ys[0].dtype,) if ys[0].dtype in _TARGETS else _TARGETS)
        check_device(name, "logits", x, first.device)
        check_device(name, "targets", y, first.device)
        if y.shape != x.shape:
            raise ValueError(
                f"{name}: targets must have the shape of logits, {shape_of(x)}, got {shape_of(y)}"
            )
        check_no_grad(name, "targets", y)
    if not one_dtype:
        function: Callable[..., Any] = soft_target_focal_loss  # overloads take no unions
        loss = function(
            [x.to(common_dtype(xs)) for x in xs], ys, alpha0=alpha0, alpha1=alpha1, gamma=gamma,
            weight=weight, normalizer=normalizer, mix=mix, reduction=reduction,
        )  # fmt: skip
        if reduction != "none":
            return loss
        return in_structure(logits, [v.to(x.dtype) for v, x in zip(loss, xs, strict=True)])
    alpha0, alpha1, gamma = check_hyperparameters(name, alpha0, alpha1, gamma, reduction)
    lam, index = _check_mix(name, mix, xs)
    weights = _check_weight(name, weight, xs)
    normalizer = _check_normalizer(name, normalizer, reduction, first)

    rows = 1 if lam is None else first.shape[0]
    per_row = False
    if weights:
        inner = [x.numel() // x.shape[0] if x.dim() and x.shape[0] else 0 for x in xs]
        same_batch = first.dim() > 0 and all(x.shape[:1] == first.shape[:1] for x in xs)
        per_sample = same_batch and all(map(_is_per_sample, weights, xs))
        if per_sample and max(inner) >= _MIN_ROW:
            rows = first.shape[0]
        per_row = all(w.numel() == 1 for w in weights) or (per_sample and rows > 1)
    if rows == 0:
        rows, lam, index = 1, None, None
    orders = [memory_order(x) for x in xs]
    dense_weights = [
        w.reshape(-1).expand(rows).contiguous() if per_row else arrange(w.expand(x.shape), order)
        for w, x, order in zip(weights, xs, orders, strict=len(weights) > 0)
    ]
    formula = varying(alpha0, alpha1, gamma)
    arguments = (
        [arrange(x, order) for x, order in zip(xs, orders, strict=True)],
        [arrange(y, order) for y, order in zip(ys, orders, strict=True)],
        dense_weights, lam, index, rows, *formula,
    )  # fmt: skip
    if reduction == "none":
        losses = soft_target_focal_loss_elementwise_op(*arguments)
        losses = [restore(loss, order) for loss, order in zip(losses, orders, strict=True)]
        return in_structure(logits, losses)
    requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    with_gradients = requires_grad and first.dtype != torch.float16
    return soft_target_focal_loss_op(
        *arguments, normalizer, reduction == "mean", with_gradients=with_gradients
    )[0]


def check_hyperparameters(
    name: str, alpha0: float, alpha1: float, gamma: float, reduction: str
) -> tuple[float, float, float]:
    """The numbers as Python floats."""
    alpha0 = check_number(name, "alpha0", alpha0)
    alpha1 = check_number(name, "alpha1", alpha1)
    gamma = check_number(name, "gamma", gamma)
    if gamma < 0:
        raise ValueError(f"{name}: gamma must be >= 0, got {gamma}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'{name}: reduction must be "none", "sum" or "mean", got {reduction!r}')
    return float(alpha0), float(alpha1), float(gamma)


def _check_mix(
    name: str, mix: tuple[Tensor, Tensor] | None, xs: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    if mix is None:
        return None, None
    if not isinstance(mix, (list, tuple)) or len(mix) != 2:
        raise TypeError(f"{name}: mix must be a pair of tensors (lam, index), got {describe(mix)}")
    lam, index = mix
    if not isinstance(lam, Tensor) or not isinstance(index, Tensor):
        raise TypeError(
            f"{name}: mix must be a pair of tensors (lam, index), each of shape [B], "
            f"got ({describe(lam)}, {describe(index)})"
        )
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
    dtypes = (weights[0].dtype,) if weights[0].dtype in _TARGETS else _TARGETS
    for w, x in zip(weights, xs, strict=True):
        check_dtype(name, "weight", w, dtypes)
        check_device(name, "weight", w, x.device)
        check_no_grad(name, "weight", w)
        fits = w.dim() <= x.dim() and all(
            a in (1, b) for a, b in zip(reversed(w.shape), reversed(x.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"{name}: weight must broadcast to the shape of logits, {shape_of(x)}, "
                f"got {shape_of(w)}"
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
        check_no_dtensor(name, "normalizer", normalizer)
        check_device(name, "normalizer", normalizer, x.device)
        check_no_grad(name, "normalizer", normalizer)
        return normalizer
    normalizer = check_number(name, "normalizer", normalizer)
    # torch.full would make the number a constant of a compiled graph: one recompile per value
    return x.new_ones((), dtype=compute_dtype(x.dtype)) * normalizer


def _is_per_sample(w: Tensor, x: Tensor) -> bool:
    return w.numel() == 1 or (0 < w.dim() == x.dim() and w.shape[0] == x.shape[0] == w.numel())


# Tensors are dense, all in the memory order of the logits. weights is empty, or holds one tensor of
# `rows` or of all elements per level.
_INPUTS = (
    "Tensor[] logits, Tensor[] targets, Tensor[] weights, Tensor? lam, Tensor? index, "
    "SymInt rows, float alpha0, float alpha1, float gamma"
)


@functional_op(
    f"soft_target_focal_loss_backward(Tensor[] grad_outputs, {_INPUTS}, Tensor? divisor) "
    "-> Tensor[]"
)
def soft_target_focal_loss_backward_op(grad_outputs, logits, *_):
    return [torch.empty_like(x) for x in logits]


def _save_inputs(ctx, inputs, divisor=None):
    logits, targets, weights, lam, index, *ctx.formula = inputs
    ctx.levels = len(logits)
    save_for_backward(ctx, divisor, lam, index, *logits, *targets, *weights)


def _recompute(ctx, grad_outputs):
    divisor, lam, index, *tensors = ctx.saved_tensors
    n = ctx.levels
    logits, targets, weights = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    return soft_target_focal_loss_backward_op(
        grad_outputs, logits, targets, weights, lam, index, *ctx.formula, divisor
    )


def _save_elementwise(ctx, args, losses):
    _save_inputs(ctx, args)


def _backward_elementwise(ctx, *grad_outputs):
    return _recompute(ctx, [grad.contiguous() for grad in grad_outputs])


@functional_op(
    f"soft_target_focal_loss_elementwise({_INPUTS}) -> Tensor[]",
    save=_save_elementwise,
    backward=_backward_elementwise,
)
def soft_target_focal_loss_elementwise_op(logits, *_):
    return [torch.empty_like(x) for x in logits]


def _save(ctx, args, results):
    *inputs, normalizer, _ = args
    _, divisor, gradients = results
    ctx.mark_non_differentiable(divisor)
    ctx.set_materialize_grads(False)  # else the backward would get zeros as large as the gradients
    if gradients:
        ctx.levels = 0
        # a hook may keep what it is given, so the backward must not write into that
        ctx.owns_gradients = _C._autograd._top_saved_tensors_default_hooks(True) is None
        ctx.save_for_backward(divisor, *gradients)
    else:
        _save_inputs(ctx, inputs, divisor if normalizer is None else normalizer)


def _may_overwrite(ctx):
    """Whether this backward is the last one, and nobody else can see the saved gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not ctx.owns_gradients:
        return False
    return not _C._autograd._get_current_graph_task_keep_graph()


def _backward(ctx, grad_output, _, *grad_gradients):
    """The gradients, too, are differentiable results: so a second derivative arrives here."""
    if any(grad is not None for grad in grad_gradients):
        raise RuntimeError("soft_target_focal_loss: no second derivative is offered")
    if grad_output is None:
        return ()
    if ctx.levels:
        return _recompute(ctx, [grad_output] * ctx.levels)
    divisor, *gradients = ctx.saved_tensors
    if not (_may_overwrite(ctx) and has_memory(grad_output) and has_memory(gradients[0])):
        scale = grad_output / divisor
        return [(x.to(scale.dtype) * scale).to(x.dtype) for x in gradients]
    gradients = [x.detach() for x in gradients]
    soft_target_focal_loss_scale_op(gradients, grad_output, divisor)
    return gradients


@functional_op(
    f"soft_target_focal_loss({_INPUTS}, Tensor? normalizer, bool mean, *, bool with_gradients) "
    "-> (Tensor, Tensor, Tensor[])",
    save=_save,
    backward=_backward,
)
def soft_target_focal_loss_op(logits, *_, with_gradients):
    """The loss, what its gradients must still be divided by, and the gradients."""
    loss = logits[0].new_empty((), dtype=compute_dtype(logits[0].dtype))
    gradients = [torch.empty_like(x) for x in logits] if with_gradients else []
    return loss, torch.empty_like(loss), gradients


@mutating_op(
    "soft_target_focal_loss_scale(Tensor(a!)[] gradients, Tensor grad_output, Tensor divisor) "
    "-> ()",
    "soft_target_focal_loss_scale",
)
def soft_target_focal_loss_scale_op(launch, gradients, grad_output, divisor):
    launch(gradients, grad_output, divisor)
