"""What only a GPU can show of every op, beside the tests and the benchmarks.

    python -m benchmarks.device_checks calls     every kernel once, small: for compute-sanitizer to look at
    python -m benchmarks.device_checks graphs    capture every op in a CUDA graph, replay it with other inputs
    python -m benchmarks.device_checks large     more than 2^31 elements, held to the same op on their last part

Results are held to the float64 reference, to the op outside of a graph, and to the op on a part.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import reference
from benchmarks import (
    bench_crop_and_resize3d,
    bench_mixup3d,
    bench_object_mixup3d,
    bench_predict_targets,
    bench_soft_target_focal_loss,
)
from benchmarks.common import DEVICE, OURS, Comparison, Provider, Run
from fmkernels import (
    crop_and_resize3d,
    mixup3d,
    object_mixup3d,
    predict_targets,
    sample_mixup,
    soft_target_focal_loss,
)
from tests.support.tolerance import assert_close

F16, BF16, I16 = torch.float16, torch.bfloat16, torch.int16
MORE_THAN_INT32 = 2**31 + 2**16
PIECE = 2**28  # that the loss is added up from
PART = 2**16  # of which the large results are checked
ROWS = 2**11  # that large volumes have along y and x together


def comparisons() -> list[Comparison]:
    """Small workloads that, together, launch every kernel."""
    loss, targets, mixup = bench_soft_target_focal_loss, bench_predict_targets, bench_mixup3d
    crop, objects = bench_crop_and_resize3d, bench_object_mixup3d
    volumes = {"batch": 3, "edge": 12}
    return [
        loss.comparison(loss.Workload(5003)),
        loss.comparison(loss.Workload(5003, BF16, torch.uint8, scale=1024)),
        loss.comparison(loss.Workload(5003, F16, F16, scale=1024)),
        _levels(),
        targets.comparison(targets.Workload(8, 2)),
        targets.comparison(targets.Workload(7, 2, BF16)),
        mixup.comparison(mixup.Workload(**volumes, gradient=True)),
        mixup.comparison(mixup.Workload(**volumes, in_place=True)),
        mixup.comparison(mixup.Workload(**volumes, flips=True, in_place=True)),
        mixup.comparison(mixup.Workload(**volumes, flips=True, gradient=True)),
        mixup.comparison(mixup.Workload(**volumes, dtype=I16, result=BF16, flips=True)),
        crop.comparison(crop.Workload(5, 8, edge=64, whole=True)),
        crop.comparison(crop.Workload(5, 8, edge=64, dtype=BF16, result=BF16)),
        crop.comparison(crop.Workload(5, 8, edge=64, dtype=I16, result=BF16, gradient=False)),
        objects.comparison(objects.Workload(2, 32, 5, 4, 8, donors=True)),
        objects.comparison(objects.Workload(2, 32, 5, 4, 8)),
        objects.comparison(objects.Workload(2, 32, 5, 4, 8, BF16, in_place=False)),
    ]


def _levels() -> Comparison:
    """The loss of every element over three levels, some ignored, with targets that are mixed."""

    def inputs() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        logits = [torch.randn(2, n, device=DEVICE, requires_grad=True) for n in (1000, 130, 17)]
        targets = [torch.rand_like(x) - 0.1 for x in logits]
        return logits, targets, torch.rand(2, device=DEVICE), torch.tensor([1, 0], device=DEVICE)

    def losses(function: Callable) -> Callable:
        return lambda xs, ys, lam, index: function(xs, ys, mix=(lam, index), reduction="none")

    return Comparison(
        op="soft_target_focal_loss",
        workload="three levels, mixed targets, no reduction",
        inputs=inputs,
        reference=losses(reference.soft_target_focal_loss),
        floor=dict.fromkeys(("forward", "backward", "both")),
        providers=[Provider(OURS, losses(soft_target_focal_loss))],
    )


def ours_of(comparison: Comparison) -> Provider:
    return next(provider for provider in comparison.providers if provider.name == OURS)


def calls() -> None:
    for comparison in comparisons():
        comparison.checked(ours_of(comparison))
        print(f"{comparison}: as the reference")


def _results(run: Run) -> list[Tensor]:
    """Results and gradients, in tensors of their own where the op works in place."""
    if run.backward:
        results, _, gradients = run.forward_backward()
        return [*(result.detach() for result in results), *gradients]
    return run.forward()


def captured(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """The results of a call, captured in a CUDA graph, and what computes them anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


def _tensors(values: Sequence) -> list[Tensor]:
    flat = [t for value in values for t in (value if isinstance(value, (list, tuple)) else [value])]
    return [t.detach() for t in flat if isinstance(t, Tensor)]


