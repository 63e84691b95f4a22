"""The ops behind mixup3d: schemas, fakes and autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels.ops.library import define, fake

_MODULE = "mixup3d"
_INPUTS = (
    "Tensor volumes, Tensor? donors, Tensor lam, Tensor index, Tensor? flips, Tensor? donor_flips"
)

define(
    "mixup3d",
    f"({_INPUTS}, int[] axes, float[]? window, ScalarType dtype) -> Tensor",
    _MODULE,
    "launch_mixup",
)
define(
    "mixup3d_into",
    f"({_INPUTS}, int[] axes, float[]? window, Tensor(a!) out) -> ()",
    _MODULE,
    "launch_mixup_into",
)
define(
    "mixup3d_gradient",
    "(Tensor upstream, Tensor? windowed, Tensor lam, Tensor index, Tensor? flips, int[] axes, float[]? window, "
    "SymInt sources, ScalarType dtype, bool own, bool donor) -> Tensor",
    _MODULE,
    "launch_gradient",
)


@fake("mixup3d")
def _(volumes, donors, lam, index, flips, donor_flips, axes, window, dtype):
    return torch.empty_like(volumes, dtype=dtype)


@fake("mixup3d_into")
def _(volumes, donors, lam, index, flips, donor_flips, axes, window, out):
    return None


@fake("mixup3d_gradient")
def _(upstream, windowed, lam, index, flips, axes, window, sources, dtype, own, donor):
    return upstream.new_empty((sources, *upstream.shape[1:]), dtype=dtype)


_ops = torch.ops.fmkernels


class _Mixup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, volumes, donors, lam, index, flips, donor_flips, axes, window, dtype):
        ctx.axes, ctx.window, ctx.dtype = axes, window, volumes.dtype
        ctx.donors = None if donors is None else donors.shape[0]
        kept = (volumes, donors) if window else (None, None)
        ctx.save_for_backward(*kept, lam, index, flips, donor_flips)
        return _ops.mixup3d(volumes, donors, lam, index, flips, donor_flips, axes, window, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        volumes, donors, lam, index, flips, donor_flips = ctx.saved_tensors
        upstream = upstream.contiguous()

        def gradient(windowed, masks, sources, own, donor):
            return _ops.mixup3d_gradient(
                upstream,
                windowed,
                lam,
                index,
                masks,
                ctx.axes,
                ctx.window,
                sources,
                ctx.dtype,
                own,
                donor,
            )

        to_volumes = to_donors = None
        if ctx.needs_input_grad[0]:
            to_volumes = gradient(volumes, flips, upstream.shape[0], True, ctx.donors is None)
        if ctx.needs_input_grad[1]:
            to_donors = gradient(donors, donor_flips, ctx.donors, False, True)
        return (to_volumes, to_donors, *[None] * 7)


def mixed(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The mixed volumes; tensors contiguous, see launch_mixup."""
    differentiable = volumes.requires_grad or (donors is not None and donors.requires_grad)
    function = _Mixup.apply if differentiable and torch.is_grad_enabled() else _ops.mixup3d.default
    return function(volumes, donors, lam, index, flips, donor_flips, axes, window, dtype)


mixed_into = _ops.mixup3d_into.default
