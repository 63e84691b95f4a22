"""Soft-target focal loss on the GPU: loss and gradient of an element come from one device function.

Levels of a feature pyramid are handled by one launch. A level is ``rows`` rows of ``inner`` elements (one row unless
the targets are mixed or the weight differs by sample); a program owns one tile of ``BLOCK`` elements of one row.
Sums are deterministic: every program writes one partial, a second launch of one program adds them in order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.dtypes import compute_dtype
from fmkernels.kernels.arithmetic import LOG2E, divide, log1p, log2
from fmkernels.kernels.tuning import launch_parameters

SMALLEST = tl.constexpr(1e-37)  # keeps |d|^gamma and p q / |d| finite in float32
SMALLEST_DOUBLE = tl.constexpr(1e-290)
LARGEST = tl.constexpr(3.4028234663852886e38)
FINISH_BLOCK = tl.constexpr(4096)


@triton.jit
def soft_target_focal(x, y, factor, gamma, GAMMA_IS_2: tl.constexpr):
    """Loss and d loss / d x of each element, both times ``factor``; all in the compute type.

    With e = exp(-|x|) and u = 1 - y, v = y for x > 0 (u = y, v = 1 - y else), t = u - v e, both signs of x share
    |p - y| = |t| / (1 + e) and cross entropy = u |x| + log1p(e): nothing cancels but what must.
    """
    e = tl.exp(-tl.abs(x)) if x.dtype == tl.float64 else tl.exp2(tl.abs(x) * -LOG2E)
    positive = x > 0
    u = tl.where(positive, 1.0 - y, y)
    v = tl.where(positive, y, 1.0 - y)
    t = u - v * e
    ce = u * tl.minimum(tl.abs(x), LARGEST) + log1p(e)
    if GAMMA_IS_2:  # d^2 CE, and d (2 p (1 - p) CE + d^2), each power of 1 / (1 + e) taken once
        square = t * t
        scale = divide(divide(factor, 1.0 + e), 1.0 + e)
        loss = scale * (square * ce)
        grad = divide(scale, 1.0 + e) * t * (2.0 * (e * ce) + square)
    else:
        d = divide(t, 1.0 + e)
        zero = tl.abs(d) < (SMALLEST_DOUBLE if x.dtype == tl.float64 else SMALLEST)
        power = factor * tl.exp2(
            gamma * tl.where(zero, -1e30, log2(tl.abs(d)))
        )  # 0^gamma is 0, and 1 for gamma = 0
        slope = tl.where(zero, 0.0, divide(divide(e, 1.0 + e), t))  # p (1 - p) / d
        loss = power * ce
        grad = power * (gamma * (slope * ce) + d)
    return loss, tl.where(positive, grad, -grad)


@triton.jit
def _pick(level, values):
    """values[level] of a tuple, for a level known only at run time."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(level == i, values[i], value)
    return value


@triton.jit
def _place(first, shares, inner, EXTENT, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """What this program owns: level, row, elements of the row, and its first element in the row (int64)."""
    program = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, len(first)):
        level += (program >= _unpack(first[i])).to(tl.int32)
    share = (program - _unpack(_pick(level, first))).to(tl.int64)
    length = _unpack(_pick(level, inner)).to(tl.int64)
    if ROWS:
        per_row = _unpack(_pick(level, shares)).to(tl.int64)
        row = share // per_row
        share = share - row * per_row
        if ALIGNED:
            length = tl.multiple_of(length, 16)
    else:
        row = share * 0
    return level, row, length, share * EXTENT


@triton.jit
def _unpack(size):
    return (size - 3) >> 1


def _pack(size: int) -> int:
    """An odd number above 1, which the JIT never specialises on (1 and multiples of 16 would each be a variant)."""
    return 2 * size + 3


@triton.jit
def _load_tile(
    x, y, weight, lam, index, row, length, rows, column, mask, alpha0, alpha1,
    ROWS: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr,
):  # fmt: skip
    """Offsets, logits, targets and factors of one tile, in the type of alpha0, and where it is ignored.

    ``mask`` is None for a tile that lies whole in its row.
    """
    T: tl.constexpr = alpha0.dtype
    OTHER: tl.constexpr = None if mask is None else 0
    offset = row * length + column if ROWS else column
    logit = tl.load(x + offset, mask, other=OTHER).to(T)
    target = tl.load(y + offset, mask, other=OTHER).to(T)
    ignored = target < 0
    if lam is not None:
        share = tl.load(lam + row).to(T)
        partner = tl.load(index + row).to(tl.int64)
        tl.device_assert((partner >= 0) & (partner < rows), "mix: index out of range")
        second = tl.load(y + partner * length + column, mask, other=OTHER).to(T)
        ignored = ignored | (second < 0)
        target = share * target + (1.0 - share) * second
    factor = alpha0 + target * (alpha1 - alpha0)
    if weight is not None:
        if WEIGHT_PER_ROW:
            factor *= tl.load(weight + row).to(T)
        else:
            factor *= tl.load(weight + offset, mask, other=OTHER).to(T)
    if mask is not None:
        ignored = ignored | (column >= length)
    return offset, logit, target, factor, ignored


