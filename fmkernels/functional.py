"""The public functions of fmkernels.ops."""

from fmkernels.ops.apply_symmetry import apply_symmetry
from fmkernels.ops.crop_and_resize3d import crop_and_resize3d
from fmkernels.ops.group_norm3d import group_norm3d
from fmkernels.ops.mixup3d import mixup3d
from fmkernels.ops.object_mixup3d import object_mixup3d
from fmkernels.ops.predict_targets import predict_targets
from fmkernels.ops.sample_donors import sample_donors
from fmkernels.ops.sample_mixup import sample_mixup
from fmkernels.ops.soft_target_focal_loss import soft_target_focal_loss
from fmkernels.ops.undo_symmetry import undo_symmetry

__all__ = [
    "apply_symmetry",
    "crop_and_resize3d",
    "group_norm3d",
    "mixup3d",
    "object_mixup3d",
    "predict_targets",
    "sample_donors",
    "sample_mixup",
    "soft_target_focal_loss",
    "undo_symmetry",
]
