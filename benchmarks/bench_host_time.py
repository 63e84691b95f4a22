"""Host time of one element, next to the cheapest call of any registered op.

The cheapest op makes one copy and has no gradient; for forward and backward, an autograd.Function
wraps two of them. sample_mixup is not a registered op.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.common import OURS, Comparison, Provider, op_suites, rows

LIBRARY = torch.library.Library("fmkernels_benchmarks", "DEF")
LIBRARY.define("copy(Tensor x) -> Tensor")
LIBRARY.impl("copy", lambda x: x.clone(), "CPU")
LIBRARY.impl("copy", lambda x: x.clone(), "CUDA")


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ops.fmkernels_benchmarks.copy(x)

    @staticmethod
    def backward(ctx, upstream):
        return torch.ops.fmkernels_benchmarks.copy(upstream)


def copy(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Copy.apply(x)
    return torch.ops.fmkernels_benchmarks.copy(x)


def comparison(whole: Comparison) -> Comparison:
    """Our op on a workload of one element, next to the copy of one element."""
    ours = next(provider for provider in whole.providers if provider.name == OURS)
    cheapest = Provider(
        "cheapest registered op",
        copy,
        inputs=lambda: (
            whole.inputs()[0].detach().flatten()[:1].requires_grad_("backward" in whole.floor),
        ),
        reference=lambda x: x.double(),
    )
    return replace(
        whole,
        op="host time of one element",
        workload=whole.op,
        providers=[ours, cheapest],
        host=True,
        floor=dict.fromkeys(whole.floor),
    )


EVERY = [comparison(suite.ONE) for suite in op_suites().values()]


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_host_time(record, comparison, provider, phase):
    record(comparison, provider, phase)
