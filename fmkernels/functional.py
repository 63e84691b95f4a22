"""The face of the library: contract, documentation, validation and defaults of every operation.

Arguments are checked here once; everything below trusts them. No check reads a value from the device.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fmkernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_no_grad,
    check_no_tangent,
    check_number,
    check_tensor,
    check_volumes,
    check_window,
    kind_of,
    result_dtype,
    shape_of,
)
from fmkernels.dtypes import compute_dtype
from fmkernels.layout import arrange, memory_order, restore
from fmkernels.ops import crop_and_resize3d as _crop
from fmkernels.ops import mixup3d as _mixup
from fmkernels.ops import object_mixup3d as _objects
from fmkernels.ops import predict_targets as _targets
from fmkernels.ops import soft_target_focal_loss as _sfl

__all__ = [
    "crop_and_resize3d",
    "mixup3d",
    "object_mixup3d",
    "predict_targets",
    "sample_mixup",
    "soft_target_focal_loss",
]

_CLAMPS = ("box", "volume")
_LONGEST_AXIS = 2**24  # voxels or samples: as far as float32 counts
_UNITS = (*FLOATS, torch.uint8, torch.bool)
_FLIP_BITS = (0, 1, 2, 4)  # of the axes C, D, H, W
_ROW_ELEMENTS = (
    128  # a weight per sample is read as such where samples are at least this large, else expanded
)
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
    xs, ys = _levels(name, "logits", logits), _levels(name, "targets", targets)
    if isinstance(logits, Tensor) != isinstance(targets, Tensor) or len(xs) != len(ys):
        raise ValueError(
            f"{name}: targets must have the structure of logits, {kind_of(logits)}, got {kind_of(targets)}"
        )
    first = xs[0]
    for x, y in zip(xs, ys, strict=True):
        check_no_tangent(name, "logits", x)
        check_dtype(name, "logits", x, (first.dtype,) if first.dtype in FLOATS else FLOATS)
        check_dtype(name, "targets", y, (ys[0].dtype,) if ys[0].dtype in _UNITS else _UNITS)
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
        return _sfl.reduced(
            dense, dense_targets, dense_weights, divisor, lam, index, formula, reduction == "mean"
        )
    losses = _sfl.elementwise(dense, dense_targets, dense_weights, lam, index, formula)
    losses = [restore(loss, order) for loss, order in zip(losses, orders, strict=True)]
    return _like(logits, losses)


def _like(levels: Tensor | Sequence[Tensor], results: list[Tensor]) -> Tensor | Sequence[Tensor]:
    """The results in the structure of the argument."""
    return (
        results[0]
        if isinstance(levels, Tensor)
        else tuple(results)
        if isinstance(levels, tuple)
        else results
    )


def _levels(name: str, argument: str, value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Tensor) for v in value):
        raise TypeError(
            f"{name}: {argument} must be a tensor or a list or tuple of tensors, got {kind_of(value)}"
        )
    if not value:
        raise ValueError(f"{name}: {argument} must hold at least one tensor, got an empty sequence")
    return value


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


def _check_weight(
    name: str, weight: Tensor | Sequence[Tensor] | None, xs: Sequence[Tensor]
) -> Sequence[Tensor]:
    if weight is None:
        return []
    weights = [weight] * len(xs) if isinstance(weight, Tensor) else _levels(name, "weight", weight)
    if len(weights) != len(xs):
        raise ValueError(
            f"{name}: weight must be one tensor or one per level, {len(xs)}, got {len(weights)}"
        )
    for w, x in zip(weights, xs, strict=True):
        check_dtype(
            name, "weight", w, (weights[0].dtype,) if weights[0].dtype in _UNITS else _UNITS
        )
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


def predict_targets(
    view_logits: Tensor | Sequence[Tensor], flips: Tensor, *, temperature: float = 0.7
) -> Tensor | Any:  # a sequence where the logits are one
    r"""Pseudo-targets from K flipped views: undo each flip, average the probabilities, sharpen.

    .. math::
        \bar y = \frac 1 K \sum_k \mathrm{unflip}_k(\sigma(\mathrm{view\_logits}_k)), \qquad
        y = \frac{\bar y^{1/T}}{\bar y^{1/T} + (1 - \bar y)^{1/T}}

    Tiny probabilities keep their digits. Arithmetic is float32 (float64 for float64) whatever the storage.

    Args:
        view_logits: raw logits of the views, [K, B, A, D, H, W]; float16, bfloat16, float32 or float64; any strides,
            channels_last_3d views included, without a copy. Or a sequence of such tensors, the levels of a feature
            pyramid. There are 8 flips: the kernel, whose code grows with K, is made for about as many views.
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
        check_no_tangent(name, "view_logits", x)
        check_dtype(name, "view_logits", x, (first.dtype,) if first.dtype in FLOATS else FLOATS)
        check_device(name, "view_logits", x, first.device)
        if x.dim() != 6 or x.shape[0] == 0 or x.shape[0] != first.shape[0]:
            expected = "[K, B, A, D, H, W] with K >= 1 the same at every level"
            raise ValueError(f"{name}: view_logits must be {expected}, got {shape_of(x)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: no gradient to view_logits is offered, call it under torch.no_grad()"
            )
    if not isinstance(flips, Tensor):
        raise TypeError(f"{name}: flips must be a tensor, got {kind_of(flips)}")
    check_dtype(name, "flips", flips, (torch.uint8,))
    check_device(name, "flips", flips, first.device)
    if flips.shape != first.shape[:1]:
        raise ValueError(
            f"{name}: flips must have shape ({first.shape[0]},), one per view, got {shape_of(flips)}"
        )
    check_number(name, "temperature", temperature)
    if not 0 < temperature <= 1:
        raise ValueError(f"{name}: temperature must be in (0, 1], got {temperature}")
    anchors_last = [x.shape[2] > 1 and x.stride(2) < x.stride(5) for x in levels]
    views = [
        x.unsqueeze(2).movedim(3, 6) if last else x.unsqueeze(6)
        for x, last in zip(levels, anchors_last, strict=True)
    ]  # [K, B, 1, D, H, W, A] or [K, B, A, D, H, W, 1]
    results = _targets.predict_targets(
        views, flips.contiguous(), max(float(temperature), _SHARPEST)
    )
    targets = [
        y.movedim(5, 2).squeeze(1) if last else y.squeeze(5)
        for y, last in zip(results, anchors_last, strict=True)
    ]
    return _like(view_logits, targets)


