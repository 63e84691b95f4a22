"""Checks of arguments. Errors name the function, the argument, what was expected and what came.

No check reads a value from the device. Public functions check once; launchers trust them.
"""

import numbers
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VOXELS = (*FLOATS, torch.int16, torch.uint8)
MAX_NUMBER = torch.finfo(torch.float32).max
MIN_WINDOW_WIDTH = 1e-30  # its inverse fits into float32
MAX_AXIS = 2**24  # voxels or samples; float32 counts no further


def check_tensor(name: str, argument: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {describe(x)}")


def check_no_dtensor(name: str, argument: str, x: Tensor) -> None:
    """No op has a sharding rule."""
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: {argument} must be a plain tensor, got a DTensor; "
            f"pass the local shards of all tensors, such as {argument}.to_local()"
        )


def check_dtype(name: str, argument: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if type(x) is not Tensor:
        check_no_dtensor(name, argument, x)
    if x.dtype not in allowed:
        raise TypeError(f"{name}: {argument} must be {_names(allowed)}, got {_names([x.dtype])}")


def check_device(name: str, argument: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(
            f"{name}: {argument} must be on {device} as the first tensor is, got {x.device}"
        )


def check_no_tangent(name: str, argument: str, x: Tensor) -> None:
    """No op has a forward-mode derivative: a tangent would be dropped silently."""
    if forward_ad._current_level >= 0 and not torch.compiler.is_dynamo_compiling():
        refuse_tangent(name, argument, x)


def refuse_tangent(name: str, argument: str, x: Tensor) -> None:
    # no guard of compiled code tells whether there is a tangent: it would answer for other tensors
    if torch.compiler.disable(_has_tangent)(x):
        raise ValueError(
            f"{name}: no forward-mode derivative by {argument} is offered, use reverse mode"
        )


def _has_tangent(x: Tensor) -> bool:
    return torch._VF._unpack_dual(x, level=0)[1] is not None


def check_no_grad(name: str, argument: str, x: Tensor) -> None:
    check_no_tangent(name, argument, x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: no gradient to {argument} is offered, pass {argument} detached")


def check_number(name: str, argument: str, value: float) -> float:
    """The number, as a Python number where it came from NumPy."""
    plain = type(value) is float or type(value) is int  # isinstance of numbers.Real is slow
    if not plain and (isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: {argument} must be a number, got {describe(value)}")
    if not abs(value) <= MAX_NUMBER:  # math.isfinite cannot be traced with a symbolic float
        raise ValueError(f"{name}: {argument} must be finite, got {value}")
    return value if plain or isinstance(value, (int, float)) else float(value)


def varying(*numbers: float) -> Sequence[Any]:
    """The numbers; in compiled code, as tensors on the CPU if one of them varies between calls.

    A graph that took them as numbers would be compiled for each value.
    """
    if not torch.compiler.is_compiling():
        return numbers
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    probe = 0.4567  # only for constants is it known on which side of any number they lie
    constant = [
        statically_known_true(x > probe) or statically_known_true(x <= probe) for x in numbers
    ]
    if all(constant):
        return numbers
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return [one * x for x in numbers]


def varying_window(window: tuple[float, float] | None) -> tuple[float, float] | Tensor | None:
    """The window; in compiled code, as a tensor of both bounds if one of them varies."""
    if window is None:
        return None
    bounds = varying(*window)
    return torch.stack(list(bounds)) if isinstance(bounds[0], Tensor) else window


def check_integer(name: str, argument: str, value: int) -> int:
    """The integer, as a Python integer where it came from NumPy."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: {argument} must be an int, got {describe(value)}")
    return int(value)


def check_volumes(name: str, argument: str, x: Tensor) -> None:
    check_tensor(name, argument, x)
    check_no_tangent(name, argument, x)
    check_dtype(name, argument, x, VOXELS)
    if x.dim() != 5:
        raise ValueError(f"{name}: {argument} must be [B, C, D, H, W], got shape {shape_of(x)}")


def check_axes(name: str, argument: str, volumes: Tensor) -> None:
    if max(volumes.shape[2:]) > MAX_AXIS:
        raise ValueError(
            f"{name}: {argument} must have axes of at most {MAX_AXIS} voxels, "
            f"got {shape_of(volumes)}"
        )


def check_levels(name: str, argument: str, value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """A tensor or a sequence of tensors, as a sequence."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Tensor) for v in value):
        raise TypeError(
            f"{name}: {argument} must be a tensor or a list or tuple of tensors, "
            f"got {describe(value)}"
        )
    if not value:
        raise ValueError(f"{name}: {argument} must hold at least one tensor, got an empty sequence")
    return value


def common_dtype(levels: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all levels, which autocast may have made different."""
    return reduce(torch.promote_types, [x.dtype for x in levels])


def check_per_sample(
    name: str,
    argument: str,
    x: Tensor,
    device: torch.device,
    allowed: Sequence[torch.dtype],
    count: int,
) -> None:
    check_tensor(name, argument, x)
    check_dtype(name, argument, x, allowed)
    check_device(name, argument, x, device)
    if x.shape != (count,):
        raise ValueError(f"{name}: {argument} must have shape ({count},), got {shape_of(x)}")
    check_no_grad(name, argument, x)


def check_boxes(name: str, argument: str, boxes: Tensor, device: torch.device) -> None:
    check_tensor(name, argument, boxes)
    check_dtype(name, argument, boxes, (torch.float32,))
    check_device(name, argument, boxes, device)
    if boxes.dim() != 2 or boxes.shape[1] != 7:
        raise ValueError(
            f"{name}: {argument} must be [K, 7], (batch index, z1, y1, x1, z2, y2, x2), "
            f"got shape {shape_of(boxes)}"
        )
    check_no_grad(name, argument, boxes)


def check_generator(name: str, generator: object, device: torch.device | None) -> None:
    """No device means that of the generator."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator, got {describe(generator)}")
    own = generator.device
    device = device or own
    if device.type != own.type or device.index not in (None, own.index):
        raise ValueError(f"{name}: generator must be on {device}, got {own}")


def check_window(name: str, window: object) -> tuple[float, float] | None:
    """The window as a pair of floats."""
    if window is None:
        return None
    if not isinstance(window, (list, tuple)) or len(window) != 2:
        raise TypeError(
            f"{name}: window must be a pair of numbers (lo, hi), got {describe(window)}"
        )
    for bound, value in zip(("lo", "hi"), window, strict=True):
        check_number(name, f"window {bound}", value)
    if not window[0] < window[1]:
        raise ValueError(f"{name}: window must have lo < hi, got ({window[0]}, {window[1]})")
    if window[1] - window[0] < MIN_WINDOW_WIDTH:
        raise ValueError(
            f"{name}: window must be at least {MIN_WINDOW_WIDTH} wide, "
            f"got ({window[0]}, {window[1]})"
        )
    return float(window[0]), float(window[1])


def result_dtype(name: str, dtype: object, volumes: Tensor, window: object) -> torch.dtype:
    """The dtype asked for; else that of the volumes, float32 for windowed integers."""
    if dtype is None:
        windowed = window is not None and not volumes.is_floating_point()
        return torch.float32 if windowed else volumes.dtype
    if dtype not in VOXELS:
        got = _names([dtype]) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(f"{name}: dtype must be {_names(VOXELS)}, got {got}")
    return dtype


def check_out(name: str, out: Tensor, volumes: Tensor, dtype: torch.dtype) -> None:
    check_tensor(name, "out", out)
    check_dtype(name, "out", out, (dtype,))
    check_device(name, "out", out, volumes.device)
    if out.shape != volumes.shape:
        raise ValueError(
            f"{name}: out must have the shape of volumes, {shape_of(volumes)}, got {shape_of(out)}"
        )
    repeats = any(step == 0 and n > 1 for step, n in zip(out.stride(), out.shape, strict=True))
    if out.numel() and repeats:
        raise ValueError(
            f"{name}: out must have an element of its own for each voxel, "
            f"got strides {out.stride()}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: no gradient through out is offered, pass all tensors detached")


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def describe(value: object) -> str:
    """What an argument is, for an error message."""
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
