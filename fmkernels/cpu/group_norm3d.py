"""Group normalization on the CPU, with the residual and the activation in the same pass.

Loops see memory as rows of [places, channels, inner]. With channels last, a row is a sample and
inner is 1. In contiguous memory, a row is one channel (one group where moments are computed), or a
sample of one place if it has few voxels; inner is their number.

Rows are cut into chunks. Their sums are added in order, so that the number of threads changes
nothing. A chunk is cut into spans of several places, and the parameters of a place are copied to
the length of a span: loops over few channels would not fill vectors.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fmkernels.cpu.arithmetic import load, store, sum_reordered
from fmkernels.cpu.compiled import njit, parallel_for, subroutine
from fmkernels.cpu.voxels import elements, zero_of

SPAN = 512  # elements, unless a place has more
MIN_SPAN = 128  # likewise; a short row has short spans, for parameters are copied for each row
CHUNK = 1 << 14  # elements, likewise
FEW_VOXELS = 128  # with fewer, a contiguous sample of up to this many elements is one place:
LARGEST_PLACE = 1 << 16
GRAIN_SIZE = 1 << 17  # elements

_STORED = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
}
"""A zero of each dtype that loops take, of the type that they see in memory."""

Cut = tuple[int, int, int, int, int]
"""How rows are cut: (elements of a row, channels, inner, span, elements of a chunk)."""


@subroutine
def _memory(tensor, size, stored):
    """The elements of a dense tensor, which is given as (address, dtype code)."""
    return elements(tensor[0], size, type(stored))


@subroutine
def _chunk(number, cut):
    """The row of a chunk, its first element and the one behind its last."""
    size, longest = cut[0], cut[4]
    row, part = divmod(number, -(-size // longest))
    start = part * longest
    return row, row * size + start, row * size + min(start + longest, size)


@subroutine
def _tile(values, inner, tiled):
    """Write each value ``inner`` times: a place. Repeat the place."""
    if values.size == 1:
        tiled[:] = values[0]
        return
    place = values.size * inner
    for i in range(values.size):
        tiled[i * inner : (i + 1) * inner] = values[i]
    for start in range(place, tiled.size, place):
        copy = tiled[start : start + place]
        for i in range(place):  # to assign a slice takes Numba two seconds to compile
            copy[i] = tiled[i]


@subroutine
def _add_lanes(lanes, place, totals):
    """Write the sums of equal parts of a place; the lanes, several places, are overwritten."""
    size = lanes.size
    while size > place > 1:
        size //= 2
        lower, upper = lanes[:size], lanes[size : 2 * size]
        for i in range(size):
            lower[i] += upper[i]
    width = size // totals.size
    for i in range(totals.size):
        totals[i] = sum_reordered(lanes[i * width : (i + 1) * width])


@njit
def _moments(first, last, x, stored, zero, size, cut, partials):
    """Write the moments of chunks ``first`` to ``last``.

    The mean of the first span of a chunk is subtracted before squaring. This bounds the
    cancellation: the squares sum up to at most 1 + spans times the squared deviations.

    Args:
        x: (address, dtype code) of ``size`` elements.
        stored: zero of the type in memory; ``zero``: of the compute dtype.
        partials: float64 [chunks, 2, groups], means and sums of squared deviations.
    """
    _, channels, inner, span, _ = cut
    source, place, groups = _memory(x, size, stored), channels * inner, partials.shape[2]
    sums, squares, pivots = np.full(span, zero), np.full(span, zero), np.full(span, zero)
    pivot, total, total_squares = np.full(groups, zero), np.empty(groups), np.empty(groups)
    for number in range(first, last):
        _, start, end = _chunk(number, cut)
        sums[:] = squares[:] = zero
        own = source[start : min(start + span, end)]
        for j in range(own.size):
            sums[j] = load(own, j)
        _add_lanes(sums, place, total)
        for group in range(groups):
            pivot[group] = total[group] * groups / own.size
        _tile(pivot, place // groups, pivots)
        sums[:] = zero
        for i in range(start, end, span):
            own = source[i : min(i + span, end)]
            for j in range(own.size):
                value = load(own, j) - pivots[j]
                sums[j] += value
                squares[j] += value * value
        _add_lanes(sums, place, total)
        _add_lanes(squares, place, total_squares)
        count = (end - start) // groups
        for group in range(groups):
            mean = total[group] / count
            rest = total_squares[group] - count * mean * mean
            partials[number, 0, group] = pivot[group] + mean
            partials[number, 1, group] = 0.0 if rest < 0 else rest


@njit
def _combine_moments(partials, cut, weight, bias, eps, num_groups, moments, coefficients):
    """Write the moments [N, 2, G] and the coefficients.

    Args:
        weight: address of [C] in the compute dtype, or 0; ``bias`` alike.
        moments: address, of the compute dtype.
        coefficients: [3, N, C], such that (x - mean) * scale + shift is the normalized x.
    """
    size, longest = cut[0], cut[4]
    _, samples, channels = coefficients.shape
    row_groups, dtype = partials.shape[2], coefficients.dtype
    width, parts = channels // num_groups, -(-size // longest)
    weights = elements(weight, channels if weight else 0, dtype)
    biases = elements(bias, channels if bias else 0, dtype)
    statistics = elements(moments, samples * 2 * num_groups, dtype)
    for k in range(samples * num_groups):
        n, group = divmod(k, num_groups)
        row, column = divmod(k, row_groups)
        mean = squares = 0.0
        for part in range(parts):
            share = min(longest, size - part * longest)
            mean += share * partials[row * parts + part, 0, column]
        mean /= size
        for part in range(parts):
            share = min(longest, size - part * longest) // row_groups
            off = partials[row * parts + part, 0, column] - mean
            squares += partials[row * parts + part, 1, column] + share * off * off
        inverse = 1 / np.sqrt(squares / (size // row_groups) + eps)
        at = 2 * num_groups * n + group
        statistics[at], statistics[at + num_groups] = mean, inverse
        for c in range(group * width, (group + 1) * width):
            coefficients[0, n, c] = mean
            coefficients[1, n, c] = inverse * weights[c] if weight else inverse
            coefficients[2, n, c] = biases[c] if bias else 0.0


@njit
def _apply(
    first, last, x, residual, out, stored, size, cut, coefficients, has_residual, negative_slope
):
    """Write out in chunks ``first`` to ``last``.

    Args:
        x: (address, dtype code) of ``size`` elements; ``residual`` and ``out`` alike.
        stored: zero of the type in memory.
        coefficients: [3, N, C].
    """
    _, channels, inner, span, _ = cut
    source, other = _memory(x, size, stored), _memory(residual, size, stored)
    target, values = _memory(out, size, stored), coefficients.reshape(3, -1)
    zero = coefficients.dtype.type(0)
    slope, leaky = coefficients.dtype.type(negative_slope), negative_slope != 0
    tiles, tiled = np.full((3, span), zero), -1
    means, scales, shifts = tiles[0], tiles[1], tiles[2]
    for number in range(first, last):
        row, start, end = _chunk(number, cut)
        if row != tiled:
            for i in range(3):
                _tile(values[i, row * channels : (row + 1) * channels], inner, tiles[i])
            tiled = row
        for i in range(start, end, span):
            stop = min(i + span, end)
            own, result = source[i:stop], target[i:stop]
            if has_residual:
                added = other[i:stop]
                for j in range(own.size):
                    value = (load(own, j) - means[j]) * scales[j] + shifts[j] + load(added, j)
                    negative = slope * value if leaky else zero
                    store(result, j, negative if value <= zero else value)
            else:
                for j in range(own.size):
                    value = (load(own, j) - means[j]) * scales[j] + shifts[j]
                    negative = slope * value if leaky else zero
                    store(result, j, negative if value <= zero else value)


@njit
def _products(
    first, last, x, grad_output, out, moments, grad, stored, zero, size, cut, active,
    negative_slope, shape, partials,
):  # fmt: skip
    """Differentiate the activation, and write the sums of chunks ``first`` to ``last``.

    Args:
        x: (address, dtype code) of ``size`` elements; ``grad_output``, ``out`` and ``grad`` alike.
        stored: zero of the type in memory; ``zero``: of the compute dtype.
        active: whether there is an activation. If not, ``grad`` is ``grad_output``.
        moments: (address, dtype code) of [N, 2, G].
        shape: (N, C, G).
        grad: written, the gradient to the input of the activation.
        partials: float64 [chunks, 2, channels]: sums of grad, and of grad * (x - mean).
    """
    _, channels, inner, span, _ = cut
    source, given = _memory(x, size, stored), _memory(grad_output, size, stored)
    sign, passed = _memory(out, size, stored), _memory(grad, size, stored)
    samples, all_channels, num_groups = shape
    width, statistics = all_channels // num_groups, _memory(moments, samples * 2 * num_groups, zero)
    slope, leaky = type(zero)(negative_slope), negative_slope != 0
    mean, means = np.full(channels, zero), np.full(span, zero)
    sums, products, values = np.full(span, zero), np.full(span, zero), np.full(span, zero)
    for number in range(first, last):
        row, start, end = _chunk(number, cut)
        for i in range(channels):
            n, c = divmod(row * channels + i, all_channels)
            mean[i] = statistics[2 * num_groups * n + c // width]
        _tile(mean, inner, means)
        sums[:] = products[:] = zero
        for i in range(start, end, span):
            stop = min(i + span, end)
            own, upstream = source[i:stop], given[i:stop]
            if active:
                output, result = sign[i:stop], passed[i:stop]
                for j in range(own.size):
                    value = load(upstream, j)
                    negative = slope * value if leaky else zero
                    value = value if load(output, j) > zero else negative
                    values[j] = value
                    store(result, j, value)
            else:
                for j in range(own.size):
                    values[j] = load(upstream, j)
            for j in range(own.size):
                sums[j] += values[j]
                products[j] += values[j] * (load(own, j) - means[j])
        _add_lanes(sums, channels * inner, partials[number, 0])
        _add_lanes(products, channels * inner, partials[number, 1])


@njit
def _combine_products(
    partials, cut, weight, num_groups, moments, coefficients, grad_weight, grad_bias
):
    """Write the gradients to weight and bias, and the coefficients a, b, c, mean of that to x.

    Args:
        weight: address of [C] in the compute dtype, or 0; addresses of the gradients alike.
        moments: address of [N, 2, G].
        coefficients: [4, N, C], such that a * grad + b * (x - mean) + c is the gradient to x.
    """
    size, row_channels, _, _, longest = cut
    _, samples, channels = coefficients.shape
    dtype, parts, width = coefficients.dtype, -(-size // longest), channels // num_groups
    count = size // row_channels * width
    weights = elements(weight, channels if weight else 0, dtype)
    statistics = elements(moments, samples * 2 * num_groups, dtype)
    to_weight, to_bias = np.zeros(channels), np.zeros(channels)
    for k in range(samples * num_groups):
        n, group = divmod(k, num_groups)
        at = 2 * num_groups * n + group
        mean, inverse = np.float64(statistics[at]), np.float64(statistics[at + num_groups])
        level = slope = 0.0
        for c in range(group * width, (group + 1) * width):
            row, column = divmod(n * channels + c, row_channels)
            total = product = 0.0
            for number in range(row * parts, (row + 1) * parts):
                total += partials[number, 0, column]
                product += partials[number, 1, column]
            product *= inverse
            factor = np.float64(weights[c]) if weight else 1.0
            level += factor * total / count
            slope += factor * product / count
            to_weight[c] += product
            to_bias[c] += total
            coefficients[0, n, c] = factor * inverse
        for c in range(group * width, (group + 1) * width):
            coefficients[1, n, c] = -inverse * inverse * slope
            coefficients[2, n, c] = -inverse * level
            coefficients[3, n, c] = mean
    result_weight = elements(grad_weight, channels, dtype)
    result_bias = elements(grad_bias, channels, dtype)
    for c in range(channels):
        result_weight[c], result_bias[c] = to_weight[c], to_bias[c]


@njit
def _apply_backward(first, last, x, grad, grad_x, stored, size, cut, coefficients, in_place):
    """Write grad_x in chunks ``first`` to ``last``.

    Args:
        x: (address, dtype code) of ``size`` elements; ``grad`` and ``grad_x`` alike.
        stored: zero of the type in memory.
        in_place: whether ``grad`` is ``grad_x``.
    """
    _, channels, inner, span, _ = cut
    source, target = _memory(x, size, stored), _memory(grad_x, size, stored)
    given, values = _memory(grad, size, stored), coefficients.reshape(4, -1)
    tiles, tiled = np.full((4, span), coefficients.dtype.type(0)), -1
    by_grad, by_x, rest, means = tiles[0], tiles[1], tiles[2], tiles[3]
    for number in range(first, last):
        row, start, end = _chunk(number, cut)
        if row != tiled:
            for i in range(4):
                _tile(values[i, row * channels : (row + 1) * channels], inner, tiles[i])
            tiled = row
        for i in range(start, end, span):
            stop = min(i + span, end)
            own, result = source[i:stop], target[i:stop]
            if in_place:  # one array, so that the loop is vectorized
                for j in range(own.size):
                    value = (load(own, j) - means[j]) * by_x[j] + rest[j]
                    store(result, j, load(result, j) * by_grad[j] + value)
            else:
                passed = given[i:stop]
                for j in range(own.size):
                    value = (load(own, j) - means[j]) * by_x[j] + rest[j]
                    store(result, j, load(passed, j) * by_grad[j] + value)


@lru_cache
def _cut(shape: torch.Size, contiguous: bool, num_groups: int | None = None) -> tuple[Cut, int]:
    """How a tensor is cut, for moments if ``num_groups`` is given, and the number of chunks."""
    samples, channels = shape[:2]
    sample = shape.numel() // samples
    voxels = sample // channels
    rows, place, inner = samples, channels, 1
    if contiguous and voxels > 1:
        if voxels < FEW_VOXELS and sample <= LARGEST_PLACE:
            place, inner = sample, voxels
        else:
            rows, place = samples * (num_groups or channels), 1
    size, span = shape.numel() // rows, place
    while 2 * span <= SPAN and (span < MIN_SPAN or 16 * span <= size):
        span *= 2
    chunk = span * max(1, CHUNK // span)
    return (size, place // inner, inner, span, chunk), rows * -(-size // chunk)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _parameter(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _as(x, dtype).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
    """As in fmkernels.kernels.group_norm3d."""
    size = x.numel()
    if not size:
        return
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    stored, zero = _STORED[dtype], zero_of(x)
    source, result = _as(x, dtype), _as(out, dtype)
    added = source if residual is None else _as(residual, dtype)
    weight, bias = _parameter(weight, moments.dtype), _parameter(bias, moments.dtype)
    cut, chunks = _cut(x.shape, x.is_contiguous(), num_groups)
    partials = np.empty((chunks, 2, num_groups if cut[1] > 1 else 1))
    coefficients = np.empty((3, *x.shape[:2]), zero.dtype)
    grain_size = GRAIN_SIZE * chunks // size
    parallel_for(_moments, chunks, grain_size, (source,), stored, zero, size, cut, partials)
    _combine_moments(
        partials, cut, _address(weight), _address(bias), eps, num_groups, _address(moments),
        coefficients,
    )  # fmt: skip
    cut, chunks = _cut(x.shape, x.is_contiguous())
    parallel_for(
        _apply, chunks, GRAIN_SIZE * chunks // size, (source, added, result), stored, size, cut,
        coefficients, residual is not None, negative_slope,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)


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
    """As in fmkernels.kernels.group_norm3d."""
    size = x.numel()
    if not size:
        grad_weight.zero_()
        grad_bias.zero_()
        return
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    stored, zero = _STORED[dtype], zero_of(x)
    source, given, result = _as(x, dtype), _as(grad_output, dtype), _as(grad_x, dtype)
    grad, has_residual = given, grad_residual.numel() > 0
    if out is None and has_residual:
        grad_residual.copy_(grad_output)
    elif out is not None:
        grad = _as(grad_residual, dtype) if has_residual else result
    weight = _parameter(weight, moments.dtype)
    cut, chunks = _cut(x.shape, x.is_contiguous())
    coefficients = np.empty((4, *x.shape[:2]), zero.dtype)
    partials, grain_size = np.empty((chunks, 2, cut[1])), GRAIN_SIZE * chunks // size
    parallel_for(
        _products, chunks, grain_size,
        (source, given, source if out is None else _as(out, dtype), moments, grad), stored, zero,
        size, cut, out is not None, negative_slope, (*x.shape[:2], num_groups), partials,
    )  # fmt: skip
    _combine_products(
        partials, cut, _address(weight), num_groups, _address(moments), coefficients,
        _address(grad_weight), _address(grad_bias),
    )  # fmt: skip
    parallel_for(
        _apply_backward, chunks, grain_size, (source, grad, result), stored, size, cut,
        coefficients, grad is result,
    )  # fmt: skip
    if result is not grad_x:
        grad_x.copy_(result)
        if out is not None and has_residual:
            grad_residual.copy_(grad)
