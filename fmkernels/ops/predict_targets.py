"""The op behind predict_targets: schema and fake. It has no gradient."""

import torch

from fmkernels.ops.library import define, fake

define(
    "predict_targets",
    "(Tensor[] view_logits, Tensor flips, float temperature) -> Tensor[]",
    "predict_targets",
    "launch_predict_targets",
)


@fake("predict_targets")
def _(view_logits, flips, temperature):
    return [x.new_empty(x.shape[1:], dtype=torch.float32) for x in view_logits]


predict_targets = torch.ops.fmkernels.predict_targets.default
