"""mixup3d: each volume of a batch mixed with another one."""

from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_out,
    check_per_sample,
    check_volumes,
    check_window,
    describe,
    result_dtype,
    shape_of,
    varying_window,
)
from fmkernels.ops.library import functional_op, mutating_op, save_for_backward
from fmkernels.ops.tensors import arrange, is_same, may_overlap, memory_order, restore

MAX_IN_PLACE = 4096  # samples; one program of the kernel holds the same voxels of all of them
_FLIP_BITS = (0, 1, 2, 4)  # of the axes C, D, H, W


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
    r"""Mix each volume with another one in one pass over memory, with flips, HU window and cast.

    .. math::
        \mathrm{out}_b = \lambda_b \, f(\mathrm{volumes}_b)
            + (1 - \lambda_b) \, f(\mathrm{donors}_{\mathrm{index}_b})

    f flips each source volume by its own mask and maps v to clamp((v - lo) / (hi - lo), 0, 1).
    Arithmetic is float32 (float64 for float64 volumes).

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides.
        lam: [B], the weight of each volume, in [0, 1]; any float dtype. Values outside raise on
            the CPU; on a GPU they are only checked under FMKERNELS_DEBUG=1.
        index: int64 [B], the donor of each volume: any map into [0, B), or into [0, B') where
            donors are given. Checked as lam is.
        donors: [B', C, D, H, W], of the dtype of the volumes. By default the volumes themselves.
        flips: uint8 [B], a bit mask for each volume: 1 flips D, 2 flips H, 4 flips W. Where donors
            are given, a pair of masks, [B] for the volumes and [B'] for the donors; either may be
            None.
        window: (lo, hi), finite, lo < hi. None keeps the values as they are.
        dtype: dtype of the result, any of those of the volumes. By default that of the volumes, or
            float32 for windowed integers. Integer results are rounded to nearest, ties to even,
            and saturate; NaN becomes 0.
        out: tensor to write into, of the shape and dtype of the result. ``volumes`` or ``donors``
            itself mixes in place, with any index map; any other overlap with them raises. Mixing
            in place with flips, or more than 4096 volumes, needs scratch memory of the size of
            ``out``, and so does an ``out`` of another memory layout than the volumes.

    Returns:
        The mixed volumes, in the memory format of ``volumes``; ``out`` where it is given.

    Gradients flow to volumes and donors and are deterministic; lam and ``out`` have none. A voxel
    that is not finite shows only where its weight is not exactly 0.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch, without flips and donors::

        x = ((volumes.float() - lo) / (hi - lo)).clamp(0, 1)
        lam = lam[:, None, None, None, None]
        out = (lam * x + (1 - lam) * x[index]).to(dtype)

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Wang et al.,
    FocalMix, CVPR 2020.

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
    if donors is not None:
        check_volumes(name, "donors", donors)
        check_dtype(name, "donors", donors, (volumes.dtype,))
        check_device(name, "donors", donors, volumes.device)
        if donors.shape[1:] != volumes.shape[1:] or (batch > 0 and donors.shape[0] == 0):
            raise ValueError(
                f"{name}: donors must hold volumes of shape {tuple(volumes.shape[1:])}, "
                f"got shape {shape_of(donors)}"
            )
    flips, donor_flips = _check_flips(name, flips, volumes, donors)
    window = check_window(name, window)
    dtype = result_dtype(name, dtype, volumes, window)
    differentiable = torch.is_grad_enabled() and (
        volumes.requires_grad or (donors is not None and donors.requires_grad)
    )
    if differentiable and not dtype.is_floating_point:
        raise ValueError(
            f"{name}: no gradient through {dtype} is offered, pass volumes and donors detached"
        )
    bounds = varying_window(window)
    if out is not None:
        check_out(name, out, volumes, dtype)
        if differentiable:
            raise ValueError(
                f"{name}: no gradient through out is offered, pass all tensors detached"
            )
        mixup3d_out_op(volumes, donors, lam, index, flips, donor_flips, bounds, out)
        return out
    order = memory_order(volumes)
    mixed = mixup3d_op(
        *_arranged(order, volumes, donors, lam, index, flips, donor_flips), bounds, dtype=dtype
    )
    return restore(mixed, order)


def _check_flips(
    name: str, flips: Any, volumes: Tensor, donors: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of the volumes and those of the donors."""
    if donors is None:
        if flips is not None:
            check_per_sample(name, "flips", flips, volumes.device, (torch.uint8,), volumes.shape[0])
        return flips, None
    if flips is None:
        return None, None
    if not isinstance(flips, (list, tuple)) or len(flips) != 2:
        raise TypeError(
            f"{name}: flips must be a pair where donors are given, got {describe(flips)}"
        )
    for masks, source, x in zip(flips, ("volumes", "donors"), (volumes, donors), strict=True):
        if masks is not None:
            argument = f"flips of the {source}"
            check_per_sample(name, argument, masks, volumes.device, (torch.uint8,), x.shape[0])
    return flips[0], flips[1]


