"""Costs of the kernel of object_mixup3d: bytes, races, launches, registers, instructions."""

import math

import pytest
import torch
import triton

from fmkernels import object_mixup3d
from fmkernels.kernels import object_mixup3d as kernels
from tests.support import on_gpu
from tests.support.driver import no_host_sync
from tests.support.interpreter import KernelFault, checked
from tests.support.launch import launch
from tests.support.plan import TARGETS, run_plan
from tests.test_object_mixup3d import assert_right, draw, make, rows

pytestmark = pytest.mark.skipif(
    on_gpu(), reason="without a GPU: the interpreter counts, the compiler reports"
)

WINDOW, UNIT = (-1200.0, 600.0), (-1.0, 1.0)
TARGET, SOURCE = (0, 1, 2, 3, 5, 6, 9), (1, 0, 1, 2, 4, 5, 8)  # 96 voxels each, not resampled
VOXELS_IN_BOX = 96
HALF = torch.full((1,), 0.5)


def mix_new(*arguments, dtype=torch.float32):
    return launch("object_mixup3d", *arguments, dtype=dtype)


def mix_in_place(volumes, donors, *arguments):
    kernels.object_mixup3d(volumes, donors, *arguments, volumes, True, donors is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.float64])
def test_in_place_only_the_voxels_in_boxes_are_read_and_written(dtype):
    volumes, donors = make((2, 1, 7, 8, 11), dtype), make((2, 1, 7, 8, 11), dtype, seed=1)
    with checked(volumes=volumes, donors=donors) as report:
        mix_in_place(volumes, donors, rows(TARGET), rows(SOURCE), HALF, None, None)
    once = VOXELS_IN_BOX * dtype.itemsize
    assert report["volumes"].read == report["volumes"].written == report["donors"].read_once == once
    assert len(report.launches) == 1
    ours = make((2, 1, 7, 8, 11), dtype)
    with checked(volumes=ours) as report:
        mix_in_place(ours, None, rows(TARGET), rows(SOURCE), HALF, None, None)
    assert report["volumes"].read_once == 2 * once and report["volumes"].written == once
    scratch = sum(
        (t.read + t.written for n, t in report.traffic.items() if n in ("out", "donors")), 0
    )
    assert scratch == 2 * once and len(report.launches) == 2


@pytest.mark.parametrize(
    ("dtype", "result", "window"),
    [
        (torch.float32, torch.float32, None),
        (torch.int16, torch.bfloat16, WINDOW),
        (torch.int16, torch.float32, WINDOW),
    ],
)
def test_out_of_place_every_voxel_is_read_and_written_once(dtype, result, window):
    volumes, donors = make((2, 1, 9, 21, 35), dtype), make((2, 1, 7, 8, 11), dtype)
    with checked(volumes=volumes) as report:
        pair = rows(TARGET), rows(SOURCE), HALF
        out = mix_new(volumes, donors, *pair, window, window, dtype=result)
    assert report["volumes"].read == report["volumes"].read_once == volumes.nbytes
    assert report["out"].written == report["out"].written_once == out.nbytes
    assert report["donors"].read_once == VOXELS_IN_BOX * dtype.itemsize
    assert report.never_written("out") == 0 and len(report.launches) == 1


def test_one_tensor_for_all_is_read_once_more_for_the_donors():
    volumes = make((2, 1, 7, 8, 11))
    with checked(volumes=volumes) as report:
        out = mix_new(volumes, None, rows(TARGET), rows(SOURCE), HALF, None, None)
    assert report["volumes"].read_once == volumes.nbytes and report.never_written("out") == 0
    assert report["out"].written == out.nbytes and len(report.launches) == 1
    with checked(volumes=volumes) as report:
        windows = (-1.0, 1.0), (-1.0, 1.0)
        mix_in_place(volumes, None, rows(TARGET), rows(SOURCE), HALF, *windows)
    assert report["volumes"].written == volumes.nbytes and len(report.launches) == 2


def test_unusable_pairs_read_and_write_no_voxel():
    volumes = make((2, 1, 7, 8, 11))
    bad = rows((2, *TARGET[1:]), (0, math.nan, *TARGET[2:]), (0, 3, 3, 3, 3, 6, 6))
    with checked(volumes=volumes) as report:
        good = rows(*[SOURCE] * 3)
        mix_in_place(volumes, None, bad, good, HALF.repeat(3), None, None)
        mix_in_place(volumes, None, good, bad, HALF.repeat(3), None, None)
    assert report["volumes"].read == report["volumes"].written == 0


