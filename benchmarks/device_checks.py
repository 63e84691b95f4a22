"""Checks of every op that need a GPU, in addition to tests and benchmarks.

    python -m benchmarks.device_checks calls     run every kernel once, for compute-sanitizer
    python -m benchmarks.device_checks graphs    replay every op in a CUDA graph with new inputs
    python -m benchmarks.device_checks large     more than 2^31 elements, checked on their last part

Results are compared with the float64 reference, with the op outside a graph, and with the op on the
last part alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import DEVICE, OURS, Comparison, Provider, Run, op_suites
from fmkernels import sample_mixup, soft_target_focal_loss

MORE_THAN_INT32 = 2**31 + 2**16
PART = 2**16  # elements: of large results, what is checked


def comparisons() -> list[Comparison]:
    """Small workloads that, together, launch every kernel."""
    return [comparison for suite in op_suites().values() for comparison in suite.SMALL]


def ours_of(comparison: Comparison) -> Provider:
    return next(provider for provider in comparison.providers if provider.name == OURS)


def calls() -> None:
    for comparison in comparisons():
        comparison.checked(ours_of(comparison))
        print(f"{comparison}: as the reference")


def _results(run: Run) -> list[Tensor]:
    """Results and gradients; results are copied where the op works in place."""
    if run.backward:
        results, _, gradients = run.forward_backward()
        return [*(result.detach() for result in results), *gradients]
    return run.forward()


def captured(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """The results of a call captured in a CUDA graph, and a function that replays it."""
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
    if DEVICE.type == "cuda":
        _at_once()
    sample_mixup(8, device=DEVICE)
    (lam, index), replay = captured(lambda: list(sample_mixup(8, device=DEVICE)))
    replay()
    first = lam.clone()
    replay()
    assert sorted(index.tolist()) == list(range(8)) and 0.5 <= lam.min() <= lam.max() <= 1
    assert not torch.equal(lam, first), "sample_mixup: a graph draws the same again"
    print("sample_mixup: new draws from a graph")


def _at_once(times: int = 100) -> None:
    """Launches of several streams and graphs do not count each other's programs."""
    logits = torch.randn(3, 1 << 22, device=DEVICE)
    targets = torch.rand_like(logits)
    losses = [soft_target_focal_loss(x, y) for x, y in zip(logits, targets, strict=True)]
    streams = [torch.cuda.Stream() for _ in losses]
    graphs = [
        captured(lambda x=x, y=y: [soft_target_focal_loss(x, y)])
        for x, y in zip(logits[:2], targets[:2], strict=True)
    ]
    torch.cuda.synchronize()
    for _ in range(times):
        for stream, (_, replay) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                replay()
        with torch.cuda.stream(streams[2]):
            eager = soft_target_focal_loss(logits[2], targets[2])
        torch.cuda.synchronize()
        found = [*(loss for (loss,), _ in graphs), eager]
        assert all(map(torch.equal, found, losses)), "soft_target_focal_loss: launches interfere"
    print(f"soft_target_focal_loss: {len(losses)} at once, {times} times")


def large(elements: int = MORE_THAN_INT32) -> None:
    for op, suite in op_suites().items():
        size = elements * suite.LARGE_BYTES
        if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < size:
            print(f"{op}: left out, it takes {size / 2**30:.0f} GiB of GPU memory")
            continue
        suite.large(elements, PART)
        print(f"{op}: {elements:,} elements, as their last part by itself")
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
