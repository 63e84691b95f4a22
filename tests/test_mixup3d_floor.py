"""mixup3d in place needs its barrier; large offsets are right; weight 0 moves no bytes."""

import pytest
import torch
import triton.language as tl

from fmkernels import mixup3d
from tests.support import on_gpu
from tests.support.cases import kernel_only
from tests.support.launch import launch
from tests.triton_checked.interpreter import KernelFault, checked

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the interpreter")


@kernel_only
def test_in_place_without_its_barrier_is_a_race(path, monkeypatch):
    volumes = torch.ones(3, 1, 6, 5, 48)
    lam, index = torch.tensor([0.9, 0.6, 0.75]), torch.tensor([1, 2, 0])
    mixup3d(volumes, lam, index, out=volumes)
    monkeypatch.setattr(tl, "debug_barrier", lambda **_: None)
    with pytest.raises(KernelFault, match="without a barrier in between"):
        mixup3d(volumes, lam, index, out=volumes)


@kernel_only
@pytest.mark.parametrize(
    "row", [2**31 + 16, 2**30 + 7]
)  # int32 counts vectors of 16; int64 counts single voxels
def test_offsets_beyond_two_to_the_31(path, row):
    lam, index = torch.tensor([1.0, 0.5]), torch.tensor([0, 0])
    volumes = torch.empty((2, 1, 1, 1, row), dtype=torch.uint8)
    ends = torch.tensor([[10, 20, 30], [20, 40, 60]], dtype=torch.uint8)
    volumes[:, ..., -3:] = ends.view(2, 1, 1, 1, 3)
    volumes[0, ..., :3] = torch.tensor([50, 60, 70], dtype=torch.uint8)
    flips = torch.tensor([4, 0], dtype=torch.uint8)
    with checked(programs=[-1]):
        new, flipped = (mixup3d(volumes, lam, index, flips=f) for f in (None, flips))
        mixup3d(volumes, lam, index, out=volumes)
    assert new[1, ..., -3:].flatten().tolist() == [15, 30, 45]
    assert flipped[1, ..., -3:].flatten().tolist() == [45, 50, 55]
    assert volumes[1, ..., -3:].flatten().tolist() == [15, 30, 45]


@kernel_only
def test_offsets_of_gradients_beyond_two_to_the_31(path):
    volumes = torch.empty((2, 1, 1, 1, 2**30 + 18), dtype=torch.float16, requires_grad=True)
    grad_output = torch.empty_like(volumes, requires_grad=False)
    grad_output[..., -3:] = torch.tensor([2.0, 4, 6], dtype=torch.float16)
    with checked(programs=[-1]):
        out = mixup3d(volumes, torch.tensor([1.0, 0.5]), torch.tensor([1, 1]))
        (gradient,) = torch.autograd.grad(out, volumes, grad_output)
    assert gradient[1, ..., -3:].flatten().tolist() == [1 + 1, 2 + 2, 3 + 3]


def test_voxels_of_weight_0_are_not_read():
    volumes, donors, index = torch.ones(2, 1, 3, 5, 16), torch.ones(2, 1, 3, 5, 16), torch.arange(2)
    for weight, source in ((0.0, "volumes"), (1.0, "donors")):
        common, axes = (torch.full((2,), weight), index, None), (0, 1, 2, 4)
        with checked() as report:
            launch("mixup3d", volumes, donors, *common, None, axes, None, dtype=torch.float32)
        assert report.traffic[source].read == 0 and report.traffic["out"].written > 0
        with checked() as report:
            arguments = volumes, None, *common, axes, None, source == "volumes", source == "donors"
            launch("mixup3d_backward", *arguments, rows=2, dtype=torch.float32)
        assert report.traffic["grad_output"].read == 0
