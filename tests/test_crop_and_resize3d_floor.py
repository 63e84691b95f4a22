"""crop_and_resize3d reads the voxels of its boxes only; offsets beyond 2^31 are right."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fmkernels import crop_and_resize3d
from fmkernels.kernels import sampling
from tests.support import on_gpu
from tests.support.cases import kernel_only
from tests.triton_checked.interpreter import KernelFault, checked

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the interpreter")

# no two boxes share a voxel
APART = torch.tensor([[0, 0, 1, 2, 3, 4, 6], [1, 2, 0, 0, 4, 3, 5], [0, 3, 0, 0, 4, 6, 2.0]])
VOXELS = int((APART[:, 4:] - APART[:, 1:4]).prod(1).sum())
SHAPE = (2, 1, 4, 6, 7)


@kernel_only
@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)]
)
def test_reads_the_voxels_of_the_boxes_and_writes_every_sample_once(path, dtype, result):
    volumes = torch.ones(SHAPE, dtype=dtype)
    with checked(volumes=volumes) as report:
        out = crop_and_resize3d(volumes, APART, (8, 8, 8), dtype=result)
    assert report["volumes"].read_once == VOXELS * dtype.itemsize
    assert report[out].written == report[out].written_once == out.nbytes
    assert report.never_written(out) == 0 and len(report.launches) == 1
    with checked(volumes=volumes) as report:  # one sample between 8 voxels, and one on a voxel
        boxes = torch.tensor([[0, 0, 0, 0, 4, 6, 4], [1, 1, 1, 1, 2, 2, 2.0]])
        crop_and_resize3d(volumes, boxes, (1, 1, 1), dtype=result)
    assert report["volumes"].read_once == (8 + 1) * dtype.itemsize


@kernel_only
def test_unusable_boxes_read_nothing(path):
    volumes = torch.ones(SHAPE)
    boxes = torch.tensor([[2, 0, 0, 0, 1, 1, 1], [0, math.nan, 0, 0, 1, 1, 1]])
    with checked(volumes=volumes) as report:
        out = crop_and_resize3d(volumes, boxes, (2, 3, 4))
    assert "volumes" in report.traffic and report["volumes"].read == 0 and (out == 0).all()


@kernel_only
@pytest.mark.parametrize("window", [None, (-2.0, 3.0)])
def test_backward_reads_every_sample_and_writes_every_voxel_once(path, window):
    volumes = torch.ones(SHAPE, requires_grad=True)
    out = crop_and_resize3d(volumes, APART, (5, 4, 6), window=window)
    grad_output = torch.ones_like(out)
    with checked(volumes=volumes, grad_output=grad_output) as report:
        (gradient,) = torch.autograd.grad(out, volumes, grad_output)
    assert report["grad_output"].read_once == out.nbytes
    assert report[gradient].written == report[gradient].written_once == gradient.nbytes
    assert len(report.launches) == 1
    assert report["volumes"].read == (VOXELS * 4 if window else 0)


@triton.jit
def _bilinear_beyond_the_last_voxel(
    plane, offset, dy, dx, fy, fx, low, scale, WINDOW: tl.constexpr
):
    near, far = plane + offset, plane + dy + offset
    return tl.load(near) + tl.load(near + dx) + tl.load(far) + tl.load(far + dx)


@kernel_only
def test_a_planted_read_beyond_the_volume_is_caught(path, monkeypatch):
    volumes, box = torch.ones(1, 1, 3, 4, 5), torch.tensor([[0, 0, 0, 0, 3, 4, 5.0]])
    crop_and_resize3d(volumes, box, (3, 4, 5))
    monkeypatch.setattr(sampling, "bilinear", _bilinear_beyond_the_last_voxel)
    with pytest.raises(KernelFault, match="volumes"):
        crop_and_resize3d(volumes, box, (3, 4, 5))


@kernel_only
def test_offsets_beyond_two_to_the_31(path):
    """Volumes, crops, a plane of a crop, and the gradient."""
    volumes = torch.empty((3, 1, 300, 2000, 2000), dtype=torch.uint8)
    volumes[2, 0, -1, -1, -3:] = torch.tensor([10, 20, 30], dtype=torch.uint8)
    last = torch.tensor([[2, 299, 1999, 1997, 300, 2000, 2000.0]])
    with checked(races=False):
        crops = crop_and_resize3d(volumes, last, (1, 1, 3))
    assert crops.flatten().tolist() == [10, 20, 30]

    volumes = torch.empty((1, 1, 1, 46_400, 46_400), dtype=torch.float16, requires_grad=True)
    volumes.detach()[0, 0, -1, -1, -3:] = torch.tensor([10.0, 20, 30], dtype=torch.float16)
    whole = torch.tensor([[0, 0, 0, 0, 1, 46_400, 46_400.0]])
    grad_output = torch.empty(volumes.shape, dtype=torch.float16)
    grad_output[0, 0, 0, -9:, -17:] = 0
    grad_output[0, 0, 0, -1, -3:] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)
    with checked(programs=[-1], races=False):
        crops = crop_and_resize3d(volumes, whole, volumes.shape[2:])
        (gradient,) = torch.autograd.grad(crops, volumes, grad_output)
    assert crops[0, 0, 0, -1, -3:].tolist() == [10, 20, 30]
    assert gradient[0, 0, 0, -1, -3:].tolist() == [1, 2, 3]
