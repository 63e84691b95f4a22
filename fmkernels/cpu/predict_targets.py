"""Pseudo-targets from transformed views on the CPU, block by block: gathered rows vectorize.

The formulation differs from that of the kernel on purpose: the mean of sigmoids and its complement,
where the kernel keeps sums of fractions over a common denominator. Near y = 1 the complement loses
digits, but only those that y, rounded to float32, cannot show.

To undo a symmetry is to walk through the view with other strides: permuted, and negative along
flipped axes, from another first element.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fmkernels.cpu.arithmetic import exp, log, sigmoid
from fmkernels.cpu.compiled import njit, parallel_for, subroutine
from fmkernels.cpu.voxels import (
    elements,
    empty,
    load_block,
    load_reversed,
    load_strided,
    part,
    zero_of,
)

BLOCK = 1024  # elements; a few float32 blocks stay in the L1 cache
GRAIN_SIZE = 32  # minimum blocks per thread
ZERO, MAX = np.float32(0), np.finfo(np.float32).max


@subroutine
def _undone(code, shape, strides):
    """First element and strides of a view [D, H, W, I], in the order of the original's axes."""
    (depth, height, width, _), (first, second, third, inner) = shape, strides
    origin = 0
    if code & 1:
        origin, first = origin + (depth - 1) * first, -first
    if code & 2:
        origin, second = origin + (height - 1) * second, -second
    if code & 4:
        origin, third = origin + (width - 1) * third, -third
    if code & 8:
        second, third = third, second
    if code < 16:
        return origin, (first, second, third, inner)
    if code < 32:
        return origin, (second, first, third, inner)
    return origin, (second, third, first, inner)


@subroutine
def _gather(x, origin, shape, strides, first, logit):
    """Load elements first, first + 1, ... of [D, H, W, I] at an origin."""
    address, kind = x
    depth, height, width, size = shape
    stride_d, stride_h, stride_w, stride = strides
    if size == 1:  # axes are joined that lie in memory as one
        width, size, stride_w, stride = 1, width, 0, stride_w
    elif stride_w == size * stride:
        width, size = 1, width * size
    if width == 1 and stride_h == size * stride:
        height, size = 1, height * size
        if stride_d == size * stride:
            depth, size = 1, depth * size
    at, rest = first % size, first // size
    w, rest = rest % width, rest // width
    h, d = rest % height, rest // height
    done = 0
    while done < logit.size:
        start = origin + d * stride_d + h * stride_h + w * stride_w + at * stride
        n = min(logit.size - done, size - at)
        if stride == 1:
            load_block(address, kind, start, part(logit, done, n))
        elif stride == -1:
            load_reversed(address, kind, start, part(logit, done, n))
        else:
            load_strided(address, kind, start, stride, part(logit, done, n))
        done += n
        at, w = 0, w + 1
        if w == width:
            w, h = 0, h + 1
        if h == height:
            h, d = 0, d + 1


@njit
def _run(start, end, x, flips, out, shape, strides, inverse_temperature):
    """Compute blocks ``start`` to ``end``, numbered through all samples, of one level.

    Args:
        x: (address, dtype code) of logits [K, B, A, D, H, W, I].
        flips: likewise, of uint8 [K].
        out: likewise, of float32 targets [B, A, D, H, W, I], dense.
        shape, strides: those of x.
        inverse_temperature: a scalar of the compute dtype.
    """
    views, anchors = shape[0], shape[2]
    codes = elements(flips[0], views, np.uint8)
    length = shape[3] * shape[4] * shape[5] * shape[6]
    blocks = (length + BLOCK - 1) // BLOCK
    dtype = type(inverse_temperature)
    buffers = empty(2 * BLOCK, inverse_temperature)
    for block in range(start, end):
        sample, first = block // blocks, block % blocks * BLOCK
        size = min(BLOCK, length - first)
        logit, total = part(buffers, 0, size), part(buffers, BLOCK, size)
        for i in range(size):
            total[i] = ZERO
        origin = sample // anchors * strides[1] + sample % anchors * strides[2]
        for k in range(views):
            corner, undone = _undone(codes[k], shape[3:], strides[3:])
            _gather(x, origin + k * strides[0] + corner, shape[3:], undone, first, logit)
            for i in range(size):
                total[i] += sigmoid(logit[i])
        target = elements(out[0] + 4 * (sample * length + first), size, np.float32)
        for i in range(size):  # y^(1/T) / (y^(1/T) + (1 - y)^(1/T)) for y = total / views
            odds = total[i] / (dtype(views) - total[i])
            target[i] = sigmoid(log(odds) * inverse_temperature)


