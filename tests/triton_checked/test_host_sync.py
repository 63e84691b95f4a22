"""Every way to wait for the device is refused; work on the device is not."""

import pytest
import torch

from .host_sync import HostSyncError, no_host_sync

library = torch.library.Library("triton_checked", "FRAGMENT")
library.define("peek(Tensor x) -> Tensor")
library.impl("peek", lambda x: x * 2 if x.sum() > 0 else x, "CPU")
library.define("read(Tensor x) -> Tensor")
library.impl("read", lambda x: x * x.sum().item(), "CPU")
library.define("double(Tensor x) -> Tensor")
library.impl("double", lambda x: x * 2, "CPU")


class Peeks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


X = torch.arange(4.0)
WAITING = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X[0]),
    "int": lambda: int(X[0]),
    "bool": lambda: bool(X[0]),
    "index": lambda: [1, 2, 3, 4][X[0].long()],
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "mask": lambda: X[X > 1],
    "assign": lambda: X.clone().__setitem__(X > 1, torch.ones(2)),
    "equal": lambda: torch.equal(X, X + 1),
    "unique": lambda: X.unique(),
    "repeat": lambda: X.repeat_interleave(X.long()),
    "synchronize": lambda: torch.cuda.synchronize(),
    "from the host": lambda: torch.tensor([1.0, 2.0]),
    "operator": lambda: torch.ops.triton_checked.peek(X),
    "item in an operator": lambda: torch.ops.triton_checked.read(X),
    "backward": lambda: Peeks.apply(X.clone().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", WAITING)
def test_host_synchronization_is_refused(name):
    with no_host_sync(), pytest.raises(HostSyncError, match="waits for the device"):
        WAITING[name]()
    if name != "synchronize" or torch.cuda.is_available():
        WAITING[name]()  # and only in the block


def test_work_on_the_device_is_allowed():
    with no_host_sync():
        x = torch.zeros(4, requires_grad=True)
        y = (
            torch.ops.triton_checked.double(x.detach())
            + torch.where(x > 1, x, 0.0)[torch.arange(4)]
        )
        y.masked_fill(y > 1, 0.0).sum().backward()
        torch.full((), 2.0).repeat_interleave(3, output_size=3)
    assert x.grad is not None
