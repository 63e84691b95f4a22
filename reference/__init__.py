"""Float64 oracles in textbook form, named as in ``fmkernels.functional``. For tests and benchmarks.

Module ``reference.<op>`` holds the function ``<op>``.
"""

from importlib import import_module
from pkgutil import iter_modules

__all__ = [module.name for module in iter_modules(__path__)]
globals().update({name: getattr(import_module(f"reference.{name}"), name) for name in __all__})
