"""Launches of soft_target_focal_loss: types, levels, mix, weights, forward and backward."""

from collections.abc import Iterator

import torch

from fmkernels.kernels import soft_target_focal_loss as kernels
from tests.triton_checked.plan import Case

F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
N = 100_003  # odd, so that both the main path and the tail run
LARGE = 1 << 26  # where a program takes several tiles
ONE = torch.ones(())


def inputs(dtype, target, rows=1, inner=N, levels=1, weight=None):
    logits = [torch.zeros(rows * inner, dtype=dtype) for _ in range(levels)]
    targets = [torch.zeros(rows * inner, dtype=target) for _ in range(levels)]
    weights = (
        [torch.zeros(rows if weight == "row" else rows * inner) for _ in range(levels)]
        if weight
        else []
    )
    mix = (torch.ones(rows), torch.zeros(rows, dtype=torch.int64)) if rows > 1 else (None, None)
    return logits, targets, weights, mix, rows


def step(dtype, target, gamma=2.0, normalizer=None, mean=False, **shape):
    """Forward and, with a grad_output of 1, backward."""
    logits, targets, weights, mix, rows = inputs(dtype, target, **shape)
    common = *mix, rows, 0.05, 0.95, gamma

    def call():
        saved = dtype != F16
        _, divisor, gradients = kernels.launch_sum(
            logits, targets, weights, normalizer, *common, mean, saved
        )
        if saved:
            kernels.launch_scale(gradients, ONE, divisor)
        else:
            kernels.launch_elementwise(logits, targets, weights, [ONE], divisor, *common)

    return call


def forward(dtype, target, **shape):
    logits, targets, weights, mix, rows = inputs(dtype, target, **shape)
    return lambda: kernels.launch_sum(
        logits, targets, weights, None, *mix, rows, 0.05, 0.95, 2.0, False, False
    )


def elementwise(dtype, target, upstream, **shape):
    logits, targets, weights, mix, rows = inputs(dtype, target, **shape)
    return lambda: kernels.launch_elementwise(
        logits, targets, weights, upstream, None, *mix, rows, 0.05, 0.95, 2.0
    )


def cases() -> Iterator[Case]:
    for dtype, target, both, one_way in [
        (F32, F32, 12, 8), (BF16, BF16, 6, 4), (BF16, U8, 5, 3), (F16, F16, 10, 4), (F64, F64, 24, 16),
    ]:  # fmt: skip
        types = str(dtype if dtype == target else f"{dtype}, {target}").replace("torch.", "")
        yield Case(f"step {types}", step(dtype, target), N, both)
        yield Case(f"forward {types}", forward(dtype, target), N, one_way)
    for dtype, both in ((F32, 12), (BF16, 6)):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"any gamma {name}", step(dtype, dtype, gamma=1.5), N, both)
        yield Case(f"64M elements {name}", step(dtype, dtype, inner=LARGE), LARGE, both)
        yield Case(
            f"64M elements, any gamma {name}",
            step(dtype, dtype, gamma=1.5, inner=LARGE),
            LARGE,
            both,
        )
    yield Case("mean, device normalizer", step(F32, F32, mean=True, normalizer=ONE), N, 12)
    yield Case("mean of those not ignored", step(F32, F32, mean=True), N, 12)
    yield Case("3 levels", step(F32, F32, levels=3), 3 * N, 12)
    yield Case(
        "3 levels, mixed",
        step(BF16, F32, rows=4, inner=24_000, levels=3, weight="row"),
        12 * 24_000,
        8,
    )
    yield Case("weighted", step(F32, F32, weight="element"), N, 16)
    yield Case("losses", elementwise(F32, F32, []), N, 12)
    yield Case("gradient of losses", elementwise(F32, F32, [torch.zeros(N)]), N, 16)
