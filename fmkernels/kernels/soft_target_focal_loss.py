"""Soft-target focal loss on the GPU: one device function computes loss and gradient of an element.

One launch handles all levels of a feature pyramid. A level is ``rows`` rows of ``inner`` elements:
one row, unless targets are mixed or weights differ by sample. A program computes one or several
tiles of ``BLOCK`` elements of one row. Sums are deterministic: each program writes one partial sum,
and the program that finishes last adds them in order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.arithmetic import LOG2E, divide, log1p, log2
from fmkernels.kernels.arrivals import arrival_counter, is_last
from fmkernels.kernels.launching import quick
from fmkernels.kernels.tuning import Launch, debug, launch_parameters, processors

SMALLEST = tl.constexpr(1e-37)  # keeps |d|^gamma and p q / |d| finite in float32
SMALLEST_DOUBLE = tl.constexpr(1e-290)
LARGEST = tl.constexpr(3.4028234663852886e38)
PARTIALS = tl.constexpr(1024)  # partial sums added at once
SCALE_BLOCK, SCALE_WARPS = 4096, 4  # few programs scale gradients, each many at once
SCALE_PROGRAMS = 4  # per multiprocessor; mostly they only find that nothing is to be done


@triton.jit
def soft_target_focal(x, y, factor, gamma, GAMMA_IS_2: tl.constexpr):
    """Loss and d loss / d x of each element, both times ``factor``, all in the compute dtype.

    Let e = exp(-|x|); u = 1 - y, v = y for x > 0, else u = y, v = 1 - y; and t = u - v e. Then both
    signs of x share |p - y| = |t| / (1 + e) and cross entropy = u |x| + log1p(e), without avoidable
    cancellation.
    """
    e = tl.exp(-tl.abs(x)) if x.dtype == tl.float64 else tl.exp2(tl.abs(x) * -LOG2E)
    positive = x > 0
    u = tl.where(positive, 1.0 - y, y)
    v = tl.where(positive, y, 1.0 - y)
    t = u - v * e
    ce = u * tl.minimum(tl.abs(x), LARGEST) + log1p(e)
    if GAMMA_IS_2:  # d^2 CE and d (2 p (1 - p) CE + d^2); powers of 1 / (1 + e) are shared
        square = t * t
        scale = divide(divide(factor, 1.0 + e), 1.0 + e)
        loss = scale * (square * ce)
        grad = divide(scale, 1.0 + e) * t * (2.0 * (e * ce) + square)
    else:
        d = divide(t, 1.0 + e)
        zero = tl.abs(d) < (SMALLEST_DOUBLE if x.dtype == tl.float64 else SMALLEST)
        # 0^gamma is 0, and 1 for gamma = 0
        power = factor * tl.exp2(gamma * tl.where(zero, -1e30, log2(tl.abs(d))))
        slope = tl.where(zero, 0.0, divide(divide(e, 1.0 + e), t))  # p (1 - p) / d
        loss = power * ce
        grad = power * (gamma * (slope * ce) + d)
    return loss, tl.where(positive, grad, -grad)


@triton.jit
def _pick(level, values):
    """values[level] of a tuple, for a level that is only known at run time."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(level == i, values[i], value)
    return value


