"""Pseudo-targets from flipped views on the CPU, block by block: gathered rows vectorize.

The formulation differs from that of the kernel on purpose: the mean of sigmoids and its complement,
where the kernel keeps both as fractions over a common denominator. Near y = 1 the complement loses
digits, but only those that y, rounded to float32, cannot show.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fmkernels.cpu.arithmetic import exp, log, stored
from fmkernels.cpu.compiled import njit, parallel_for, subroutine
from fmkernels.cpu.voxels import (
    empty,
    load_block,
    load_reversed,
    load_strided,
    part,
    zero_of,
)

BLOCK = 1024  # elements; a few float32 blocks stay in the L1 cache
GRAIN_SIZE = 8  # minimum blocks per thread
ZERO, ONE = np.float32(0), np.float32(1)


@subroutine
def _gather(x, origin, shape, strides, flip, first, logit):
    """Load elements first, first + 1, ... of the sample [D, H, W, I] at an origin, unflipped."""
    address, kind = x
    depth, height, width, inner = shape
    stride_d, stride_h, stride_w, stride_i = strides
    line, at = divmod(first, width * inner)
    d, h = divmod(line, height)
    done = 0
    while done < logit.size:
        row = origin
        row += (depth - 1 - d if flip & 1 else d) * stride_d
        row += (height - 1 - h if flip & 2 else h) * stride_h
        size = min(logit.size - done, width * inner - at)
        if stride_w == inner and (inner == 1 or stride_i == 1) and not flip & 4:
            load_block(address, kind, row + at, part(logit, done, size))
        elif inner == 1 and stride_w == 1:
            load_reversed(address, kind, row + width - 1 - at, part(logit, done, size))
        elif inner == 1:
            column, step = (width - 1 - at, -stride_w) if flip & 4 else (at, stride_w)
            load_strided(address, kind, row + column * stride_w, step, part(logit, done, size))
        else:
            w, a = divmod(at, inner)
            i = 0
            while i < size:
                column = width - 1 - w if flip & 4 else w
                start = row + column * stride_w + a * stride_i
                n = min(size - i, inner - a)
                load_strided(address, kind, start, stride_i, part(logit, done + i, n))
                i += n
                w, a = w + 1, 0
        done += size
        at, h = 0, h + 1
        if h == height:
            d, h = d + 1, 0


@subroutine
def _add_view(logit, total):
    """total += sigmoid(logit)."""
    for i in range(logit.size):
        total[i] += ONE / (ONE + exp(-logit[i]))


@subroutine
def _sharpen(total, views, inverse_temperature, target):
    """y^(1/T) / (y^(1/T) + (1 - y)^(1/T)) for y = total / views."""
    for i in range(target.size):
        odds = (views - total[i]) / total[i]
        target[i] = ONE / (ONE + exp(log(odds) * inverse_temperature))


@njit
def _run(start, end, x, shape, strides, flips, inverse_temperature, out):
    """Compute blocks ``start`` to ``end``, numbered through all samples, of one level.

    Args:
        x: (address, dtype code) of logits [K, B, A, D, H, W, I].
        shape, strides: those of x.
        flips: uint8 [K].
        inverse_temperature: a scalar of the compute dtype.
        out: targets [B, A, D, H, W, I], flat.
    """
    views, anchors = shape[0], shape[2]
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
            _gather(x, origin + k * strides[0], shape[3:], strides[3:], flips[k], first, logit)
            _add_view(logit, total)
        target = part(out, sample * length + first, size)
        _sharpen(total, dtype(views), inverse_temperature, target)


def predict_targets(
    view_logits: Sequence[Tensor], flips: Tensor, temperature: float, targets: Sequence[Tensor]
) -> None:
    """Write targets [B, A, D, H, W, I] of levels [K, B, A, D, H, W, I] of any strides."""
    masks = stored(flips)
    for x, out in zip(view_logits, targets, strict=True):
        if not out.numel():
            continue
        inverse = zero_of(x) + 1 / temperature
        blocks = x.shape[1] * x.shape[2] * -(-x.shape[3:].numel() // BLOCK)
        parallel_for(
            _run, blocks, GRAIN_SIZE, x, tuple(x.shape), x.stride(), masks, inverse, stored(out)
        )
