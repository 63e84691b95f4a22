"""Test Triton kernels without a GPU.

Three tools and a guard, each usable alone. The folder depends on torch, triton and numpy only:
copy it into a project and fix nothing but the name in your imports.

1. The checked interpreter runs kernels on CPU tensors by the rules of a GPU. It raises KernelFault
   for accesses out of bounds, races, overflow and use of undefined values, and counts the bytes
   that a kernel moves. Call `enable_interpreter()` before anything imports triton.

       from tests.triton_checked.interpreter import checked

       with checked(x=x, out=out, shuffle=0) as report:
           scale(x, out)
       assert report["out"].written == out.nbytes and report.never_written("out") == 0

2. The recording driver launches kernels as on a GPU, but neither compiles nor runs them. It notes
   every launch and every variant that the JIT asks for. Not in a process that interprets kernels.

       from tests.triton_checked.driver import recording

       with recording("sm_90") as calls:
           scale(x, out)
       assert [launch.grid for launch in calls.launches] == [(98, 1, 1)]

3. The compile checker builds these variants for real GPUs and reads their machine code: registers,
   spills, width of memory accesses, instructions on the main path. `run_plan` does 2 and 3 for all
   cases of a module, in a process of its own.

       from tests.triton_checked.plan import run_plan

       report = run_plan("tests.plans.scale")
       assert all(variant.on["sm_90"].spill_bytes == 0 for variant in report.variants)

The guard `host_sync.no_host_sync()` raises where code above the kernels waits for the device.

Modules: `interpreter` (with `builder`: values, `memory`: bounds, races and traffic, `numerics`: a
GPU's arithmetic, `memo`: types, made once), `driver`, `aot`, `plan`, `host_sync`. Their tests use
planted kernels: healthy ones, and twins with one fault each.
"""

import os
import sys


def enable_interpreter() -> None:
    """Make `triton.jit` interpret kernels in this process. Call it before triton is imported."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("enable_interpreter() must be called before triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"
