"""Float64 oracles in textbook form, named as in ``fmkernels.functional``. For tests and benchmarks."""

from reference.predict_targets import predict_targets
from reference.soft_target_focal_loss import soft_target_focal_loss

__all__ = ["predict_targets", "soft_target_focal_loss"]
