"""Costs of the mixup3d kernels, checked without a GPU: bytes, races, registers, instructions."""

import pytest
import torch
import triton.language as tl

import reference
from fmkernels.kernels import mixup3d as kernels
from tests.support import on_gpu
from tests.support.interpreter import KernelFault, checked
from tests.support.launch import launch
from tests.support.plan import TARGETS, run_plan

pytestmark = pytest.mark.skipif(
    on_gpu(), reason="without a GPU: the interpreter counts, the compiler reports"
)

AXES = (0, 1, 2, 4)
WINDOW = (-1200.0, 600.0)
F32, U8 = torch.float32, torch.uint8
LAM, CYCLE = torch.tensor([0.9, 0.6, 0.75]), torch.tensor([1, 2, 0])
FLIPS = torch.tensor([5, 0, 6], dtype=torch.uint8)


def make(dtype, shape=(3, 1, 6, 5, 48)):
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bytes_per_voxel(report, voxels):
    """Distinct cells read and written; and all that was moved, second reads included."""
    large = [
        t
        for name, t in report.traffic.items()
        if name in ("volumes", "donors", "out", "grad_output", "grad_input")
    ]
    return (
        sum(t.read_once + t.written_once for t in large) / voxels,
        sum(t.read + t.written for t in large) / voxels,
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.float64]
)
def test_in_place_reads_and_writes_each_voxel_once(dtype):
    volumes = make(dtype)
    with checked() as report:
        kernels.mixup3d(volumes, None, LAM, CYCLE, None, None, AXES, None, volumes, True)
    once, all_reads = bytes_per_voxel(report, volumes.numel())
    assert once == 2 * dtype.itemsize
    assert all_reads == 3 * dtype.itemsize  # the partner's second read, which a cache serves


@pytest.mark.parametrize("flips", [None, FLIPS])
@pytest.mark.parametrize(
    ("dtype", "result", "floor"),
    [
        (torch.int16, torch.bfloat16, 4),
        (torch.int16, torch.float32, 6),
        (torch.float32, torch.float32, 8),
    ],
)
def test_out_of_place_reads_and_writes_each_voxel_once(dtype, result, floor, flips):
    volumes = make(dtype)
    with checked() as report:
        launch("mixup3d", volumes, None, LAM, CYCLE, flips, None, AXES, WINDOW, dtype=result)
    once, all_reads = bytes_per_voxel(report, volumes.numel())
    assert once == floor and all_reads == floor + dtype.itemsize


def test_donors_and_gradients_are_read_once():
    volumes, donors = make(torch.float32), make(torch.float32)
    for flips, out in ((None, volumes), (FLIPS, torch.empty_like(volumes))):
        with checked() as report:
            kernels.mixup3d(volumes, donors, LAM, CYCLE, flips, flips, AXES, None, out)
        assert bytes_per_voxel(report, volumes.numel()) == (12, 12)
    for as_volumes, as_donors, all_reads in ((True, False, 8), (False, True, 8), (True, True, 12)):
        with checked() as report:
            arguments = volumes, None, LAM, CYCLE, FLIPS, AXES, None, as_volumes, as_donors
            launch("mixup3d_backward", *arguments, rows=3, dtype=torch.float32)
        assert bytes_per_voxel(report, volumes.numel()) == (8, all_reads)


def test_voxels_of_weight_0_are_not_read():
    volumes, donors = make(torch.float32), make(torch.float32)
    for weight, name in ((0.0, "volumes"), (1.0, "donors")):
        lam = torch.full((3,), weight)
        with checked() as report:
            launch("mixup3d", volumes, donors, lam, CYCLE, *[None] * 2, AXES, None, dtype=F32)
        assert report.traffic[name].read == 0
        with checked() as report:
            arguments = volumes, None, lam, CYCLE, None, AXES, None, weight == 0, weight == 1
            launch("mixup3d_backward", *arguments, rows=3, dtype=F32)
        assert report.traffic["grad_output"].read == 0


INDEX = {
    "cycle": CYCLE,
    "identity": torch.arange(3),
    "one for all": torch.ones(3, dtype=torch.int64),
}


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("index", INDEX)
def test_no_race_and_nothing_left_unwritten(index, shuffle):
    for shape in ((3, 2, 5, 3, 32), (3, 1, 3, 2, 7), (3, 1, 14, 10, 4)):
        for given, target, flips in (
            (False, "volumes", None),
            (True, "volumes", None),
            (True, "donors", None),
            (False, "new", None),
            (False, "new", FLIPS),
            (True, "new", FLIPS),
        ):
            volumes, other = make(torch.float32, shape), make(torch.float32, shape)
            before, donors = (volumes.clone(), other.clone()), other if given else None
            out = {"volumes": volumes, "donors": other, "new": torch.empty_like(volumes)}[target]
            in_place = target == ("donors" if given else "volumes")
            masks = flips, flips if given else None
            with checked(out=out, shuffle=shuffle) as report:
                arguments = volumes, donors, LAM, INDEX[index], *masks, AXES, None, out
                kernels.mixup3d(*arguments, in_place)
            assert report.never_written("out") == 0 and len(report.launches) == 1
            options = {"flips": masks, "donors": before[1]} if given else {"flips": flips}
            exact = reference.mixup3d(before[0], LAM, INDEX[index], **options)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_one_volume_in_place():
    volumes, lam, index = make(torch.float32, (1, 1, 6, 5, 48)), LAM[:1], CYCLE[2:]
    before = volumes.clone()
    with checked():
        kernels.mixup3d(volumes, None, lam, index, None, None, AXES, None, volumes, True)
    torch.testing.assert_close(volumes, before)


