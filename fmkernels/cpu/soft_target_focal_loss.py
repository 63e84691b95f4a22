"""Soft-target focal loss on the CPU: one function computes loss and gradient of an element.

Loops work on blocks. Each block is summed in float64 and the sums are added in order, so that the
number of threads changes nothing. The formulation differs from the kernel's on purpose: p, q and
the natural logarithm here, one fraction and powers of two there. Each can catch mistakes of the
other.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from fmkernels.cpu.arithmetic import STRICT, exp, load, log, log1p, store, stored, sum_reordered
from fmkernels.cpu.compiled import njit, parallel_for
from fmkernels.dtypes import compute_dtype

BLOCK = 4096  # elements: the arrays between two passes stay in the caches of a core
GRAIN_SIZE = 8  # minimum blocks per thread
LARGEST = np.finfo(np.float32).max
NO_OUTPUT, LOSSES, GRADIENTS = range(3)  # what _run writes for each element
ZERO, ONE, TWO = map(np.float32, range(3))
EMPTY = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}
NO_INDEX = np.empty(0, np.int64)
TARGETS = {
    torch.float32: (torch.float32, torch.uint8, torch.bool),
    torch.bfloat16: (torch.float32, torch.bfloat16, torch.uint8, torch.bool),
    torch.float64: (torch.float64,),
}
"""Target dtypes that the loops take, for each dtype of the logits."""


@register_jitable(**STRICT)
def _soft_target_focal(x, y, alpha0, alpha1, gamma, gamma_is_2):
    """Loss and d loss / d x of one element, both 0 where the target is negative.

    With p = sigmoid(x), q = sigmoid(-x) and d = (1 - y) p - y q, which is p - y without its
    cancellation, the derivative of |d|^g CE is |d|^g (g CE p q / d + d).
    """
    x = LARGEST if x > LARGEST else x
    x = -LARGEST if x < -LARGEST else x
    e = exp(-abs(x))
    larger = ONE / (ONE + e)
    p = larger if x > ZERO else e * larger
    q = e * larger if x > ZERO else larger
    d = (ONE - y) * p - y * q
    cross_entropy = (x * (ONE - y) if x > ZERO else -x * y) + log1p(e)
    scale = alpha0 + y * (alpha1 - alpha0)
    if gamma_is_2:
        loss = scale * (d * d) * cross_entropy
        gradient = scale * d * (TWO * (p * q * cross_entropy) + d * d)
    else:
        power = scale * (exp(gamma * log(abs(d))) if gamma > ZERO else ONE)
        loss = power * cross_entropy
        slope = gamma * (p * q / d * cross_entropy) + d
        gradient = power * slope if d != ZERO else ZERO  # 0 at the cusp of gamma < 1
    return ZERO if y < ZERO else loss, ZERO if y < ZERO else gradient


@njit
def _focal(x, y, alpha0, alpha1, gamma, factor, loss, gradient):
    """Write the losses of a block, and its gradients times ``factor``."""
    if gamma == TWO:
        for i in range(x.size):
            loss[i], slope = _soft_target_focal(load(x, i), load(y, i), alpha0, alpha1, gamma, True)
            store(gradient, i, slope * factor)
    else:
        for i in range(x.size):
            loss[i], slope = _soft_target_focal(
                load(x, i), load(y, i), alpha0, alpha1, gamma, False
            )
            store(gradient, i, slope * factor)


@njit
def _count(y):
    """The numbers of targets that are not ignored, and of targets above 1."""
    count, too_large = np.int32(0), np.int32(0)  # twice as many fill a vector as of int64
    for i in range(y.size):
        count = np.int32(count + (not load(y, i) < 0))
        too_large = np.int32(too_large + (load(y, i) > 1))
    return count, too_large


@njit
def _mix_targets(y, lam, index, first, target):
    """Write mixed targets from element ``first`` on; -1 where one of the two is ignored."""
    rows, inner = lam.size, y.size // lam.size
    done = 0
    while done < target.size:
        row, column = divmod(first + done, inner)
        if not 0 <= index[row] < rows:
            raise ValueError("soft_target_focal_loss: mix index must lie in [0, B)")
        size = min(target.size - done, inner - column)
        own, partner = y[first + done :][:size], y[index[row] * inner + column :][:size]
        mixed, lam_row = target[done:][:size], lam[row]
        for i in range(size):
            a, b = load(own, i), load(partner, i)
            mixed[i] = -ONE if a < 0 or b < 0 else lam_row * a + (ONE - lam_row) * b
        done += size


@njit
def _weigh(weight, inner, first, target, values):
    """values *= weight where the target is not ignored; a weight holds for ``inner`` elements."""
    done = 0
    while done < values.size:
        row, column = divmod(first + done, inner)
        size = values.size - done if inner == 1 else min(values.size - done, inner - column)
        product, y, factor = values[done:][:size], target[done:][:size], weight[row:]
        if inner == 1:
            for i in range(size):
                product[i] = ZERO if y[i] < ZERO else product[i] * load(factor, i)
        else:
            for i in range(size):
                product[i] = ZERO if y[i] < ZERO else product[i] * load(factor, 0)
        done += size


@njit
def _run(
    start, end, x, y, weight, lam, index, grad_output, factor, alpha0, alpha1, gamma, output, out,
    sums,
):  # fmt: skip
    """Blocks ``start`` to ``end`` of one level.

    Args:
        x: logits; like y (targets), grad_output (or empty) and out, of [rows * inner] elements.
        weight: [rows] or [rows * inner] or empty, in the compute dtype, as is lam: [rows] or empty.
        factor: of the gradients, in addition to ``grad_output``.
        output: NO_OUTPUT, LOSSES or GRADIENTS, written to ``out``.
        sums: float64 [blocks, 3], written: sum of the losses of a block, number of elements that
            are not ignored, number of targets above 1.
    """
    dtype = weight.dtype.type
    targets, losses = np.empty(BLOCK, dtype), np.empty(BLOCK, dtype)
    gradients = np.empty(BLOCK, dtype)
    formula, factor = (dtype(alpha0), dtype(alpha1), dtype(gamma)), dtype(factor)
    mixed = lam.size > 0
    direct = output == GRADIENTS and weight.size == 0 and grad_output.size == 0
    for block in range(start, end):
        first = block * BLOCK
        size = min(BLOCK, x.size - first)
        logit, own, result = x[first:][:size], y[first:][:size], out[first:][:size]
        target, loss, gradient = targets[:size], losses[:size], gradients[:size]
        count, too_large = _count(own)
        if mixed:
            _mix_targets(y, lam, index, first, target)
            count, _ = _count(target)
        elif not direct:
            for i in range(size):
                target[i] = load(own, i)
        if direct and not mixed:  # logits and targets read and gradients written in one pass
            _focal(logit, own, *formula, factor, loss, result)
        elif direct:
            _focal(logit, target, *formula, factor, loss, result)
        else:
            _focal(logit, target, *formula, dtype(1), loss, gradient)
            if weight.size > 0:
                _weigh(weight, x.size // weight.size, first, target, loss)
                _weigh(weight, x.size // weight.size, first, target, gradient)
            if grad_output.size > 0:
                _weigh(grad_output, 1, first, target, gradient)
            if output == LOSSES:
                for i in range(size):
                    store(result, i, loss[i])
            elif output == GRADIENTS:
                for i in range(size):
                    store(result, i, gradient[i] * factor)
        sums[block, 0], sums[block, 1], sums[block, 2] = sum_reordered(loss), count, too_large


@njit
def _add(sums):
    """The sums over all blocks, in order."""
    total, count, too_large = 0.0, 0.0, 0.0
    for block in range(sums.shape[0]):
        total += sums[block, 0]
        count += sums[block, 1]
        too_large += sums[block, 2]
    return total, count, too_large


def _stored_as(x: Tensor, *dtypes: torch.dtype) -> np.ndarray:
    """The tensor as a flat array of one of these dtypes; converted to the first if it has none."""
    return stored(x if x.dtype in dtypes else x.to(dtypes[0]))


def _at_least_one(value: Tensor | None) -> float:
    return 1.0 if value is None else max(float(value), 1.0)  # NaN, as the first, stays NaN


def _run_levels(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: Tensor | None,
    index: Tensor | None,
    alphas_gamma: tuple[float, float, float],
    grad_outputs: Sequence[Tensor],
    divisor: float,
    output: int,
    out: Sequence[Tensor],
) -> tuple[float, float]:
    """Write what ``output`` says; return the sum of the losses and the number of elements."""
    dtype = compute_dtype(logits[0].dtype)
    loop_dtype = dtype if logits[0].dtype == torch.float16 else logits[0].dtype
    lambdas, partners = EMPTY[dtype], NO_INDEX
    if lam is not None and index is not None:
        lambdas, partners = _stored_as(lam, dtype), stored(index)
        wrong = lambdas[(lambdas < 0) | (lambdas > 1)]
        if wrong.size:
            raise ValueError(f"soft_target_focal_loss: mix lam must be in [0, 1], got {wrong[0]:g}")
    total, count = 0.0, 0.0
    for level, logit in enumerate(logits):
        x = _stored_as(logit, loop_dtype)
        y = _stored_as(targets[level], *TARGETS[loop_dtype])
        weight = _stored_as(weights[level], dtype) if weights else EMPTY[dtype]
        grad_output, factor, result = x[:0], 1.0, x[:0]
        if grad_outputs and grad_outputs[level].dim() == 0:
            factor = float(grad_outputs[level])
        elif grad_outputs:
            grad_output = _stored_as(grad_outputs[level], loop_dtype)
        if output != NO_OUTPUT:
            converted = out[level].to(loop_dtype)  # out itself, unless that is float16
            result = stored(converted)
        sums = np.empty((-(-x.size // BLOCK), 3), np.float64)
        parallel_for(
            _run, len(sums), GRAIN_SIZE, x, y, weight, lambdas, partners, grad_output,
            factor / divisor, *alphas_gamma, output, result, sums,
        )  # fmt: skip
        level_total, level_count, too_large = _add(sums)
        if too_large:
            largest = targets[level][targets[level] > 1].max()
            raise ValueError(
                "soft_target_focal_loss: targets must be in [0, 1], or negative to be ignored, "
                f"got {largest.item()}"
            )
        if output != NO_OUTPUT and converted is not out[level]:
            out[level].copy_(converted)
        total += level_total
        count += level_count
    return total, count


def soft_target_focal_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: Tensor | None,
    index: Tensor | None,
    rows: int,
    alpha0: float,
    alpha1: float,
    gamma: float,
    normalizer: Tensor | None,
    mean: bool,
    loss: Tensor,
    divisor: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """As in fmkernels.kernels.soft_target_focal_loss."""
    denominator = _at_least_one(normalizer)
    total, count = _run_levels(
        logits, targets, weights, lam, index, (alpha0, alpha1, gamma), (), denominator,
        GRADIENTS if gradients else NO_OUTPUT, gradients,
    )  # fmt: skip
    count = max(count, 1.0) if mean and normalizer is None else 1.0
    loss.fill_(total / (denominator * count))
    divisor.fill_(count)


def soft_target_focal_loss_elementwise(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: Tensor | None,
    index: Tensor | None,
    rows: int,
    alpha0: float,
    alpha1: float,
    gamma: float,
    losses: Sequence[Tensor],
) -> None:
    """As in fmkernels.kernels.soft_target_focal_loss."""
    formula = alpha0, alpha1, gamma
    _run_levels(logits, targets, weights, lam, index, formula, (), 1.0, LOSSES, losses)


def soft_target_focal_loss_backward(
    grad_outputs: Sequence[Tensor],
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    lam: Tensor | None,
    index: Tensor | None,
    rows: int,
    alpha0: float,
    alpha1: float,
    gamma: float,
    divisor: Tensor | None,
    gradients: Sequence[Tensor],
) -> None:
    """As in fmkernels.kernels.soft_target_focal_loss."""
    _run_levels(
        logits, targets, weights, lam, index, (alpha0, alpha1, gamma), grad_outputs,
        _at_least_one(divisor), GRADIENTS, gradients,
    )  # fmt: skip


def soft_target_focal_loss_scale(
    gradients: Sequence[Tensor], grad_output: Tensor, divisor: Tensor
) -> None:
    """As in fmkernels.kernels.soft_target_focal_loss."""
    factor = float(grad_output) / float(divisor)
    if factor != 1:
        for gradient in gradients:
            gradient.mul_(factor)
