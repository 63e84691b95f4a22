"""Group normalization on the CPU, with the residual and the activation in the same pass.

Loops see memory as rows of [places, channels, inner]. With channels last, a row is a sample and
inner is 1. In contiguous memory, a row is one channel (one group where moments are computed), or a
sample of one place if it has few voxels; inner is their number.

Rows are cut into chunks. Their sums are added in order, so that the number of threads changes
nothing. A chunk is cut into spans of several places, and the parameters of a place are copied to
the length of a span: loops over few channels would not fill vectors.
"""

import numpy as np
from torch import Tensor

from fmkernels.cpu.arithmetic import sum_reordered
from fmkernels.cpu.compiled import located, njit, parallel_for, subroutine
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

SPAN = 512  # elements, unless a place has more
CHUNK = 1 << 14  # elements, likewise
FEW_VOXELS = 128  # with fewer, a contiguous sample of up to this many elements is one place:
LARGEST_PLACE = 1 << 16
GRAIN_SIZE = 1 << 15  # elements

Cut = tuple[int, int, int, int, int]
"""How rows are cut: (elements of a row, channels, inner, span, elements of a chunk)."""


@subroutine
def _chunk(number, cut):
    """The row of a chunk, its first element and the one behind its last."""
    size, longest = cut[0], cut[4]
    row, rest = divmod(number, -(-size // longest))
    start = rest * longest
    return row, row * size + start, row * size + min(start + longest, size)


@subroutine
def _fill(values, value):
    for i in range(values.size):
        values[i] = value


@subroutine
def _tile(values, inner, tiled):
    """Write each value ``inner`` times: a place. Repeat the place."""
    place = values.size * inner
    for i in range(values.size):
        for j in range(inner):
            tiled[i * inner + j] = values[i]
    if place == 1:
        _fill(tiled, values[0])
        return
    for start in range(place, tiled.size, place):
        copy = part(tiled, start, place)
        for i in range(place):
            copy[i] = tiled[i]


@subroutine
def _add_lanes(lanes, place, totals):
    """Write the sums of equal parts of a place; the lanes, several places, are overwritten."""
    size = lanes.size
    while size > place > 1:
        size //= 2
        upper = part(lanes, size, size)
        for i in range(size):
            lanes[i] += upper[i]
    width = size // totals.size
    for i in range(totals.size):
        totals[i] = sum_reordered(part(lanes, i * width, width))


@subroutine
def _written(out, first, size, buffer):
    """Where to write elements from ``first`` on: where they lie if of the dtype of the buffer."""
    if out[1] == own_kind(buffer):
        return elements(out[0] + buffer.itemsize * first, size, buffer.dtype)
    return part(buffer, 0, size)


@njit
def _moments(first, last, x, groups, cut, partials, zero):
    """Write the moments of chunks ``first`` to ``last``.

    The mean of the first span of a chunk is subtracted before squaring. This bounds the
    cancellation: the squares sum up to at most 1 + spans times the squared deviations.

    Args:
        x: (address, dtype code).
        groups: of a row.
        partials: float64 [chunks, 2, groups], flat: means and sums of squared deviations.
        zero: of the compute dtype.
    """
    _, channels, inner, span, _ = cut
    place, buffer = channels * inner, empty(span, zero)
    sums, squares, pivots = empty(span, zero), empty(span, zero), empty(span, zero)
    pivot, total, total_squares = empty(groups, zero), empty(groups, 0.0), empty(groups, 0.0)
    for number in range(first, last):
        _, start, end = _chunk(number, cut)
        own = read_block(x, start, part(buffer, 0, min(span, end - start)))
        _fill(sums, zero)
        for j in range(own.size):
            sums[j] = own[j]
        _add_lanes(sums, place, total)
        for group in range(groups):
            pivot[group] = total[group] * groups / own.size
        _tile(pivot, place // groups, pivots)
        _fill(sums, zero)
        _fill(squares, zero)
        for i in range(start, end, span):
            own = read_block(x, i, part(buffer, 0, min(span, end - i)))
            for j in range(own.size):
                value = own[j] - pivots[j]
                sums[j] += value
                squares[j] += value * value
        _add_lanes(sums, place, total)
        _add_lanes(squares, place, total_squares)
        count = (end - start) // groups
        for group in range(groups):
            mean = total[group] / count
            rest = total_squares[group] - count * mean * mean
            at = 2 * groups * number + group
            partials[at] = pivot[group] + mean
            partials[at + groups] = 0.0 if rest < 0 else rest


@njit
def _combine_moments(
    weight, bias, moments, samples, num_channels, num_groups, row_groups, cut, eps, partials,
    coefficients,
):  # fmt: skip
    """Write the moments [N, 2, G] and the coefficients.

    Args:
        weight: (address, dtype code) of [C], or missing; ``bias`` alike.
        moments: address and code, of the compute dtype.
        row_groups: groups of a row; of ``partials``.
        coefficients: [3, N, C], flat, such that (x - mean) * scale + shift is the normalized x.
    """
    size, longest, zero = cut[0], cut[4], coefficients.dtype.type(0)
    width, parts, total = num_channels // num_groups, -(-size // longest), samples * num_channels
    weights, biases = empty(num_channels, zero), empty(num_channels, zero)
    _fill(weights, 1.0)
    _fill(biases, 0.0)
    if weight[0]:
        load_block(weight[0], weight[1], 0, weights)
    if bias[0]:
        load_block(bias[0], bias[1], 0, biases)
    statistics = elements(moments[0], samples * 2 * num_groups, coefficients.dtype)
    for k in range(samples * num_groups):
        n, group = divmod(k, num_groups)
        row, column = divmod(k, row_groups)
        mean = squares = 0.0
        for number in range(parts):
            share = min(longest, size - number * longest)
            mean += share * partials[2 * row_groups * (row * parts + number) + column]
        mean /= size
        for number in range(parts):
            share = min(longest, size - number * longest) // row_groups
            at = 2 * row_groups * (row * parts + number) + column
            off = partials[at] - mean
            squares += partials[at + row_groups] + share * off * off
        inverse = 1 / np.sqrt(squares / (size // row_groups) + eps)
        at = 2 * num_groups * n + group
        statistics[at], statistics[at + num_groups] = mean, inverse
        for c in range(group * width, (group + 1) * width):
            at = n * num_channels + c
            coefficients[at] = mean
            coefficients[total + at] = inverse * weights[c]
            coefficients[2 * total + at] = biases[c]


@njit
def _apply(first, last, x, residual, out, cut, coefficients, negative_slope):
    """Write out in chunks ``first`` to ``last``.

    Args:
        x: (address, dtype code); ``residual``, which may be missing, and ``out`` alike.
        coefficients: [3, N, C], flat.
    """
    _, channels, inner, span, _ = cut
    zero, total, tiled = coefficients.dtype.type(0), coefficients.size // 3, -1
    slope, leaky = coefficients.dtype.type(negative_slope), negative_slope != 0
    means, scales, shifts = empty(span, zero), empty(span, zero), empty(span, zero)
    buffers = empty(3 * span, zero)
    for number in range(first, last):
        row, start, end = _chunk(number, cut)
        if row != tiled:
            for i, tiles in enumerate((means, scales, shifts)):
                _tile(part(coefficients, i * total + row * channels, channels), inner, tiles)
            tiled = row
        for i in range(start, end, span):
            n = min(span, end - i)
            own = read_block(x, i, part(buffers, 0, n))
            result = _written(out, i, n, part(buffers, span, n))
            if residual[0]:
                added = read_block(residual, i, part(buffers, 2 * span, n))
                for j in range(n):
                    value = (own[j] - means[j]) * scales[j] + shifts[j] + added[j]
                    negative = slope * value if leaky else zero
                    result[j] = negative if value <= zero else value
            else:
                for j in range(n):
                    value = (own[j] - means[j]) * scales[j] + shifts[j]
                    negative = slope * value if leaky else zero
                    result[j] = negative if value <= zero else value
            if out[1] != own_kind(buffers):
                store_block(result, out[0], out[1], i)


@njit
def _products(
    first, last, x, grad_output, out, moments, grad, shape, cut, negative_slope, partials, zero
):
    """Differentiate the activation, and write the sums of chunks ``first`` to ``last``.

    Args:
        x: (address, dtype code); ``grad_output``, ``out`` and ``grad`` alike. ``out`` is missing
            where there is no activation; then ``grad`` is not written.
        moments: address and code of [N, 2, G], of the compute dtype.
        grad: written, the gradient to the input of the activation.
        shape: (N, C, G).
        partials: float64 [chunks, 2, channels], flat: sums of grad, and of grad * (x - mean).
        zero: of the compute dtype.
    """
    _, channels, inner, span, _ = cut
    samples, num_channels, num_groups = shape
    width, buffers = num_channels // num_groups, empty(4 * span, zero)
    statistics = elements(moments[0], samples * 2 * num_groups, buffers.dtype)
    slope, leaky = type(zero)(negative_slope), negative_slope != 0
    mean, means = empty(channels, zero), empty(span, zero)
    sums, products = empty(span, zero), empty(span, zero)
    for number in range(first, last):
        row, start, end = _chunk(number, cut)
        for i in range(channels):
            n, c = divmod(row * channels + i, num_channels)
            mean[i] = statistics[2 * num_groups * n + c // width]
        _tile(mean, inner, means)
        _fill(sums, zero)
        _fill(products, zero)
        for i in range(start, end, span):
            n = min(span, end - i)
            own = read_block(x, i, part(buffers, 0, n))
            values = read_block(grad_output, i, part(buffers, span, n))
            if out[0]:
                sign = read_block(out, i, part(buffers, 2 * span, n))
                passed = part(buffers, 3 * span, n)
                for j in range(n):
                    negative = slope * values[j] if leaky else zero
                    passed[j] = values[j] if sign[j] > zero else negative
                store_block(passed, grad[0], grad[1], i)
                values = passed
            for j in range(n):
                sums[j] += values[j]
                products[j] += values[j] * (own[j] - means[j])
        at = 2 * channels * number
        _add_lanes(sums, channels * inner, part(partials, at, channels))
        _add_lanes(products, channels * inner, part(partials, at + channels, channels))


@njit
def _combine_products(weight, moments, grad_weight, grad_bias, shape, cut, partials, coefficients):
    """Write the gradients to weight and bias, and the coefficients a, b, c, mean of that to x.

    Args:
        weight: (address, dtype code) of [C], or missing.
        moments: address and code of [N, 2, G]; those of the gradients alike.
        shape: (N, C, G).
        coefficients: [4, N, C], flat, such that a * grad + b * (x - mean) + c is the gradient.
    """
    size, row_channels, _, _, longest = cut
    samples, channels, num_groups = shape
    zero = coefficients.dtype.type(0)
    parts, width = -(-size // longest), channels // num_groups
    count, total = size // row_channels * width, samples * channels
    weights = empty(channels, zero)
    _fill(weights, 1.0)
    if weight[0]:
        load_block(weight[0], weight[1], 0, weights)
    statistics = elements(moments[0], samples * 2 * num_groups, coefficients.dtype)
    to_weight, to_bias = empty(channels, 0.0), empty(channels, 0.0)
    _fill(to_weight, 0.0)
    _fill(to_bias, 0.0)
    for k in range(samples * num_groups):
        n, group = divmod(k, num_groups)
        at = 2 * num_groups * n + group
        mean, inverse = np.float64(statistics[at]), np.float64(statistics[at + num_groups])
        level = slope = 0.0
        for c in range(group * width, (group + 1) * width):
            row, column = divmod(n * channels + c, row_channels)
            added = product = 0.0
            for number in range(row * parts, (row + 1) * parts):
                at = 2 * row_channels * number + column
                added += partials[at]
                product += partials[at + row_channels]
            product *= inverse
            factor = np.float64(weights[c])
            level += factor * added / count
            slope += factor * product / count
            to_weight[c] += product
            to_bias[c] += added
            coefficients[n * channels + c] = factor * inverse
        for c in range(group * width, (group + 1) * width):
            at = n * channels + c
            coefficients[total + at] = -inverse * inverse * slope
            coefficients[2 * total + at] = -inverse * level
            coefficients[3 * total + at] = mean
    store_block(to_weight, grad_weight[0], grad_weight[1], 0)
    store_block(to_bias, grad_bias[0], grad_bias[1], 0)


@njit
def _apply_backward(first, last, x, grad, grad_x, cut, coefficients):
    """Write grad_x in chunks ``first`` to ``last``.

    Args:
        x: (address, dtype code); ``grad``, which may be ``grad_x``, alike.
        coefficients: [4, N, C], flat.
    """
    _, channels, inner, span, _ = cut
    zero, total, tiled = coefficients.dtype.type(0), coefficients.size // 4, -1
    by_grad, by_x, rest, means = (
        empty(span, zero), empty(span, zero), empty(span, zero), empty(span, zero)
    )  # fmt: skip
    buffers = empty(3 * span, zero)
    for number in range(first, last):
        row, start, end = _chunk(number, cut)
        if row != tiled:
            for i, tiles in enumerate((by_grad, by_x, rest, means)):
                _tile(part(coefficients, i * total + row * channels, channels), inner, tiles)
            tiled = row
        for i in range(start, end, span):
            n = min(span, end - i)
            own = read_block(x, i, part(buffers, 0, n))
            passed = read_block(grad, i, part(buffers, span, n))
            result = part(buffers, 2 * span, n)
            for j in range(n):
                result[j] = passed[j] * by_grad[j] + (own[j] - means[j]) * by_x[j] + rest[j]
            store_block(result, grad_x[0], grad_x[1], i)


def _cut(x: Tensor, num_groups: int | None = None) -> tuple[Cut, int]:
    """How x is cut, for moments if ``num_groups`` is given, and the number of chunks."""
    samples, channels = x.shape[:2]
    sample = x.numel() // samples
    voxels = sample // channels
    rows, place, inner = samples, channels, 1
    if x.is_contiguous() and voxels > 1:
        if voxels < FEW_VOXELS and sample <= LARGEST_PLACE:
            place, inner = sample, voxels
        else:
            rows, place = samples * (num_groups or channels), 1
    size, span = x.numel() // rows, place
    while 2 * span <= SPAN and span < size:
        span *= 2
    chunk = span * max(1, CHUNK // span)
    return (size, place // inner, inner, span, chunk), rows * -(-size // chunk)


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
    zero, (samples, channels) = zero_of(x), x.shape[:2]
    cut, chunks = _cut(x, num_groups)
    groups = num_groups if cut[1] > 1 else 1
    partials = np.empty(2 * groups * chunks)
    coefficients = np.empty(3 * samples * channels, zero.dtype)
    grain_size = GRAIN_SIZE * chunks // size
    parallel_for(_moments, chunks, grain_size, (x,), groups, cut, partials, zero)
    _combine_moments(
        located(weight), located(bias), located(moments), samples, channels, num_groups, groups,
        cut, eps, partials, coefficients,
    )  # fmt: skip
    cut, chunks = _cut(x)
    parallel_for(
        _apply, chunks, GRAIN_SIZE * chunks // size, (x, residual, out), cut, coefficients,
        negative_slope,
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
    """As in fmkernels.kernels.group_norm3d."""
    size = x.numel()
    if not size:
        grad_weight.zero_()
        grad_bias.zero_()
        return
    grad = grad_output
    if out is not None:
        grad = grad_residual if grad_residual.numel() else grad_x
    elif grad_residual.numel():
        grad_residual.copy_(grad_output)
    zero, shape = zero_of(x), (*x.shape[:2], num_groups)
    cut, chunks = _cut(x)
    coefficients = np.empty(4 * shape[0] * shape[1], zero.dtype)
    partials, grain_size = np.empty(2 * cut[1] * chunks), GRAIN_SIZE * chunks // size
    parallel_for(
        _products, chunks, grain_size, (x, grad_output, out, moments, grad), shape, cut,
        negative_slope, partials, zero,
    )  # fmt: skip
    _combine_products(
        located(weight), located(moments), located(grad_weight), located(grad_bias), shape, cut,
        partials, coefficients,
    )  # fmt: skip
    parallel_for(_apply_backward, chunks, grain_size, (x, grad, grad_x), cut, coefficients)
