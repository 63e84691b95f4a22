"""How many cases a property test tries: FMKERNELS_TEST_CASES=10 tries ten times as many."""

import os

from hypothesis import settings


def cases(n: int) -> settings:
    """Settings for ``n`` cases, the same in every run."""
    count = round(n * float(os.environ.get("FMKERNELS_TEST_CASES", "1")))
    return settings(max_examples=max(1, count), deadline=None, derandomize=True, database=None)
