"""Fused kernels for semi-supervised 3D medical detection with FocalMix.

Importing this package imports neither triton nor SimpleITK and touches no device.
"""

from fmkernels import functional, nn
from fmkernels.functional import (
    crop_and_resize3d,
    mixup3d,
    object_mixup3d,
    predict_targets,
    sample_mixup,
    soft_target_focal_loss,
)

__version__ = "0.1.0"

__all__ = [
    "crop_and_resize3d",
    "functional",
    "mixup3d",
    "nn",
    "object_mixup3d",
    "predict_targets",
    "sample_mixup",
    "soft_target_focal_loss",
]
