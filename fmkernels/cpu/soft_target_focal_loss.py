"""Soft-target focal loss on the CPU: loss and gradient of an element come from one function, in blocks.

Sums are taken by block, in float64, and added in order: the number of threads changes nothing. The formulation differs
from the kernel's on purpose (p, q and the natural logarithm here, one fraction and powers of two there), so that each
can catch the other's mistakes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from fmkernels.cpu.arithmetic import STRICT, exp, load, log, log1p, store, stored
from fmkernels.cpu.compiled import compiled, shared
from fmkernels.dtypes import compute_dtype

BLOCK = 4096  # elements: what lies between two passes stays in a core's caches
LEAST = 8  # blocks for which a thread of their own pays
LARGEST = np.finfo(np.float32).max
NOTHING, LOSSES, GRADIENTS = range(3)  # what is written for every element
ZERO, ONE, TWO = map(np.float32, range(3))
NO_NUMBERS: dict[torch.dtype, np.ndarray] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0),
}
NO_INDEX = np.empty(0, np.int64)
TARGETS = {
    torch.float32: (torch.float32, torch.uint8, torch.bool),
    torch.bfloat16: (torch.float32, torch.bfloat16, torch.uint8, torch.bool),
    torch.float64: (torch.float64,),
}
"""Of what types a loop takes the targets, by that of the logits."""


@register_jitable(**STRICT)
def soft_target_focal(x, y, alpha0, alpha1, gamma, gamma_is_2):
    """Loss and d loss / d x of one element, both 0 where the target is negative.

    With p = sigmoid(x), q = sigmoid(-x) and d = (1 - y) p - y q, which is p - y without its cancellation, the
    derivative of |d|^g CE is |d|^g (g CE p q / d + d).
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
        gradient = (
            power * (gamma * (p * q / d * cross_entropy) + d) if d != ZERO else ZERO
        )  # the cusp of gamma < 1
    return ZERO if y < ZERO else loss, ZERO if y < ZERO else gradient


@compiled
def _focal(x, y, alpha0, alpha1, gamma, factor, loss, gradient):
    """Losses of a block, and gradients times ``factor``; returns how many elements count."""
    if gamma == TWO:
        for i in range(x.size):
            loss[i], slope = soft_target_focal(load(x, i), load(y, i), alpha0, alpha1, gamma, True)
            store(gradient, i, slope * factor)
    else:
        for i in range(x.size):
            loss[i], slope = soft_target_focal(load(x, i), load(y, i), alpha0, alpha1, gamma, False)
            store(gradient, i, slope * factor)
    count = 0
    for i in range(y.size):
        count += not load(y, i) < 0
    return count


@compiled
def _mix_targets(y, lam, index, first, target):
    """Mixed targets from element ``first`` on; -1 where either is ignored."""
    rows, inner = lam.size, y.size // lam.size
    done = 0
    while done < target.size:
        row, column = divmod(first + done, inner)
        if not 0 <= index[row] < rows:
            raise ValueError("soft_target_focal_loss: mix index must lie in [0, B)")
        size = min(target.size - done, inner - column)
        own, partner = y[first + done :][:size], y[index[row] * inner + column :][:size]
        part, share = target[done:][:size], lam[row]
        for i in range(size):
            a, b = load(own, i), load(partner, i)
            part[i] = -ONE if a < 0 or b < 0 else share * a + (ONE - share) * b
        done += size


@compiled
def _weigh(weight, inner, first, target, values):
    """values *= weight, each of which holds for ``inner`` elements, where the target counts."""
    done = 0
    while done < values.size:
        row, column = divmod(first + done, inner)
        size = values.size - done if inner == 1 else min(values.size - done, inner - column)
        part, counted, factor = values[done:][:size], target[done:][:size], weight[row:]
        if inner == 1:
            for i in range(size):
                part[i] = ZERO if counted[i] < ZERO else part[i] * load(factor, i)
        else:
            for i in range(size):
                part[i] = ZERO if counted[i] < ZERO else part[i] * load(factor, 0)
        done += size


