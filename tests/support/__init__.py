"""What the tests of fmkernels share: devices, tolerances, numbers of cases, the floor table."""

import os

from tests import triton_checked


def on_gpu() -> bool:
    """Whether the tests run compiled kernels on a CUDA device (FMKERNELS_TEST_DEVICE=cuda)."""
    return os.environ.get("FMKERNELS_TEST_DEVICE") == "cuda"


def enable_interpreter() -> None:
    """Interpret kernels in this process, unless the tests run on a GPU."""
    if not on_gpu():
        triton_checked.enable_interpreter()
