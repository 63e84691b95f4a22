"""Group normalisation of channels-last volumes with the sum and the ReLU that follow it; no op, the detector's own.

A sample is read from the memory once, for its moments; it is still in the caches when it is normalised.
"""

import numpy as np
import torch
from torch import Tensor

from fmkernels.cpu.arithmetic import load, store, stored
from fmkernels.cpu.compiled import njit, parallel_for

GRAIN_SIZE = 1 << 15  # elements for which a thread of their own pays
_SPAN = 256  # elements of an inner loop, about


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """ReLU(group_norm(x) + residual), the last two where asked for.

    Args:
        x: float32 or bfloat16 [N, C, D, H, W], dense, channels last; ``residual`` alike.
        weight: float32 [C]; ``bias`` alike.
        groups: of the C channels.
        eps: added to the variances.
        relu: whether negative results become 0.

    Returns:
        out: like x.
        moments: float32 [N, 2, groups], the means and the inverse standard deviations.
    """
    out, moments = torch.empty_like(x), x.new_empty((len(x), 2, groups), dtype=torch.float32)
    parallel_for(
        _normalize, len(x), 1 + GRAIN_SIZE // x[0].numel(),
        _memory(x), _memory(out), _memory(x if residual is None else residual), residual is not None,
        weight.numpy(), bias.numpy(), moments.numpy(), eps, relu,
    )  # fmt: skip
    return out, moments


