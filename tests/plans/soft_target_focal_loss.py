"""Production launches of soft_target_focal_loss: dtypes, levels, mix, weights, both directions."""

from collections.abc import Callable, Iterator

import torch

from fmkernels.kernels.soft_target_focal_loss import soft_target_focal_loss_scale
from tests.plans import alike
from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
N = 100_003  # odd: some programs take the main path, one the masked tail
LARGE = 1 << 26  # large enough for several tiles per program
ONE = torch.ones(())


def inputs(dtype, target, rows=1, inner=N, levels=1, weight=None, gamma=2.0):
    """All arguments that the ops have in common."""
    logits = [torch.zeros(rows * inner, dtype=dtype) for _ in range(levels)]
    targets = [torch.zeros(rows * inner, dtype=target) for _ in range(levels)]
    weights = []
    if weight:
        weights = [torch.zeros(rows if weight == "row" else rows * inner) for _ in range(levels)]
    mix = (torch.ones(rows), torch.zeros(rows, dtype=torch.int64)) if rows > 1 else (None, None)
    return logits, targets, weights, *mix, rows, 0.05, 0.95, gamma


def step(dtype, target, normalizer=None, mean=False, **shape):
    """Forward and, under an incoming gradient of 1, backward."""
    arguments = inputs(dtype, target, **shape)

    def call():
        saved = dtype != F16
        _, divisor, gradients = launch(
            "soft_target_focal_loss", *arguments, normalizer, mean, with_gradients=saved
        )
        if saved:
            soft_target_focal_loss_scale(gradients, ONE, divisor)
        else:
            launch("soft_target_focal_loss_backward", [ONE], *arguments, divisor)

    return call


def forward(dtype, target, **shape):
    arguments = *inputs(dtype, target, **shape), None, False
    return lambda: launch("soft_target_focal_loss", *arguments, with_gradients=False)


def elementwise(dtype, target, **shape):
    arguments = inputs(dtype, target, **shape)
    return lambda: launch("soft_target_focal_loss_elementwise", *arguments)


def backward(dtype, target):
    arguments = [torch.zeros(N)], *inputs(dtype, target), None
    return lambda: launch("soft_target_focal_loss_backward", *arguments)


def cases() -> Iterator[Case]:
    for dtype, target, both, one_way in [
        (F32, F32, 12, 8), (BF16, BF16, 6, 4), (BF16, U8, 5, 3), (F16, F16, 10, 4),
        (F64, F64, 24, 16),
    ]:  # fmt: skip
        types = str(dtype if dtype == target else f"{dtype}, {target}").replace("torch.", "")
        yield alike(Case(f"step {types}", step(dtype, target), N, both), target in (BF16, U8))
        yield alike(Case(f"forward {types}", forward(dtype, target), N, one_way), target != BF16)
    for dtype, both in ((F32, 12), (BF16, 6)):
        name = str(dtype).removeprefix("torch.")
        yield alike(Case(f"any gamma {name}", step(dtype, dtype, gamma=1.5), N, both))
        large = Case(f"64M elements {name}", step(dtype, dtype, inner=LARGE), LARGE, both)
        yield alike(large, dtype == BF16)
        any_gamma = step(dtype, dtype, gamma=1.5, inner=LARGE)
        name = f"64M elements, any gamma {name}"
        yield alike(Case(name, any_gamma, LARGE, both), dtype == F32)
    yield alike(Case("mean, device normalizer", step(F32, F32, mean=True, normalizer=ONE), N, 12))
    yield Case("mean of those not ignored", step(F32, F32, mean=True), N, 12)
    yield alike(Case("3 levels", step(F32, F32, levels=3), 3 * N, 12))
    yield Case(
        "3 levels, mixed",
        step(BF16, F32, rows=4, inner=24_000, levels=3, weight="row"),
        12 * 24_000,
        8,
    )
    yield alike(Case("weighted", step(F32, F32, weight="element"), N, 16))
    yield Case("losses", elementwise(F32, F32), N, 12)
    yield Case("gradient of losses", backward(F32, F32), N, 16)


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    return {"soft_target_focal_loss": (step(F32, F32), ("BLOCK",))}


EXTRA_BYTES = {
    # the number of anchors is known only after the forward, so the backward scales the gradient
    "mean of those not ignored": 8
}
