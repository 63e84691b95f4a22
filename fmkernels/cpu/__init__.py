"""How the CPU does it: the launchers of fmkernels.kernels as loops that Numba compiles."""

try:
    import numba
except ImportError as error:
    raise ImportError(
        f"fmkernels: operations on the CPU need numba (pip install numba): {error}"
    ) from None
if numba.config.DISABLE_JIT:
    raise ImportError(
        "fmkernels: operations on the CPU are compiled by numba, but NUMBA_DISABLE_JIT is set"
    )
