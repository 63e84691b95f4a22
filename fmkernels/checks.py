"""Checks of arguments that every function of fmkernels.functional shares; the errors name function and argument.

No check reads a value from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(name: str, argument: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        expected = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: {argument} must be {expected}, got {str(x.dtype).removeprefix('torch.')}")


def check_device(name: str, argument: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: {argument} must be on {device} as the first tensor is, got {x.device}")


def check_no_grad(name: str, argument: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: no gradient to {argument} is offered, pass {argument} detached")


def check_number(name: str, argument: str, value: object) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument} must be a number, got {kind_of(value)}")
    if not abs(value) <= LARGEST:  # math.isfinite cannot be traced with a symbolic float
        raise ValueError(f"{name}: {argument} must be finite, got {value}")


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def kind_of(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__
