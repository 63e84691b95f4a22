"""The op behind predict_targets: schema and fake. It has no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def predict_targets(view_logits: Sequence[Tensor], flips: Tensor, temperature: float) -> Sequence[Tensor]:
    """Targets [B, A, D, H, W, I] of each level [K, B, A, D, H, W, I]."""
    return torch.ops.fmkernels.predict_targets(view_logits, flips, temperature)