@compiled
def _run(
    start, end, x, y, weight, lam, index, upstream, factor, alpha0, alpha1, gamma, what, out, sums
):
    """Blocks ``start`` to ``end`` of one level.

    Args:
        x: logits; with y (targets), upstream (empty or like x) and out, all of its elements [rows * inner].
        weight: [rows] or [rows * inner], or empty; in the type computed in, as is lam: [rows], or empty.
        factor: of the gradients, beside ``upstream``.
        what: NOTHING, LOSSES or GRADIENTS, written to ``out``.
        sums: float64 [blocks, 2], written: losses of a block, and how many of its elements count.
    """
    dtype = weight.dtype.type
    targets, losses, gradients = (
        np.empty(BLOCK, dtype),
        np.empty(BLOCK, dtype),
        np.empty(BLOCK, dtype),
    )
    formula, factor = (dtype(alpha0), dtype(alpha1), dtype(gamma)), dtype(factor)
    mixed, direct = lam.size > 0, what == GRADIENTS and weight.size == 0 and upstream.size == 0
    for block in range(start, end):
        first = block * BLOCK
        size = min(BLOCK, x.size - first)
        logit, own, result = (
            x[first : first + size],
            y[first : first + size],
            out[first : first + size],
        )
        target, loss, gradient = targets[:size], losses[:size], gradients[:size]
        if mixed:
            _mix_targets(y, lam, index, first, target)
        elif not direct:
            for i in range(size):
                target[i] = load(own, i)
        if direct and not mixed:  # each memory read and written in one pass
            count = _focal(logit, own, *formula, factor, loss, result)
        elif direct:
            count = _focal(logit, target, *formula, factor, loss, result)
        else:
            count = _focal(logit, target, *formula, dtype(1), loss, gradient)
            if weight.size > 0:
                _weigh(weight, x.size // weight.size, first, target, loss)
                _weigh(weight, x.size // weight.size, first, target, gradient)
            if upstream.size > 0:
                _weigh(upstream, 1, first, target, gradient)
            if what == LOSSES:
                for i in range(size):
                    store(result, i, loss[i])
            elif what == GRADIENTS:
                for i in range(size):
                    store(result, i, gradient[i] * factor)
        sums[block, 0], sums[block, 1] = _sum(loss), count


@register_jitable(fastmath={"reassoc"})
def _sum(values):
    """In float64, and in an order that fills vectors."""
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@compiled
def _add(sums):
    """The sums of all blocks, in order."""
    total, count = 0.0, 0.0
    for block in range(sums.shape[0]):
        total += sums[block, 0]
        count += sums[block, 1]
    return total, count


def _stored(x: Tensor, *types: torch.dtype) -> np.ndarray:
    """The memory of a tensor of one of these types; of a copy in the first of them, if it is of none."""
    return stored(x if x.dtype in types else x.to(types[0]))


def _run_levels(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    upstream: Sequence[Tensor],
    divisor: float,
    lam: Tensor | None,
    index: Tensor | None,
    alphas_gamma: tuple[float, float, float],
    what: int,
) -> tuple[list[Tensor], float, float]:
    """What is wanted of every element, the sum of the losses, and how many elements count."""
    dtype = compute_dtype(logits[0].dtype)
    kind = dtype if logits[0].dtype == torch.float16 else logits[0].dtype
    shares = NO_NUMBERS[dtype] if lam is None else _stored(lam, dtype)
    partners = NO_INDEX if index is None else stored(index)
    results, total, count = [], 0.0, 0.0
    for level, logit in enumerate(logits):
        x = _stored(logit, kind)
        y = _stored(targets[level], *TARGETS[kind])
        weight = _stored(weights[level], dtype) if weights else NO_NUMBERS[dtype]
        given, factor, result = x[:0], 1.0, x[:0]
        if upstream and upstream[level].dim() == 0:
            factor = float(upstream[level])
        elif upstream:
            given = _stored(upstream[level], kind)
        if what != NOTHING:
            results.append(torch.empty_like(logit, dtype=kind))
            result = stored(results[-1])
        sums = np.empty((-(-x.size // BLOCK), 2))
        shared(
            _run, len(sums), LEAST, x, y, weight, shares, partners, given, factor / divisor, *alphas_gamma, what,
            result, sums,
        )  # fmt: skip
        level_total, level_count = _add(sums)
        total += level_total
        count += level_count
    return (
        [r if r.dtype == logits[0].dtype else r.to(logits[0].dtype) for r in results],
        total,
        count,
    )


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(value, NO_NUMBERS[dtype].dtype))


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
    known = 1.0 if normalizer is None else max(float(normalizer), 1.0)
    gradients, total, count = _run_levels(
        logits, targets, weights, [], known, lam, index, (alpha0, alpha1, gamma),
        GRADIENTS if with_gradient else NOTHING,
    )  # fmt: skip
    left = max(count, 1.0) if mean and normalizer is None else 1.0
    dtype = compute_dtype(logits[0].dtype)
    return _scalar(total / (known * left), dtype), _scalar(left, dtype), gradients


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
    known = 1.0 if divisor is None else max(float(divisor), 1.0)
    return _run_levels(
        logits, targets, weights, upstream, known, lam, index, (alpha0, alpha1, gamma),
        GRADIENTS if upstream else LOSSES,
    )[0]  # fmt: skip


def launch_scale(gradients: Sequence[Tensor], factor: Tensor, divisor: Tensor) -> None:
    """As fmkernels.kernels.soft_target_focal_loss.launch_scale."""
    scale = float(factor) / float(divisor)
    if scale != 1:
        for gradient in gradients:
            gradient.mul_(scale)
