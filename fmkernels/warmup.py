"""``fmkernels warmup``: compile the CPU path ahead of time."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fmkernels import functional
from fmkernels.cpu.compiled import cache_folders

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.uint8)
"""Dtypes of logits and volumes. float64, which is for tests of gradients, is left out."""

_FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)
_WINDOW = (-1000.0, 400.0)


def warmup(ops: Sequence[str] = ()) -> int:
    """Call ops, by default all, with small tensors, print the seconds and return exit code 0.

    What other processes have compiled and kept is loaded, not compiled again.
    """
    ops = ops or OPS
    start = time.perf_counter()
    for number, op in enumerate(ops, 1):
        began = time.perf_counter()
        print(f"[{number}/{len(ops)}] {op} ...", end="", flush=True)
        for call in _CALLS[op]():
            call()
        print(f" {time.perf_counter() - began:.1f} s", flush=True)
    folders = " or ".join(map(str, cache_folders()))
    print(f"compiled in {time.perf_counter() - start:.1f} s, kept in {folders} (NUMBA_CACHE_DIR)")
    return 0


def _soft_target_focal_loss() -> Iterator[Callable]:
    for dtype in _FLOATS:
        logits = torch.zeros(1, 8, dtype=dtype, requires_grad=True)
        for targets in (torch.ones(1, 8), torch.ones(1, 8, dtype=torch.uint8)):
            yield lambda x=logits, y=targets: functional.soft_target_focal_loss(x, y).backward()


def _predict_targets() -> Iterator[Callable]:
    flips = torch.tensor([0, 5], dtype=torch.uint8)
    for dtype in _FLOATS:
        views = torch.zeros(2, 1, 1, 2, 2, 2, dtype=dtype)
        yield lambda x=views: functional.predict_targets(x, flips)
        yield lambda x=views: functional.predict_targets(
            x.expand(2, 1, 2, 2, 2, 2), flips, classes=2
        )


def _symmetry() -> Iterator[Callable]:
    yield lambda: functional.undo_symmetry(functional.apply_symmetry(torch.zeros(2, 2, 2), 9), 9)


def _sample_mixup() -> Iterator[Callable]:
    yield lambda: functional.sample_mixup(2)


def _sample_donors() -> Iterator[Callable]:
    yield lambda: functional.sample_donors(torch.zeros(2, 7))


def _group_norm3d() -> Iterator[Callable]:
    for dtype in _FLOATS:
        x = torch.zeros(1, 4, 2, 2, 2, dtype=dtype, requires_grad=True)
        yield lambda x=x: _differentiate(
            functional.group_norm3d(x, 2, torch.ones(4), residual=x, activation="relu")
        )


def _volumes() -> Iterator[tuple[Tensor, dict]]:
    """Volumes of each dtype, and the window for them."""
    for dtype in DTYPES:
        x = torch.zeros(2, 1, 4, 4, 4, dtype=dtype, requires_grad=dtype.is_floating_point)
        yield x, {} if dtype.is_floating_point else {"window": _WINDOW}


def _mixup3d() -> Iterator[Callable]:
    lam, index = torch.full((2,), 0.5), torch.tensor([1, 0])
    for x, window in _volumes():
        yield lambda x=x, w=window: _differentiate(functional.mixup3d(x, lam, index, **w))


def _crop_and_resize3d() -> Iterator[Callable]:
    boxes = torch.tensor([[0.0, 0, 0, 0, 4, 4, 4]])
    for x, window in _volumes():
        yield lambda x=x, w=window: _differentiate(
            functional.crop_and_resize3d(x, boxes, (2, 2, 2), **w)
        )


def _object_mixup3d() -> Iterator[Callable]:
    boxes, lam = torch.tensor([[0.0, 0, 0, 0, 3, 3, 3]]), torch.full((1,), 0.5)
    for x, window in _volumes():
        x = x.detach()
        yield lambda x=x, w=window: functional.object_mixup3d(x, boxes, boxes, lam, **w)


def _differentiate(result: Tensor) -> None:
    if result.requires_grad:
        result.sum().backward()


_CALLS: dict[str, Callable[[], Iterator[Callable]]] = {
    "soft_target_focal_loss": _soft_target_focal_loss,
    "apply_symmetry": _symmetry,
    "undo_symmetry": _symmetry,
    "predict_targets": _predict_targets,
    "sample_mixup": _sample_mixup,
    "sample_donors": _sample_donors,
    "group_norm3d": _group_norm3d,
    "mixup3d": _mixup3d,
    "crop_and_resize3d": _crop_and_resize3d,
    "object_mixup3d": _object_mixup3d,
}
OPS = tuple(_CALLS)
