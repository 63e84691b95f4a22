"""Group normalization, one sample and one group after the other, in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm3d(
    x,
    num_groups,
    weight=None,
    bias=None,
    *,
    residual=None,
    activation=None,
    negative_slope=0.01,
    eps=1e-5,
) -> Tensor:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual).

    Mean and variance are those of a group of channels of a sample; the variance is divided by the
    number of elements.
    """
    width = x.shape[1] // num_groups
    samples = []
    for sample in x.double():
        groups = []
        for g in range(num_groups):
            group = sample[g * width : (g + 1) * width]
            mean = group.sum() / group.numel()
            variance = ((group - mean) ** 2).sum() / group.numel()
            groups.append((group - mean) / (variance + eps) ** 0.5)
        samples.append(torch.cat(groups))
    y = torch.stack(samples) if samples else x.double()
    of_channel = (-1, *[1] * (x.dim() - 2))
    if weight is not None:
        y = y * weight.double().reshape(of_channel)
    if bias is not None:
        y = y + bias.double().reshape(of_channel)
    if residual is not None:
        y = y + residual.double()
    if activation == "relu":
        y = F.relu(y)
    if activation == "leaky_relu":
        y = F.leaky_relu(y, negative_slope)
    return y
