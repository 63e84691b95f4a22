"""What production launches of predict_targets: every type, several levels, channels last, sizes that forbid vectors."""

from collections.abc import Iterator

import torch

from fmkernels.kernels.predict_targets import launch_predict_targets
from tests.support.driver import Case


def call(dtype, *sizes, views=4, anchors_last=False):
    levels = []
    for size in sizes:
        shape = (views, 2, 1, *[size] * 3, 8) if anchors_last else (views, 2, 8, *[size] * 3, 1)
        levels.append(torch.zeros(shape, dtype=dtype))
    flips = torch.zeros(views, dtype=torch.uint8)
    return lambda: launch_predict_targets(levels, flips, 0.7)


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"vectors {name}", call(dtype, 32), 16 * 32**3)
        yield Case(f"channels last {name}", call(dtype, 32, anchors_last=True), 16 * 32**3)
        yield Case(f"odd rows {name}", call(dtype, 31), 16 * 30 * 1024)  # whole programs: 31^3 fills 29 and a part
    yield Case("vectors float64", call(torch.float64, 32), 16 * 32**3)
    yield Case("4 levels", call(torch.float32, 40, 20, 10, 5))