def test_the_checker_finds_races(monkeypatch):
    """In place without the barrier, or with one sample per program."""
    volumes = make(torch.float32)

    def run(in_place):
        with checked():
            kernels.mixup3d(volumes, None, LAM, CYCLE, None, None, AXES, None, volumes, in_place)

    with monkeypatch.context() as patch:
        patch.setattr(tl, "debug_barrier", lambda **_: None)
        with pytest.raises(KernelFault, match="no barrier in between"):
            run(True)
    with pytest.raises(KernelFault, match=r"race|no barrier in between"):
        run(False)
    run(True)


def last_program(volumes, lam, index, flips):
    with checked(programs=[-1]):
        return launch("mixup3d", volumes, None, lam, index, flips, None, AXES, None, dtype=U8)


@pytest.mark.parametrize(
    "row", [2**31 + 16, 2**30 + 7]
)  # int32 counts vectors of 16; int64 counts single voxels
def test_offsets_beyond_two_to_the_31(row):
    lam, index = torch.tensor([1.0, 0.5]), torch.tensor([0, 0])
    volumes = torch.empty((2, 1, 1, 1, row), dtype=torch.uint8)
    volumes[:, ..., -3:] = torch.tensor([[10, 20, 30], [20, 40, 60]], dtype=torch.uint8).view(
        2, 1, 1, 1, 3
    )
    volumes[0, ..., :3] = torch.tensor([50, 60, 70], dtype=torch.uint8)
    assert last_program(volumes, lam, index, None)[1, ..., -3:].flatten().tolist() == [15, 30, 45]
    flips = torch.tensor([4, 0], dtype=torch.uint8)
    assert last_program(volumes, lam, index, flips)[1, ..., -3:].flatten().tolist() == [45, 50, 55]
    with checked(programs=[-1]):
        kernels.mixup3d(volumes, None, lam, index, None, None, AXES, None, volumes, True)
    assert volumes[1, ..., -3:].flatten().tolist() == [15, 30, 45]
    grad_output = torch.empty((2, 1, 1, 1, row // 4 + 2), dtype=torch.float16)
    grad_output[1, ..., -3:] = torch.tensor([2.0, 4, 6], dtype=torch.float16)
    with checked(programs=[-1]):
        arguments = grad_output, None, lam, index, None, AXES, None, True, False
        gradient = launch("mixup3d_backward", *arguments, rows=2, dtype=torch.float16)
    assert gradient[1, ..., -3:].flatten().tolist() == [1, 2, 3]


# --- compiled code -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return run_plan("tests.plans.mixup3d")


def test_one_launch_each(plan):
    for name, case in plan.cases.items():
        expected = "mixup3d_backward_kernel" if name.startswith("backward") else "mixup3d_kernel"
        assert [kernel for kernel, _ in case.launches] == [expected], name


def test_sizes_share_their_variants(plan):
    assert plan.cases["in place float32"].launches, "the sweep below would be empty"
    sweep = run_plan("tests.plans.mixup3d_sizes", targets=("sm_90",), compiled=False)
    counts = [
        len([v for v in sweep.variants if f"{kind} " in v.case])
        for kind in ("place, even", "flips, even")
    ]
    assert counts == [1, 1]
    assert len(sweep.variants) <= 6  # rows that are no multiple of 4 voxels read 2 or 1 at a time


def test_compiled_code(plan):
    for variant in plan.variants:
        for target in TARGETS:
            code, name = variant.on[target], f"{variant.case} on {target}"
            assert code.spill_bytes == 0 and code.stack_bytes == 0, name
            assert code.registers <= 96, name
            if "odd" not in variant.case and not variant.case.endswith("4096"):
                assert code.conversions == 0 and code.shared_bytes == 0, name


def test_main_paths_are_vectorised(plan):
    """Every voxel is stored and loaded 128 bits a thread; what is narrower are lam, index and flips."""
    for variant in plan.variants:
        if "odd" in variant.case:  # rows of 31 or 35 voxels cannot be
            continue
        for target in ("sm_80", "sm_90", "sm_100"):
            main, name = variant.on[target].main, f"{variant.case} on {target}"
            assert set(main.stores) == {128}, name
            loads = (
                main.loads[64] if "int16 float32" in variant.case else main.loads[128]
            )  # half as wide as stores
            per_store = (
                1
                if "backward to" in variant.case
                else 3
                if "backward, window" in variant.case
                else 2
            )
            assert loads // per_store == main.stores[128], name


# instructions per voxel on sm_90, all that a program does included
INSTRUCTIONS = {
    "in place float32": 13,
    "in place bfloat16": 11,
    "in place int16": 15,
    "in place, batch of 4096": 14,
    "out of place float32": 13,
    "out of place, flips float32": 29,
    "window, flips int16 bfloat16": 25,
    "window int16 bfloat16": 15,
    "window, flips int16 float32": 37,
    "backward float32": 15,
    "backward to donors float32": 13,
    "backward, window, flips bfloat16": 30,
}


@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_instructions_per_voxel(plan, case):
    (variant,) = [v for v in plan.variants if v.case == case]
    assert variant.per_element("sm_90") <= INSTRUCTIONS[case]
