"""The ops behind object_mixup3d: schemas and fakes. They have no gradient."""

import torch

from fmkernels.ops.library import define, fake

_MODULE = "object_mixup3d"
_INPUTS = (
    "Tensor volumes, Tensor? donors, Tensor boxes, Tensor donor_boxes, Tensor lam, "
    "float[]? window, float[]? donor_window"
)

define("object_mixup3d", f"({_INPUTS}, ScalarType dtype) -> Tensor", _MODULE, "launch_object_mixup")
define(
    "object_mixup3d_into", f"({_INPUTS}, Tensor(a!) out) -> ()", _MODULE, "launch_object_mixup_into"
)


@fake("object_mixup3d")
def _(volumes, donors, boxes, donor_boxes, lam, window, donor_window, dtype):
    return torch.empty_like(volumes, dtype=dtype)


@fake("object_mixup3d_into")
def _(volumes, donors, boxes, donor_boxes, lam, window, donor_window, out):
    return None


mixed = torch.ops.fmkernels.object_mixup3d.default
mixed_into = torch.ops.fmkernels.object_mixup3d_into.default
