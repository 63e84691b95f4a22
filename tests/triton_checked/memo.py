"""Caches for the types that the stock interpreter builds again in every operation.

Half of its time goes into them: the shape of a block, wrapped and unwrapped number by number, and
a table of NumPy's dtypes. Values and checks stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_blocks: dict[tuple, dict] = {}  # the attributes that equal block types share


def _block_type(stock):
    def init(self, element_ty, shape) -> None:
        numbers = (getattr(n, "value", n) for n in shape)
        key = element_ty.name, getattr(element_ty, "address_space", None), type(shape), *numbers
        if key not in _blocks:
            stock(self, element_ty, shape)
            _blocks[key] = vars(self)
        self.__dict__ = _blocks[key]

    return init


def _tensor(stock):
    def init(self, handle, type) -> None:
        of_type = vars(type)
        if "_tensor" not in of_type:
            stock(self, handle, type)
            of_type["_tensor"] = {k: v for k, v in vars(self).items() if k != "handle"}
        self.__dict__.update(of_type["_tensor"])
        self.handle = handle

    return init


def _numpy_dtype(stock):
    known: dict[str, np.dtype] = {}

    def dtype(ty: tl.dtype) -> np.dtype:
        if ty.name not in known:
            known[ty.name] = stock(ty)
        return known[ty.name]

    return dtype


def _broadcast(stock):
    def broadcast(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() == b.is_block() and (not a.is_block() or [*a.shape] == [*b.shape]):
            return lhs, rhs
        return stock(self, lhs, rhs)

    return broadcast


def _operands(stock):
    def operands(self, lhs, rhs, *args, **options):
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            divides = options.get("div_or_mod") or len(args) > 3
            if vars(lhs.type) is vars(rhs.type) and not lhs.type.scalar.is_ptr() and not divides:
                return lhs, rhs
        return stock(self, lhs, rhs, *args, **options)

    return operands


def _equal(stock):
    def equal(self, other) -> bool:
        if self is other:
            return True
        return self.name == other.name if type(other) is tl.dtype else stock(self, other)

    return equal


def patches() -> Iterator[tuple[object, str, object]]:
    """Owner, name and value of each attribute to set."""
    yield tl.block_type, "__init__", _block_type(tl.block_type.__init__)
    yield tl.tensor, "__init__", _tensor(tl.tensor.__init__)
    yield tl.dtype, "__eq__", _equal(tl.dtype.__eq__)
    yield interpreter, "_get_np_dtype", _numpy_dtype(interpreter._get_np_dtype)
    semantic = type(interpreter.interpreter_semantic)
    yield semantic, "broadcast_impl_value", _broadcast(semantic.broadcast_impl_value)
    name = "binary_op_type_checking_impl"
    yield semantic, name, _operands(getattr(semantic, name))
