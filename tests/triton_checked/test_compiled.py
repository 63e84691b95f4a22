"""The compile checker and the recording driver, on planted kernels with known figures."""

import contextlib
import textwrap

import pytest

from . import aot, driver
from .plan import TARGETS, run_plan

PLANTED = f"{__package__}.planted"


@pytest.fixture(scope="module")
def planted():
    return run_plan(PLANTED)


def compiled(plan, case, target):
    (variant,) = [v for v in plan.variants if v.case == case]
    return variant.on[target]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_instructions_of_the_main_path(planted, target):
    """16 more steps for each of 8 elements: 128 more instructions in the main path and the tail."""
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


def sass(text, without=()):
    lines = [line.strip() for line in textwrap.dedent(text).strip().splitlines()]
    code = [
        line
        if line.endswith(":") or line.startswith("//")
        else f"        /*{16 * n:04x}*/   {line} ;"
        for n, line in enumerate(lines)
    ]
    return aot.main_path(aot.parse("\n".join(code), aot._sass), tuple(without))


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
    for branch in (
        "@P0 BRA `(.L_x_0)",
        "BRA.U UP0, `(.L_x_0)",
        "BRA.U !UP0, `(.L_x_0)",
        "@!P6 CALL.REL.NOINC `(.L_x_0)",
    ):
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
    body = aot.MainPath(4, {8: 1, 64: 1}, {})
    assert sass(loop) == aot.MainPath(6, {8: 1, 64: 1}, {}, (body,))
    nested = """
        .L_x_0:
        MOV R1, R2
        .L_x_1:
        LDG.E R4, desc[UR4][R4.64]
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_0)
        .L_x_2:
        STG.E desc[UR4][R2.64], R4
        @P2 BRA `(.L_x_2)
        EXIT
    """
    left_at_its_head = """
        .L_x_0:
        @P0 BRA `(.L_x_1)
        LDG.E R4, desc[UR4][R4.64]
        BRA `(.L_x_0)
        .L_x_1:
        STG.E desc[UR4][R2.64], R4
        EXIT
    """
    body = aot.MainPath(3, {32: 1}, {})
    assert sass(left_at_its_head) == aot.MainPath(5, {32: 1}, {32: 1}, (body,))
    left_before_its_end = """
        .L_x_0:
        LDG.E R4, desc[UR4][R4.64]
        @!P6 CALL.REL.NOINC `(.L_x_1)
        BRA `(.L_x_0)
        .L_x_1:
        EXIT
    """
    body = aot.MainPath(2, {32: 1}, {})
    assert sass(left_before_its_end) == aot.MainPath(3, {32: 1}, {}, (body,))
    inner, last = aot.MainPath(2, {32: 1}, {}), aot.MainPath(2, {}, {32: 1})
    outer = aot.MainPath(4, {32: 1}, {}, (inner,))
    assert sass(nested) == aot.MainPath(7, {32: 1}, {32: 1}, (outer, last))
    assert sass(nested).loop == outer


def test_the_main_path_leaves_out_what_only_the_last_program_does():
    code = """
        LDG.E R4, desc[UR4][R4.64]
        {before}
        @P0 BRA `(.L_x_0)
        {counts} R5, desc[UR4][R6.64], R7
        .L_x_0:
        BAR.SYNC.DEFER_BLOCKING 0x0
        @P1 EXIT
        MOV R8, RZ
        .L_x_1:
        LDG.E.128 R8, desc[UR4][R8.64]
        @P2 BRA `(.L_x_1)
        STG.E desc[UR4][R2.64], R8
        {after}
        EXIT
    """
    counts = "@P3 ATOMG.E.ADD.STRONG.GPU PT,"
    short = aot.MainPath(6, {32: 1}, {})
    assert sass(code.format(before="MOV R1, R2", counts=counts, after="NOP")) == short
    # without a count, and with one in a loop, all is on the path
    body = aot.MainPath(2, {128: 1}, {})
    whole = aot.MainPath(11, {32: 1, 128: 1}, {32: 1}, (body,))
    assert sass(code.format(before="MOV R1, R2", counts="MOV", after="NOP")) == whole
    looped = sass(code.format(before=".L_x_2:", counts=counts, after="@P4 BRA `(.L_x_2)"))
    assert looped.loads == {32: 1, 128: 1} and len(looped.loops) == 1


def test_the_main_path_leaves_out_lines():
    code = """
        //## File "/a/kernel.py", line 7
        @P0 BRA `(.L_x_0)
        LDG.E R4, desc[UR4][R4.64]
        EXIT
        .L_x_0:
        //## File "/a/kernel.py", line 9
        MOV R1, R2
        LDG.E.128 R4, desc[UR4][R4.64]
        EXIT
    """
    narrow, wide = aot.MainPath(3, {32: 1}, {}), aot.MainPath(4, {128: 1}, {})
    assert sass(code, [("kernel.py", 9, 12)]) == sass(code, [("kernel.py", 8, 9)]) == narrow
    assert sass(code) == sass(code, [("kernel.py", 10, 12)]) == wide
    assert sass(code, [("other.py", 9, 12)]) == wide


def test_launches_and_grids(planted):
    case = planted.cases["masked torch.float32"]
    assert case.launches == (("masked", (98, 1, 1)),) and case.elements == 100_003
    assert case.min_bytes == 8 and case.microseconds is None
    (variant,) = [v for v in planted.variants if v.case == "8 steps"]
    assert (
        variant.signature["x"] == "*fp32"
        and variant.constants["BLOCK"] == 1024
        and variant.constants["STEPS"] == 8
    )


def test_number_of_variants_and_host_time():
    """The JIT specializes on 1, multiples of 16 and more than 2^31, unless it is told not to."""
    sweep = run_plan(f"{PLANTED}_sizes", targets=("sm_90",), compiled=False, host_time=True)
    count = {
        kernel: sum(v.kernel == kernel for v in sweep.variants) for kernel in ("masked", "streamed")
    }
    assert count == {"masked": 4, "streamed": 2}
    assert all(not v.on for v in sweep.variants)
    assert all(0 < case.microseconds < 10_000 for case in sweep.cases.values())


def test_a_plan_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"No module named '.*\.missing'"):
        run_plan(f"{__package__}.missing")


def test_recordings_enter_the_registered_contexts(monkeypatch):
    entered = []
    context = contextlib.nullcontext()
    monkeypatch.setattr(
        driver, "DURING_RECORDING", [lambda target: entered.append(target) or context]
    )
    with driver.recording("sm_80"):
        pass
    assert entered == ["sm_80"]
