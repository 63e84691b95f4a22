"""The ops behind mixup3d: schemas, fakes and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_no_grad,
    check_out,
    check_per_sample,
    check_volumes,
    check_window,
    describe,
    result_dtype,
    shape_of,
)
from fmkernels.ops.library import define, fake
from fmkernels.ops.tensors import arrange, is_same, may_overlap, memory_order, restore

_FLIP_BITS = (0, 1, 2, 4)  # of the axes C, D, H, W

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


def mixup3d(
    volumes: Tensor,
    lam: Tensor,
    index: Tensor,
    *,
    donors: Tensor | None = None,
    flips: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    window: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Mix each volume with another one, in one pass over memory; flips, HU window, rounding and cast included.

    .. math::
        \mathrm{out}_b = \lambda_b \, f(\mathrm{volumes}_b) + (1 - \lambda_b) \, f(\mathrm{donors}_{\mathrm{index}_b})

    f flips each source by its own mask and maps v to clamp((v - lo) / (hi - lo), 0, 1). Arithmetic is float32 (float64
    for float64) whatever the storage.

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides.
        lam: [B], the share of each volume; any float type.
        index: int64 [B], the partner of each volume; any map into [0, B), or into [0, B') of the donors.
        donors: [B', C, D, H, W] of the type of the volumes, from which the partners come; the volumes by default.
        flips: uint8 [B], a mask for each volume: 1 flips D, 2 flips H, 4 flips W. Where donors are given, a pair, the
            second of which is [B'] for the donors; either may be None.
        window: (lo, hi), finite, lo < hi; None keeps the values as they are.
        dtype: type of the result: one of those of the volumes. By default that of the volumes, float32 for windowed
            integers. Integer results are rounded to nearest, ties to even, and saturate; NaN becomes 0.
        out: where to write, of the shape and type of the result; ``volumes`` or ``donors`` to mix in place, right for
            any index map and any flips. It may share memory with them in no other way. On a GPU that takes one launch
            and no further memory for up to 4096 volumes, 512 with flips; beyond, or with strides other than contiguous
            or channels_last_3d, a copy of the size of ``out``.

    Returns:
        The mixed volumes, in the memory format of ``volumes``; ``out`` where given.

    Gradients flow to volumes and donors, without atomics, so that they are the same in every run; not through ``out``
    and not to lam. An index out of range is an error on the CPU, and on the GPU under TRITON_DEBUG=1. NaN gives NaN, an
    infinity that no window clamps infinity or NaN.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch, for flips and donors None::

        x = ((volumes.float() - lo) / (hi - lo)).clamp(0, 1)
        share = lam[:, None, None, None, None]
        out = (share * x + (1 - share) * x[index]).to(dtype)

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Wang et al., FocalMix, CVPR 2020.

    Example:
        >>> import torch
        >>> scans = torch.tensor([-1200, 600], dtype=torch.int16).reshape(2, 1, 1, 1, 1)
        >>> lam, index = torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
        >>> mixup3d(scans, lam, index, window=(-1200, 600)).flatten().tolist()
        [0.25, 0.5]
    """
    name = "mixup3d"
    check_volumes(name, "volumes", volumes)
    batch = volumes.shape[0]
    check_per_sample(name, "lam", lam, volumes.device, FLOATS, batch)
    check_per_sample(name, "index", index, volumes.device, (torch.int64,), batch)
    check_no_grad(name, "lam", lam)
    if donors is not None:
        check_volumes(name, "donors", donors)
        check_dtype(name, "donors", donors, (volumes.dtype,))
        check_device(name, "donors", donors, volumes.device)
        if donors.shape[1:] != volumes.shape[1:] or (batch > 0 and donors.shape[0] == 0):
            raise ValueError(
                f"{name}: donors must hold volumes of shape {tuple(volumes.shape[1:])}, got shape {shape_of(donors)}"
            )
    own_flips, donor_flips = _check_flips(name, flips, volumes, donors)
    window = check_window(name, window)
    dtype = result_dtype(name, dtype, volumes, window)
    differentiable = torch.is_grad_enabled() and (
        volumes.requires_grad or (donors is not None and donors.requires_grad)
    )
    if differentiable and not dtype.is_floating_point:
        raise ValueError(
            f"{name}: no gradient through {dtype} is offered, pass volumes and donors detached"
        )

    order = memory_order(volumes)
    axes = _FLIP_BITS if order is None else [_FLIP_BITS[d - 1] for d in order[1:]]
    own, other = arrange(volumes, order), None if donors is None else arrange(donors, order)
    arguments = (
        own,
        other,
        lam.contiguous(),
        index.contiguous(),
        own_flips,
        donor_flips,
        axes,
        window,
    )
    if out is None:
        return restore(mixed(*arguments, dtype), order)
    check_out(name, out, volumes, dtype)
    if differentiable:
        raise ValueError(f"{name}: no gradient through out is offered, pass all tensors detached")
    target = out if order is None else out.permute(order)
    if target.is_contiguous():
        _check_overlap(name, "volumes", own, target)
        if other is not None:
            _check_overlap(name, "donors", other, target)
        mixed_into(*arguments, target)
    else:
        out.copy_(restore(mixed(*arguments, dtype), order))
    return out


def _check_flips(
    name: str, flips: Any, volumes: Tensor, donors: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if flips is None:
        return None, None
    if donors is None:
        check_per_sample(name, "flips", flips, volumes.device, (torch.uint8,), volumes.shape[0])
        return flips.contiguous(), None
    if not isinstance(flips, (list, tuple)) or len(flips) != 2:
        raise TypeError(
            f"{name}: flips must be a pair where donors are given, got {describe(flips)}"
        )
    sides = zip(
        flips, ("flips of the volumes", "flips of the donors"), (volumes, donors), strict=True
    )
    for mask, argument, x in sides:
        if mask is not None:
            check_per_sample(name, argument, mask, volumes.device, (torch.uint8,), x.shape[0])
    own, donor = flips
    return None if own is None else own.contiguous(), None if donor is None else donor.contiguous()


def _check_overlap(name: str, argument: str, x: Tensor, out: Tensor) -> None:
    if may_overlap(x, out) and not is_same(x, out):
        raise ValueError(f"{name}: out may be {argument} itself but must not overlap it otherwise")
