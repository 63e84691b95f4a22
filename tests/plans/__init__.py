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


def alike(case: Case, condition: bool = True) -> Case:
    """The case, compiled for one GPU only, because it differs from another in types or sizes alone.

    If the condition is false, the case as it is.
    """
    return replace(case, targets=("sm_90",)) if condition else case
