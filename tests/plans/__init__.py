"""Launches of production, one module per op. Recordings use the tuning rows of their target."""

from unittest import mock

from fmkernels.kernels import tuning
from tests.triton_checked import driver

driver.DURING_RECORDING.append(
    lambda target: mock.patch.object(tuning, "architecture", lambda device: target)
)
