"""Checking Triton kernels without a GPU.

`interpreter` runs kernels on CPU tensors, raises KernelFault on what a GPU would do wrong in silence, and counts the
bytes they move (`memory` knows of bounds and races, `builder` of values, `numerics` of a GPU's arithmetic). `plan` runs
launch code in a process of its own, where `driver` notes every launch and `aot` compiles the variants for real targets.
"""

import os
import sys


def on_gpu() -> bool:
    """Whether the tests run the compiled kernels on a CUDA device (FMKERNELS_TEST_DEVICE=cuda)."""
    return os.environ.get("FMKERNELS_TEST_DEVICE") == "cuda"


def enable_interpreter() -> None:
    """Make `triton.jit` interpret kernels in this process. Call it before anything imports triton; no-op on a GPU."""
    if on_gpu():
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("enable_interpreter() must be called before triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"
