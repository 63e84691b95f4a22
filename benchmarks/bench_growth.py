"""Time against size, from one element up: ours beside the best that PyTorch has.

On a CPU without torch.compile, which takes seconds for each size.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest

from benchmarks import (
    bench_crop_and_resize3d,
    bench_mixup3d,
    bench_object_mixup3d,
    bench_predict_targets,
    bench_soft_target_focal_loss,
)
from benchmarks.common import DEVICE, OURS, Comparison, rows

GPU = DEVICE.type == "cuda"
RIVALS = {"best eager", "gather and lerp", "interpolate loop", "interpolate"} | (
    {"torch.compile"} if GPU else set()
)


def growing(suite: ModuleType, workload, elements: int) -> Comparison:
    """The suite's comparison on a workload of so many elements, without the weaker providers."""
    whole = suite.comparison(workload)
    providers = [provider for provider in whole.providers if provider.name in {OURS} | RIVALS]
    return replace(whole, op=f"{whole.op} by size", elements=elements, providers=providers)


def losses() -> Iterator[Comparison]:
    suite = bench_soft_target_focal_loss
    for power in range(0, 9 if GPU else 7, 2 if GPU else 1):
        yield growing(suite, suite.Workload(10**power), 10**power)


def targets() -> Iterator[Comparison]:
    suite = bench_predict_targets
    yield growing(suite, suite.Workload(1, 1, kinds=1), 1)
    for size in (4, 16, 64, 256) if GPU else (2, 4, 8, 16, 32, 64):
        workload = suite.Workload(size, 2)
        yield growing(suite, workload, workload.anchors)


def mixups() -> Iterator[Comparison]:
    suite = bench_mixup3d
    yield growing(suite, suite.Workload(1, 1), 1)
    for edge in (4, 16, 64, 256) if GPU else (2, 4, 8, 16, 32, 64):
        yield growing(suite, suite.Workload(8, edge), 8 * edge**3)


def crops() -> Iterator[Comparison]:
    suite = bench_crop_and_resize3d
    yield growing(suite, suite.Workload(1, 1, (1, 2), edge=4, whole=True, gradient=False), 1)
    for size in (4, 16, 64, 128) if GPU else (2, 4, 8, 16, 32):
        extents = min(size, 32), min(2 * size, 64)
        workload = suite.Workload(
            16, size, extents, edge=2 * extents[1], whole=True, gradient=False
        )
        yield growing(suite, workload, 16 * size**3)


def objects() -> Iterator[Comparison]:
    """A box in each of 16 volumes, of half its edge at most."""
    suite = bench_object_mixup3d
    for batch, size in [(1, 1)] + [(16, size) for size in ((4, 16, 64) if GPU else (2, 4, 8, 16))]:
        workload = suite.Workload(batch, 2 * size, batch, (size + 1) // 2, size, donors=True)
        yield growing(suite, workload, workload.voxels)


EVERY = [
    comparison for series in (losses, targets, mixups, crops, objects) for comparison in series()
]


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_growth(record, comparison, provider, phase):
    record(comparison, provider, phase)
