"""predict_targets: soft targets from the predictions of several views."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_integer,
    check_levels,
    check_no_tangent,
    check_number,
    check_per_sample,
    common_dtype,
    shape_of,
    varying,
)
from fmkernels.ops.library import functional_op
from fmkernels.ops.tensors import in_structure

_MIN_TEMPERATURE = 1e-30  # already gives exactly 0, 1/2 or 1


def predict_targets(
    view_logits: Tensor | Sequence[Tensor],
    flips: Tensor,
    *,
    temperature: float = 0.7,
    classes: int | None = None,
) -> Tensor | Any:  # a sequence for a sequence
    r"""Pseudo-targets from K views: undo each symmetry, average the probabilities, sharpen.

    .. math::
        q = \frac 1 K \sum_k \mathrm{undo}_k(\sigma(\mathrm{view\_logits}_k)), \qquad
        y = \frac{q^{1/T}}{q^{1/T} + (1 - q)^{1/T}}

    and for L classes

    .. math::
        q_i = \frac 1 K \sum_k \mathrm{undo}_k(\mathrm{softmax}_i(\mathrm{view\_logits}_k)),
        \qquad y_i = \frac{q_i^{1/T}}{\sum_{j=1}^L q_j^{1/T}}

    Tiny probabilities keep their relative accuracy. Arithmetic is float32 (float64 for float64).

    Args:
        view_logits: raw logits of the views, [K, B, A, D, H, W]; float16, bfloat16, float32 or
            float64; any strides, channels_last_3d views included, without a copy. Or a sequence of
            such tensors, the levels of a feature pyramid; levels of different dtypes, as autocast
            may make them, are converted to the wider one. The kernel is unrolled over K.
        flips: uint8 [K] on the same device: the symmetry of each view, a code of
            :func:`apply_symmetry` from 0 to 47. Below 8 it is a bit mask of flips, 1 = D, 2 = H,
            4 = W; from 8 on, axes are permuted too, which needs D = H = W at every level. Never
            read back to the host.
        temperature: T in (0, 1]; 1 keeps the mean.
        classes: L, at least 2, for detectors with softmax heads: channel a L + i is the logit of
            class i at anchor a. None for independent sigmoids.

    Returns:
        float32 [B, A, D, H, W] for logits of any dtype, in the memory order of the views. For a
        sequence, a list or tuple like it.

    No gradient is offered. Logits of +inf and -inf are the probabilities 1 and 0; with classes,
    they count as +-3.4e38. The result is NaN where a view is NaN (with classes, in all classes of
    the anchor), and finite everywhere else.

    On a GPU, flips of only 0 to 7 are read and written in vectors. Other codes read views across
    memory, element by element, unless the anchors are innermost (channels last).

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or a gradient is requested. Codes that do
            not fit are found on the CPU only; on a GPU all targets of the level are NaN, and with
            ``FMKERNELS_DEBUG=1`` a device assertion fails.

    Equivalent PyTorch::

        views = [undo_symmetry(view, code) for view, code in zip(view_logits, flips.tolist())]
        mean = torch.stack(views).sigmoid().mean(0)
        targets = mean ** (1 / T) / (mean ** (1 / T) + (1 - mean) ** (1 / T))

        mean = torch.stack(views).unflatten(2, (-1, L)).softmax(3).mean(0)  # with classes
        targets = (mean ** (1 / T) / (mean ** (1 / T)).sum(2, keepdim=True)).flatten(1, 2)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR
    2020; T = 0.7 is the value in its figure. Classes: Berthelot et al., MixMatch, NeurIPS 2019.

    Example:
        >>> import torch
        >>> views = torch.logit(torch.tensor([0.9, 0.8])).reshape(2, 1, 1, 1, 1, 1)
        >>> targets = predict_targets(views, torch.tensor([0, 4], dtype=torch.uint8))
        >>> round(targets.item(), 2)
        0.92
    """
    name = "predict_targets"
    levels = check_levels(name, "view_logits", view_logits)
    first = levels[0]
    for x in levels:
        check_no_tangent(name, "view_logits", x)
        check_dtype(name, "view_logits", x, FLOATS)
        check_device(name, "view_logits", x, first.device)
        if x.dim() != 6 or x.shape[0] == 0 or x.shape[0] != first.shape[0]:
            expected = "[K, B, A, D, H, W] with K >= 1 the same at every level"
            raise ValueError(f"{name}: view_logits must be {expected}, got {shape_of(x)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: no gradient to view_logits is offered, call it under torch.no_grad()"
            )
    check_per_sample(name, "flips", flips, first.device, (torch.uint8,), first.shape[0])
    check_number(name, "temperature", temperature)
    if not 0 < temperature <= 1:
        raise ValueError(f"{name}: temperature must be in (0, 1], got {temperature}")
    if classes is not None:
        classes = check_integer(name, "classes", classes)
        if classes < 2:
            raise ValueError(f"{name}: classes must be at least 2, got {classes}")
        for x in levels:
            if x.shape[2] % classes:
                raise ValueError(
                    f"{name}: classes must divide the channels of view_logits, "
                    f"{x.shape[2]}, got {classes}"
                )
    if any(x.dtype != first.dtype for x in levels):
        levels = [x.to(common_dtype(levels)) for x in levels]
    # torch.compile of PyTorch 2.11 would take each temperature for a constant because of max()
    (t,) = varying(float(temperature) if temperature > _MIN_TEMPERATURE else _MIN_TEMPERATURE)
    targets = predict_targets_op(levels, flips.contiguous(), t, classes or 1)
    return in_structure(view_logits, targets)


@functional_op(
    "predict_targets(Tensor[] view_logits, Tensor flips, float temperature, int classes)"
    " -> Tensor[]"
)
def predict_targets_op(view_logits, flips, temperature, classes):
    return [
        torch.empty_permuted(
            x.shape[1:],
            (0, 2, 3, 4, 1) if x.shape[2] > 1 and x.stride(2) < x.stride(5) else (0, 1, 2, 3, 4),
            dtype=torch.float32,
            device=x.device,
        )
        for x in view_logits
    ]
