"""Fused kernels for semi-supervised 3D medical detection with FocalMix.

Importing this package imports neither triton nor SimpleITK and touches no device.
"""

from fmkernels import functional, nn
from fmkernels.functional import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["functional", "nn"]
__all__ += functional.__all__
