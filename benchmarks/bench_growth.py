"""Time against size, from few elements up: ours next to the best of PyTorch.

On a CPU without torch.compile, which takes seconds for each size.
"""

from dataclasses import replace

import pytest

from benchmarks.common import DEVICE, OURS, Comparison, op_suites, rows

RIVALS = {"best eager", "gather and lerp", "interpolate loop", "interpolate"}
if DEVICE.type == "cuda":
    RIVALS.add("torch.compile")


def without_the_weaker(whole: Comparison, elements: int) -> Comparison:
    """The comparison with the best rivals of its suite."""
    providers = [provider for provider in whole.providers if provider.name in {OURS} | RIVALS]
    return replace(whole, op=f"{whole.op} by size", elements=elements, providers=providers)


EVERY = [
    without_the_weaker(suite.comparison(workload), elements)
    for suite in op_suites().values()
    for workload, elements in suite.growth()
]


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_growth(record, comparison, provider, phase):
    record(comparison, provider, phase)
