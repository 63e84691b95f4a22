"""Pseudo-targets from several views on the GPU: one launch per level, every element moved once.

The sum p of the probabilities of K views is kept as a fraction whose denominator is the product of
all (1 + exp(-|x|)). It is a sum of positive terms, so that it is accurate however small. Its
complement loses digits near p = K, but only those that y, rounded to float32, cannot show.
Sharpening only needs the ratio of both, in which the denominator cancels, so that no view needs a
division.

A level is seen as samples of [D, H, W, I] elements. I is 1, or the number of anchors where these
are innermost in memory (channels last). Positions count vectors of V elements along the innermost
axis. V is 1 if its length, a stride or the mirrored positions do not keep 16-byte alignment. A flip
of that axis reverses the order of vectors in the address and of lanes in registers.

Whether axes are permuted is known on the device only. All programs of a launch take the same of two
paths. In that for permutations each axis of the original has a stride and a direction in the view.
Without channels last, neighbors in the original are then not neighbors in the view, so that a warp
reads more sectors; caches serve the rest of them to other warps.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.arithmetic import LOG2E, divide, log2, quotient, reciprocal
from fmkernels.kernels.launching import quick
from fmkernels.kernels.tuning import debug, launch_parameters

INFINITY = tl.constexpr(math.inf)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)  # infinite logits count as this
_SIZES = (
    "A", "D", "H", "W", "inner", "tiles", "by_tiles", "by_A", "by_H", "by_W", "by_inner",
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
def _quotient(n, divisor, by_divisor, WIDE: tl.constexpr):
    """n // divisor."""
    return n // divisor if WIDE else quotient(n, by_divisor)


@triton.jit
def _position(
    at, H, W, inner, by_H, by_W, by_inner, ANCHORS_LAST: tl.constexpr, WIDE: tl.constexpr
):
    """Indices along D, H, W and the innermost axis."""
    row = _quotient(at, inner, by_inner, WIDE) if ANCHORS_LAST else at
    line = _quotient(row, W, by_W, WIDE)
    d = _quotient(line, H, by_H, WIDE)
    return d, line - d * H, row - line * W, at - row * inner


@triton.jit
def _lanes_mask(mask, V: tl.constexpr):
    """The mask of vectors for their elements."""
    if V > 1:
        mask = tl.broadcast_to(mask[:, None], (mask.shape[0], V))
    return mask