@triton.jit
def _sum_tile(
    x, y, weight, grad_out, lam, index, scale, row, length, rows, column, mask, formula,
    ROWS: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """Store the tile's gradients where wanted; return sums of 4 losses each, and how many of the 4 count."""
    offset, logit, target, factor, ignored = _load_tile(
        x,
        y,
        weight,
        lam,
        index,
        row,
        length,
        rows,
        column,
        mask,
        formula[0],
        formula[1],
        ROWS,
        WEIGHT_PER_ROW,
    )
    logit = tl.where(
        ignored, 0.0, logit
    )  # cleared here and not in the results: a quarter fewer registers
    target = tl.where(ignored, 0.0, target)
    factor = tl.where(ignored, 0.0, factor)
    loss, grad = soft_target_focal(logit, target, factor, formula[2], GAMMA_IS_2)
    if grad_out is not None:
        tl.store(grad_out + offset, grad * scale, mask)
    FOURS: tl.constexpr = loss.shape[0] // 4  # which one thread holds
    return tl.sum(loss.reshape(FOURS, 4), axis=1), tl.sum(
        (1 - ignored.to(tl.int32)).reshape(FOURS, 4), axis=1
    )


@triton.jit
def _denominator(normalizer, T: tl.constexpr):
    value = tl.load(normalizer).to(T)
    return tl.where(value < 1.0, 1.0, value)


@triton.jit
def sum_kernel(
    x,  # tuple of pointers, one per level: logits [rows, inner]
    y,  # the same: targets [rows, inner]
    weight,  # the same: [rows] or [rows, inner]; or None
    grad,  # the same: gradients [rows, inner], written; or None
    lam,  # [rows], or None
    index,  # [rows] int64, or None
    normalizer,  # scalar by which gradients are divided, or None
    losses,  # [programs], written
    counts,  # [programs] int32, written; or None
    first, shares, inner,  # tuples: first program, programs per row, elements per row of each level (packed)
    rows, tiles,  # tiles per program
    alpha0: tl.float64, alpha1: tl.float64, gamma: tl.float64,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr,
    GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    level, row, length, start = _place(first, shares, inner, tiles * BLOCK, ROWS, ALIGNED)
    x_l, y_l = _pick(level, x), _pick(level, y)
    w_l = _pick(level, weight) if weight is not None else None
    g_l = _pick(level, grad) if grad is not None else None
    T: tl.constexpr = losses.dtype.element_ty
    formula = (alpha0.to(T), alpha1.to(T), gamma.to(T))
    scale = 1.0 if normalizer is None else 1.0 / _denominator(normalizer, T)
    loss = tl.zeros((BLOCK // 4,), T)
    count = tl.zeros((BLOCK // 4,), tl.int32)
    column = start + tl.arange(0, BLOCK)
    if start + tiles * BLOCK <= length:
        for _ in range(tiles):
            tile_loss, tile_count = _sum_tile(
                x_l, y_l, w_l, g_l, lam, index, scale, row, length, rows, column, None, formula,
                ROWS, WEIGHT_PER_ROW, GAMMA_IS_2,
            )  # fmt: skip
            loss += tile_loss
            count += tile_count
            column += BLOCK
    else:
        for _ in range(tiles):
            tile_loss, tile_count = _sum_tile(
                x_l, y_l, w_l, g_l, lam, index, scale, row, length, rows, column, column < length, formula,
                ROWS, WEIGHT_PER_ROW, GAMMA_IS_2,
            )  # fmt: skip
            loss += tile_loss
            count += tile_count
            column += BLOCK
    tl.store(losses + tl.program_id(0), tl.sum(loss, axis=0))
    if counts is not None:
        tl.store(counts + tl.program_id(0), tl.sum(count, axis=0))


@triton.jit
def finish_kernel(
    losses,  # [programs]
    counts,  # [programs] int32; or None
    normalizer,  # scalar, or None
    total,  # scalar, written: the reduced loss
    divisor,  # scalar, written: what gradients must still be divided by
    programs,
):
    T: tl.constexpr = losses.dtype.element_ty
    loss = tl.zeros((FINISH_BLOCK,), tl.float64)
    count = tl.zeros((FINISH_BLOCK,), tl.int64)
    for start in range(0, programs, FINISH_BLOCK):
        i = start + tl.arange(0, FINISH_BLOCK)
        loss += tl.load(losses + i, i < programs, other=0.0).to(tl.float64)
        if counts is not None:
            count += tl.load(counts + i, i < programs, other=0).to(tl.int64)
    result = tl.sum(loss, axis=0)
    left = tl.full((), 1.0, tl.float64)
    if normalizer is not None:
        result = result / _denominator(normalizer, tl.float64)
    if counts is not None:
        left = tl.maximum(tl.sum(count, axis=0), 1).to(tl.float64)
        result = result / left
    tl.store(total, result.to(T))
    tl.store(divisor, left.to(T))


@triton.jit
def _elementwise_tile(
    x, y, weight, upstream, out, lam, index, scale, row, length, rows, column, mask, formula,
    ROWS: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr, UPSTREAM_IS_SCALAR: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    """Store the tile's losses; or, where there is an upstream gradient, its gradients times that and ``scale``."""
    offset, logit, target, factor, ignored = _load_tile(
        x,
        y,
        weight,
        lam,
        index,
        row,
        length,
        rows,
        column,
        mask,
        formula[0],
        formula[1],
        ROWS,
        WEIGHT_PER_ROW,
    )
    loss, grad = soft_target_focal(logit, target, factor, formula[2], GAMMA_IS_2)
    if upstream is None:
        result = loss
    elif UPSTREAM_IS_SCALAR:
        result = grad * scale
    else:
        result = grad * (
            tl.load(upstream + offset, mask, other=None if mask is None else 0).to(grad.dtype)
            * scale
        )
    tl.store(out + offset, tl.where(ignored, 0.0, result), mask)


@triton.jit
def elementwise_kernel(
    x,  # tuple of pointers, one per level: logits [rows, inner]
    y,  # the same: targets [rows, inner]
    weight,  # the same: [rows] or [rows, inner]; or None
    upstream,  # the same: gradient of the result [rows, inner] or a scalar; None writes losses, not gradients
    out,  # the same: losses or gradients [rows, inner], written
    lam,  # [rows], or None
    index,  # [rows] int64, or None
    divisor,  # scalar by which gradients are divided (at least 1), or None
    first, shares, inner,  # tuples: first program, programs per row, elements per row of each level (packed)
    rows,
    alpha0: tl.float64, alpha1: tl.float64, gamma: tl.float64,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT_PER_ROW: tl.constexpr,
    UPSTREAM_IS_SCALAR: tl.constexpr, GAMMA_IS_2: tl.constexpr,
):  # fmt: skip
    level, row, length, start = _place(first, shares, inner, BLOCK, ROWS, ALIGNED)
    x_l, y_l, out_l = _pick(level, x), _pick(level, y), _pick(level, out)
    w_l = _pick(level, weight) if weight is not None else None
    u_l = _pick(level, upstream) if upstream is not None else None
    T: tl.constexpr = tl.float64 if x_l.dtype.element_ty == tl.float64 else tl.float32
    formula = (alpha0.to(T), alpha1.to(T), gamma.to(T))
    scale = 1.0
    if upstream is not None and UPSTREAM_IS_SCALAR:
        scale = tl.load(u_l).to(T)
    if divisor is not None:
        scale = scale / _denominator(divisor, T)
    column = start + tl.arange(0, BLOCK)
    if start + BLOCK <= length:
        _elementwise_tile(
            x_l, y_l, w_l, u_l, out_l, lam, index, scale, row, length, rows, column, None, formula,
            ROWS, WEIGHT_PER_ROW, UPSTREAM_IS_SCALAR, GAMMA_IS_2,
        )  # fmt: skip
    else:
        _elementwise_tile(
            x_l, y_l, w_l, u_l, out_l, lam, index, scale, row, length, rows, column, column < length, formula,
            ROWS, WEIGHT_PER_ROW, UPSTREAM_IS_SCALAR, GAMMA_IS_2,
        )  # fmt: skip


@triton.jit
def scale_kernel(grad, factor, divisor, first, shares, inner, BLOCK: tl.constexpr):
    """grad *= factor / divisor in place; where that is 1 every program returns without touching grad."""
    level, _, length, start = _place(first, shares, inner, BLOCK, False, False)
    g_l = _pick(level, grad)
    T: tl.constexpr = tl.float64 if g_l.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.load(factor).to(T) / tl.load(divisor).to(T)
    if scale != 1.0:
        offset = start + tl.arange(0, BLOCK)
        if start + BLOCK <= length:
            tl.store(g_l + offset, tl.load(g_l + offset).to(T) * scale)
        else:
            mask = offset < length
            tl.store(g_l + offset, tl.load(g_l + offset, mask, other=0.0).to(T) * scale, mask)


@dataclass(frozen=True)
class _Grid:
    """How the levels share one grid: program numbers and sizes as the kernels take them."""

    programs: int
    first: tuple[int, ...]
    shares: tuple[int, ...]
    inner: tuple[int, ...]
    aligned: bool

    @staticmethod
    def of(tensors: Sequence[Tensor], rows: int, extent: int) -> "_Grid":
        """A program owns ``extent`` elements of a row."""
        inner = [t.numel() // rows for t in tensors]
        shares = [triton.cdiv(n, extent) for n in inner]
        first = [0, *itertools.accumulate(rows * n for n in shares)]
        return _Grid(
            first[-1],
            tuple(map(_pack, first[:-1])),
            tuple(map(_pack, shares)),
            tuple(map(_pack, inner)),
            all(n % 16 == 0 for n in inner),
        )


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
    """Reduced loss, what its gradients must still be divided by, and those gradients (none where not wanted).

    Every tensor is dense, in the order of ``logits``; ``weights`` is empty or one tensor of ``rows`` or all elements
    per level. Gradients are already divided by ``normalizer`` where one is given.
    """
    launch = launch_parameters("soft_target_focal_loss", logits[0].device)
    tiles = launch.tiles(sum(x.numel() for x in logits))
    grid = _Grid.of(logits, rows, tiles * launch.block)
    dtype = compute_dtype(logits[0].dtype)
    losses = logits[0].new_empty(grid.programs, dtype=dtype)
    count = mean and normalizer is None
    counts = logits[0].new_empty(grid.programs, dtype=torch.int32) if count else None
    total, divisor = logits[0].new_empty((), dtype=dtype), logits[0].new_empty((), dtype=dtype)
    gradients = [torch.empty_like(x) for x in logits] if with_gradient else []
    with torch.cuda.device_of(logits[0]):
        if grid.programs:
            sum_kernel[(grid.programs,)](
                tuple(logits), tuple(targets), tuple(weights) or None, tuple(gradients) or None, lam, index,
                normalizer, losses, counts, grid.first, grid.shares, grid.inner, rows, tiles, alpha0, alpha1, gamma,
                BLOCK=launch.block, ROWS=rows > 1, ALIGNED=grid.aligned and rows > 1,
                WEIGHT_PER_ROW=all(w.numel() == rows for w in weights), GAMMA_IS_2=gamma == 2.0,
                num_warps=launch.num_warps,
            )  # fmt: skip
        finish_kernel[(1,)](losses, counts, normalizer, total, divisor, grid.programs, num_warps=8)
    return total, divisor, gradients


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
    """Losses of every element; or, where ``upstream`` is given, gradients: d loss / d x * upstream / max(divisor, 1).

    ``upstream`` is empty, or per level a tensor like the logits or one scalar.
    """
    launch = launch_parameters("soft_target_focal_loss", logits[0].device)
    grid = _Grid.of(logits, rows, launch.block)
    out = [torch.empty_like(x) for x in logits]
    if grid.programs:
        with torch.cuda.device_of(logits[0]):
            elementwise_kernel[(grid.programs,)](
                tuple(logits), tuple(targets), tuple(weights) or None, tuple(upstream) or None, tuple(out), lam, index,
                divisor, grid.first, grid.shares, grid.inner, rows, alpha0, alpha1, gamma,
                BLOCK=launch.block, ROWS=rows > 1, ALIGNED=grid.aligned and rows > 1,
                WEIGHT_PER_ROW=all(w.numel() == rows for w in weights),
                UPSTREAM_IS_SCALAR=all(u.dim() == 0 for u in upstream), GAMMA_IS_2=gamma == 2.0,
                num_warps=launch.num_warps,
            )  # fmt: skip
    return out


def launch_scale(gradients: Sequence[Tensor], factor: Tensor, divisor: Tensor) -> None:
    """gradients *= factor / divisor, in place; costs no traffic where factor equals divisor."""
    launch = launch_parameters("soft_target_focal_loss", gradients[0].device)
    grid = _Grid.of(gradients, 1, launch.block)
    if grid.programs:
        with torch.cuda.device_of(gradients[0]):
            scale_kernel[(grid.programs,)](
                tuple(gradients), factor, divisor, grid.first, grid.shares, grid.inner,
                BLOCK=launch.block, num_warps=launch.num_warps,
            )  # fmt: skip
