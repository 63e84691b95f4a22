"""A guard against host synchronization: code that must never wait for the device raises."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostSyncError(AssertionError):
    """Code that must not wait for the device did."""


SYNCHRONIZING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose",
    "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip
INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index",
}  # fmt: skip
COPIES = (
    (torch.Tensor, ("tolist", "cpu", "numpy")),
    (torch, ("tensor", "as_tensor", "from_numpy")),
    (torch.cuda, ("synchronize",)),
)


def _waits(name: str, args: tuple, kwargs: dict) -> bool:
    if name in INDEXING:  # a mask as an index
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten::_to_copy":
        return kwargs.get("device") == torch.device("cpu") and args[0].is_cuda
    return name in SYNCHRONIZING


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        if _waits(name, args, kwargs):
            raise HostSyncError(f"{name} waits for the device")
        with self:  # below autograd, item() and the like arrive as composite operators
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if name.startswith(("aten::", "prim", "profiler::")):
            return func(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        cuda = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)
        key = torch._C.DispatchKey.CUDA if cuda else torch._C.DispatchKey.CPU
        with self:  # look inside operators that are written in Python
            return func._op_dk(key, *args, **kwargs)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise HostSyncError where the block would wait for the device or copy from pageable memory.

    CPU tensors may stand for a GPU's. The guard looks inside operators that are written in Python.
    """

    def refuse(name: str) -> Callable:
        def method(*_, **__):
            raise HostSyncError(f"{name}() waits for the device")

        return method

    with ExitStack() as patches, _NoHostSync():
        for owner, names in COPIES:
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, refuse(name)))
        yield