def sample_mixup(
    batch_size: int,
    *,
    eta: float = 0.2,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw how a batch is mixed, for :func:`mixup3d` and the ``mix`` of :func:`soft_target_focal_loss`.

    .. math::
        \lambda = \max(l, 1 - l), \qquad l \sim \mathrm{Beta}(\eta, \eta)

    Args:
        batch_size: number of samples B, >= 0.
        eta: both parameters of the Beta distribution, > 0; the smaller, the less is mixed.
        generator: source of randomness, on the device; the same state gives the same draw. Torch's own by default;
            ``torch.compile`` can trace no other.
        device: where the result lies; that of the generator, else torch's default device.

    Returns:
        The pair ``(lam, index)``: float32 [B], in [0.5, 1]; and int64 [B], a permutation.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a value is out of range, or the generator is not on the device.

    Equivalent PyTorch::

        l = torch.distributions.Beta(eta, eta).sample([batch_size])
        lam, index = torch.maximum(l, 1 - l), torch.randperm(batch_size)

    Source: Berthelot et al., MixMatch, NeurIPS 2019 (the maximum); Zhang et al., mixup, ICLR 2018; Devroye, Random
    variate generation in one line of code, WSC 1996 (how l is drawn).

    Example:
        >>> import torch
        >>> lam, index = sample_mixup(4, generator=torch.Generator().manual_seed(0))
        >>> bool((lam >= 0.5).all()), sorted(index.tolist())
        (True, [0, 1, 2, 3])
    """
    name = "sample_mixup"
    if isinstance(batch_size, bool) or not isinstance(batch_size, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: batch_size must be an int, got {kind_of(batch_size)}")
    if batch_size < 0:
        raise ValueError(f"{name}: batch_size must be >= 0, got {batch_size}")
    eta = check_number(name, "eta", eta)
    if eta <= 0:
        raise ValueError(f"{name}: eta must be > 0, got {eta}")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{name}: generator must be a torch.Generator, got {kind_of(generator)}"
            )
        device = generator.device if device is None else torch.device(device)
        if device.type != generator.device.type or device.index not in (
            None,
            generator.device.index,
        ):
            raise ValueError(f"{name}: generator must be on {device}, got {generator.device}")
        device = generator.device
    # Devroye's draw: |2 l - 1| = (1 + 1 / ((u^(-1 / eta) - 1) cos^2 (2 pi v)))^(-1/2) of two uniform u and v
    u, v = torch.empty(2, batch_size, dtype=torch.float64, device=device).uniform_(
        generator=generator
    )
    odds = torch.expm1(-u.log() / eta) * torch.cos(2 * math.pi * v) ** 2
    lam = 0.5 + 0.5 * (1 + 1 / odds).rsqrt()
    index = torch.randperm(batch_size, generator=generator, device=device)
    return lam.float(), index


def mixup3d(
    volumes: Tensor,
    lam: Tensor,
    index: Tensor,
    *,
    donors: Tensor | None = None,
    flips: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    window: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Mix each volume with another one, in one pass over memory; flips, HU window, rounding and cast included.

    .. math::
        \mathrm{out}_b = \lambda_b \, f(\mathrm{volumes}_b) + (1 - \lambda_b) \, f(\mathrm{donors}_{\mathrm{index}_b})

    f flips each source by its own mask and maps v to clamp((v - lo) / (hi - lo), 0, 1). Arithmetic is float32 (float64
    for float64) whatever the storage.

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides.
        lam: [B], the share of each volume; any float type.
        index: int64 [B], the partner of each volume; any map into [0, B), or into [0, B') of the donors.
        donors: [B', C, D, H, W] of the type of the volumes, from which the partners come; the volumes by default.
        flips: uint8 [B], a mask for each volume: 1 flips D, 2 flips H, 4 flips W. Where donors are given, a pair, the
            second of which is [B'] for the donors; either may be None.
        window: (lo, hi), finite, lo < hi; None keeps the values as they are.
        dtype: type of the result: one of those of the volumes. By default that of the volumes, float32 for windowed
            integers. Integer results are rounded to nearest, ties to even, and saturate; NaN becomes 0.
        out: where to write, of the shape and type of the result; ``volumes`` or ``donors`` to mix in place, right for
            any index map and any flips. It may share memory with them in no other way. On a GPU that takes one launch
            and no further memory for up to 4096 volumes, 512 with flips; beyond, or with strides other than contiguous
            or channels_last_3d, a copy of the size of ``out``.

    Returns:
        The mixed volumes, in the memory format of ``volumes``; ``out`` where given.

    Gradients flow to volumes and donors, without atomics, so that they are the same in every run; not through ``out``
    and not to lam. An index out of range is an error on the CPU, and on the GPU under TRITON_DEBUG=1. NaN gives NaN, an
    infinity that no window clamps infinity or NaN.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch, for flips and donors None::

        x = ((volumes.float() - lo) / (hi - lo)).clamp(0, 1)
        share = lam[:, None, None, None, None]
        out = (share * x + (1 - share) * x[index]).to(dtype)

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Wang et al., FocalMix, CVPR 2020.

    Example:
        >>> import torch
        >>> scans = torch.tensor([-1200, 600], dtype=torch.int16).reshape(2, 1, 1, 1, 1)
        >>> lam, index = torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
        >>> mixup3d(scans, lam, index, window=(-1200, 600)).flatten().tolist()
        [0.25, 0.5]
    """
    name = "mixup3d"
    check_volumes(name, "volumes", volumes)
    batch = volumes.shape[0]
    _check_per_sample(name, "lam", lam, volumes, FLOATS, batch)
    _check_per_sample(name, "index", index, volumes, (torch.int64,), batch)
    check_no_grad(name, "lam", lam)
    if donors is not None:
        check_volumes(name, "donors", donors)
        check_dtype(name, "donors", donors, (volumes.dtype,))
        check_device(name, "donors", donors, volumes.device)
        if donors.shape[1:] != volumes.shape[1:] or (batch > 0 and donors.shape[0] == 0):
            raise ValueError(
                f"{name}: donors must hold volumes of shape {tuple(volumes.shape[1:])}, got shape {shape_of(donors)}"
            )
    own_flips, donor_flips = _check_flips(name, flips, volumes, donors)
    window = check_window(name, window)
    dtype = result_dtype(name, dtype, volumes, window)
    differentiable = torch.is_grad_enabled() and (
        volumes.requires_grad or (donors is not None and donors.requires_grad)
    )
    if differentiable and not dtype.is_floating_point:
        raise ValueError(
            f"{name}: no gradient through {dtype} is offered, pass volumes and donors detached"
        )

    order = memory_order(volumes)
    axes = _FLIP_BITS if order is None else [_FLIP_BITS[d - 1] for d in order[1:]]
    own, other = arrange(volumes, order), None if donors is None else arrange(donors, order)
    arguments = (
        own,
        other,
        lam.contiguous(),
        index.contiguous(),
        own_flips,
        donor_flips,
        axes,
        window,
    )
    if out is None:
        return restore(_mixup.mixed(*arguments, dtype), order)
    _check_out(name, out, volumes, dtype, differentiable)
    target = out if order is None else out.permute(order)
    if target.is_contiguous():
        _check_overlap(name, "volumes", own, target)
        if other is not None:
            _check_overlap(name, "donors", other, target)
        _mixup.mixed_into(*arguments, target)
    else:
        out.copy_(restore(_mixup.mixed(*arguments, dtype), order))
    return out


def _check_per_sample(
    name: str, argument: str, x: Tensor, volumes: Tensor, allowed: Sequence[torch.dtype], batch: int
) -> None:
    check_tensor(name, argument, x)
    check_dtype(name, argument, x, allowed)
    check_device(name, argument, x, volumes.device)
    if x.shape != (batch,):
        raise ValueError(f"{name}: {argument} must have shape ({batch},), got {shape_of(x)}")


def _check_flips(
    name: str, flips: Any, volumes: Tensor, donors: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if flips is None:
        return None, None
    if donors is None:
        _check_per_sample(name, "flips", flips, volumes, (torch.uint8,), volumes.shape[0])
        return flips.contiguous(), None
    if not isinstance(flips, (list, tuple)) or len(flips) != 2:
        raise TypeError(
            f"{name}: flips must be a pair where donors are given, got {kind_of(flips)}"
        )
    sides = zip(
        flips, ("flips of the volumes", "flips of the donors"), (volumes, donors), strict=True
    )
    for mask, argument, x in sides:
        if mask is not None:
            _check_per_sample(name, argument, mask, volumes, (torch.uint8,), x.shape[0])
    own, donor = flips
    return None if own is None else own.contiguous(), None if donor is None else donor.contiguous()


def _check_out(
    name: str, out: Tensor, volumes: Tensor, dtype: torch.dtype, differentiable: bool
) -> None:
    check_tensor(name, "out", out)
    check_dtype(name, "out", out, (dtype,))
    check_device(name, "out", out, volumes.device)
    if out.shape != volumes.shape:
        raise ValueError(
            f"{name}: out must have the shape of volumes, {shape_of(volumes)}, got {shape_of(out)}"
        )
    if out.numel() and any(
        stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
    ):
        raise ValueError(
            f"{name}: out must have an element of its own for each voxel, got strides {out.stride()}"
        )
    if differentiable or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError(f"{name}: no gradient through out is offered, pass all tensors detached")


def _check_overlap(name: str, argument: str, x: Tensor, out: Tensor) -> None:
    """Of contiguous tensors: the same voxels or apart. What is traced or has no data has no addresses."""
    if (
        torch.compiler.is_compiling()
        or x is out
        or x.is_meta
        or {type(x), type(out)} - {Tensor, Parameter}
    ):
        return
    begin, start = x.data_ptr(), out.data_ptr()
    if begin == start and x.shape == out.shape and x.element_size() == out.element_size():
        return
    if (
        begin < start + out.numel() * out.element_size()
        and start < begin + x.numel() * x.element_size()
    ):
        raise ValueError(f"{name}: out may be {argument} itself but must not overlap it otherwise")


def crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    *,
    clamp: str = "box",
    window: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Crop boxes out of volumes and resize each to one size by trilinear interpolation, all in one launch.

    Sample i of n along an axis of a box [start, end) lies, in voxels whose centres are at 0, 1, 2 ..., at

    .. math::
        p_i = \mathrm{clamp}\left(\mathrm{start} + (i + \tfrac{1}{2}) \, \frac{\mathrm{end} - \mathrm{start}}{n}
              - \tfrac{1}{2}, \; \mathrm{first}, \; \mathrm{last}\right)

    and is the mean of the 8 voxels around it, each weighted with ``(1 - |dz|) (1 - |dy|) (1 - |dx|)``. Boxes are
    float32, and arithmetic on voxels is float32 (float64 for float64) whatever the storage.

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides; axes of at most
            2^24 voxels.
        boxes: float32 [K, 7], (batch index, z1, y1, x1, z2, y2, x2) in voxels, half-open, voxel i covering [i, i + 1).
            Any numbers, also beyond the volume. A box that is not finite (or whose extents are not, in float32), or
            whose batch index is out of range, gives zeros.
        output_size: (d, h, w), each >= 1.
        clamp: "box": first and last are the first and the last voxel of the volume whose centre lies in the box, as in
            a crop followed by a resize. Where there is none, in a box smaller than a voxel, outside of the volume or
            with end <= start, both are the voxel nearest to the middle of the box. "volume": the first and the last
            voxel of the volume, so that samples near a face of the box take from beyond it; with end < start the crop
            is mirrored.
        window: (lo, hi), finite, lo < hi, applied to every voxel before the interpolation: v becomes
            clamp((v - lo) / (hi - lo), 0, 1). None keeps the values as they are.
        dtype: type of the result: one of those of the volumes. By default that of the volumes, float32 for windowed
            integers. Integer results are rounded to nearest, ties to even, and saturate; NaN becomes 0.

    Returns:
        The crops, [K, C, d, h, w], contiguous.

    The gradient flows to the volumes, gathered without atomics in the order of the boxes, so that it is the same in
    every run; not to the boxes. No value is read back to the host. A voxel that is not finite shows in the samples that
    it has a weight in, and only there.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch, for integer boxes inside their volumes and clamp "box"::

        out = torch.cat([
            F.interpolate(volumes[b : b + 1, :, z1:z2, y1:y2, x1:x2], output_size, mode="trilinear")
            for b, z1, y1, x1, z2, y2, x2 in boxes.int().tolist()
        ])

    clamp "volume" is F.grid_sample with padding_mode="border" and align_corners=False, and inside of the volumes
    roi_align with aligned=True and one sample per bin.

    Source: He et al., Mask R-CNN, ICCV 2017 (RoIAlign, of which this is the form for volumes).

    Example:
        >>> import torch
        >>> ramp = torch.arange(16.0).expand(1, 1, 1, 1, 16)
        >>> box = torch.tensor([[0.0, 0, 0, 8, 1, 1, 12]])
        >>> crop_and_resize3d(ramp, box, (1, 1, 8)).flatten().tolist()
        [8.0, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11.0]
        >>> crop_and_resize3d(ramp, box, (1, 1, 8), clamp="volume").flatten().tolist()
        [7.75, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11.25]
    """
    name = "crop_and_resize3d"
    check_volumes(name, "volumes", volumes)
    if max(volumes.shape[2:]) > _LONGEST_AXIS:
        raise ValueError(
            f"{name}: volumes must have axes of at most {_LONGEST_AXIS} voxels, got {shape_of(volumes)}"
        )
    _check_boxes(name, "boxes", boxes, volumes.device)
    size = _check_output_size(name, output_size)
    if clamp not in _CLAMPS:
        raise ValueError(
            f"{name}: clamp must be one of {', '.join(map(repr, _CLAMPS))}, got {clamp!r}"
        )
    window = check_window(name, window)
    dtype = result_dtype(name, dtype, volumes, window)
    if torch.is_grad_enabled() and volumes.requires_grad and not dtype.is_floating_point:
        raise ValueError(f"{name}: no gradient through {dtype} is offered, pass volumes detached")
    return _crop.crop_and_resize3d(volumes, boxes.contiguous(), size, clamp == "box", window, dtype)


def _check_boxes(name: str, argument: str, boxes: Tensor, device: torch.device) -> None:
    check_tensor(name, argument, boxes)
    check_dtype(name, argument, boxes, (torch.float32,))
    check_device(name, argument, boxes, device)
    if boxes.dim() != 2 or boxes.shape[1] != 7:
        raise ValueError(
            f"{name}: {argument} must be [K, 7], (batch index, z1, y1, x1, z2, y2, x2), got shape {shape_of(boxes)}"
        )
    check_no_grad(name, argument, boxes)


def _check_output_size(name: str, output_size: Sequence[int]) -> list[int]:
    if not isinstance(output_size, (list, tuple)) or len(output_size) != 3:
        raise TypeError(
            f"{name}: output_size must be three ints (d, h, w), got {kind_of(output_size)}"
        )
    for axis, size in zip("dhw", output_size, strict=True):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name}: output_size {axis} must be an int, got {kind_of(size)}")
        if not 1 <= size <= _LONGEST_AXIS:
            raise ValueError(
                f"{name}: output_size {axis} must be in [1, {_LONGEST_AXIS}], got {size}"
            )
    return list(output_size)


def object_mixup3d(
    volumes: Tensor,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    *,
    donors: Tensor | None = None,
    window: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Mix objects with other objects, each resized to the one it is mixed into: all boxes in one launch, or in two.

    For each k, in order, the voxels v of volumes[boxes[k, 0]] whose centres lie in boxes[k, 1:] become

    .. math::
        \mathrm{out}_v = \lambda_k \, \mathrm{out}_v + (1 - \lambda_k) \, \mathrm{donor}_{k, v}

    where donor_k is donors[donor_boxes[k, 0]] cropped to donor_boxes[k, 1:] and resized to as many voxels, as
    :func:`crop_and_resize3d` does it with clamp="box". Both boxes are first clipped to their volumes. Donors are read
    as they were before the call; a voxel in several boxes is mixed in the order of the list, and rounded once.
    Arithmetic is float32 (float64 for float64) whatever the storage.

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides.
        boxes: float32 [K, 7], the targets: (batch index, z1, y1, x1, z2, y2, x2), voxel units, half-open, voxel i
            covering [i, i + 1). Never read back to the host. A pair of boxes of which either is empty once clipped,
            not finite, or has a batch index out of range changes nothing.
        donor_boxes: float32 [K, 7], the box to mix into each target; of any size.
        lam: [K], the share of each target; any float type.
        donors: [B', C, D', H', W'], in which the donor boxes lie; of any type that volumes may have; the volumes by
            default.
        window: (lo, hi), finite, lo < hi: every voxel v of volumes and donors counts as
            clamp((v - lo) / (hi - lo), 0, 1), and so do voxels in no box, in place as well. None keeps the values.
            Integer donors of floating volumes are windowed alone: objects in int16 HU are mixed into volumes that are
            windowed already. Other donors with a window have the type of the volumes.
        dtype: type of the result: one of those of the volumes. By default that of the volumes, float32 for windowed
            integers. Integer results are rounded to nearest, ties to even, and saturate; NaN becomes 0.
        out: where to write, of the shape and type of the result; ``volumes`` to mix in place, in which case, without a
            window, only the voxels in boxes are read and written. It may share memory with the donors in any way, with
            the volumes in no other.

    Returns:
        The mixed volumes; channels_last_3d where ``volumes`` are, else contiguous. ``out`` where given.

    No gradient is offered. On a GPU, where ``out`` shares memory with the donors, a scratch as large as ``out`` is
    allocated and there are two launches, else one; of the scratch, only the voxels in boxes are touched. The CPU keeps
    the voxels in boxes until all are mixed. A voxel that is not finite shows where it has a weight, and only there.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or a gradient is asked for.

    Equivalent PyTorch, for boxes of whole numbers inside the volumes::

        out, donors = volumes.clone(), volumes
        for (b, *box), (j, *source), share in zip(boxes.long(), donor_boxes.long(), lam):
            z1, y1, x1, z2, y2, x2 = box
            i1, j1, k1, i2, j2, k2 = source
            crop = donors[j, None, :, i1:i2, j1:j2, k1:k2]
            donor = F.interpolate(crop, (z2 - z1, y2 - y1, x2 - x1), mode="trilinear")[0]
            out[b, :, z1:z2, y1:y2, x1:x2].mul_(share).add_((1 - share) * donor)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR 2020 (object-level
    MixUp). The interpolation and the treatment of overlaps are this project's choice.

    Example:
        >>> import torch
        >>> volumes = torch.arange(8.0).reshape(1, 1, 1, 1, 8)
        >>> target, donor = torch.tensor([[0.0, 0, 0, 0, 1, 1, 2]]), torch.tensor([[0.0, 0, 0, 4, 1, 1, 8]])
        >>> object_mixup3d(volumes, target, donor, torch.tensor([0.5])).flatten().tolist()
        [2.25, 3.75, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    name = "object_mixup3d"
    check_volumes(name, "volumes", volumes)
    _check_boxes(name, "boxes", boxes, volumes.device)
    _check_boxes(name, "donor_boxes", donor_boxes, volumes.device)
    if donor_boxes.shape != boxes.shape:
        raise ValueError(
            f"{name}: donor_boxes must be as many as boxes, {boxes.shape[0]}, got shape {shape_of(donor_boxes)}"
        )
    _check_per_sample(name, "lam", lam, volumes, FLOATS, boxes.shape[0])
    check_no_grad(name, "lam", lam)
    _check_object_source(name, "volumes", volumes)
    if donors is not None:
        check_volumes(name, "donors", donors)
        check_device(name, "donors", donors, volumes.device)
        if donors.shape[1] != volumes.shape[1]:
            raise ValueError(
                f"{name}: donors must have the channels of volumes, {volumes.shape[1]}, got shape {shape_of(donors)}"
            )
        _check_object_source(name, "donors", donors)
    donor_window = check_window(name, window)
    window = donor_window if donors is None or donors.dtype == volumes.dtype else None
    if (
        donors is not None
        and donor_window != window
        and (donors.is_floating_point() or not volumes.is_floating_point())
    ):
        raise ValueError(
            f"{name}: window must be None for donors of another type than volumes, unless integers are mixed into "
            f"floats, got {donors.dtype} for {volumes.dtype}"
        )
    dtype = result_dtype(name, dtype, volumes, window)
    arguments = (
        donors,
        boxes.contiguous(),
        donor_boxes.contiguous(),
        lam.contiguous(),
        window,
        donor_window,
    )
    if out is None:
        dense = volumes.is_contiguous() or volumes.is_contiguous(
            memory_format=torch.channels_last_3d
        )
        return _objects.mixed(volumes if dense else volumes.contiguous(), *arguments, dtype)
    _check_out(name, out, volumes, dtype, False)
    if volumes.is_contiguous() and out.is_contiguous():
        _check_overlap(name, "volumes", volumes, out)
    _objects.mixed_into(volumes, *arguments, out)
    return out


def _check_object_source(name: str, argument: str, x: Tensor) -> None:
    check_no_grad(name, argument, x)
    if max(x.shape[2:]) > _LONGEST_AXIS:
        raise ValueError(
            f"{name}: {argument} must have axes of at most {_LONGEST_AXIS} voxels, got {shape_of(x)}"
        )
