"""Fused kernels for semi-supervised 3D medical detection with FocalMix.

Importing this package imports neither triton nor SimpleITK and touches no device.
"""

from fmkernels import functional, nn
from fmkernels.functional import predict_targets, soft_target_focal_loss

__version__ = "0.1.0"

__all__ = ["functional", "nn", "predict_targets", "soft_target_focal_loss"]