def _permuted(x: Tensor, order: list[int] | None) -> Tensor:
    return x if order is None else x.permute(order)


def _arranged(order, volumes, donors, lam, index, flips, donor_flips):
    """The arguments of a launcher up to the axes: contiguous, the flip bit of each volume axis."""
    return (
        arrange(volumes, order),
        None if donors is None else arrange(donors, order),
        lam.contiguous(),
        index.contiguous(),
        None if flips is None else flips.contiguous(),
        None if donor_flips is None else donor_flips.contiguous(),
        _FLIP_BITS if order is None else [_FLIP_BITS[axis - 1] for axis in order[1:]],
    )


def _save(ctx, args, mixed):
    volumes, donors, lam, index, flips, donor_flips, ctx.axes, ctx.window = args
    ctx.dtype, ctx.num_donors = volumes.dtype, None if donors is None else donors.shape[0]
    inputs = (volumes, donors) if ctx.window is not None else (None, None)
    save_for_backward(ctx, *inputs, lam, index, flips, donor_flips)


def _backward(ctx, grad_output):
    volumes, donors, lam, index, flips, donor_flips = ctx.saved_tensors
    grad_output = grad_output.contiguous()

    def gradient(input, flips, as_volumes, as_donors, rows):
        return mixup3d_backward_op(
            grad_output, input, lam, index, flips, ctx.axes, ctx.window, as_volumes, as_donors,
            rows=rows, dtype=ctx.dtype,
        )  # fmt: skip

    grad_volumes = grad_donors = None
    if ctx.needs_input_grad[0]:
        rows = grad_output.shape[0]
        grad_volumes = gradient(volumes, flips, True, ctx.num_donors is None, rows)
    if ctx.needs_input_grad[1]:
        grad_donors = gradient(donors, donor_flips, False, True, ctx.num_donors)
    return grad_volumes, grad_donors


@functional_op(
    "mixup3d(Tensor volumes, Tensor? donors, Tensor lam, Tensor index, Tensor? flips, "
    "Tensor? donor_flips, int[] axes, float[]? window, *, ScalarType dtype) -> Tensor",
    save=_save,
    backward=_backward,
)
def mixup3d_op(volumes, donors, lam, index, flips, donor_flips, axes, window, *, dtype):
    return torch.empty_like(volumes, dtype=dtype)


@functional_op(
    "mixup3d_backward(Tensor grad_output, Tensor? input, Tensor lam, Tensor index, Tensor? flips, "
    "int[] axes, float[]? window, bool as_volumes, bool as_donors, *, SymInt rows, "
    "ScalarType dtype) -> Tensor"
)
def mixup3d_backward_op(
    grad_output, input, lam, index, flips, axes, window, as_volumes, as_donors, *, rows, dtype
):
    return grad_output.new_empty((rows, *grad_output.shape[1:]), dtype=dtype)


@mutating_op(
    "mixup3d_out(Tensor volumes, Tensor? donors, Tensor lam, Tensor index, Tensor? flips, "
    "Tensor? donor_flips, float[]? window, Tensor(a!) out) -> ()",
    "mixup3d",
)
def mixup3d_out_op(launcher, volumes, donors, lam, index, flips, donor_flips, window, out):
    """Write into ``out``, or into scratch memory that is then copied to it.

    Tensors are as the user passed them: what memory they share is known only at run time.
    """
    order = memory_order(volumes)
    target = _permuted(out, order)
    direct, in_place = target.is_contiguous(), False
    flipped = flips is not None or donor_flips is not None
    for source, x in (("volumes", volumes), ("donors", donors)):
        if x is None or not may_overlap(x, out):
            continue
        if not (target.is_contiguous() and _permuted(x, order).is_contiguous()):
            continue  # x or the result is copied
        if not is_same(x, out):
            raise ValueError(
                "mixup3d: out must be volumes or donors itself, or must not overlap them, "
                f"got a tensor that overlaps a part of {source}"
            )
        direct = direct and not flipped and volumes.shape[0] <= MAX_IN_PLACE
        in_place = in_place or x is donors or donors is None
    arguments = _arranged(order, volumes, donors, lam, index, flips, donor_flips)
    if direct:
        launcher(*arguments, window, target, in_place)
    else:
        mixed = torch.empty_like(arguments[0], dtype=out.dtype)
        launcher(*arguments, window, mixed, False)
        target.copy_(mixed)
