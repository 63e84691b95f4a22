"""The number of cases of property tests. FMKERNELS_TEST_CASES=10 tries ten times as many."""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings


def cases(n: int) -> settings:
    """Settings for ``n`` cases, the same in every run."""
    count = round(n * float(os.environ.get("FMKERNELS_TEST_CASES", "1")))
    return settings(max_examples=max(1, count), deadline=None, derandomize=True, database=None)


kernel_only = pytest.mark.parametrize(
    "path", [pytest.param("kernel", marks=pytest.mark.kernel)], indirect=True
)
"""For a test that takes ``path`` and is about kernels only."""


def kernel_cases(n: int) -> Callable[[Callable], Callable]:
    """As ``cases``, for a test that takes ``path``: of kernels, with one path for all cases."""
    tries = settings(cases(n), suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda test: kernel_only(tries(test))
