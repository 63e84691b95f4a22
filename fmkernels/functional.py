"""The face of the library: contract, documentation, validation and defaults of every operation.

Arguments are checked here once; everything below trusts them. No check reads a value from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.checks import FLOATS, check_device, check_dtype, check_no_grad, check_number, kind_of, shape_of
from fmkernels.dtypes import compute_dtype
from fmkernels.ops import predict_targets as _targets
from fmkernels.ops import soft_target_focal_loss as _sfl

__all__ = ["predict_targets", "soft_target_focal_loss"]

_UNITS = (*FLOATS, torch.uint8, torch.bool)
_ROW_ELEMENTS = 128  # a weight per sample is read as such where samples are at least this large, else expanded
_SHARPEST = 1e-30  # lower temperatures act as this one, which already decides for 0, 1/2 or 1


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
                       (-y \log p - (1 - y) \log(1 - p)), \qquad p = \sigma(\mathrm{logits})

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
    a second derivative, raises. NaN logits or targets give NaN; infinite logits count as the largest finite float32.

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
    xs, ys = _levels(name, "logits", logits), _levels(name, "targets", targets)
    if isinstance(logits, Tensor) != isinstance(targets, Tensor) or len(xs) != len(ys):
        raise ValueError(
            f"{name}: targets must have the structure of logits, {kind_of(logits)}, got {kind_of(targets)}"
        )
    first = xs[0]
    for x, y in zip(xs, ys, strict=True):
        check_dtype(name, "logits", x, (first.dtype,) if first.dtype in FLOATS else FLOATS)
        check_dtype(name, "targets", y, (ys[0].dtype,) if ys[0].dtype in _UNITS else _UNITS)
        check_device(name, "logits", x, first.device)
        check_device(name, "targets", y, first.device)
        if y.shape != x.shape:
            raise ValueError(f"{name}: targets must have the shape of logits, {shape_of(x)}, got {shape_of(y)}")
        check_no_grad(name, "targets", y)
    for argument, value in (("alpha0", alpha0), ("alpha1", alpha1), ("gamma", gamma)):
        check_number(name, argument, value)
    if gamma < 0:
        raise ValueError(f"{name}: gamma must be >= 0, got {gamma}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'{name}: reduction must be "none", "sum" or "mean", got {reduction!r}')
    lam, index = _check_mix(name, mix, xs)
    weights = _check_weight(name, weight, xs)
    divisor = _check_normalizer(name, normalizer, reduction, first)

    inner = [x.numel() // x.shape[0] if x.dim() and x.shape[0] else 0 for x in xs]
    same_batch = first.dim() > 0 and all(x.shape[:1] == first.shape[:1] for x in xs)
    per_sample = bool(weights) and same_batch and all(map(_is_per_sample, weights, xs))
    rows = first.shape[0] if lam is not None or (per_sample and max(inner) >= _ROW_ELEMENTS) else 1
    if rows == 0:
        rows, lam, index = 1, None, None
    per_row = (bool(weights) and all(w.numel() == 1 for w in weights)) or (per_sample and rows > 1)
    orders = [_memory_order(x, batch_first=rows > 1) for x in xs]
    dense_weights = [
        w.reshape(-1).expand(rows).contiguous() if per_row else _arrange(w.expand(x.shape), order)
        for w, x, order in zip(weights, xs, orders, strict=bool(weights))
    ]
    dense = [_arrange(x, order) for x, order in zip(xs, orders, strict=True)]
    dense_targets = [_arrange(y, order) for y, order in zip(ys, orders, strict=True)]
    formula = _sfl.Formula(rows, float(alpha0), float(alpha1), float(gamma))
    if reduction != "none":
        return _sfl.reduced(dense, dense_targets, dense_weights, divisor, lam, index, formula, reduction == "mean")
    losses = _sfl.elementwise(dense, dense_targets, dense_weights, lam, index, formula)
    losses = [_restore(loss, order) for loss, order in zip(losses, orders, strict=True)]
    return losses[0] if isinstance(logits, Tensor) else tuple(losses) if isinstance(logits, tuple) else losses


def _levels(name: str, argument: str, value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Tensor) for v in value):
        raise TypeError(f"{name}: {argument} must be a tensor or a list or tuple of tensors, got {kind_of(value)}")
    if not value:
        raise ValueError(f"{name}: {argument} must hold at least one tensor, got an empty sequence")
    return value


def _check_mix(name: str, mix: object, xs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    if mix is None:
        return None, None
    if not isinstance(mix, (list, tuple)) or len(mix) != 2 or not all(isinstance(v, Tensor) for v in mix):
        raise TypeError(f"{name}: mix must be a pair of tensors (lam, index), got {kind_of(mix)}")
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


def _check_weight(name: str, weight: object, xs: Sequence[Tensor]) -> Sequence[Tensor]:
    if weight is None:
        return []
    weights = [weight] * len(xs) if isinstance(weight, Tensor) else _levels(name, "weight", weight)
    if len(weights) != len(xs):
        raise ValueError(f"{name}: weight must be one tensor or one per level, {len(xs)}, got {len(weights)}")
    for w, x in zip(weights, xs, strict=True):
        check_dtype(name, "weight", w, (weights[0].dtype,) if weights[0].dtype in _UNITS else _UNITS)
        check_device(name, "weight", w, x.device)
        check_no_grad(name, "weight", w)
        fits = w.dim() <= x.dim() and all(a in (1, b) for a, b in zip(reversed(w.shape), reversed(x.shape)))  # noqa: B905
        if not fits:
            raise ValueError(f"{name}: weight must broadcast to the logits' shape {shape_of(x)}, got {shape_of(w)}")
    return weights


def _check_normalizer(name: str, normalizer: object, reduction: str, x: Tensor) -> Tensor | None:
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
    check_number(name, "normalizer", normalizer)
    return x.new_ones((), dtype=compute_dtype([x])) * normalizer  # torch.full would compile anew for every number


def _is_per_sample(w: Tensor, x: Tensor) -> bool:
    return w.numel() == 1 or (0 < w.dim() == x.dim() and w.shape[0] == x.shape[0] == w.numel())


def _memory_order(x: Tensor, *, batch_first: bool) -> list[int] | None:
    """The permutation that makes a dense but permuted tensor (channels_last_3d, say) contiguous; None for the rest."""
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    if (batch_first and order[0] != 0) or not x.permute(order).is_contiguous():
        return None
    return order


def _arrange(x: Tensor, order: list[int] | None) -> Tensor:
    return (x if order is None else x.permute(order)).contiguous()


def _restore(x: Tensor, order: list[int] | None) -> Tensor:
    return x if order is None else x.permute(sorted(range(len(order)), key=order.__getitem__))


def predict_targets(
    view_logits: Tensor | Sequence[Tensor], flips: Tensor, *, temperature: float = 0.7
) -> Tensor | Sequence[Tensor]:
    r"""Pseudo-targets from K flipped views: undo each flip, average the probabilities, sharpen.

    .. math::
        \bar y = \frac 1 K \sum_k \mathrm{unflip}_k(\sigma(\mathrm{view\_logits}_k)), \qquad
        y = \frac{\bar y^{1/T}}{\bar y^{1/T} + (1 - \bar y)^{1/T}}

    Tiny probabilities keep their digits. Arithmetic is float32 (float64 for float64) whatever the storage.

    Args:
        view_logits: raw logits of the views, [K, B, A, D, H, W]; float16, bfloat16, float32 or float64; any strides,
            channels_last_3d views included, without a copy. Or a sequence of such tensors, the levels of a feature
            pyramid.
        flips: uint8 [K] on the same device: how each view was flipped, as a bit mask, 1 = D, 2 = H, 4 = W; other bits
            are not looked at. Never read back to the host.
        temperature: T in (0, 1]; 1 leaves the mean as it is.

    Returns:
        float32 [B, A, D, H, W], whatever the type of the logits; in the order of memory of the views. For a sequence,
        one of the same kind.

    No gradient is offered. Logits of +inf and -inf are the probabilities 1 and 0; where a view is NaN, so is the
    result; it is finite everywhere else.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or a gradient is asked for.

    Equivalent PyTorch::

        views = [view.flip(dims) for view, dims in zip(view_logits, dims_of_each_view)]
        mean = torch.stack(views).sigmoid().mean(0)
        targets = mean ** (1 / T) / (mean ** (1 / T) + (1 - mean) ** (1 / T))

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR 2020; T = 0.7 is the
    value that its figure shows.

    Example:
        >>> import torch
        >>> views = torch.logit(torch.tensor([0.9, 0.8])).reshape(2, 1, 1, 1, 1, 1)
        >>> targets = predict_targets(views, torch.tensor([0, 4], dtype=torch.uint8))
        >>> round(targets.item(), 2)
        0.92
    """
    name = "predict_targets"
    levels = _levels(name, "view_logits", view_logits)
    first = levels[0]
    for x in levels:
        check_dtype(name, "view_logits", x, (first.dtype,) if first.dtype in FLOATS else FLOATS)
        check_device(name, "view_logits", x, first.device)
        if x.dim() != 6 or x.shape[0] == 0 or x.shape[0] != first.shape[0]:
            expected = "[K, B, A, D, H, W] with K >= 1 the same at every level"
            raise ValueError(f"{name}: view_logits must be {expected}, got {shape_of(x)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: no gradient to view_logits is offered, call it under torch.no_grad()")
    if not isinstance(flips, Tensor):
        raise TypeError(f"{name}: flips must be a tensor, got {kind_of(flips)}")
    check_dtype(name, "flips", flips, (torch.uint8,))
    check_device(name, "flips", flips, first.device)
    if flips.shape != first.shape[:1]:
        raise ValueError(f"{name}: flips must have shape ({first.shape[0]},), one per view, got {shape_of(flips)}")
    check_number(name, "temperature", temperature)
    if not 0 < temperature <= 1:
        raise ValueError(f"{name}: temperature must be in (0, 1], got {temperature}")
    anchors_last = [x.shape[2] > 1 and x.stride(2) < x.stride(5) for x in levels]
    views = [
        x.unsqueeze(2).movedim(3, 6) if last else x.unsqueeze(6) for x, last in zip(levels, anchors_last, strict=True)
    ]  # [K, B, 1, D, H, W, A] or [K, B, A, D, H, W, 1]
    results = _targets.predict_targets(views, flips.contiguous(), max(float(temperature), _SHARPEST))
    targets = [
        y.movedim(5, 2).squeeze(1) if last else y.squeeze(5) for y, last in zip(results, anchors_last, strict=True)
    ]
    return targets[0] if isinstance(view_logits, Tensor) else type(view_logits)(targets)