def graphs() -> None:
    for comparison in comparisons():
        provider = ours_of(comparison)
        run = comparison.checked(provider)  # which also compiles and loads the kernels
        run.host = True  # no event is to be captured
        results, replay = captured(lambda run=run: _results(run))
        for seed in (1, 2):
            torch.manual_seed(seed)
            other = Run(provider, comparison.inputs(), comparison.floor)
            other.upstream = run.upstream
            other.host = True
            for mine, new in zip(_tensors(run.inputs), _tensors(other.inputs), strict=True):
                mine.copy_(new)
            replay()
            for result, expected in zip(results, _results(other), strict=True):
                torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        print(f"{comparison}: the same from a graph")
    sample_mixup(8, device=DEVICE)
    (lam, index), replay = captured(lambda: list(sample_mixup(8, device=DEVICE)))
    replay()
    first = lam.clone()
    replay()
    assert sorted(index.tolist()) == list(range(8)) and 0.5 <= lam.min() <= lam.max() <= 1
    assert not torch.equal(lam, first), "sample_mixup: a graph draws the same again"
    print("sample_mixup: new draws from a graph")


def large_loss(elements: int) -> None:
    logits = torch.empty(elements, dtype=BF16, device=DEVICE).normal_().requires_grad_()
    targets = torch.empty(elements, dtype=torch.uint8, device=DEVICE).random_(2)
    loss = soft_target_focal_loss(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    total = 0.0
    pieces = (tensor.split(PIECE) for tensor in (logits.detach(), targets, gradient))
    for x, y, expected in zip(*pieces, strict=True):
        piece = x.requires_grad_()
        loss_of_piece = soft_target_focal_loss(piece, y, reduction="sum")
        assert_close(torch.autograd.grad(loss_of_piece, piece)[0][-PART:], expected[-PART:])
        total += loss_of_piece.item()
    assert abs(loss.item() - total) <= 1e-5 * abs(total), (loss.item(), total)


def large_targets(elements: int) -> None:
    logits = torch.empty(
        1, 1, 1, elements // ROWS, ROWS // 32, 32, dtype=BF16, device=DEVICE
    ).normal_()
    flips = torch.tensor([1], dtype=torch.uint8, device=DEVICE)
    targets = predict_targets(logits, flips)
    planes = PART // ROWS
    for part in (slice(planes), slice(-planes, None)):
        mirror = slice(-planes, None) if part.start is None else slice(planes)
        assert_close(
            predict_targets(logits[:, :, :, mirror].contiguous(), flips), targets[:, :, part]
        )


def _volume(elements: int, dtype: torch.dtype) -> Tensor:
    """[1, 1, planes, 32, 64]: so many voxels."""
    return torch.empty(1, 1, elements // ROWS, 32, ROWS // 32, dtype=dtype, device=DEVICE).random_(
        120
    )


def large_mixup(elements: int) -> None:
    volumes = _volume(2 * elements, torch.uint8).view(2, 1, -1, 32, ROWS // 32)
    lam, index = torch.tensor([0.75, 0.5], device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    last = volumes[:, :, -PART // ROWS :].clone()
    mixed = mixup3d(volumes, lam, index, out=volumes)[:, :, -PART // ROWS :]
    assert torch.equal(mixup3d(last, lam, index), mixed)


def large_crops(elements: int) -> None:
    volumes = _volume(elements, torch.uint8)
    planes, part = volumes.shape[2], PART // ROWS
    boxes = torch.tensor([[0, 2, 3, 4, 6, 19, 36]], dtype=torch.float32, device=DEVICE)
    moved = boxes + torch.tensor([0, planes - part, 0, 0, planes - part, 0, 0], device=DEVICE)
    last = volumes[:, :, -part:].contiguous()
    size = 8, 8, 64  # samples on quarters of a voxel, which float32 has there
    expected = crop_and_resize3d(last, boxes, size, dtype=torch.float32)
    assert_close(crop_and_resize3d(volumes, moved, size, dtype=torch.float32), expected)


def large_objects(elements: int) -> None:
    volumes = _volume(elements, torch.uint8)
    planes, part = volumes.shape[2], PART // ROWS
    boxes = torch.tensor([[0, 2, 3, 4, part - 1, 30, 60]], dtype=torch.float32, device=DEVICE)
    lam = torch.tensor([0.5], device=DEVICE)
    moved = boxes + torch.tensor([0, planes - part, 0, 0, planes - part, 0, 0], device=DEVICE)
    last = volumes[:, :, -part:].contiguous()
    expected = object_mixup3d(last, boxes, boxes, lam)
    for out in (None, volumes):
        result = object_mixup3d(volumes, moved, moved, lam, out=out)
        assert torch.equal(result[:, :, -part:], expected)


LARGE = {
    large_loss: 14,
    large_targets: 8,
    large_mixup: 5,
    large_crops: 3,
    large_objects: 5,
}  # bytes for each element


def large(elements: int = MORE_THAN_INT32) -> None:
    for check, size in LARGE.items():
        if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < elements * size:
            print(
                f"{check.__name__}: left out, it takes {elements * size / 2**30:.0f} GiB of GPU memory"
            )
            continue
        check(elements)
        print(f"{check.__name__}: {elements:,} elements, as their last part by itself")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    checks = {"calls": calls, "graphs": graphs, "large": large}
    parser = argparse.ArgumentParser(
        prog="benchmarks.device_checks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("check", choices=checks)
    check = checks[parser.parse_args().check]
    if DEVICE.type != "cuda":
        print("benchmarks.device_checks: no GPU that PyTorch can use was found", file=sys.stderr)
        return 2
    check()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