def differentiate(
    upstream: Tensor, x: Tensor, out: Tensor | None, weight: Tensor, moments: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients to x, to weight and bias, and to the residual where there is one.

    Args:
        upstream: the gradient to the result, of the type and layout of x.
        x: as in `normalize`; ``weight`` and ``moments`` alike.
        out: the result, where a ReLU made it.
        residual: whether there was one.
    """
    passed = upstream if out is None else torch.empty_like(x)  # by the ReLU
    to_x, sums = torch.empty_like(x), x.new_empty((2, len(x), len(weight)), dtype=torch.float32)
    parallel_for(
        _differentiate, len(x), 1 + GRAIN_SIZE // x[0].numel(),
        _memory(upstream), _memory(x), _memory(x if out is None else out), out is not None,
        _memory(passed), _memory(to_x), weight.numpy(), moments.numpy(), sums.numpy(),
    )  # fmt: skip
    to_weight, to_bias = sums.sum(1)
    return to_x, to_weight, to_bias, passed if residual else None


def _memory(x: Tensor) -> np.ndarray:
    """[N, D * H * W * C] as it lies in the memory."""
    return stored(x.permute(0, 2, 3, 4, 1)).reshape(len(x), -1)


@njit
def _tiled(values, size):
    """Values of the channels, again and again: loops over channels alone are too short to fill vectors."""
    tiled = np.empty(size, np.float32)
    for start in range(0, size, values.size):
        tiled[start : start + values.size] = values
    return tiled


@njit
def _folded(values, channels):
    """The sums over all places of each channel."""
    total = np.zeros(channels)
    for start in range(0, values.size, channels):
        total += values[start : start + channels]
    return total


@njit
def _normalize(first, last, x, out, residual, has_residual, weight, bias, moments, eps, relu):
    channels, groups, size = weight.size, moments.shape[2], x.shape[1]
    width, places, least = channels // groups, size // channels, np.float32(0 if relu else -np.inf)
    step = channels * max(1, _SPAN // channels)
    room = np.empty((3, channels), np.float32)
    pivot, scale, shift = room[0], room[1], room[2]
    for n in range(first, last):
        for c in range(channels):
            pivot[c] = load(x[n], c)  # near the mean, against cancellation
        pivots, sums, squares = (
            _tiled(pivot, step),
            np.zeros(step, np.float32),
            np.zeros(step, np.float32),
        )
        for i in range(0, size, step):
            _add_moments(x[n, i : i + step], pivots, sums, squares)
        total, total_squares = _folded(sums, channels), _folded(squares, channels)
        for group in range(groups):
            own = range(group * width, (group + 1) * width)
            mean = variance = 0.0
            for c in own:
                mean += (pivot[c] + total[c] / places) / width
            for c in own:
                off = pivot[c] + total[c] / places - mean
                variance += (
                    total_squares[c] / places - (total[c] / places) ** 2 + off * off
                ) / width
            inverse = 1 / np.sqrt(max(variance, 0.0) + eps)
            moments[n, 0, group], moments[n, 1, group] = mean, inverse
            for c in own:
                scale[c], shift[c] = weight[c] * inverse, bias[c] - mean * weight[c] * inverse
        scales, shifts = _tiled(scale, step), _tiled(shift, step)
        for i in range(0, size, step):
            if has_residual:
                _apply_and_add(
                    x[n, i : i + step],
                    scales,
                    shifts,
                    residual[n, i : i + step],
                    least,
                    out[n, i : i + step],
                )
            else:
                _apply(x[n, i : i + step], scales, shifts, least, out[n, i : i + step])


@njit
def _differentiate(first, last, upstream, x, out, has_relu, passed, to_x, weight, moments, sums):
    channels, groups, size = weight.size, moments.shape[2], x.shape[1]
    width = channels // groups
    step, count = channels * max(1, _SPAN // channels), width * (size // channels)
    room = np.empty((4, channels), np.float32)
    middle, by_passed, by_x, rest = room[0], room[1], room[2], room[3]
    for n in range(first, last):
        for c in range(channels):
            middle[c] = moments[n, 0, c // width]
        means, gradients, products = (
            _tiled(middle, step),
            np.zeros(step, np.float32),
            np.zeros(step, np.float32),
        )
        for i in range(0, size, step):
            if has_relu:
                _pass(upstream[n, i : i + step], out[n, i : i + step], passed[n, i : i + step])
            _add_products(passed[n, i : i + step], x[n, i : i + step], means, gradients, products)
        total, slopes = _folded(gradients, channels), _folded(products, channels)
        for group in range(groups):
            own, inverse = range(group * width, (group + 1) * width), moments[n, 1, group]
            level = slope = 0.0
            for c in own:
                slopes[c] *= inverse  # products of the gradient and x normalised
                sums[0, n, c], sums[1, n, c] = slopes[c], total[c]
                level += weight[c] * total[c] / count
                slope += weight[c] * slopes[c] / count
            for c in own:
                by_passed[c], by_x[c] = weight[c] * inverse, -slope * inverse * inverse
                rest[c] = -inverse * level
        by_passeds, by_xs, rests = _tiled(by_passed, step), _tiled(by_x, step), _tiled(rest, step)
        for i in range(0, size, step):
            _combine(
                passed[n, i : i + step],
                by_passeds,
                x[n, i : i + step],
                means,
                by_xs,
                rests,
                to_x[n, i : i + step],
            )


# What follows goes over a few places of all channels; functions of their own, so that the compiler fills vectors.


@njit
def _add_moments(x, pivot, sums, squares):
    for i in range(x.size):
        value = load(x, i) - pivot[i]
        sums[i] += value
        squares[i] += value * value


@njit
def _apply(x, scale, shift, least, out):
    for i in range(x.size):
        value = load(x, i) * scale[i] + shift[i]
        store(out, i, least if value < least else value)


@njit
def _apply_and_add(x, scale, shift, residual, least, out):
    for i in range(x.size):
        value = load(x, i) * scale[i] + shift[i] + load(residual, i)
        store(out, i, least if value < least else value)


@njit
def _pass(upstream, out, passed):
    for i in range(out.size):
        store(passed, i, load(upstream, i) if load(out, i) > 0 else np.float32(0))


@njit
def _add_products(gradient, x, mean, sums, products):
    for i in range(x.size):
        value = load(gradient, i)
        sums[i] += value
        products[i] += value * (load(x, i) - mean[i])


@njit
def _combine(gradient, by_gradient, x, mean, by_x, rest, out):
    for i in range(x.size):
        store(
            out,
            i,
            load(gradient, i) * by_gradient[i] + ((load(x, i) - mean[i]) * by_x[i] + rest[i]),
        )
