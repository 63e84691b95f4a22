"""Costs of the kernels of crop_and_resize3d: bytes, races, launches, registers, instructions."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fmkernels.kernels import crop_and_resize3d as kernels
from tests.support import on_gpu
from tests.support.interpreter import KernelFault, checked
from tests.plans.crop_and_resize3d import crop_backward
from tests.plans.crop_and_resize3d import launch_crop as crop
from tests.support.plan import TARGETS, run_plan
from tests.test_crop_and_resize3d import assert_right, boxes_of, make

pytestmark = pytest.mark.skipif(
    on_gpu(), reason="without a GPU: the interpreter counts, the compiler reports"
)

WINDOW = (-2.0, 3.0)
APART = [
    [0, 0, 1, 2, 3, 4, 6],
    [1, 2, 0, 0, 4, 3, 5],
    [0, 3, 0, 0, 4, 6, 2],
]  # no two in the same voxels


def voxels_of(boxes):
    return sum(
        math.prod(end - start for start, end in zip(box[1:4], box[4:], strict=True))
        for box in boxes
    )


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)]
)
def test_reads_the_voxels_of_the_boxes_and_writes_every_sample_once(dtype, result):
    volumes, size = make((2, 1, 4, 6, 7), dtype), (8, 8, 8)
    with checked() as report:
        out = crop(volumes, boxes_of(APART), size, True, None, result)
    assert report["volumes"].read_once == voxels_of(APART) * dtype.itemsize
    assert report["out"].written == report["out"].written_once == out.nbytes
    assert report.never_written("out") == 0 and len(report.launches) == 1
    with checked() as report:  # one sample between 8 voxels; one on a voxel
        rows = boxes_of([[0, 0, 0, 0, 4, 6, 4], [1, 1, 1, 1, 2, 2, 2]])
        crop(volumes, rows, (1, 1, 1), True, None, result)
    assert report["volumes"].read_once == (8 + 1) * dtype.itemsize


def test_unusable_boxes_read_nothing():
    volumes, rows = (
        make((2, 1, 4, 6, 7)),
        boxes_of([[2, 0, 0, 0, 1, 1, 1], [0, math.nan, 0, 0, 1, 1, 1]]),
    )
    with checked() as report:
        out = crop(volumes, rows, (2, 3, 4), True, None, torch.float32)
    assert report["volumes"].read == 0 and report.never_written("out") == 0 and (out == 0).all()


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_gradient_reads_every_sample_and_writes_every_voxel_once(window):
    volumes, grad_output = make((2, 1, 4, 6, 7)), torch.ones(3, 1, 5, 4, 6)
    with checked(windowed=volumes) as report:
        out = crop_backward(
            grad_output, boxes_of(APART), volumes if window else None,
            volumes.shape, True, window, torch.float32,
        )  # fmt: skip
    assert report["grad_output"].read_once == grad_output.nbytes
    assert report["out"].written == report["out"].written_once == out.nbytes
    assert report.never_written("out") == 0 and len(report.launches) == 1
    if window:
        assert report["windowed"].read == voxels_of(APART) * 4


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("clamp", ["box", "volume"])
def test_no_race_and_nothing_left_unwritten(clamp, shuffle):
    rows = boxes_of(
        [[0, -1.3, 0.2, 1.7, 5, 4.9, 9], [0, 0, 0, 0, 3, 4, 18], [1, 2.2, 3, 9.1, -1, 6.5, 4.2]]
    )
    for shape, size in (((2, 1, 5, 9, 18), (3, 2, 3)), ((2, 2, 3, 4, 5), (1, 12, 12))):
        volumes = make(shape)
        with checked(shuffle=shuffle) as report:
            out = crop(volumes, rows, size, clamp == "box", None, torch.float32)
        assert_right(out, volumes, rows, size, clamp=clamp)
        assert report.never_written("out") == 0
        with checked(shuffle=shuffle) as report:
            gradient = crop_backward(out, rows, None, shape, clamp == "box", None, torch.float32)
        assert report.never_written("out") == 0
        # the gradient is the transpose: <crop(x), crop(x)> = <x, gradient(crop(x))>
        inner = (out.double() ** 2).sum(), (gradient.double() * volumes.double()).sum()
        torch.testing.assert_close(*inner, rtol=1e-5, atol=1e-5)


@triton.jit
def _taps_beyond_the_last_voxel(position, stride, T: tl.constexpr):
    below = tl.floor(position)
    return below.to(tl.int64) * stride, stride.to(tl.int64), (position - below).to(T)


def test_the_checker_sees_what_would_be_wrong(monkeypatch):
    volumes, box = make((1, 1, 3, 4, 5)), boxes_of([[0, 0, 0, 0, 3, 4, 5]])

    def launch():
        with checked() as report:
            crop(volumes, box, (3, 4, 5), True, None, torch.float32)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "taps", _taps_beyond_the_last_voxel)
        with pytest.raises(KernelFault, match="volumes"):
            launch()
    with monkeypatch.context() as patch:
        patch.setattr(triton, "cdiv", lambda a, b: max(1, a // b))  # a program too few
        patch.setattr(kernels, "LANES", 32)
        with checked() as report:
            crop(volumes, box, (3, 5, 8), True, None, torch.float32)
        assert report.never_written("out") > 0
    assert launch().never_written("out") == 0


def test_offsets_beyond_two_to_the_31():
    """Volumes, crops, a plane of a crop, and both gradients."""
    volumes = torch.empty((3, 1, 300, 2000, 2000), dtype=torch.uint8)
    volumes[2, 0, -1, -1, -3:] = torch.tensor([10, 20, 30], dtype=torch.uint8)
    last = boxes_of([[2, 299, 1999, 1997, 300, 2000, 2000]])
    with checked(races=False):
        crops = crop(volumes, last, (1, 1, 3), True, None, torch.uint8)
    assert crops.flatten().tolist() == [10, 20, 30]

    wide = (1, 1, 1, 46_400, 46_400)
    volumes = torch.empty(wide, dtype=torch.uint8)
    volumes[0, 0, -1, -1, -3:] = torch.tensor([10, 20, 30], dtype=torch.uint8)
    whole = boxes_of([[0, 0, 0, 0, 1, 46_400, 46_400]])
    with checked(programs=[-1], races=False):
        crops = crop(volumes, whole, wide[2:], True, None, torch.uint8)
    assert crops[0, 0, 0, -1, -3:].tolist() == [10, 20, 30]

    grad_output = torch.empty(wide, dtype=torch.float16)
    grad_output[0, 0, 0, -9:, -17:] = 0
    grad_output[0, 0, 0, -1, -3:] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)
    with checked(programs=[-1], races=False):
        gradient = crop_backward(grad_output, whole, None, wide, True, None, torch.float16)
    assert gradient[0, 0, 0, -1, -3:].tolist() == [1, 2, 3]


# --- compiled code ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return run_plan("tests.plans.crop_and_resize3d")


def test_one_launch_for_all_boxes(plan):
    for name, case in plan.cases.items():
        assert len(case.launches) == 1, name


def test_a_sweep_of_sizes_compiles_few_variants():
    sweep = run_plan("tests.plans.crop_and_resize3d_sizes", compiled=False)
    crops = [v for v in sweep.variants if v.kernel == "crop_kernel"]
    assert len(crops) == 3  # of 32, 64 and 128 positions
    assert len(sweep.variants) - len(crops) == 1
    assert len(sweep.cases) == 90


def test_compiled_code(plan):
    for variant in plan.variants:
        for target in TARGETS:
            code, name = variant.on[target], f"{variant.case} on {target}"
            assert code.spill_bytes == 0 and code.stack_bytes == 0, name
            assert code.registers <= 128, name
            assert code.conversions == 0, name
            assert code.shared_bytes <= (0 if variant.kernel == "crop_kernel" else 64), name


def test_instructions_per_sample(plan):
    """All that a program does included, samples beyond the edge of a crop too."""
    for variant in plan.variants:
        if variant.kernel == "crop_kernel" and not variant.case.startswith("small"):
            for target in ("sm_80", "sm_90", "sm_100"):
                assert variant.per_element(target) <= 180, f"{variant.case} on {target}"
