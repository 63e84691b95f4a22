"""group_norm3d: group normalization, the residual sum and the activation in one operation.

The backward needs the input, the moments and, for the sign before the activation, the result.
"""

import torch
from torch import Tensor

from fmkernels.dtypes import compute_dtype
from fmkernels.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_integer,
    check_no_tangent,
    check_number,
    check_tensor,
    shape_of,
)
from fmkernels.ops.library import functional_op
from fmkernels.ops.tensors import arrange, memory_order, restore

_ACTIVATIONS = (None, "relu", "leaky_relu")


def group_norm3d(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    eps: float = 1e-5,
) -> Tensor:
    r"""Group normalization, plus a residual, through an activation, in one operation.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu_g}{\sqrt{\sigma_g^2 + \mathrm{eps}}} \, w_c + b_c
            + \mathrm{residual}\right)

    The mean and the biased variance are those of all elements of a group of C / num_groups
    consecutive channels of a sample. With num_groups = C this is instance normalization. Statistics
    and arithmetic are float32 (float64 for float64), whatever the dtype of x, and do not cancel
    where the mean is large. The residual and the activation apply before the one rounding.

    Args:
        x: [N, C, ...] of 3 to 5 axes; float16, bfloat16, float32 or float64; any strides.
            Contiguous and channels-last tensors are read as they are, others copied first.
        num_groups: divides C.
        weight: [C], any of these dtypes; 1 if None.
        bias: likewise; 0 if None.
        residual: the shape of x, any of these dtypes; converted to dtype and memory format of x.
        activation: None, "relu" or "leaky_relu".
        negative_slope: slope of the leaky ReLU below 0, >= 0.
        eps: added to the variances, >= 0.

    Returns:
        The result, in the shape, the dtype and the memory format of x (contiguous if that is
        neither contiguous nor channels last), also under autocast.

    Gradients flow to x, weight, bias and residual; a second derivative raises. The backward keeps
    x, weight and the moments, and with an activation the result. A GPU needs two launches each way,
    and reads x twice; results are the same in every run, and no value is read back to the host. A
    NaN gives NaN in its group, also through an activation.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Equivalent PyTorch, without the rounding of each step::

        y = F.group_norm(x, num_groups, weight, bias, eps)
        y = F.leaky_relu(y + residual, negative_slope)

    Source: Wu and He, Group Normalization, ECCV 2018; Ulyanov et al., Instance Normalization, 2016.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 3.0], [-5.0, 5.0]]])
        >>> group_norm3d(x, 2, eps=0.0).flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0]
        >>> group_norm3d(x, 2, residual=x, activation="relu", eps=0.0).flatten().tolist()
        [0.0, 4.0, 0.0, 6.0]
    """
    name = "group_norm3d"
    check_tensor(name, "x", x)
    check_no_tangent(name, "x", x)
    check_dtype(name, "x", x, FLOATS)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"{name}: x must be [N, C, ...] of 3 to 5 axes, got shape {shape_of(x)}")
    channels = x.shape[1]
    num_groups, eps, slope = check_hyperparameters(
        name, num_groups, channels, eps, activation, negative_slope
    )
    for argument, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_float(name, argument, parameter, x)
            if parameter.shape != (channels,):
                raise ValueError(
                    f"{name}: {argument} must have shape ({channels},), one for each channel of x, "
                    f"got {shape_of(parameter)}"
                )
    if residual is not None:
        _check_float(name, "residual", residual, x)
        if residual.shape != x.shape:
            raise ValueError(
                f"{name}: residual must have the shape of x, {shape_of(x)}, "
                f"got {shape_of(residual)}"
            )
    order = memory_order(x)
    return group_norm3d_op(
        _in_order(x, order),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else _in_order(residual.to(x.dtype), order),
        num_groups,
        eps,
        slope,
    )[0]


def check_hyperparameters(
    name: str,
    num_groups: int,
    num_channels: int,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[int, float, float]:
    """The number of groups, eps, and the slope below 0: 1 without an activation."""
    num_groups = check_integer(name, "num_groups", num_groups)
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f"{name}: num_groups must divide the number of channels, {num_channels}, "
            f"got {num_groups}"
        )
    eps = check_number(name, "eps", eps)
    if eps < 0:
        raise ValueError(f"{name}: eps must be >= 0, got {eps}")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{name}: activation must be one of {', '.join(map(repr, _ACTIVATIONS))}, "
            f"got {activation!r}"
        )
    negative_slope = check_number(name, "negative_slope", negative_slope)
    if negative_slope < 0:
        raise ValueError(f"{name}: negative_slope must be >= 0, got {negative_slope}")
    slope = {None: 1.0, "relu": 0.0}.get(activation, float(negative_slope))
    return num_groups, float(eps), slope


def _check_float(name: str, argument: str, tensor: Tensor, x: Tensor) -> None:
    check_tensor(name, argument, tensor)
    check_no_tangent(name, argument, tensor)
    check_dtype(name, argument, tensor, FLOATS)
    check_device(name, argument, tensor, x.device)


def _in_order(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The tensor, dense in a memory order of its axes."""
    return restore(arrange(tensor, order), order)


# Tensors of the shape of x are dense, all in one memory order: contiguous or channels last.
# negative_slope: 1 without an activation, 0 for ReLU.


@functional_op(
    "group_norm3d_backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor moments, "
    "Tensor? out, int num_groups, float negative_slope, *, bool with_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def group_norm3d_backward_op(
    grad_output, x, weight, moments, out, num_groups, negative_slope, *, with_residual
):
    """The gradients of x, weight, bias and residual; the last is empty unless asked for."""
    grad_weight = moments.new_empty(x.shape[1])
    grad_residual = torch.empty_like(x) if with_residual else x.new_empty(0)
    return torch.empty_like(x), grad_weight, torch.empty_like(grad_weight), grad_residual


def _save(ctx, args, results):
    x, weight, bias, _, ctx.num_groups, _, ctx.negative_slope = args
    out, moments = results
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(x, weight, moments, out if ctx.negative_slope != 1 else None)
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return ()
    x, weight, moments, out = ctx.saved_tensors
    _, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    grad_output = _in_order(grad_output, memory_order(x))
    grad_x, grad_weight, grad_bias, grad_residual = group_norm3d_backward_op(
        grad_output, x, weight, moments, out, ctx.num_groups, ctx.negative_slope,
        with_residual=for_residual and out is not None,
    )  # fmt: skip
    return (
        grad_x,
        grad_weight.to(weight.dtype) if for_weight else None,
        grad_bias.to(ctx.bias_dtype) if for_bias else None,
        (grad_output if out is None else grad_residual) if for_residual else None,
    )


@functional_op(
    "group_norm3d(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, "
    "float eps, float negative_slope) -> (Tensor, Tensor)",
    save=_save,
    backward=_backward,
)
def group_norm3d_op(x, weight, bias, residual, num_groups, eps, negative_slope):
    """The result and the moments [N, 2, groups]: means and inverse standard deviations."""
    moments = x.new_empty((x.shape[0], 2, num_groups), dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), moments
