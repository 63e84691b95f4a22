"""What production launches of soft_target_focal_loss: types, levels, mix, weights, forward and backward."""

from collections.abc import Iterator

import torch

from fmkernels.kernels import soft_target_focal_loss as kernels
from tests.support.driver import Case

F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
N = 100_003  # of an odd size, so that main path and tail are both there


def inputs(dtype, target, rows=1, inner=N, levels=1, weight=None):
    logits = [torch.zeros(rows * inner, dtype=dtype) for _ in range(levels)]
    targets = [torch.zeros(rows * inner, dtype=target) for _ in range(levels)]
    weights = [torch.zeros(rows if weight == "row" else rows * inner) for _ in range(levels)] if weight else []
    mix = (torch.ones(rows), torch.zeros(rows, dtype=torch.int64)) if rows > 1 else (None, None)
    return logits, targets, weights, mix, rows


def total(dtype, target, gamma=2.0, normalizer=None, mean=False, with_gradient=True, **shape):
    logits, targets, weights, mix, rows = inputs(dtype, target, **shape)
    return lambda: kernels.launch_sum(
        logits, targets, weights, normalizer, *mix, rows, 0.05, 0.95, gamma, mean, with_gradient
    )


def elementwise(dtype, target, upstream, **shape):
    logits, targets, weights, mix, rows = inputs(dtype, target, **shape)
    return lambda: kernels.launch_elementwise(logits, targets, weights, upstream, None, *mix, rows, 0.05, 0.95, 2.0)


def cases() -> Iterator[Case]:
    one = torch.ones(())
    for dtype, target in [(F32, F32), (BF16, BF16), (BF16, U8), (F16, F16), (F64, F64)]:
        name = f"{dtype} {target}".replace("torch.", "")
        yield Case(f"sum {name}", total(dtype, target), N)
        yield Case(f"sum, forward only {name}", total(dtype, target, with_gradient=False), N)
    yield Case("sum, any gamma", total(F32, F32, gamma=1.5), N)
    yield Case("sum, any gamma bfloat16", total(BF16, BF16, gamma=1.5), N)
    yield Case("mean", total(F32, F32, mean=True), N)
    yield Case("mean, device normalizer", total(F32, F32, mean=True, normalizer=one), N)
    yield Case("sum, 3 levels", total(F32, F32, levels=3), 3 * N)
    yield Case("sum, 3 levels mixed", total(BF16, F32, rows=4, inner=24_000, levels=3, weight="row"), 12 * 24_000)
    yield Case("sum, weighted", total(F32, F32, weight="element"), N)
    yield Case("losses", elementwise(F32, F32, []), N)
    yield Case("gradient again", elementwise(F16, F16, [one]), N)
    yield Case("gradient of losses", elementwise(F32, F32, [torch.zeros(N)]), N)
    gradients = [torch.zeros(N) for _ in range(3)]
    yield Case("scale", lambda: kernels.launch_scale(gradients, one, one), 3 * N)
