"""The compiler reports and the recording driver, on planted kernels whose figures are known."""

import textwrap

import pytest
import torch

from tests.support import aot, driver, on_gpu
from tests.support.driver import HostSyncError, no_host_sync
from tests.support.plan import TARGETS, run_plan

pytestmark = pytest.mark.skipif(
    on_gpu(), reason="compiles for other machines, in a process of its own"
)


@pytest.fixture(scope="module")
def planted():
    return run_plan("tests.support.planted")


def compiled(plan, case, target):
    (variant,) = [v for v in plan.variants if v.case == case]
    return variant.on[target]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_instructions_of_the_main_path(planted, target):
    """16 more multiply-adds for each of a thread's 8 elements are 128 more instructions, in path and tail."""
    few, many = (compiled(planted, f"{steps} steps", target) for steps in (8, 24))
    assert many.main.instructions - few.main.instructions == 16 * 8
    assert many.instructions - few.instructions == 2 * 16 * 8
    per_element = [v.per_element(target) for v in planted.variants if v.kernel == "streamed"]
    assert per_element[1] - per_element[0] == 16


@pytest.mark.parametrize("target", TARGETS)
def test_width_of_accesses(planted, target):
    threads = 256 if target == "gfx942" else 128
    vectors, scalars = 1024 // threads // 4, 1024 // threads
    streamed = compiled(planted, "8 steps", target)
    assert streamed.threads == threads
    assert streamed.loads == streamed.stores == {32: scalars, 128: vectors}
    masked = compiled(planted, "masked torch.float32", target)
    assert masked.loads == masked.stores == {32: scalars} and masked.narrow() == 2 * scalars
    assert compiled(planted, "masked torch.bfloat16", target).loads == {16: scalars}
    assert compiled(planted, "aligned", target).narrow() == 0
    assert compiled(planted, "unaligned pointer", target).loads == {32: scalars}
    if target != "gfx942":
        assert (
            streamed.main.loads == streamed.main.stores == {128: vectors} and streamed.narrow() == 0
        )
        assert streamed.narrow(256) == 2 * vectors


def test_spills(planted):
    for target in ("sm_80", "sm_90", "sm_100"):
        assert compiled(planted, "crowded", target).spill_bytes > 1000
        assert compiled(planted, "crowded", target).stack_bytes > 500
        for case in ("roomy", "8 steps", "masked torch.bfloat16"):
            assert (
                compiled(planted, case, target).spill_bytes
                == compiled(planted, case, target).stack_bytes
                == 0
            )
        assert (
            compiled(planted, "roomy", target).registers >= 32
        )  # 4 vectors of 8 are alive at once


def test_spills_on_amd():
    kernel = type("Kernel", (), {})()
    kernel.metadata = type(
        "Metadata", (), {"shared": 0, "num_warps": 4, "target": driver.TARGETS["gfx942"]}
    )
    text = [
        "\tscratch_store_dword off, v0, s32",
        "\tglobal_load_dwordx4 v[0:3], v[4:5], off",
        ".Lfunc_end0:",
    ]
    counts = {"vgpr_count": 256, "sgpr_count": 30, "vgpr_spill_count": 3, "sgpr_spill_count": 2}
    text += [f"    .{key}:     {n}" for key, n in counts.items()] + [
        "    .private_segment_fixed_size: 24"
    ]
    kernel.asm = {"amdgcn": "\n".join(text), "ttgir": ""}
    code = aot._amd(kernel)
    assert (code.registers, code.scalar_registers, code.spill_bytes, code.stack_bytes) == (
        256,
        30,
        20,
        24,
    )
    assert (code.instructions, code.loads, code.main) == (2, {128: 1}, None)


def test_layout_conversions(planted):
    for target in TARGETS:
        turned = compiled(planted, "turned", target)
        assert turned.conversions == 1 and turned.shared_bytes == 64 * 64 * 4
        assert (
            compiled(planted, "8 steps", target).conversions
            == compiled(planted, "8 steps", target).shared_bytes
            == 0
        )


