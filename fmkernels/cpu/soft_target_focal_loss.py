"""Soft-target focal loss on the CPU: one function computes loss and gradient of an element.

Loops work on blocks. Each block is summed in float64 and the sums are added in order, so that the
number of threads changes nothing. The formulation differs from the kernel's on purpose: p, q and
the natural logarithm here, one fraction and powers of two there. Each can catch mistakes of the
other.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fmkernels.cpu.arithmetic import STRICT, exp, log, log1p, sum_reordered
from fmkernels.cpu.compiled import njit, parallel_for, subroutine
from fmkernels.cpu.voxels import (
    elements,
    empty,
    load_block,
    own_kind,
    part,
    read_block,
    store_block,
    zero_of,
)
from fmkernels.dtypes import compute_dtype

BLOCK = 2048  # elements: the arrays between two passes stay in the caches of a core
GRAIN_SIZE = 16  # minimum blocks per thread
LARGEST = np.finfo(np.float32).max
NO_OUTPUT, LOSSES, GRADIENTS = range(3)  # what _run writes for each element
ZERO, ONE, TWO = map(np.float32, range(3))


@subroutine(**STRICT)
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


@subroutine
def _focal(x, y, alpha0, alpha1, gamma, factor, loss, gradient):
    """Write the losses of a block, and its gradients times ``factor``."""
    if gamma == TWO:
        for i in range(x.size):
            loss[i], slope = _soft_target_focal(x[i], y[i], alpha0, alpha1, gamma, True)
            gradient[i] = slope * factor
    else:
        for i in range(x.size):
            loss[i], slope = _soft_target_focal(x[i], y[i], alpha0, alpha1, gamma, False)
            gradient[i] = slope * factor


@subroutine
def _count(y):
    """The numbers of targets that are not ignored, and of targets above 1."""
    count, too_large = np.int32(0), np.int32(0)  # twice as many fill a vector as of int64
    for i in range(y.size):
        count = np.int32(count + (not y[i] < 0))
        too_large = np.int32(too_large + (y[i] > 1))
    return count, too_large


@subroutine
def _mix_targets(y, inner, lam, index, first, own, buffer, target):
    """Write mixed targets from element ``first`` on; -1 where one of the two is ignored.

    ``own`` holds the targets of these elements, as they are.
    """
    done = 0
    while done < target.size:
        row, column = divmod(first + done, inner)
        size = min(target.size - done, inner - column)
        partner = read_block(y, index[row] * inner + column, part(buffer, 0, size))
        x, mixed, lam_row = part(own, done, size), part(target, done, size), lam[row]
        for i in range(size):
            a, b = x[i], partner[i]
            mixed[i] = -ONE if a < 0 or b < 0 else lam_row * a + (ONE - lam_row) * b
        done += size


@subroutine
def _weigh(weight, inner, first, target, values):
    """values *= weight where the target is not ignored; a weight holds for ``inner`` elements."""
    done = 0
    while done < values.size:
        row, column = divmod(first + done, inner)
        size = values.size - done if inner == 1 else min(values.size - done, inner - column)
        product, y = part(values, done, size), part(target, done, size)
        if inner == 1:
            for i in range(size):
                product[i] = ZERO if y[i] < ZERO else product[i] * weight[row + i]
        else:
            for i in range(size):
                product[i] = ZERO if y[i] < ZERO else product[i] * weight[row]
        done += size


@njit
def _run(
    start, end, x, y, weight, lam, index, grad_output, out, length, weights, rows, factor, alpha0,
    alpha1, gamma, output, sums, zero,
):  # fmt: skip
    """Blocks ``start`` to ``end`` of one level.

    Args:
        x: (address, dtype code) of the logits, as are all tensors; y (targets), grad_output and
            out, of ``length`` elements too. All but x and y may be missing.
        weight: [weights], one for each row or each element, in the compute dtype.
        lam: [rows]; ``index``, int64 [rows].
        factor: of the gradients, in addition to ``grad_output``.
        output: NO_OUTPUT, LOSSES or GRADIENTS, written to ``out``.
        sums: float64 [blocks, 3], written: sum of the losses of a block, number of elements that
            are not ignored, number of targets above 1.
        zero: of the compute dtype.
    """
    dtype = type(zero)
    buffers = empty(6 * BLOCK, zero)
    weight = elements(weight[0], weights, buffers.dtype)
    index, lambdas = elements(index[0], rows, np.int64), empty(rows, zero)
    load_block(lam[0], lam[1], 0, lambdas)
    formula, factor = (dtype(alpha0), dtype(alpha1), dtype(gamma)), dtype(factor)
    at_once = output == GRADIENTS and weights == 0 and not grad_output[0]
    scale = factor if at_once else dtype(1)
    in_place = at_once and out[1] == own_kind(buffers)
    for block in range(start, end):
        first = block * BLOCK
        size = min(BLOCK, length - first)
        logit = read_block(x, first, part(buffers, 0, size))
        target = read_block(y, first, part(buffers, BLOCK, size))
        loss, gradient = part(buffers, 2 * BLOCK, size), part(buffers, 3 * BLOCK, size)
        count, too_large = _count(target)
        if rows > 0:
            mixed, partner = part(buffers, 4 * BLOCK, size), part(buffers, 5 * BLOCK, size)
            _mix_targets(y, length // rows, lambdas, index, first, target, partner, mixed)
            target = mixed
            count, _ = _count(target)
        if in_place:
            gradient = elements(out[0] + buffers.itemsize * first, size, buffers.dtype)
        _focal(logit, target, *formula, scale, loss, gradient)
        if weights > 0:
            _weigh(weight, length // weights, first, target, loss)
            _weigh(weight, length // weights, first, target, gradient)
        if grad_output[0]:  # the logits are not needed any more
            upstream = read_block(grad_output, first, part(buffers, 0, size))
            _weigh(upstream, 1, 0, target, gradient)
        if output == LOSSES:
            store_block(loss, out[0], out[1], first)
        elif output == GRADIENTS and not in_place:
            if not at_once:
                for i in range(size):
                    gradient[i] *= factor
            store_block(gradient, out[0], out[1], first)
        sums[block, 0], sums[block, 1], sums[block, 2] = sum_reordered(loss), count, too_large


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
    zero, rows, total, count = zero_of(logits[0]), 0, 0.0, 0.0
    if lam is not None and index is not None:
        rows = index.numel()
        # here, since an error raised in a loop would keep the arrays of the loop alive for good
        if not all(0 <= partner < rows for partner in index.tolist()):
            raise ValueError("soft_target_focal_loss: mix index must lie in [0, B)")
        wrong = [weight for weight in lam.tolist() if weight < 0 or weight > 1]  # NaN gives NaN
        if wrong:
            raise ValueError(f"soft_target_focal_loss: mix lam must be in [0, 1], got {wrong[0]:g}")
    for level, logit in enumerate(logits):
        weight = weights[level].to(compute_dtype(logit.dtype)) if weights else None
        grad_output, factor, size = None, 1.0, logit.numel()
        if grad_outputs and grad_outputs[level].dim() == 0:
            factor = float(grad_outputs[level])
        elif grad_outputs:
            grad_output = grad_outputs[level]
        result = out[level] if output != NO_OUTPUT else None
        sums = np.empty((-(-size // BLOCK), 3), np.float64)
        parallel_for(
            _run, len(sums), GRAIN_SIZE,
            (logit, targets[level], weight, lam, index, grad_output, result), size,
            0 if weight is None else weight.numel(), rows, factor / divisor, *alphas_gamma, output,
            sums, zero,
        )  # fmt: skip
        sums = sums[0] if len(sums) == 1 else sums.sum(0)
        level_total, level_count, too_large = sums.tolist()
        if too_large:
            largest = targets[level][targets[level] > 1].max()
            raise ValueError(
                "soft_target_focal_loss: targets must be in [0, 1], or negative to be ignored, "
                f"got {largest.item()}"
            )
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
