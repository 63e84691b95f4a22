"""Checks of arguments that every function of fmkernels.functional shares; the errors name function and argument.

No check reads a value from the device.
"""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

LARGEST = torch.finfo(torch.float32).max
NARROWEST = 1e-30  # a window whose inverse float32 holds, with room
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VOXELS = (*FLOATS, torch.int16, torch.uint8)


def check_dtype(name: str, argument: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        expected = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(
            f"{name}: {argument} must be {expected}, got {str(x.dtype).removeprefix('torch.')}"
        )


def check_tensor(name: str, argument: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {kind_of(x)}")


def check_volumes(name: str, argument: str, x: Tensor) -> None:
    check_tensor(name, argument, x)
    check_no_tangent(name, argument, x)
    check_dtype(name, argument, x, VOXELS)
    if x.dim() != 5:
        raise ValueError(f"{name}: {argument} must be [B, C, D, H, W], got shape {shape_of(x)}")


def check_window(name: str, window: object) -> tuple[float, float] | None:
    """The window as a pair of floats."""
    if window is None:
        return None
    if not isinstance(window, (list, tuple)) or len(window) != 2:
        raise TypeError(f"{name}: window must be a pair of numbers (lo, hi), got {kind_of(window)}")
    for bound, value in zip(("lo", "hi"), window, strict=True):
        check_number(name, f"window {bound}", value)
    if not window[0] < window[1]:
        raise ValueError(f"{name}: window must have lo < hi, got ({window[0]}, {window[1]})")
    if window[1] - window[0] < NARROWEST:
        raise ValueError(
            f"{name}: window must be at least {NARROWEST} wide, got ({window[0]}, {window[1]})"
        )
    return float(window[0]), float(window[1])


def result_dtype(name: str, dtype: object, volumes: Tensor, window: object) -> torch.dtype:
    """As asked; else that of the volumes, float32 for windowed integers."""
    if dtype is None:
        return (
            torch.float32
            if window is not None and not volumes.is_floating_point()
            else volumes.dtype
        )
    if dtype not in VOXELS:
        expected = " or ".join(str(d).removeprefix("torch.") for d in VOXELS)
        got = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(f"{name}: dtype must be {expected}, got {got}")
    return dtype


def check_device(name: str, argument: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(
            f"{name}: {argument} must be on {device} as the first tensor is, got {x.device}"
        )


def check_no_tangent(name: str, argument: str, x: Tensor) -> None:
    """No op has a derivative in forward mode: a tangent would be dropped without a word."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{name}: no forward-mode derivative by {argument} is offered, use reverse mode"
        )


def check_no_grad(name: str, argument: str, x: Tensor) -> None:
    check_no_tangent(name, argument, x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: no gradient to {argument} is offered, pass {argument} detached")


def check_number(name: str, argument: str, value: float) -> float:
    """The number, as Python's own where it was NumPy's."""
    plain = type(value) is float or type(value) is int  # to ask the tower of numbers takes long
    if not plain and (isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: {argument} must be a number, got {kind_of(value)}")
    if not abs(value) <= LARGEST:  # math.isfinite cannot be traced with a symbolic float
        raise ValueError(f"{name}: {argument} must be finite, got {value}")
    return value if plain or isinstance(value, (int, float)) else float(value)


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def kind_of(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__
