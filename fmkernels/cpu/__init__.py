"""How the CPU does it: the names and signatures of ``launch_*`` in fmkernels.kernels, in loops that Numba compiles."""

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError(f"fmkernels: operations on the CPU need numba (pip install numba): {error}") from None
