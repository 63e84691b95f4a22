"""Launches of predict_targets: types, levels, channels last, odd sizes, classes."""

from collections.abc import Callable, Iterator

import torch

from tests.plans import alike
from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32 = torch.float32


def call(dtype, *sizes, views=4, anchors_last=False, classes=1):
    levels = []
    for size in sizes:
        x = torch.zeros(views, 2, 8, *[size] * 3, dtype=dtype)
        levels.append(x.movedim(2, -1).contiguous().movedim(-1, 2) if anchors_last else x)
    flips = torch.zeros(views, dtype=torch.uint8)
    return lambda: launch("predict_targets", levels, flips, 0.7, classes)


def cases() -> Iterator[Case]:
    for dtype, min_bytes in ((F32, 20), (torch.bfloat16, 12)):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"vectors {name}", call(dtype, 16), 16 * 16**3, min_bytes)
        last = call(dtype, 16, anchors_last=True)
        yield alike(Case(f"channels last {name}", last, 16 * 16**3, min_bytes), dtype != F32)
        odd = Case(f"odd rows {name}", call(dtype, 19), 16 * 19**3, min_bytes)
        yield alike(odd, dtype == F32)
        classes, a_loop_of_views = call(dtype, 16, classes=4), (4,)
        case = Case(f"4 classes {name}", classes, 16 * 16**3, min_bytes, a_loop_of_views)
        yield alike(case, dtype == F32)
    yield Case("vectors float64", call(torch.float64, 16), 16 * 16**3, 36)
    sizes = 24, 12, 6, 3
    yield alike(Case("4 levels", call(F32, *sizes), 16 * sum(n**3 for n in sizes), 20))


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    return {"predict_targets": (call(F32, 16), ("BLOCK",))}
