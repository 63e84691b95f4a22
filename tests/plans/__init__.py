"""Launches of production, one module per op. Recordings use the tuning rows of their target.

A module has

cases(): the launches, with the least bytes per element that they must move;
EXTRA_BYTES: bytes per element above that, by case, where the minimum cannot be reached;
tuned(): for each row of the launch table, a call and the constants whose product is the block.
"""

from dataclasses import replace
from unittest import mock

from fmkernels.kernels import tuning
from tests.triton_checked import driver
from tests.triton_checked.plan import Case

driver.DURING_RECORDING.append(
    lambda target: mock.patch.object(tuning, "architecture", lambda device: target)
)


def alike(case: Case, really: bool = True) -> Case:
    """The case, compiled for one GPU: another case differs in types or sizes, and not in kind."""
    return replace(case, targets=("sm_90",)) if really else case