@triton.jit
def _in_order(x, backwards, V: tl.constexpr):
    """Vectors [n, V] in float32 (float64 for float64), reversed if so; words hold two bfloat16."""
    if x.dtype == tl.uint32:
        ROWS: tl.constexpr = x.shape[0]
        x = tl.where(backwards, _reverse(x, V // 2), x)
        half = backwards.to(tl.uint32) * 16
        x = (x << half) | (x >> (-half & 31))
        x = tl.join(x << 16, x & 0xFFFF0000).reshape(ROWS, V).to(tl.float32, bitcast=True)
    else:
        x = tl.where(backwards, _reverse(x, V), x)
    return x


@triton.jit
def _add_view(x, p, denominator, FIRST: tl.constexpr):
    """Add sigmoid(x) to p / denominator."""
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
    else:
        e = tl.exp2(tl.abs(x) * -LOG2E)
    positive = x > 0
    larger = 1.0 + e
    if FIRST:
        p = tl.where(positive, 1.0, e)
        denominator = larger
    else:
        smaller = e * denominator
        p = p * larger + tl.where(positive, denominator, smaller)
        denominator = denominator + smaller
    return p, denominator


@triton.jit
def _view(code, cube, d, h, w, D, H, W, stride_d, stride_h, stride_w):
    """Where a view has the element of each position, and whether its code is valid."""
    valid = (code < 8) | (cube & (code < 48))
    tl.device_assert(valid, "predict_targets: flips must be in [0, 48), [0, 8) if sizes differ")
    code = tl.where(valid, code, code & 7)
    flip_d, flip_h, flip_w = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0
    odd, second, third = (code & 8) != 0, code >= 16, code >= 32
    # the first axis of the view is D, H (second) or W (third); the others are in order or not
    stride_1, stride_2 = tl.where(odd, stride_w, stride_h), tl.where(odd, stride_h, stride_w)
    flip_1, flip_2 = tl.where(odd, flip_w, flip_h), tl.where(odd, flip_h, flip_w)
    step_d = tl.where(second, stride_1, stride_d)
    step_h = tl.where(third, stride_2, tl.where(second, stride_d, stride_1))
    step_w = tl.where(third, stride_d, stride_2)
    d = tl.where(tl.where(second, flip_1, flip_d), D - 1 - d, d)
    h = tl.where(tl.where(third, flip_2, tl.where(second, flip_d, flip_1)), H - 1 - h, h)
    w = tl.where(tl.where(third, flip_d, flip_2), W - 1 - w, w)
    return d * step_d + h * step_h + w * step_w, valid


@triton.jit
def _flipped_views(
    x, mask, flips, d, h, w, i, D, H, W,
    stride_k, stride_d, stride_h, stride_w, stride_i,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ANCHORS_LAST: tl.constexpr,
):  # fmt: skip
    """Sum of the probabilities of views that no axes are permuted of, as a fraction."""
    offset = d * stride_d + h * stride_h + w * stride_w
    if ANCHORS_LAST:
        offset += i * stride_i
    mirror_d = (D - 1 - 2 * d) * stride_d
    mirror_h = (H - 1 - 2 * h) * stride_h
    mirror_w = (W - 1 - 2 * w) * stride_w
    p, denominator = 0.0, 1.0
    for k in tl.static_range(K):
        flip = tl.load(flips + k).to(tl.int32)
        view = (
            offset
            + (flip & 1) * mirror_d
            + ((flip >> 1) & 1) * mirror_h
            + ((flip >> 2) & 1) * mirror_w
        )
        first = x + k * stride_k.to(tl.int64) * V
        if V > 1 and not ANCHORS_LAST and x.dtype.element_ty == tl.bfloat16:
            words = first.to(tl.pointer_type(tl.uint32)) + _lanes(view, V // 2)
            logit = tl.load(words, _lanes_mask(mask, V // 2))
        else:
            logit = tl.load(first + _lanes(view, V), _lanes_mask(mask, V))
        if V > 1 and not ANCHORS_LAST:
            logit = _in_order(logit, (flip & 4) != 0, V)
        p, denominator = _add_view(logit.to(T), p, denominator, k == 0)
        if k % 32 == 31:  # the denominator has grown to at most 2^32
            p /= denominator
            denominator /= denominator
    return p, denominator


@triton.jit
def _permuted_views(
    x, mask, flips, d, h, w, i, D, H, W,
    stride_k, stride_d, stride_h, stride_w, stride_i,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ANCHORS_LAST: tl.constexpr,
):  # fmt: skip
    """The same for all symmetries: each element along W is loaded by itself.

    Neither this loop nor that over parts is unrolled, or the other path would lose registers.
    """
    LANES: tl.constexpr = 1 if ANCHORS_LAST else V
    if LANES > 1:
        d, h, w = d[:, None], h[:, None], _lanes(w, V)
        stride_d, stride_h, stride_w, W = stride_d * V, stride_h * V, 1, W * V
    cube = (D == H) & (H == W)
    p = tl.zeros((mask.shape[0], V) if V > 1 else mask.shape, T)
    denominator = p + 1.0
    for k in range(K):
        view, valid = _view(
            tl.load(flips + k).to(tl.int32), cube, d, h, w, D, H, W, stride_d, stride_h, stride_w
        )
        if ANCHORS_LAST:
            view = _lanes(view + i * stride_i, V)
        logit = tl.load(x + k * stride_k.to(tl.int64) * V + view, _lanes_mask(mask, V)).to(T)
        p, denominator = _add_view(logit, p, denominator, False)
        p = tl.where(valid, p, float("nan"))
        if K > 32:
            p /= denominator
            denominator /= denominator
    return p, denominator


@triton.jit
def _softmax(x, exists, LOG2: tl.constexpr):
    """Powers of a base, whose log2 is given, over their sum; rows that do not exist get 0."""
    highest = tl.max(tl.where(exists, x, -INFINITY), 0)[None, :]
    power = tl.where(exists, tl.exp2((x - highest) * LOG2), 0.0)
    one = tl.full(x.shape[1:], 1.0, x.dtype)
    return power * divide(one, tl.sum(power, 0))[None, :]


@triton.jit
def _finish(out, at, mask, p, denominator, inverse_temperature, K: tl.constexpr, V: tl.constexpr):
    """Store p^(1/T) / (p^(1/T) + q^(1/T)), vectors of 8 as 2 x 4, as a thread holds them."""
    # rounding may leave p above its denominator
    q = tl.maximum(K * denominator - p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # NaN where p is, which log2 would hide
    exponent = log2(divide(q, p)) * inverse_temperature.to(p.dtype) + p * 0.0
    target = divide(tl.full(p.shape, 1.0, p.dtype), 1.0 + tl.exp2(exponent)).to(tl.float32)
    if V == 8:
        ROWS: tl.constexpr = at.shape[0]
        low, high = tl.split(target.reshape(ROWS, 2, 4).permute(0, 2, 1))
        half = (at * 8)[:, None] + tl.arange(0, 4)[None, :]
        tl.store(out + half, low, _lanes_mask(mask, 4))
        tl.store(out + (half + 4), high, _lanes_mask(mask, 4))
    else:
        tl.store(out + _lanes(at, V), target, _lanes_mask(mask, V))


@quick
@triton.jit(do_not_specialize=_SIZES)
def fmkernels_predict_targets_kernel(
    x,  # logits [K, B, A, D, H, W, inner], any strides
    out,  # targets [B, A, D, H, W, inner] float32, written
    flips,  # [K] uint8, codes of symmetries
    A, D, H, W, inner,  # sizes; the innermost axis (W where inner is 1) in vectors
    tiles,  # programs per sample
    by_tiles, by_A, by_H, by_W, by_inner,  # reciprocals of sizes
    stride_k, stride_b, stride_a, stride_d, stride_h, stride_w, stride_i,  # in vectors
    inverse_temperature: tl.float64,
    BLOCK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ANCHORS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    sample = quotient(program, by_tiles)
    b = quotient(sample, by_A)
    a = sample - b * A
    length = D.to(INDEX) * H * W * inner
    start = (program - sample * tiles).to(INDEX) * (BLOCK // V)
    x += (b.to(tl.int64) * stride_b + a.to(tl.int64) * stride_a) * V
    out += sample.to(tl.int64) * length * V
    codes = 0
    for k in tl.static_range(K):
        codes |= tl.load(flips + k).to(tl.int32)
    if codes < 8:
        at = start + tl.arange(0, BLOCK // V)
        d, h, w, i = _position(at, H, W, inner, by_H, by_W, by_inner, ANCHORS_LAST, WIDE)
        p, denominator = _flipped_views(
            x, at < length, flips, d, h, w, i, D, H, W,
            stride_k, stride_d, stride_h, stride_w, stride_i, T, K, V, ANCHORS_LAST,
        )  # fmt: skip
        _finish(out, at, at < length, p, denominator, inverse_temperature, K, V)
    else:
        PARTS: tl.constexpr = 1 if ANCHORS_LAST else 4
        for part in range(PARTS):
            at = start + part * (BLOCK // V // PARTS) + tl.arange(0, BLOCK // V // PARTS)
            d, h, w, i = _position(at, H, W, inner, by_H, by_W, by_inner, ANCHORS_LAST, WIDE)
            p, denominator = _permuted_views(
                x, at < length, flips, d, h, w, i, D, H, W,
                stride_k, stride_d, stride_h, stride_w, stride_i, T, K, V, ANCHORS_LAST,
            )  # fmt: skip
            _finish(out, at, at < length, p, denominator, inverse_temperature, K, V)


@quick
@triton.jit(do_not_specialize=[*_SIZES, "stride_c", "out_c", "out_step"])
def fmkernels_predict_class_targets_kernel(
    x,  # logits [K, B, A, D, H, W, inner] of each class, any strides
    out,  # targets [B, A, length] of each class, float32, written
    flips,  # [K] uint8, codes of symmetries
    A, D, H, W, inner,  # sizes
    tiles,  # programs per sample
    by_tiles, by_A, by_H, by_W, by_inner,  # reciprocals of sizes
    stride_k, stride_b, stride_a, stride_d, stride_h, stride_w, stride_i,
    stride_c, out_c, out_step,  # from class to class, and from target to target of a class
    inverse_temperature: tl.float64,
    POSITIONS: tl.constexpr, K: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows are classes, columns positions, so that a thread holds all classes of a position."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    sample = quotient(program, by_tiles)
    b = quotient(sample, by_A)
    length = D.to(INDEX) * H * W * inner
    at = (program - sample * tiles).to(INDEX) * POSITIONS + tl.arange(0, POSITIONS)
    d, h, w, i = _position(at, H, W, inner, by_H, by_W, by_inner, True, WIDE)
    x += b.to(tl.int64) * stride_b + (sample - b * A).to(tl.int64) * stride_a
    c = tl.arange(0, ROWS).to(INDEX)[:, None]
    exists = c < CLASSES
    mask = exists & (at < length)[None, :]
    cube = (D == H) & (H == W)
    total = tl.zeros((ROWS, POSITIONS), T)
    for k in range(K):
        view, valid = _view(
            tl.load(flips + k).to(tl.int32), cube, d, h, w, D, H, W, stride_d, stride_h, stride_w
        )
        view = (view + i * stride_i)[None, :] + c * stride_c
        logit = tl.load(x + k * stride_k.to(tl.int64) + view, mask, other=0.0).to(T)
        logit = tl.maximum(logit, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
        logit = tl.minimum(logit, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        total += _softmax(logit, exists, LOG2E)
        total = tl.where(valid, total, float("nan"))
    # a probability that is NaN stays so, which log2 would hide
    power = log2(total) * inverse_temperature.to(T) + total * 0.0
    target = _softmax(power, exists, 1.0).to(tl.float32)
    out += sample.to(tl.int64) * length * CLASSES
    tl.store(out + (at * out_step)[None, :] + c * out_c, target, mask)


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
    view_logits: Sequence[Tensor],
    flips: Tensor,
    temperature: float,
    classes: int,
    targets: Sequence[Tensor],
) -> None:
    """Write targets [B, A, D, H, W], dense or channels last, of levels [K, B, A, D, H, W]."""
    launch = launch_parameters("predict_targets", flips.device)
    with torch.cuda.device_of(flips):
        for x, out in zip(view_logits, targets, strict=True):
            if not out.numel():
                continue
            anchors_last = out.stride(1) < out.stride(4)
            innermost = 2 if anchors_last else 5
            vector = _vector(x, innermost) if classes == 1 else 1
            views, batch, groups, *sizes = x.shape
            groups //= classes
            length, inner = math.prod(sizes), 1
            strides = [s // vector for s in x.stride()]
            if vector > 1:
                strides[innermost] = 1
            stride_k, stride_b, stride_c, *strides = strides
            step = stride_c * classes
            if anchors_last:
                length, groups, inner = length * groups, 1, groups // vector
            else:
                sizes[2] //= vector
            strides = [stride_k, stride_b, step, *strides, step]
            span = sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True))
            rows = 1 << (classes - 1).bit_length()
            columns = max(launch.block // rows, 1)
            tiles = -(-length // columns)
            arguments = (
                x, out, flips, groups, *sizes, inner, tiles,
                *map(reciprocal, (tiles, groups, *sizes[1:], inner)), *strides,
            )  # fmt: skip
            options = {
                "WIDE": max(span, length * classes + launch.block) >= 2**31,
                "num_warps": launch.num_warps,
                "debug": debug(),
            }
            grid = (batch * groups * tiles,)
            if classes == 1:
                fmkernels_predict_targets_kernel[grid](
                    *arguments, 1 / temperature, BLOCK=launch.block, K=views, V=vector,
                    ANCHORS_LAST=anchors_last, **options,
                )  # fmt: skip
            else:
                fmkernels_predict_class_targets_kernel[grid](
                    *arguments, stride_c, *((1, classes) if anchors_last else (length, 1)),
                    1 / temperature, POSITIONS=columns, K=views, CLASSES=classes, ROWS=rows,
                    **options,
                )  # fmt: skip
