"""Launch the kernels of an op on tensors of any device, past the dispatcher."""

from importlib import import_module

from fmkernels.ops.library import ALLOCATORS


def launch(name, *args, **options):
    """``torch.ops.fmkernels.<name>(*args, **options)``, by kernels."""
    module = ALLOCATORS[name].__module__.rpartition(".")[2]
    results = ALLOCATORS[name](*args, **options)
    kernels = import_module(f"fmkernels.kernels.{module}")
    getattr(kernels, name)(*args, *(results if isinstance(results, tuple) else (results,)))
    return results
