"""object_mixup3d touches the voxels of its boxes only, in any number of programs, beyond 2^31."""

import math

import pytest
import torch
import triton

import reference
from fmkernels import object_mixup3d
from fmkernels.kernels import object_mixup3d as kernels
from tests.support import on_gpu
from tests.support.cases import kernel_only
from tests.support.tolerance import assert_close
from tests.triton_checked.interpreter import KernelFault, checked

pytestmark = pytest.mark.skipif(on_gpu(), reason="needs the interpreter")

WINDOW = (-1200.0, 600.0)
# boxes of equal size, so that nothing is resampled
TARGET, SOURCE = (0, 1, 2, 3, 5, 6, 9), (1, 0, 1, 2, 4, 5, 8)
VOXELS_IN_BOX = 96
HALF = torch.full((1,), 0.5)
SMALL = (2, 1, 7, 8, 11)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.float64])
def test_in_place_only_the_voxels_in_boxes_are_read_and_written(path, dtype):
    volumes, donors = torch.ones(SMALL, dtype=dtype), torch.ones(SMALL, dtype=dtype)
    with checked(volumes=volumes, donors=donors) as report:
        object_mixup3d(volumes, boxes(TARGET), boxes(SOURCE), HALF, donors=donors, out=volumes)
    once = VOXELS_IN_BOX * dtype.itemsize
    assert report["volumes"].read == report["volumes"].written == report["donors"].read_once == once
    assert len(report.launches) == 1
    with checked(volumes=volumes) as report:
        object_mixup3d(volumes, boxes(TARGET), boxes(SOURCE), HALF, out=volumes)
    assert report["volumes"].read_once == 2 * once and report["volumes"].written == once
    scratch = [t for name, t in report.traffic.items() if name in ("out", "donors")]
    assert sum(t.read + t.written for t in scratch) == 2 * once and len(report.launches) == 2


@kernel_only
@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "result", "window"),
    [
        (torch.float32, torch.float32, None),
        (torch.int16, torch.bfloat16, WINDOW),
        (torch.int16, torch.float32, WINDOW),
    ],
)
def test_out_of_place_every_voxel_is_read_and_written_once(path, dtype, result, window, donated):
    volumes, donors = torch.ones((2, 1, 9, 21, 35), dtype=dtype), torch.ones(SMALL, dtype=dtype)
    options = {"window": window, "dtype": result}
    with checked(volumes=volumes, donors=donors) as report:
        out = object_mixup3d(
            volumes,
            boxes(TARGET),
            boxes(SOURCE),
            HALF,
            donors=donors if donated else None,
            **options,
        )
    assert report["volumes"].read_once == volumes.nbytes
    assert report[out].written == report[out].written_once == out.nbytes
    assert report.never_written(out) == 0 and len(report.launches) == 1
    if donated:
        assert report["volumes"].read == volumes.nbytes
        assert report["donors"].read_once == VOXELS_IN_BOX * dtype.itemsize


@kernel_only
def test_in_place_with_a_window_every_voxel_is_written(path):
    volumes = torch.ones(SMALL)
    with checked(volumes=volumes) as report:
        object_mixup3d(volumes, boxes(TARGET), boxes(SOURCE), HALF, window=(-1.0, 1.0), out=volumes)
    assert report["volumes"].written == volumes.nbytes and len(report.launches) == 2


@kernel_only
def test_unusable_pairs_read_and_write_no_voxel(path):
    volumes = torch.ones(SMALL)
    bad = boxes((2, *TARGET[1:]), (0, math.nan, *TARGET[2:]), (0, 3, 3, 3, 3, 6, 6))
    good = boxes(*[SOURCE] * 3)
    with checked(volumes=volumes) as report:
        object_mixup3d(volumes, bad, good, HALF.repeat(3), out=volumes)
        object_mixup3d(volumes, good, bad, HALF.repeat(3), out=volumes)
    assert "volumes" in report.traffic
    assert report["volumes"].read == report["volumes"].written == 0


