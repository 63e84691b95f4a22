"""Group normalisation with the sum and the ReLU that follow it, which on the CPU is one operation.

There, composed of torch's, it took more time than the convolutions between: each part, and under autocast each change
of type, goes through the memory once more.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """ReLU(group normalisation of x + residual), the last two where asked for."""

    def __init__(self, groups: int, channels: int, *, relu: bool) -> None:
        super().__init__(groups, channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if _is_fused(x, residual, self.num_channels):
            return _Fused.apply(
                x, self.weight, self.bias, residual, self.num_groups, self.eps, self.relu
            )
        y = super().forward(x)
        y = y if residual is None else y + residual
        return F.relu(y, inplace=True) if self.relu else y


def _is_fused(x: Tensor, residual: Tensor | None, channels: int) -> bool:
    """Whether the loops can take it: plain tensors, and nobody who traces or transforms what torch does."""
    given = (x,) if residual is None else (x, residual)
    return (
        all(
            type(t) is Tensor
            and t.device.type == "cpu"
            and t.dtype == x.dtype
            and t.shape == x.shape
            for t in given
        )
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() == 5
        and x.shape[1] == channels
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        groups: int,
        eps: float,
        relu: bool,
    ) -> Tensor:
        from fmkernels.cpu.group_norm import (
            normalize,
        )  # when first needed: a GPU needs no compiler for the CPU

        x, residual = _channels_last(x), None if residual is None else _channels_last(residual)
        out, moments = normalize(
            x, weight.detach().float(), bias.detach().float(), residual, groups, eps, relu
        )
        ctx.save_for_backward(x, weight, moments, out if relu else None)
        ctx.residual = residual is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        from fmkernels.cpu.group_norm import differentiate

        x, weight, moments, out = ctx.saved_tensors
        upstream = _channels_last(upstream.to(x.dtype))
        to_x, *to_weights, to_residual = differentiate(
            upstream, x, out, weight.float(), moments, ctx.residual
        )
        return to_x, *(g.to(weight.dtype) for g in to_weights), to_residual, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
