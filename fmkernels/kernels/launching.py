"""Launches without the work that Triton's JIT does again for each one."""

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_SUPPORTED = triton.__version__.startswith(("3.6.", "3.7.", "3.8."))
"""Versions whose binder and whose compiled kernels are called as here."""


def quick(kernel: Any) -> Any:
    """Decorate a kernel: what the JIT has compiled is kept by what it was specialized for.

    The JIT's own binder says what that is: dtypes, alignment, sizes, constants and options. What
    is saved is the work after that: a key of text, and arguments for hooks that nobody has set. The
    JIT launches in other versions, where somebody wants to see launches, and the first time.
    """
    if _SUPPORTED and isinstance(kernel, JITFunction):
        kernel.run = _launcher(kernel)
    return kernel


def _launcher(kernel: JITFunction) -> Callable:
    run_by_jit = kernel.run
    variants: dict[tuple, tuple] = {}

    def run(*args, grid, warmup, **options):
        if warmup or callable(grid) or _is_watched(kernel):
            return run_by_jit(*args, grid=grid, warmup=warmup, **options)
        active = driver.active
        device = active.get_current_device()
        bound, specialization, given = kernel.device_caches[device][4](*args, **options)
        key = active, device, *specialization, *given.items()
        variant = variants.get(key)
        if variant is None:
            compiled = run_by_jit(*args, grid=grid, warmup=False, **options)
            variants[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
            return compiled
        compiled, launch, function, metadata = variant
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        launch(x, y, z, stream, function, metadata, None, None, None, *bound.values())
        return compiled

    return run


def _is_watched(kernel: JITFunction) -> bool:
    """Whether anybody wants to see launches."""
    runtime = knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains, or what a user has set
    return bool(
        any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
        or runtime.add_stages_inspection_hook
        or kernel.pre_run_hooks
    )