@pytest.mark.parametrize(("programs", "shuffle"), [(3, 0), (2048, 1)])
def test_no_race_and_nothing_left_unwritten(programs, shuffle, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    for shape, inner in (((2, 1, 10, 7, 12), False), ((1, 2, 3, 12, 13), True)):
        volumes = make(shape)
        if inner:
            volumes = volumes.to(memory_format=torch.channels_last_3d)
        donors, boxes = make((3, shape[1], 4, 5, 6)), draw(5, shape, seed=shuffle)
        for given, window in ((None, None), (donors, None), (None, UNIT), (donors, UNIT)):
            arguments = given, *boxes, window, window
            with checked(shuffle=shuffle) as report:
                out = mix_new(volumes, *arguments)
            assert report.never_written("out") == 0 and len(report.launches) == 1
            ours = volumes.clone(memory_format=torch.preserve_format)
            with checked(shuffle=shuffle) as report:
                mix_in_place(ours, *arguments)
            assert len(report.launches) == (2 if given is None else 1)
            assert_right(out, volumes, *boxes, donors=given, window=window)
            assert torch.equal(ours, out)


@triton.jit
def _none_near(boxes, after, K, k, BOXES):
    return K if after >= k else k


def test_the_checker_sees_what_would_be_wrong(monkeypatch):
    """Overlaps overlooked, donors overwritten while they are read, a tile too few."""
    volumes = make((1, 1, 6, 7, 8))
    boxes = rows((0, 0, 0, 0, 4, 5, 6), (0, 2, 1, 1, 6, 7, 8))
    pairs = boxes, boxes.flip(0), HALF.repeat(2)

    def mix(overlap=True):
        ours = volumes.clone()
        with checked(volumes=ours):
            kernels.object_mixup3d(ours, None, *pairs, None, None, ours, True, overlap)
        assert_right(ours, volumes, *pairs)

    mix()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_next_neighbor", _none_near)
        with pytest.raises(KernelFault, match="race"):
            mix()
    with pytest.raises(KernelFault, match=r"race|no barrier in between"):
        mix(overlap=False)
    with monkeypatch.context() as patch:
        patch.setattr(triton.language, "cdiv", lambda a, b: a // b)
        with pytest.raises(AssertionError, match="not close"):
            mix()


def test_offsets_beyond_two_to_the_31():
    volumes = torch.empty((3, 1, 1100, 1000, 1000), dtype=torch.uint8)
    volumes[0, 0, 0, 0, :3] = torch.tensor([10, 20, 30], dtype=torch.uint8)
    volumes[2, 0, -1, -1, -3:] = torch.tensor([20, 40, 60], dtype=torch.uint8)
    last, first = rows((2, 1099, 999, 997, 1100, 1000, 1000)), rows((0, 0, 0, 0, 1, 1, 3))
    donors = torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(1, 1, 1, 1, 3)
    with checked(races=False, programs=[0]):
        mix_in_place(volumes, donors, last, first, HALF, None, None)
    assert volumes[2, 0, -1, -1, -3:].tolist() == [15, 30, 45]
    with checked(races=False, programs=[0]):
        mix_new(volumes, volumes, first, last, HALF, None, None, dtype=torch.uint8)
        mix_in_place(volumes, None, first, last, HALF * 0, None, None)
    assert volumes[0, 0, 0, 0, :3].tolist() == [15, 30, 45]
    with checked(races=False, programs=[-1]):
        out = mix_new(volumes, donors, first, first, HALF, None, None, dtype=torch.uint8)
    assert out[2, 0, -1, -1, -3:].tolist() == [15, 30, 45]


class Unlaunched:
    """A kernel that is never run."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_no_op_synchronizes_with_the_host(monkeypatch):
    """All host code, run as on a GPU, reads no value of a tensor."""
    from fmkernels.cpu import object_mixup3d as cpu

    monkeypatch.setattr(cpu, "object_mixup3d", kernels.object_mixup3d)
    monkeypatch.setattr(kernels, "object_mixup_kernel", Unlaunched())
    volumes, donors, boxes = make((2, 1, 4, 6, 7)), make((3, 1, 4, 4, 4)), draw(3, (2, 1, 4, 6, 7))
    with no_host_sync():
        for given in (None, donors, volumes[:1]):
            object_mixup3d(volumes, *boxes, donors=given, window=UNIT, dtype=torch.int16)
            object_mixup3d(volumes, *boxes, donors=given, out=volumes)
            object_mixup3d(volumes, *boxes, donors=given, window=UNIT, out=volumes)
        strided = volumes.transpose(2, 4)
        object_mixup3d(strided, *boxes, window=UNIT, out=strided)


# --- compiled code ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return run_plan("tests.plans.object_mixup3d")


def test_one_launch_or_two_however_many_boxes(plan):
    for name, case in plan.cases.items():
        donors_elsewhere = "donors" in name or "new" in name or "past" in name
        assert len(case.launches) == (1 if donors_elsewhere else 2), name
    (one, two) = plan.cases["3000 boxes float32"].launches
    assert one[1] == two[1] == (3000, 1, 1)


def test_a_sweep_of_sizes_compiles_few_variants():
    sweep = run_plan("tests.plans.object_mixup3d_sizes", targets=("sm_90",), compiled=False)
    assert len(sweep.cases) == 72
    assert len(sweep.variants) == 3  # into the scratch, from the scratch, out of place


def test_nothing_spills(plan):
    for variant in plan.variants:
        for target in TARGETS:
            code, name = variant.on[target], f"{variant.case} on {target}"
            assert code.spill_bytes == 0 and code.stack_bytes == 0, name
            assert code.registers <= 160, name
            if "in place" in variant.case and "window" not in variant.case:
                assert code.conversions == 0, name


def test_voxels_in_no_box_stream(plan):
    """128 bits a thread, loads and stores, even where the size is odd: tiles ignore rows."""
    for variant in plan.variants:
        if variant.case.startswith("new"):
            for target in ("sm_80", "sm_90", "sm_100"):
                main = variant.on[target].main
                assert main.loads[128] >= 4 and set(main.stores) == {128}, (
                    f"{variant.case} on {target}"
                )
    assert "new, odd size float32" not in {
        variant.case for variant in plan.variants
    }  # it runs the same variant


# instructions per voxel on sm_90, all that a program does included
INSTRUCTIONS = {
    "in place, donors float32": 213,
    "in place, donors bfloat16": 226,
    "in place, donors int16": 226,
    "in place, donors float64": 240,
    "in place float32": 121,  # the second launch: from the scratch into place
    "new, no box float32": 11,
    "new, no box, window int16 bfloat16": 15,
    "new, no box, window int16 float32": 15,
}


@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_instructions_per_voxel(plan, case):
    (variant,) = [v for v in plan.variants if v.case == case]
    assert variant.per_element("sm_90") <= INSTRUCTIONS[case]
