"""Pseudo-targets from flipped views on the GPU: one launch per level, every element moved once.

The mean probability p of K views and its complement q are kept as fractions over one common
denominator, the product of all (1 + exp(-|x|)). Both are sums of positive terms, so that they are
accurate however small. Sharpening only needs their ratio, in which the denominator cancels, so that
no view needs a division.

A level is seen as samples of [D, H, W, I] elements. I is 1, or the number of anchors where these
are innermost in memory (channels last). Positions count vectors of V elements along the innermost
axis. V is 1 if its length, a stride or the mirrored positions do not keep 16-byte alignment. A flip
of that axis reverses the order of vectors in the address and of lanes in registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.arithmetic import LOG2E, divide, log2
from fmkernels.kernels.tuning import launch_parameters

_SIZES = (
    "A", "D", "H", "W", "inner", "tiles",
    "stride_k", "stride_b", "stride_a", "stride_d", "stride_h", "stride_w", "stride_i",
)  # fmt: skip


@triton.jit
def _reverse(x, N: tl.constexpr):
    """Reverse the last axis, of length N, a power of two: in registers."""
    if N == 1:
        result = x
    else:
        ROWS: tl.constexpr = x.shape[0]
        even, odd = tl.split(x.reshape(ROWS, N // 2, 2))
        result = tl.join(_reverse(odd, N // 2), _reverse(even, N // 2)).reshape(ROWS, N)
    return result


@triton.jit
def _lanes(vector, V: tl.constexpr):
    """Offsets of the elements of each vector, [n] or [n, V]."""
    if V == 1:
        offset = vector
    else:
        offset = (vector * V)[:, None] + tl.arange(0, V)[None, :]
    return offset


@triton.jit
def _add_view(x, p, q, denominator, FIRST: tl.constexpr):
    """Add sigmoid(x) to p / denominator and sigmoid(-x) to q / denominator."""
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
    else:
        e = tl.exp2(tl.abs(x) * -LOG2E)
    positive = x > 0
    larger = 1.0 + e
    if FIRST:
        p = tl.where(positive, 1.0, e)
        q = tl.where(positive, e, 1.0)
        denominator = larger
    else:
        smaller = e * denominator
        p = p * larger + tl.where(positive, denominator, smaller)
        q = q * larger + tl.where(positive, smaller, denominator)
        denominator = denominator + smaller
    return p, q, denominator


@triton.jit
def _sharpen(p, q, inverse_temperature):
    """p^(1/T) / (p^(1/T) + q^(1/T)); NaN where p is, which log2 would hide."""
    exponent = log2(divide(q, p)) * inverse_temperature + p * 0.0
    return divide(tl.full(p.shape, 1.0, p.dtype), 1.0 + tl.exp2(exponent))


@triton.jit(do_not_specialize=_SIZES)
def fmkernels_predict_targets_kernel(
    x,  # logits [K, B, A, D, H, W, inner], any strides
    out,  # targets [B, A, D, H, W, inner] float32, written
    flips,  # [K] uint8
    A, D, H, W, inner,  # sizes; the innermost axis (W where inner is 1) in vectors
    tiles,  # programs per sample
    stride_k, stride_b, stride_a, stride_d, stride_h, stride_w, stride_i,  # in vectors
    inverse_temperature: tl.float64,
    BLOCK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ANCHORS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    sample = program // tiles
    b = sample // A
    a = sample - b * A
    length = D.to(INDEX) * H * W * inner
    at = (program - sample * tiles).to(INDEX) * (BLOCK // V) + tl.arange(0, BLOCK // V)
    inside = at < length
    row = at // inner if ANCHORS_LAST else at
    line = row // W
    w = row - line * W
    d = line // H
    h = line - d * H
    offset = d * stride_d + h * stride_h + w * stride_w
    if ANCHORS_LAST:
        offset += (at - row * inner) * stride_i
    mirror_d = (D - 1 - 2 * d) * stride_d
    mirror_h = (H - 1 - 2 * h) * stride_h
    mirror_w = (W - 1 - 2 * w) * stride_w
    first = b.to(tl.int64) * stride_b + a.to(tl.int64) * stride_a
    mask = inside if V == 1 else tl.broadcast_to(inside[:, None], (BLOCK // V, V))
    p, q, denominator = 0.0, 0.0, 1.0
    for k in tl.static_range(K):
        flip = tl.load(flips + k).to(tl.int32)
        view = (
            offset
            + (flip & 1) * mirror_d
            + ((flip >> 1) & 1) * mirror_h
            + ((flip >> 2) & 1) * mirror_w
        )
        logit = tl.load(
            x + (first + k * stride_k.to(tl.int64)) * V + _lanes(view, V), mask, other=0.0
        )
        if V > 1 and not ANCHORS_LAST:
            logit = tl.where((flip & 4) != 0, _reverse(logit, V), logit)
        p, q, denominator = _add_view(logit.to(T), p, q, denominator, k == 0)
        if k % 32 == 31:  # the common denominator has grown to at most 2^32
            p /= denominator
            q /= denominator
            denominator /= denominator
    target = _sharpen(p, q, inverse_temperature.to(T)).to(tl.float32)
    tl.store(out + sample.to(tl.int64) * length * V + _lanes(at, V), target, mask)


def _vector(x: Tensor, innermost: int) -> int:
    """Elements per 16 bytes if vectors of that size are whole and aligned in every view; else 1."""
    width = 16 // x.element_size()
    dense = x.stride(innermost) == 1 and x.shape[innermost] % width == 0
    aligned = all(
        stride % width == 0
        for dim, stride in enumerate(x.stride())
        if dim != innermost and x.shape[dim] > 1
    )
    return width if dense and aligned else 1


def predict_targets(
    view_logits: Sequence[Tensor], flips: Tensor, temperature: float, targets: Sequence[Tensor]
) -> None:
    """Write targets [B, A, D, H, W, I] of levels [K, B, A, D, H, W, I] of any strides."""
    launch = launch_parameters("predict_targets", flips.device)
    with torch.cuda.device_of(flips):
        for x, out in zip(view_logits, targets, strict=True):
            if not out.numel():
                continue
            innermost = 6 if x.shape[6] > 1 else 5
            vector = _vector(x, innermost)
            views, batch, *sizes = x.shape
            sizes[innermost - 2] //= vector
            strides = [
                1 if dim == innermost and vector > 1 else s // vector
                for dim, s in enumerate(x.stride())
            ]
            length = out[0, 0].numel()
            span = sum((n - 1) * s for n, s in zip(x.shape[3:], x.stride()[3:], strict=True))
            tiles = triton.cdiv(length, launch.block)
            fmkernels_predict_targets_kernel[(batch * sizes[0] * tiles,)](
                x, out, flips, *sizes, tiles, *strides, 1 / temperature,
                BLOCK=launch.block, K=views, V=vector, ANCHORS_LAST=innermost == 6,
                WIDE=max(span, length + launch.block) >= 2**31, num_warps=launch.num_warps,
            )  # fmt: skip
