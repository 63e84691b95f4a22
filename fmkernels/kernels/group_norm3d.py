"""Group normalization with the residual sum and the activation on the GPU: two launches each way.

A sample is S rows of C channels (channels last), or C runs of S elements (contiguous). A program
computes a chunk of one sample: some tiles of ``R`` rows and ``K`` channels; one channel where the
memory is contiguous. The first launch writes the sums of every chunk, the second one adds them up
in a fixed order and computes all elements. Nothing is converted to another memory layout.

Forward: each lane of a tile keeps its first value as a pivot and sums differences to it and their
squares. A pivot that is one of n values costs at most a factor n of rounding, whatever the mean:
the squares add up to at most n + 1 times the sum of squares about the mean. Lanes and chunks are
combined by Chan's formula. Before that, ``FOLD`` neighboring channels, which never span two groups,
become a slot; a slot holds a mean and a sum of squares about it.

Backward: with z the sum before the activation, the first launch sums dz and dz * x_hat per channel,
for the gradients of weight and bias, and both times the weight per slot, for that of x. The first
programs of the second launch add up the former.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.launching import quick
from fmkernels.kernels.tuning import Launch, launch_parameters

NONE, RELU, LEAKY_RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MAX_CHANNELS = 128  # of a tile
SUMS = tl.constexpr(512)  # of chunks, that a program adds up at a time
MIN_ELEMENTS = 16  # of a program, for each sum of a chunk that it adds up
_SIZES = ["S", "chunks", "tiles"]


@triton.jit
def _locate(
    program, S, chunks, tiles,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Sample, first channel, chunk, rows of the chunk, first element (int64)."""
    BLOCKS: tl.constexpr = (C + K - 1) // K
    channel = program % BLOCKS * K
    program = program // BLOCKS
    chunk = program % chunks
    n = (program // chunks).to(tl.int64)
    first = chunk.to(tl.int64) * tiles * R
    rows = tl.minimum(S - first, tiles * R).to(tl.int32)
    start = n * S * C + (first * C + channel if LAST else channel.to(tl.int64) * S + first)
    return n, channel, chunk, rows, start


@triton.jit
def _lanes(channel, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, LAST: tl.constexpr):
    """Rows [R, 1], channels [1, K] and offsets [R, K] of a tile."""
    r = tl.arange(0, R)[:, None]
    k = tl.arange(0, K)[None, :]
    c = channel + k
    return r, c, (r * C if LAST else r) + k


@triton.jit
def _load(x, mask, T: tl.constexpr):
    OTHER: tl.constexpr = None if mask is None else 0
    return tl.load(x, mask, other=OTHER).to(T)


@triton.jit
def _both(mask, there):
    return mask if there is None else mask & there


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """[R, K] as [R, slots, FOLD]."""
    return x.reshape(x.shape[0], x.shape[1] // FOLD, FOLD)


@triton.jit
def _add_up(x):
    """[R, slots, FOLD] to [slots]."""
    return tl.sum(tl.sum(x, 2), 0)


@quick
@triton.jit(do_not_specialize=_SIZES)
def fmkernels_moments_kernel(
    x,  # [N, S, C] or [N, C, S]
    sums,  # [N, 2, slots, chunks], written: mean and sum of squares about it
    S, chunks, tiles,  # tiles of a program
    C: tl.constexpr, FOLD: tl.constexpr, K: tl.constexpr, R: tl.constexpr, LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        S = S // 16 * 16  # as the compiler can see
    T: tl.constexpr = sums.dtype.element_ty
    STEP: tl.constexpr = R * C if LAST else R
    SLOTS: tl.constexpr = C // FOLD
    n, channel, chunk, rows, start = _locate(tl.program_id(0), S, chunks, tiles, C, K, R, LAST)
    r, c, lanes = _lanes(channel, C, K, R, LAST)
    there = None if C % K == 0 else c < C
    at = start
    if rows >= R:
        pivot = _load(x + at + lanes, there, T)
    else:
        pivot = _load(x + at + lanes, _both(r < rows, there), T)
    total, squares = tl.zeros((R, K), T), tl.zeros((R, K), T)
    for _ in range(1, rows // R):
        at += STEP
        off = _load(x + at + lanes, there, T) - pivot
        total += off
        squares += off * off
    if (rows > R) & (rows % R > 0):
        at += STEP
        mask = r < rows % R
        off = tl.where(mask, _load(x + at + lanes, _both(mask, there), T) - pivot, 0.0)
        total += off
        squares += off * off
    count = ((rows - r + R - 1) // R).to(T)  # of each lane
    mean = total / tl.maximum(count, 1.0)
    squares = tl.maximum(squares - total * mean, 0.0)
    # means are added up relative to the first value of the slot
    column = tl.arange(0, K // FOLD)
    slot = channel // FOLD + column
    first = tl.load(x + start + column * FOLD, slot < SLOTS, other=0).to(T)
    mean = _fold(pivot + mean, FOLD) - first[None, :, None]
    count = tl.expand_dims(count, 2)
    slot_mean = _add_up(mean * count) / (rows * FOLD)
    off = mean - slot_mean[None, :, None]
    slot_squares = _add_up(_fold(squares, FOLD) + count * (off * off))
    to = (n * 2 * SLOTS + slot) * chunks + chunk
    tl.store(sums + to, first + slot_mean, slot < SLOTS)
    tl.store(sums + to + SLOTS * chunks, slot_squares, slot < SLOTS)


@triton.jit
def _groups(channel, C: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The groups of the channels of a tile, [GROUPS]."""
    group = channel // WIDTH + tl.arange(0, GROUPS)
    return group, group < C // WIDTH


@triton.jit
def _per_channel(values, channel, c, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Values of groups [GROUPS] as values of channels, [1, K] or [1, 1]."""
    if GROUPS > 1:
        group = tl.minimum(c // WIDTH - channel // WIDTH, GROUPS - 1)
        values = tl.gather(values, group.reshape(c.shape[1]), 0)
    return values[None, :]


@triton.jit
def _combined_moments(
    sums, n, group, is_group, S, chunks, tiles, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr, R: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Mean and inverse standard deviation of groups, from all chunks of their slots, by Chan."""
    T: tl.constexpr = sums.dtype.element_ty
    BLOCK: tl.constexpr = SUMS // GROUPS
    SLOTS: tl.constexpr = C // FOLD
    run = WIDTH // FOLD * chunks  # the sums of a group lie side by side
    means = sums + n * 2 * SLOTS * chunks + group[None, :] * run
    first = tl.load(means, is_group[None, :], other=0.0)
    i = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros((BLOCK, GROUPS), T)
    for start in range(0, run, BLOCK):
        mask = (start + i < run) & is_group[None, :]
        share = _rows_of(start + i, S, chunks, tiles, R).to(T) / S
        off = tl.where(mask, tl.load(means + start + i, mask, other=0.0) - first, 0.0)
        total += off * share
    mean = tl.sum(first, 0) + tl.sum(total, 0) / (WIDTH // FOLD)
    total = tl.zeros((BLOCK, GROUPS), T)
    for start in range(0, run, BLOCK):
        mask = (start + i < run) & is_group[None, :]
        share = _rows_of(start + i, S, chunks, tiles, R).to(T) / S
        off = tl.load(means + start + i, mask, other=0.0) - mean[None, :]
        squares = tl.load(means + SLOTS * chunks + start + i, mask, other=0.0)
        total += tl.where(mask, share * FOLD * (off * off) + squares / S, 0.0)
    return mean, tl.rsqrt(tl.sum(total, 0) / WIDTH + eps.to(T))


@triton.jit
def _rows_of(i, S, chunks, tiles, R: tl.constexpr):
    """The rows of the chunk that sum i of a group belongs to."""
    chunk = i % chunks
    return tl.where(chunk == chunks - 1, S - chunk.to(tl.int64) * tiles * R, tiles * R)


@triton.jit
def _normalize_tile(
    x, residual, out, at, mask, scale, shift, slope, T: tl.constexpr, ACTIVATION: tl.constexpr
):
    y = _load(x + at, mask, T) * scale + shift
    if residual is not None:
        y += _load(residual + at, mask, T)
    if ACTIVATION == RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == LEAKY_RELU:
        y = tl.where(y > 0, y, y * slope)
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


@quick
@triton.jit(do_not_specialize=_SIZES)
def fmkernels_normalize_kernel(
    x,  # [N, S, C] or [N, C, S]
    residual,  # likewise, or None
    weight,  # [C], or None
    bias,  # [C], or None
    sums,  # [N, 2, slots, chunks], of fmkernels_moments_kernel
    out,  # like x, written
    moments,  # [N, 2, groups], written: mean and inverse standard deviation
    S, chunks, tiles, eps: tl.float64, slope: tl.float64,
    C: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    GROUPS: tl.constexpr, LAST: tl.constexpr, ALIGNED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        S = S // 16 * 16  # as the compiler can see
    T: tl.constexpr = sums.dtype.element_ty
    STEP: tl.constexpr = R * C if LAST else R
    n, channel, chunk, rows, at = _locate(tl.program_id(0), S, chunks, tiles, C, K, R, LAST)
    r, c, lanes = _lanes(channel, C, K, R, LAST)
    there = None if C % K == 0 else c < C
    group, is_group = _groups(channel, C, WIDTH, GROUPS)
    mean, inverse = _combined_moments(
        sums, n, group, is_group, S, chunks, tiles, eps, C, WIDTH, FOLD, R, GROUPS
    )
    begins = group * WIDTH  # one program stores the moments of a group
    own = is_group & (begins >= channel) & (begins < channel + K) & (chunk == 0)
    to = moments + n * 2 * (C // WIDTH) + group
    tl.store(to, mean, own)
    tl.store(to + C // WIDTH, inverse, own)
    scale = _per_channel(inverse, channel, c, WIDTH, GROUPS)
    if weight is not None:
        scale = scale * _load(weight + c, there, T)
    shift = -_per_channel(mean, channel, c, WIDTH, GROUPS) * scale
    if bias is not None:
        shift += _load(bias + c, there, T)
    slope = slope.to(T)
    for _ in range(rows // R):
        _normalize_tile(x, residual, out, at + lanes, there, scale, shift, slope, T, ACTIVATION)
        at += STEP
    if rows % R > 0:
        mask = _both(r < rows % R, there)
        _normalize_tile(x, residual, out, at + lanes, mask, scale, shift, slope, T, ACTIVATION)


@triton.jit
def _grad_before_activation(
    grad_output, out, at, mask, slope, T: tl.constexpr, ACTIVATION: tl.constexpr
):
    grad = _load(grad_output + at, mask, T)
    if ACTIVATION == RELU:
        grad = tl.where(_load(out + at, mask, T) > 0, grad, 0.0)
    if ACTIVATION == LEAKY_RELU:
        grad = tl.where(_load(out + at, mask, T) > 0, grad, grad * slope)
    return grad


@triton.jit
def _grad_sums_tile(
    grad_output, x, out, grad_residual, at, mask, mean, slope,
    T: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dz and dz * (x - mean) of a tile; 0 where the mask says so."""
    grad = _grad_before_activation(grad_output, out, at, mask, slope, T, ACTIVATION)
    if grad_residual is not None:
        tl.store(grad_residual + at, grad.to(grad_residual.dtype.element_ty), mask)
    return grad, grad * (_load(x + at, mask, T) - mean)


@quick
@triton.jit(do_not_specialize=_SIZES)
def fmkernels_grad_sums_kernel(
    grad_output,  # [N, S, C] or [N, C, S]
    x,  # likewise
    out,  # likewise, or None without an activation
    grad_residual,  # likewise, written: dz; or None
    weight,  # [C], or None
    moments,  # [N, 2, groups]
    sums,  # [N, 2, C, chunks], written: of dz and of dz * x_hat
    slot_sums,  # [N, 2, slots, chunks], written: of both times the weight
    S, chunks, tiles, slope: tl.float64,
    C: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    LAST: tl.constexpr, ALIGNED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        S = S // 16 * 16  # as the compiler can see
    T: tl.constexpr = sums.dtype.element_ty
    STEP: tl.constexpr = R * C if LAST else R
    SLOTS: tl.constexpr = C // FOLD
    n, channel, chunk, rows, at = _locate(tl.program_id(0), S, chunks, tiles, C, K, R, LAST)
    r, c, lanes = _lanes(channel, C, K, R, LAST)
    there = None if C % K == 0 else c < C
    group_moments = moments + n * 2 * (C // WIDTH) + c // WIDTH
    mean, inverse = _load(group_moments, there, T), _load(group_moments + C // WIDTH, there, T)
    slope = slope.to(T)
    total, products = tl.zeros((R, K), T), tl.zeros((R, K), T)
    for _ in range(rows // R):
        grad, product = _grad_sums_tile(
            grad_output, x, out, grad_residual, at + lanes, there, mean, slope, T, ACTIVATION
        )
        total += grad
        products += product
        at += STEP
    if rows % R > 0:
        mask = _both(r < rows % R, there)
        grad, product = _grad_sums_tile(
            grad_output, x, out, grad_residual, at + lanes, mask, mean, slope, T, ACTIVATION
        )
        total += grad
        products += product
    total = tl.sum(total, 0)[None, :]
    products = tl.sum(products, 0)[None, :] * inverse
    to = (n * 2 * C + c) * chunks + chunk
    tl.store(sums + to, total, there)
    tl.store(sums + to + C * chunks, products, there)
    if weight is not None:
        scale = _load(weight + c, there, T)
        total *= scale
        products *= scale
    slot = channel // FOLD + tl.arange(0, K // FOLD)
    to = (n * 2 * SLOTS + slot) * chunks + chunk
    tl.store(slot_sums + to, _add_up(_fold(total, FOLD)), slot < SLOTS)
    tl.store(slot_sums + to + SLOTS * chunks, _add_up(_fold(products, FOLD)), slot < SLOTS)


@triton.jit
def _grad_parameters(sums, grad_weight, grad_bias, c, N, chunks, C: tl.constexpr):
    """Add up the sums of one channel over all samples and chunks."""
    T: tl.constexpr = sums.dtype.element_ty
    i = tl.arange(0, SUMS).to(tl.int64)
    total, products = tl.zeros((SUMS,), T), tl.zeros((SUMS,), T)
    for start in range(0, N * chunks, SUMS):
        n = (start + i) // chunks
        at = sums + (n * 2 * C + c) * chunks + (start + i - n * chunks)
        total += tl.load(at, n < N, other=0.0)
        products += tl.load(at + C * chunks, n < N, other=0.0)
    tl.store(grad_bias + c, tl.sum(total, 0))
    tl.store(grad_weight + c, tl.sum(products, 0))


@triton.jit
def _grad_x_tile(
    grad_output, x, out, grad_x, at, mask, scale, by_x, shift, slope,
    T: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    grad = _grad_before_activation(grad_output, out, at, mask, slope, T, ACTIVATION)
    result = grad * scale + (_load(x + at, mask, T) * by_x + shift)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask)


@quick
@triton.jit(do_not_specialize=[*_SIZES, "N"])
def fmkernels_grad_x_kernel(
    grad_output,  # [N, S, C] or [N, C, S]; or dz
    x,  # likewise
    out,  # likewise, or None: grad_output is dz
    weight,  # [C], or None
    moments,  # [N, 2, groups]
    sums,  # [N, 2, C, chunks], of fmkernels_grad_sums_kernel
    slot_sums,  # [N, 2, slots, chunks], likewise
    grad_x,  # like x, written
    grad_weight,  # [C], written
    grad_bias,  # [C], written
    N, S, chunks, tiles, slope: tl.float64,
    C: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    GROUPS: tl.constexpr, LAST: tl.constexpr, ALIGNED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx = (dz * weight - mean(dz * weight) - x_hat * mean(dz * weight * x_hat)) / deviation."""
    if ALIGNED:
        S = S // 16 * 16  # as the compiler can see
    T: tl.constexpr = sums.dtype.element_ty
    if tl.program_id(0) < C:
        _grad_parameters(sums, grad_weight, grad_bias, tl.program_id(0), N, chunks, C)
    else:
        STEP: tl.constexpr = R * C if LAST else R
        program = tl.program_id(0) - C
        n, channel, _, rows, at = _locate(program, S, chunks, tiles, C, K, R, LAST)
        r, c, lanes = _lanes(channel, C, K, R, LAST)
        there = None if C % K == 0 else c < C
        group, is_group = _groups(channel, C, WIDTH, GROUPS)
        total, products = _group_sums(slot_sums, n, group, is_group, chunks, C, WIDTH, FOLD, GROUPS)
        own = moments + n * 2 * (C // WIDTH) + group
        mean = tl.load(own, is_group, other=0.0)
        inverse = tl.load(own + C // WIDTH, is_group, other=0.0)
        count = S.to(T) * WIDTH
        by_x = -inverse * inverse * (products / count)
        shift = -inverse * (total / count) - by_x * mean
        scale = _per_channel(inverse, channel, c, WIDTH, GROUPS)
        by_x = _per_channel(by_x, channel, c, WIDTH, GROUPS)
        shift = _per_channel(shift, channel, c, WIDTH, GROUPS)
        if weight is not None:
            scale = scale * _load(weight + c, there, T)
        for _ in range(rows // R):
            _grad_x_tile(
                grad_output, x, out, grad_x, at + lanes, there, scale, by_x, shift, slope.to(T), T,
                ACTIVATION,
            )  # fmt: skip
            at += STEP
        if rows % R > 0:
            mask = _both(r < rows % R, there)
            _grad_x_tile(
                grad_output, x, out, grad_x, at + lanes, mask, scale, by_x, shift, slope.to(T), T,
                ACTIVATION,
            )  # fmt: skip


@triton.jit
def _group_sums(
    sums, n, group, is_group, chunks,
    C: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Both sums of groups, over all chunks of their slots."""
    T: tl.constexpr = sums.dtype.element_ty
    BLOCK: tl.constexpr = SUMS // GROUPS
    run = WIDTH // FOLD * chunks
    first = sums + n * 2 * (C // FOLD) * chunks + group[None, :] * run
    i = tl.arange(0, BLOCK)[:, None]
    total, products = tl.zeros((BLOCK, GROUPS), T), tl.zeros((BLOCK, GROUPS), T)
    for start in range(0, run, BLOCK):
        mask = (start + i < run) & is_group[None, :]
        total += tl.load(first + start + i, mask, other=0.0)
        products += tl.load(first + C // FOLD * chunks + start + i, mask, other=0.0)
    return tl.sum(total, 0), tl.sum(products, 0)


class _Tiles(NamedTuple):
    """How a layout of so many channels and groups is cut; the names are those of the kernels."""

    C: int
    WIDTH: int  # channels of a group
    FOLD: int
    K: int
    R: int
    GROUPS: int  # at least as many as a tile touches

    @staticmethod
    @cache
    def of(channels: int, groups: int, last: bool, block: int) -> "_Tiles":
        width = channels // groups
        k = min(MAX_CHANNELS, triton.next_power_of_2(channels)) if last else 1
        touched = (
            (min(first + k, channels) - 1) // width - first // width + 1
            for first in range(0, channels, k)
        )
        return _Tiles(
            channels, width, math.gcd(width, k), k, block // k,
            triton.next_power_of_2(max(touched)),
        )  # fmt: skip

    def chunks(self, samples: int, rows: int, launch: Launch) -> tuple[int, int]:
        """Chunks of a sample, and tiles of a chunk."""
        tiles = -(-rows // self.R)
        elements = tiles * self.R * self.K
        sums = self.GROUPS * (self.WIDTH // self.FOLD)  # of each chunk, that a program adds up
        most = max(1, math.isqrt(elements // (MIN_ELEMENTS * sums)))
        of_chunk = max(launch.tiles(samples * self.blocks * elements), -(-tiles // most))
        return -(-tiles // of_chunk), of_chunk

    @property
    def blocks(self) -> int:
        return -(-self.C // self.K)


def group_norm3d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    negative_slope: float,
    out: Tensor,
    moments: Tensor,
) -> None:
    """Write act(group_norm(x) + residual), and the moments [N, 2, groups].

    Args:
        x: [N, C, ...], contiguous or channels last; ``residual`` and ``out`` alike.
        weight: contiguous [C] of any floating dtype; ``bias`` alike.
        negative_slope: 1 for no activation, 0 for ReLU.
        moments: means and inverse standard deviations, in the dtype of the arithmetic.
    """
    if not x.numel():
        return
    launch = launch_parameters("group_norm3d", x.device)
    (samples, channels), rows, last = x.shape[:2], x.shape[2:].numel(), _channels_last(x)
    tiling = _Tiles.of(channels, num_groups, last, launch.block)
    chunks, tiles = tiling.chunks(samples, rows, launch)
    C, WIDTH, FOLD, K, R, GROUPS = tiling
    sums = moments.new_empty((samples, 2, C // FOLD, chunks))
    grid, aligned = (samples * tiling.blocks * chunks,), not last and rows % 16 == 0
    with torch.cuda.device_of(x):
        fmkernels_moments_kernel[grid](
            x, sums, rows, chunks, tiles, C=C, FOLD=FOLD, K=K, R=R, LAST=last, ALIGNED=aligned,
            num_warps=launch.num_warps,
        )  # fmt: skip
        fmkernels_normalize_kernel[grid](
            x, residual, weight, bias, sums, out, moments, rows, chunks, tiles, eps,
            negative_slope, C=C, WIDTH=WIDTH, FOLD=FOLD, K=K, R=R, GROUPS=GROUPS, LAST=last,
            ALIGNED=aligned, ACTIVATION=_activation(negative_slope), num_warps=launch.num_warps,
            **launch.register_limit,
        )  # fmt: skip


def group_norm3d_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: Tensor,
    out: Tensor | None,
    num_groups: int,
    negative_slope: float,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_residual: Tensor,
) -> None:
    """Write all gradients; that to the residual unless it has no element.

    Args:
        grad_output: like x.
        out: the result where there was an activation.
        grad_weight: [C], in the dtype of the arithmetic; ``grad_bias`` alike.
    """
    if not x.numel():
        grad_weight.zero_()
        grad_bias.zero_()
        return
    launch = launch_parameters("group_norm3d", x.device)
    (samples, channels), rows, last = x.shape[:2], x.shape[2:].numel(), _channels_last(x)
    tiling = _Tiles.of(channels, num_groups, last, launch.block)
    chunks, tiles = tiling.chunks(samples, rows, launch)
    C, WIDTH, FOLD, K, R, GROUPS = tiling
    sums = moments.new_empty((samples, 2, C, chunks))
    slot_sums = sums.new_empty((samples, 2, C // FOLD, chunks))
    programs, aligned = samples * tiling.blocks * chunks, not last and rows % 16 == 0
    activation = _activation(negative_slope)
    dz = grad_residual if grad_residual.numel() else None
    with torch.cuda.device_of(x):
        fmkernels_grad_sums_kernel[(programs,)](
            grad_output, x, out, dz, weight, moments, sums, slot_sums, rows, chunks, tiles,
            negative_slope, C=C, WIDTH=WIDTH, FOLD=FOLD, K=K, R=R, LAST=last, ALIGNED=aligned,
            ACTIVATION=activation, num_warps=launch.num_warps,
        )  # fmt: skip
        if dz is not None:  # read instead of two tensors
            grad_output, out, activation = dz, None, NONE.value
        fmkernels_grad_x_kernel[(C + programs,)](
            grad_output, x, out, weight, moments, sums, slot_sums, grad_x, grad_weight, grad_bias,
            samples, rows, chunks, tiles, negative_slope, C=C, WIDTH=WIDTH, FOLD=FOLD, K=K, R=R,
            GROUPS=GROUPS, LAST=last, ALIGNED=aligned, ACTIVATION=activation,
            num_warps=launch.num_warps, **launch.register_limit,
        )  # fmt: skip


def _channels_last(x: Tensor) -> bool:
    """Whether channels are the fastest axis; where rows have one element, both layouts are one."""
    return x.shape[2:].numel() == 1 or not x.is_contiguous()


def _activation(negative_slope: float) -> int:
    if negative_slope == 1:
        return NONE.value
    return RELU.value if negative_slope == 0 else LEAKY_RELU.value
