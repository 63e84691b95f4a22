"""Tensors as launchers take them: memory layout, shared memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation that makes a channels-last tensor contiguous; None for any other tensor."""
    if x.is_contiguous() or x.dim() < 3:
        return None
    order = [0, *range(2, x.dim()), 1]
    return order if x.permute(order).is_contiguous() else None


def arrange(x: Tensor, order: list[int] | None) -> Tensor:
    """The tensor permuted, and copied where that is not contiguous."""
    return (x if order is None else x.permute(order)).contiguous()


def restore(x: Tensor, order: list[int] | None) -> Tensor:
    """The inverse of `arrange`."""
    return x if order is None else x.permute(sorted(range(len(order)), key=order.__getitem__))


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same elements in the same memory."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    return has_memory(a) and has_memory(b) and a.data_ptr() == b.data_ptr()


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of two tensors overlaps.

    False where it cannot be known: traced tensors have no address.
    """
    if a is b:
        return True
    if not (has_memory(a) and has_memory(b) and a.numel() and b.numel()):
        return False
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def has_memory(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # functional tensors, functorch's wrappers
        return False
    return True


def _extent(x: Tensor) -> tuple[int, int]:
    """The address of the first element, and the address behind the last."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + length * x.element_size()


def in_structure(levels: Tensor | Sequence[Tensor], results: Sequence[Tensor]):
    """Results as the argument was given: a tensor, a list or a tuple."""
    if isinstance(levels, Tensor):
        return results[0]
    return tuple(results) if isinstance(levels, tuple) else list(results)