@kernel_only
@pytest.mark.parametrize(("programs", "shuffle"), [(3, 0), (2048, 1)])
def test_few_and_many_programs_share_the_boxes(path, programs, shuffle, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    generator = torch.Generator().manual_seed(shuffle)
    for shape, channels_last in (((2, 1, 10, 7, 12), False), ((1, 2, 3, 12, 13), True)):
        volumes = torch.randn(shape, generator=generator)
        if channels_last:
            volumes = volumes.to(memory_format=torch.channels_last_3d)
        donors = torch.randn((3, shape[1], 4, 5, 6), generator=generator)
        size = torch.tensor(shape[2:])
        start = torch.rand(2, 5, 3, generator=generator) * (size + 2) - 2
        end = start + torch.rand(2, 5, 3, generator=generator) * (size / 2 + 2)
        batch = torch.randint(shape[0], (2, 5, 1), generator=generator)
        mix = (*torch.cat([batch, start, end], -1), torch.rand(5, generator=generator))
        for options in (
            {"donors": donors_given, "window": window}
            for donors_given in (None, donors)
            for window in (None, (-1.0, 1.0))
        ):
            own = volumes.clone(memory_format=torch.preserve_format)
            with checked(shuffle=shuffle):
                out = object_mixup3d(volumes, *mix, **options)
                object_mixup3d(own, *mix, **options, out=own)
            assert_close(out, reference.object_mixup3d(volumes, *mix, **options))
            assert torch.equal(own, out)


@triton.jit
def _none_near(boxes, after, K, k, but, BOXES):
    return K if (after >= k) | (but == k) else k


@kernel_only
def test_a_planted_oversight_of_overlaps_is_a_race(path, monkeypatch):
    volumes = torch.arange(6 * 7 * 8.0).reshape(1, 1, 6, 7, 8)
    mix = boxes((0, 0, 0, 0, 4, 5, 6), (0, 2, 1, 1, 6, 7, 8))
    object_mixup3d(volumes, mix, mix.flip(0), HALF.repeat(2), out=volumes)
    monkeypatch.setattr(kernels, "_next_neighbor", _none_near)
    with pytest.raises(KernelFault, match="race"):
        object_mixup3d(volumes, mix, mix.flip(0), HALF.repeat(2), out=volumes)


@kernel_only
def test_donors_that_are_overwritten_while_they_are_read_are_a_race(path, monkeypatch):
    volumes = torch.arange(6 * 7 * 8.0).reshape(1, 1, 6, 7, 8)
    mix = boxes((0, 0, 0, 0, 4, 5, 6), (0, 2, 1, 1, 6, 7, 8))
    monkeypatch.setattr("fmkernels.ops.object_mixup3d.may_overlap", lambda a, b: False)
    with pytest.raises(KernelFault, match=r"race|without a barrier in between"):
        object_mixup3d(volumes, mix, mix.flip(0), HALF.repeat(2), out=volumes)


@kernel_only
def test_offsets_beyond_two_to_the_31(path):
    volumes = torch.empty((3, 1, 1100, 1000, 1000), dtype=torch.uint8)
    volumes[0, 0, 0, 0, :3] = torch.tensor([10, 20, 30], dtype=torch.uint8)
    volumes[2, 0, -1, -1, -3:] = torch.tensor([20, 40, 60], dtype=torch.uint8)
    last, first = boxes((2, 1099, 999, 997, 1100, 1000, 1000)), boxes((0, 0, 0, 0, 1, 1, 3))
    donors = torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(1, 1, 1, 1, 3)
    with checked(races=False, programs=[0]):
        object_mixup3d(volumes, last, first, HALF, donors=donors, out=volumes)
    assert volumes[2, 0, -1, -1, -3:].tolist() == [15, 30, 45]
    with checked(races=False, programs=[0]):
        object_mixup3d(volumes, first, last, HALF * 0, out=volumes)
    assert volumes[0, 0, 0, 0, :3].tolist() == [15, 30, 45]
    with checked(races=False, programs=[-1]):
        out = object_mixup3d(volumes, first, first, HALF, donors=donors)
    assert out[2, 0, -1, -1, -3:].tolist() == [15, 30, 45]
