"""Float64 oracles in textbook form, named as in ``fmkernels.functional``. For tests and benchmarks."""

from reference.crop_and_resize3d import crop_and_resize3d
from reference.mixup3d import mixup3d
from reference.object_mixup3d import object_mixup3d
from reference.predict_targets import predict_targets
from reference.sample_mixup import sample_mixup
from reference.soft_target_focal_loss import soft_target_focal_loss

__all__ = [
    "crop_and_resize3d",
    "mixup3d",
    "object_mixup3d",
    "predict_targets",
    "sample_mixup",
    "soft_target_focal_loss",
]
