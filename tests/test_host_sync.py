"""No operation, forward or backward, ever waits for the device.

Everything above the kernels runs as on a GPU, on CPU tensors that stand for a GPU's; the kernels themselves do not run.
"""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import fmkernels
from fmkernels import functional
from tests.conftest import launches
from tests.support import on_gpu
from tests.triton_checked.host_sync import HostSyncError, no_host_sync

pytestmark = pytest.mark.skipif(on_gpu(), reason="the kernels of a GPU are not to run")

LAM, INDEX = torch.tensor([0.9, 0.6]), torch.tensor([1, 0])
FLIPS = torch.tensor([0, 5], dtype=torch.uint8)
BOXES = torch.tensor([[0, 1, 1, 1, 3, 4, 5], [1, 0, 0, 0, 4, 4, 8.0]])
WINDOW = (-1200.0, 600.0)


def leaf(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def soft_target_focal_loss():
    for dtype in (torch.float32, torch.float16):
        logits, targets = (
            [leaf(2, 300, dtype=dtype), leaf(2, 40, dtype=dtype)],
            [torch.zeros(2, 300), torch.zeros(2, 40)],
        )
        for reduction in ("none", "sum", "mean", "normalized"):
            given = {"reduction": reduction}
            if reduction == "normalized":
                given = {"reduction": "mean", "normalizer": (targets[0] > 0.5).sum()}
            loss = functional.soft_target_focal_loss(
                logits, targets, weight=torch.ones(2, 1), mix=(LAM, INDEX), **given
            )
            losses = [loss] if isinstance(loss, torch.Tensor) else loss
            for _ in range(2):
                torch.autograd.backward(
                    losses, [torch.ones_like(v) for v in losses], retain_graph=True
                )
        with torch.no_grad():
            functional.soft_target_focal_loss(logits, targets)


def predict_targets():
    views = torch.zeros(2, 1, 2, 4, 4, 8)
    functional.predict_targets([views, views[..., :3]], FLIPS, temperature=0.5)


def sample_mixup():
    functional.sample_mixup(2)


def mixup3d():
    volumes, donors = leaf(2, 1, 4, 4, 8), leaf(2, 1, 4, 4, 8)
    functional.mixup3d(volumes, LAM, INDEX, flips=FLIPS, window=WINDOW).sum().backward()
    functional.mixup3d(volumes, LAM, INDEX, donors=donors, flips=(FLIPS, None)).sum().backward()
    scans = torch.zeros(2, 1, 4, 4, 8, dtype=torch.int16)
    functional.mixup3d(scans, LAM, INDEX, flips=FLIPS, window=WINDOW, dtype=torch.bfloat16)
    for volumes in (scans, scans.transpose(2, 4)):
        functional.mixup3d(volumes, LAM, INDEX, flips=FLIPS, out=volumes)


def crop_and_resize3d():
    for clamp in ("box", "volume"):
        volumes = leaf(2, 3, 4, 4, 8)
        functional.crop_and_resize3d(
            volumes, BOXES, (2, 3, 5), clamp=clamp, window=WINDOW
        ).sum().backward()
    scans = torch.zeros(2, 1, 4, 4, 8, dtype=torch.int16)
    functional.crop_and_resize3d(scans, BOXES, (4, 4, 4), window=WINDOW, dtype=torch.bfloat16)


def object_mixup3d():
    volumes = torch.zeros(2, 1, 4, 4, 8)
    functional.object_mixup3d(volumes, BOXES, BOXES, LAM)
    functional.object_mixup3d(volumes, BOXES, BOXES, LAM, out=volumes)
    functional.object_mixup3d(volumes, BOXES, BOXES, LAM, donors=volumes.clone(), out=volumes)
    functional.object_mixup3d(
        volumes.short(), BOXES, BOXES, LAM, window=WINDOW, dtype=torch.bfloat16
    )


CALLS = {f.__name__: f for f in (soft_target_focal_loss, predict_targets, sample_mixup, mixup3d, crop_and_resize3d,
                                 object_mixup3d)}  # fmt: skip


@pytest.fixture
def kernels_at_rest(monkeypatch):
    """The launch code of a GPU in place of the CPU path, above kernels that do nothing."""
    count = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *_, **__: count.append(kernel))
    for cpu, name, launch in launches():
        monkeypatch.setattr(cpu, name, launch)
    return count


@pytest.mark.parametrize("op", functional.__all__)
def test_no_operation_waits_for_the_device(op, kernels_at_rest):
    with no_host_sync():
        CALLS[op]()
    assert kernels_at_rest or op == "sample_mixup"


@pytest.mark.parametrize(
    "line", ["loss.item()", "loss.cpu()", "loss.nonzero()", "bool(loss)", "loss.tolist()"]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_operation_that_waits_is_caught(line, direction, kernels_at_rest, monkeypatch):
    """A wait planted in the launch code of the loss, or in that of its backward."""
    from fmkernels.cpu import soft_target_focal_loss as cpu

    name = "soft_target_focal_loss" + {"forward": "", "backward": "_scale"}[direction]
    launch = getattr(cpu, name)

    def waiting(first, *rest):
        eval(line, {"loss": first[0].flatten()[0]})
        return launch(first, *rest)

    monkeypatch.setattr(cpu, name, waiting)
    loss = fmkernels.soft_target_focal_loss
    with no_host_sync(), pytest.raises(HostSyncError, match="waits for the device"):
        loss(leaf(4), torch.zeros(4)).backward()