def sass(text):
    lines = [line.strip() for line in textwrap.dedent(text).strip().splitlines()]
    code = [
        line if line.endswith(":") else f"        /*{16 * n:04x}*/   {line} ;"
        for n, line in enumerate(lines)
    ]
    return aot.main_path(aot.parse("\n".join(code), aot._sass))


def test_main_path_of_machine_code():
    diamond = """
        ISETP.GE.AND P0, PT, R0, R1, PT
        {branch}
        LDG.E.128 R4, desc[UR4][R4.64]
        STG.E.128 desc[UR4][R2.64], R4
        {end}
        .L_x_0:
        @!P1 LDG.E R4, desc[UR4][R4.64]
        @!P2 LDG.E R5, desc[UR4][R4.64+0x4]
        IADD3 R4, R4, 0x1, RZ
        IADD3 R5, R5, 0x1, RZ
        @!P1 STG.E desc[UR4][R2.64], R4
        .L_x_1:
        @P0 EXIT
        EXIT
        .L_x_2:
        BRA `(.L_x_2)
    """
    for branch in ("@P0 BRA `(.L_x_0)", "BRA.U UP0, `(.L_x_0)", "BRA.U !UP0, `(.L_x_0)"):
        assert sass(diamond.format(branch=branch, end="EXIT")) == aot.MainPath(
            5, {128: 1}, {128: 1}
        )
        assert sass(diamond.format(branch=branch, end="BRA `(.L_x_1)")) == aot.MainPath(
            7, {128: 1}, {128: 1}
        )
    loop = """
        MOV R1, R2
        .L_x_0:
        @P1 LDG.E.64.CONSTANT R4, desc[UR4][R4.64]
        LDG.E.U8 R4, desc[UR4][R4.64]
        CALL.REL.NOINC `($k$__internal_0)
        @P0 BRA `(.L_x_0)
        EXIT
    """
    assert sass(loop) == aot.MainPath(6, {8: 1, 64: 1}, {}, aot.MainPath(4, {8: 1, 64: 1}, {}))


def test_launches_grids_and_host_time(planted):
    case = planted.cases["masked torch.float32"]
    assert case.launches == (("masked", (98, 1, 1)),) and case.elements == 100_003
    assert 0 < case.microseconds < 10_000
    (variant,) = [v for v in planted.variants if v.case == "8 steps"]
    assert (
        variant.signature["x"] == "*fp32"
        and variant.constants["BLOCK"] == 1024
        and variant.constants["STEPS"] == 8
    )


def test_number_of_variants():
    """A size is specialised on being 1, a multiple of 16 or above 2^31, unless the kernel asks not to."""
    sweep = run_plan("tests.support.planted_sizes", targets=("sm_90",), compiled=False)
    count = {
        kernel: sum(v.kernel == kernel for v in sweep.variants) for kernel in ("masked", "streamed")
    }
    assert count == {"masked": 4, "streamed": 2}
    assert all(not v.on for v in sweep.variants)


def test_a_plan_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"No module named 'tests\.support\.missing'"):
        run_plan("tests.support.missing")


library = torch.library.Library("fmkernels_guard", "FRAGMENT")
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
    "operator": lambda: torch.ops.fmkernels_guard.peek(X),
    "item in an operator": lambda: torch.ops.fmkernels_guard.read(X),
    "backward": lambda: Peeks.apply(X.clone().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", WAITING)
def test_host_synchronisation_is_refused(name):
    with no_host_sync(), pytest.raises(HostSyncError, match="waits for the device"):
        WAITING[name]()
    if name != "synchronize" or torch.cuda.is_available():
        WAITING[name]()  # and only in the block


def test_work_on_the_device_is_allowed():
    with no_host_sync():
        x = torch.zeros(4, requires_grad=True)
        y = (
            torch.ops.fmkernels_guard.double(x.detach())
            + torch.where(x > 1, x, 0.0)[torch.arange(4)]
        )
        y.masked_fill(y > 1, 0.0).sum().backward()
        torch.full((), 2.0).repeat_interleave(3, output_size=3)
    assert x.grad is not None