@njit
def _run_classes(
    start, end, x, flips, out, shape, strides, classes, stride_c, out_c, step, inverse_temperature
):
    """The same for classes: anchor n has logits ``stride_c`` apart, targets ``out_c`` apart.

    Targets of neighboring anchors are ``step`` apart. A sharpened probability is e^(log(y) / T)
    relative to that of the largest one.
    """
    views, groups = shape[0], shape[2]
    codes = elements(flips[0], views, np.uint8)
    length = shape[3] * shape[4] * shape[5] * shape[6]
    blocks = (length + BLOCK - 1) // BLOCK
    logits = empty((classes, BLOCK), inverse_temperature)
    totals = empty((classes, BLOCK), inverse_temperature)
    buffers = empty(2 * BLOCK, inverse_temperature)
    for block in range(start, end):
        sample, first = block // blocks, block % blocks * BLOCK
        size = min(BLOCK, length - first)
        most, total = part(buffers, 0, size), part(buffers, BLOCK, size)
        totals[:] = ZERO
        origin = sample // groups * strides[1] + sample % groups * strides[2]
        for k in range(views):
            corner, undone = _undone(codes[k], shape[3:], strides[3:])
            corner += origin + k * strides[0]
            for c in range(classes):
                _gather(x, corner + c * stride_c, shape[3:], undone, first, logits[c, :size])
            _softmax(logits, most, total)
            for c in range(classes):
                for i in range(size):
                    totals[c, i] += logits[c, i] / total[i]
        for c in range(classes):
            for i in range(size):
                totals[c, i] = log(totals[c, i]) * inverse_temperature
        _softmax(totals, most, total)
        base = elements(out[0] + 4 * sample * length * classes, length * classes, np.float32)
        for c in range(classes):
            for i in range(size):
                base[(first + i) * step + c * out_c] = totals[c, i] / total[i]


@subroutine
def _softmax(values, most, total):
    """Replace values [L, n] by their exponentials, and ``total`` by the sums of these.

    Infinite values count as the largest finite ones. ``most`` is memory for n values.
    """
    size = total.size
    for i in range(size):
        most[i], total[i] = -MAX, ZERO
    for c in range(values.shape[0]):
        for i in range(size):
            value = values[c, i]
            value = -MAX if value < -MAX else value
            value = MAX if value > MAX else value
            values[c, i] = value
            most[i] = value if value > most[i] else most[i]
    for c in range(values.shape[0]):
        for i in range(size):
            power = exp(values[c, i] - most[i])
            values[c, i] = power
            total[i] += power


def _check_codes(codes: Sequence[int], levels: Sequence[Tensor]) -> None:
    most = max(codes)
    if most >= 48:
        raise ValueError(f"predict_targets: flips must be in [0, 48), got {codes}")
    for x in levels if most >= 8 else ():
        depth, height, width = x.shape[3:]
        if not depth == height == width:
            raise ValueError(
                "predict_targets: flips must be in [0, 8) where the sizes of view_logits differ, "
                f"got {codes} and sizes {(depth, height, width)}"
            )


def predict_targets(
    view_logits: Sequence[Tensor],
    flips: Tensor,
    temperature: float,
    classes: int,
    targets: Sequence[Tensor],
) -> None:
    """Write targets [B, A, D, H, W], dense or channels last, of levels [K, B, A, D, H, W]."""
    _check_codes(flips.tolist(), view_logits)
    for x, out in zip(view_logits, targets, strict=True):
        if not out.numel():
            continue
        (views, batch, anchors, *sizes), (k, b, a, *strides) = x.shape, x.stride()
        groups, step, length = anchors // classes, a * classes, math.prod(sizes)
        if out.stride(1) < out.stride(4):  # channels last
            shape, steps = (views, batch, 1, *sizes, groups), (k, b, 0, *strides, step)
            out_c, out_step = 1, classes
        else:
            shape, steps = (views, batch, groups, *sizes, 1), (k, b, step, *strides, 0)
            out_c, out_step = length, 1
        inverse = zero_of(x) + 1 / temperature
        blocks = batch * shape[2] * -(-length * shape[6] // BLOCK)
        if classes == 1:
            parallel_for(_run, blocks, GRAIN_SIZE, (x, flips, out), shape, steps, inverse)
        else:
            parallel_for(
                _run_classes, blocks, max(GRAIN_SIZE // classes, 1), (x, flips, out), shape, steps,
                classes, a, out_c, out_step, inverse,
            )  # fmt: skip