@triton.jit
def _locate(
    program, first, programs_per_row, inner, EXTENT, ROWS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Level, row, row length and first element in the row (int64) of a program."""
    level = 0
    for i in tl.static_range(1, len(first)):
        level += (program >= _unpack(first[i])).to(tl.int32)
    tile = (program - _unpack(_pick(level, first))).to(tl.int64)
    length = _unpack(_pick(level, inner)).to(tl.int64)
    if ROWS:
        per_row = _unpack(_pick(level, programs_per_row)).to(tl.int64)
        row = tile // per_row
        tile = tile - row * per_row
        if ALIGNED:
            length = tl.multiple_of(length, 16)
    else:
        row = tile * 0
    return level, row, length, tile * EXTENT


@triton.jit
def _unpack(size):
    return (size - 3) >> 1


def _pack(size: int) -> int:
    """An odd number above 1: the JIT would compile variants for 1 and for multiples of 16."""
    return 2 * size + 3


@triton.jit
def _load_tile(
    x, y, weight, lam, index, row, length, rows, start, lane, mask, alpha0, alpha1,
    ROWS: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr,
):  # fmt: skip
    """Where a tile begins, and its logits, targets, factors and ignore mask, in alpha0's dtype.

    ``start`` is its first element in the row; ``mask`` is None if it lies entirely in its row.
    """
    T: tl.constexpr = alpha0.dtype
    OTHER: tl.constexpr = None if mask is None else 0
    at = row * length + start if ROWS else start
    logit = tl.load(x + at + lane, mask, other=OTHER).to(T)
    target = tl.load(y + at + lane, mask, other=OTHER).to(T)
    tl.device_assert((target <= 1) | (target != target), "targets must be in [0, 1] or negative")
    ignored = target < 0
    if lam is not None:
        lam_row = tl.load(lam + row).to(T)
        tl.device_assert(
            ((lam_row >= 0) & (lam_row <= 1)) | (lam_row != lam_row), "mix: lam must be in [0, 1]"
        )
        partner = tl.load(index + row).to(tl.int64)
        tl.device_assert((partner >= 0) & (partner < rows), "mix: index must be in [0, B)")
        second = tl.load(y + (partner * length + start) + lane, mask, other=OTHER).to(T)
        ignored = ignored | (second < 0)
        target = lam_row * target + (1.0 - lam_row) * second
    factor = alpha0 + target * (alpha1 - alpha0)
    if weight is not None:
        if WEIGHT_PER_ROW:
            factor *= tl.load(weight + row).to(T)
        else:
            factor *= tl.load(weight + at + lane, mask, other=OTHER).to(T)
    if mask is not None:
        ignored = ignored | (mask == 0)
    return at, logit, target, factor, ignored


@triton.jit
def _sum_tile(
    x, y, weight, grad, lam, index, scale, row, length, rows, start, lane, mask, formula,
    ROWS: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile, if asked for; return sums and counts over 4 elements each."""
    at, logit, target, factor, ignored = _load_tile(
        x, y, weight, lam, index, row, length, rows, start, lane, mask, formula[0], formula[1],
        ROWS, WEIGHT_PER_ROW,
    )  # fmt: skip
    # cleared before the arithmetic, not after it: a quarter fewer registers
    logit = tl.where(ignored, 0.0, logit)
    target = tl.where(ignored, 0.0, target)
    factor = tl.where(ignored, 0.0, factor)
    loss, slope = soft_target_focal(logit, target, factor, formula[2], GAMMA_IS_2)
    if grad is not None:
        tl.store(grad + at + lane, slope * scale, mask)
    FOURS: tl.constexpr = loss.shape[0] // 4  # groups of 4 that one thread holds
    counted = 1 - ignored.to(tl.int32)
    return tl.sum(loss.reshape(FOURS, 4), axis=1), tl.sum(counted.reshape(FOURS, 4), axis=1)


@triton.jit
def _denominator(normalizer, T: tl.constexpr):
    value = tl.load(normalizer).to(T)
    return tl.where(value < 1.0, 1.0, value)


@triton.jit
def _add_up(losses, counts, normalizer, total, divisor, programs):
    """Store the reduced loss, and what gradients must still be divided by."""
    T: tl.constexpr = losses.dtype.element_ty
    loss = tl.zeros((PARTIALS,), tl.float64)
    count = tl.zeros((PARTIALS,), tl.int64)
    for start in range(0, programs, PARTIALS):
        i = start + tl.arange(0, PARTIALS)
        # .cg: past the caches that other programs do not write through
        loss += tl.load(losses + i, i < programs, 0.0, cache_modifier=".cg").to(tl.float64)
        if counts is not None:
            count += tl.load(counts + i, i < programs, 0, cache_modifier=".cg").to(tl.int64)
    result = tl.sum(loss, axis=0)
    total_count = tl.full((), 1.0, tl.float64)
    if normalizer is not None:
        result = result / _denominator(normalizer, tl.float64)
    if counts is not None:
        total_count = tl.maximum(tl.sum(count, axis=0), 1).to(tl.float64)
        result = result / total_count
    tl.store(total, result.to(T))
    tl.store(divisor, total_count.to(T))


@quick
@triton.jit
def fmkernels_sum_kernel(
    x,  # tuple of pointers, one per level: logits [rows, inner]
    y,  # likewise: targets [rows, inner]
    weight,  # likewise: [rows] or [rows, inner]; or None
    grad,  # likewise: gradients [rows, inner], written; or None
    lam,  # [rows], or None
    index,  # [rows] int64, or None
    normalizer,  # scalar that the loss and gradients are divided by (at least 1), or None
    losses,  # [programs], written
    counts,  # [programs] int32, written; or None
    arrived,  # int32 counter of finished programs, 0 before and after
    total,  # scalar, written: the reduced loss
    divisor,  # scalar, written: what gradients must still be divided by
    first, programs_per_row, inner,  # tuples of each level's first program and sizes (packed)
    rows, tiles,  # tiles per program
    alpha0: tl.float64, alpha1: tl.float64, gamma: tl.float64,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr,
    GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    program, extent = tl.program_id(0), tiles * BLOCK
    level, row, length, start = _locate(
        program, first, programs_per_row, inner, extent, ROWS, ALIGNED
    )
    x_l, y_l = _pick(level, x), _pick(level, y)
    w_l = _pick(level, weight) if weight is not None else None
    g_l = _pick(level, grad) if grad is not None else None
    T: tl.constexpr = losses.dtype.element_ty
    formula = (alpha0.to(T), alpha1.to(T), gamma.to(T))
    scale = 1.0 if normalizer is None else 1.0 / _denominator(normalizer, T)
    loss = tl.zeros((BLOCK // 4,), T)
    count = tl.zeros((BLOCK // 4,), tl.int32)
    lane = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    if start + extent <= length:
        for _ in range(tiles):
            tile_loss, tile_count = _sum_tile(
                x_l, y_l, w_l, g_l, lam, index, scale, row, length, rows, start, lane, None,
                formula, ROWS, WEIGHT_PER_ROW, GAMMA_IS_2,
            )  # fmt: skip
            loss += tile_loss
            count += tile_count
            start += BLOCK
    else:
        for _ in range(tiles):
            tile_loss, tile_count = _sum_tile(
                x_l, y_l, w_l, g_l, lam, index, scale, row, length, rows, start, lane,
                lane < length - start, formula, ROWS, WEIGHT_PER_ROW, GAMMA_IS_2,
            )  # fmt: skip
            loss += tile_loss
            count += tile_count
            start += BLOCK
    tl.store(losses + program, tl.sum(loss, axis=0))
    if counts is not None:
        tl.store(counts + program, tl.sum(count, axis=0))
    if is_last(arrived):
        _add_up(losses, counts, normalizer, total, divisor, tl.num_programs(0))


@triton.jit
def _elementwise_tile(
    x, y, weight, grad_output, out, lam, index, scale, row, length, rows, start, lane, mask,
    formula, ROWS: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr, GRAD_OUTPUT_IS_SCALAR: tl.constexpr,
    GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """Store the losses of a tile, or its gradients times ``grad_output`` and ``scale``."""
    at, logit, target, factor, ignored = _load_tile(
        x, y, weight, lam, index, row, length, rows, start, lane, mask, formula[0], formula[1],
        ROWS, WEIGHT_PER_ROW,
    )  # fmt: skip
    loss, grad = soft_target_focal(logit, target, factor, formula[2], GAMMA_IS_2)
    if grad_output is None:
        result = loss
    elif GRAD_OUTPUT_IS_SCALAR:
        result = grad * scale
    else:
        OTHER: tl.constexpr = None if mask is None else 0
        incoming = tl.load(grad_output + at + lane, mask, other=OTHER).to(grad.dtype)
        result = grad * (incoming * scale)
    tl.store(out + at + lane, tl.where(ignored, 0.0, result), mask)


@quick
@triton.jit
def fmkernels_elementwise_kernel(
    x,  # tuple of pointers, one per level: logits [rows, inner]
    y,  # likewise: targets [rows, inner]
    weight,  # likewise: [rows] or [rows, inner]; or None
    grad_output,  # likewise: [rows, inner] or a scalar; None for losses
    out,  # likewise: gradients, or losses without grad_output, [rows, inner], written
    lam,  # [rows], or None
    index,  # [rows] int64, or None
    divisor,  # scalar that gradients are divided by (at least 1), or None
    first, programs_per_row, inner,  # tuples of each level's first program and sizes (packed)
    rows,
    alpha0: tl.float64, alpha1: tl.float64, gamma: tl.float64,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr,
    GRAD_OUTPUT_IS_SCALAR: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    level, row, length, start = _locate(
        tl.program_id(0), first, programs_per_row, inner, BLOCK, ROWS, ALIGNED
    )
    x_l, y_l, out_l = _pick(level, x), _pick(level, y), _pick(level, out)
    w_l = _pick(level, weight) if weight is not None else None
    d_l = _pick(level, grad_output) if grad_output is not None else None
    T: tl.constexpr = tl.float64 if x_l.dtype.element_ty == tl.float64 else tl.float32
    formula = (alpha0.to(T), alpha1.to(T), gamma.to(T))
    scale = 1.0
    if grad_output is not None and GRAD_OUTPUT_IS_SCALAR:
        scale = tl.load(d_l).to(T)
    if divisor is not None:
        scale = scale / _denominator(divisor, T)
    lane = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    if start + BLOCK <= length:
        _elementwise_tile(
            x_l, y_l, w_l, d_l, out_l, lam, index, scale, row, length, rows, start, lane, None,
            formula, ROWS, WEIGHT_PER_ROW, GRAD_OUTPUT_IS_SCALAR, GAMMA_IS_2,
        )  # fmt: skip
    else:
        _elementwise_tile(
            x_l, y_l, w_l, d_l, out_l, lam, index, scale, row, length, rows, start, lane,
            lane < length - start, formula, ROWS, WEIGHT_PER_ROW, GRAD_OUTPUT_IS_SCALAR, GAMMA_IS_2,
        )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["tiles"])
def fmkernels_scale_kernel(
    grad,  # tuple of pointers, one per level: gradients [inner], multiplied in place
    grad_output,  # scalar
    divisor,  # scalar
    first, programs_per_row, inner,  # tuples of each level's first tile and sizes (packed)
    tiles,  # of all levels
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad *= grad_output / divisor; where that is 1, no program reads or writes grad."""
    T: tl.constexpr = tl.float64 if grad[0].dtype.element_ty == tl.float64 else tl.float32
    scale = tl.load(grad_output).to(T) / tl.load(divisor).to(T)
    lane = tl.arange(0, BLOCK)
    if scale != 1.0:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            level, _, length, start = _locate(
                tile, first, programs_per_row, inner, BLOCK, False, False
            )
            at = _pick(level, grad) + start + lane
            if start + BLOCK <= length:
                tl.store(at, tl.load(at).to(T) * scale)
            else:
                mask = lane < length - start
                tl.store(at, tl.load(at, mask, other=0.0).to(T) * scale, mask)


@dataclass(frozen=True)
class _Grid:
    """One grid for all levels: program numbers and sizes as the kernels take them."""

    programs: int
    sizes: tuple[tuple[int, ...], ...]  # first, programs_per_row and inner of each level, packed
    aligned: bool  # rows start at multiples of 16 elements

    @staticmethod
    @lru_cache
    def of(elements: tuple[int, ...], rows: int, extent: int) -> "_Grid":
        """Of levels of so many elements; a program computes ``extent`` elements of a row."""
        inner = [n // rows for n in elements]
        programs_per_row = [-(-n // extent) for n in inner]
        first = [0, *itertools.accumulate(rows * n for n in programs_per_row)]
        return _Grid(
            first[-1],
            tuple(tuple(map(_pack, sizes)) for sizes in (first[:-1], programs_per_row, inner)),
            all(n % 16 == 0 for n in inner),
        )


def _sizes(levels: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([x.numel() for x in levels])


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
    """Write the reduced loss; its gradients, unless there are none; and what to divide those by.

    All tensors are dense, in the memory order of ``logits``. ``weights`` is empty, or holds one
    tensor of ``rows`` or of all elements per level. Gradients are already divided by a
    ``normalizer``, but not by the number of elements that count: that is the ``divisor``.
    """
    sizes = _sizes(logits)
    elements = sum(sizes)
    if not elements:
        rows = 1  # of no element, for the one program that writes the loss
    launch = launch_parameters("soft_target_focal_loss", loss.device)
    tiles = launch.tiles(elements)
    grid = _Grid.of(sizes, rows, tiles * launch.block)
    programs = max(grid.programs, 1)
    losses = loss.new_empty(programs)
    counts = None
    if mean and normalizer is None:
        counts = loss.new_empty(programs, dtype=torch.int32)
    with torch.cuda.device_of(loss):
        fmkernels_sum_kernel[(programs,)](
            tuple(logits), tuple(targets), tuple(weights) or None, tuple(gradients) or None,
            lam, index, normalizer, losses, counts, arrival_counter(loss.device), loss, divisor,
            *grid.sizes, rows, tiles, alpha0, alpha1, gamma,
            BLOCK=launch.block, ROWS=rows > 1, ALIGNED=grid.aligned and rows > 1,
            WEIGHT_PER_ROW=all(w.numel() == rows for w in weights), GAMMA_IS_2=gamma == 2.0,
            num_warps=_warps(launch, loss.dtype), debug=debug(),
        )  # fmt: skip


def _warps(launch: Launch, dtype: torch.dtype) -> int:
    return launch.num_warps * (2 if dtype == torch.float64 else 1)  # half the values per thread


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
    """Write the loss of every element."""
    _launch_elementwise(
        (), logits, targets, weights, lam, index, rows, alpha0, alpha1, gamma, None, losses
    )


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
    """Write d loss / d logits * grad_output / max(divisor, 1).

    ``grad_outputs`` holds, per level, a tensor like the logits or one scalar.
    """
    _launch_elementwise(
        grad_outputs, logits, targets, weights, lam, index, rows, alpha0, alpha1, gamma, divisor,
        gradients,
    )  # fmt: skip


def _launch_elementwise(
    grad_outputs, logits, targets, weights, lam, index, rows, alpha0, alpha1, gamma, divisor, out
):
    launch = launch_parameters("soft_target_focal_loss", logits[0].device)
    grid = _Grid.of(_sizes(logits), rows, launch.block)
    if grid.programs:
        with torch.cuda.device_of(logits[0]):
            fmkernels_elementwise_kernel[(grid.programs,)](
                tuple(logits), tuple(targets), tuple(weights) or None, tuple(grad_outputs) or None,
                tuple(out), lam, index, divisor, *grid.sizes, rows, alpha0, alpha1, gamma,
                BLOCK=launch.block, ROWS=rows > 1, ALIGNED=grid.aligned and rows > 1,
                WEIGHT_PER_ROW=all(w.numel() == rows for w in weights),
                GRAD_OUTPUT_IS_SCALAR=all(grad.dim() == 0 for grad in grad_outputs),
                GAMMA_IS_2=gamma == 2.0, num_warps=_warps(launch, out[0].dtype), debug=debug(),
            )  # fmt: skip


def soft_target_focal_loss_scale(
    gradients: Sequence[Tensor], grad_output: Tensor, divisor: Tensor
) -> None:
    """gradients *= grad_output / divisor, in place; moves no byte where that factor is 1."""
    device = gradients[0].device
    grid = _Grid.of(_sizes(gradients), 1, SCALE_BLOCK)
    programs = min(grid.programs, SCALE_PROGRAMS * processors(device))
    if programs:
        with torch.cuda.device_of(gradients[0]):
            fmkernels_scale_kernel[(programs,)](
                tuple(gradients), grad_output, divisor, *grid.sizes, grid.programs,
                BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS,
            )  # fmt: skip
