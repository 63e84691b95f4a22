"""The tools on one small kernel, as the documentation shows them."""

import pytest
import torch
import triton

from .example import BLOCK, scale, scale_kernel
from .host_sync import HostSyncError, no_host_sync
from .interpreter import KernelFault, checked
from .plan import run_plan

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="conftest.py did not call enable_interpreter()"
)


def test_checked():
    x = torch.randn(1500)
    with checked(x=x, shuffle=0) as report:
        out = scale(x, 3.0)
    assert torch.equal(out, 3 * x)
    assert report["x"].read == report[out].written == x.nbytes  # every byte is moved once
    assert report.never_written(out) == 0 and len(report.launches) == 1


def test_checked_fails():
    x, out = torch.randn(1500), torch.empty(1400)
    with checked(x=x), pytest.raises(KernelFault, match=r"it writes 'out' at element \+1400"):
        scale_kernel[(2,)](x, out, 1500, 3.0, BLOCK)


def test_plan():
    report = run_plan(f"{__package__}.example")
    assert report.cases["4097 elements"].launches == (("scale_kernel", (5, 1, 1)),)
    aligned, unaligned = report.variants  # Triton specializes on sizes that 16 divides
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert aligned.on[target].spill_bytes == 0 and aligned.on[target].registers < 64
    assert aligned.on["sm_90"].main.loads == {128: 2}  # bits of a thread's access: number of them
    assert unaligned.on["sm_90"].main.loads == {32: 8}
    assert aligned.per_element("sm_90") < 8 < unaligned.per_element("sm_90")


def test_no_host_sync():
    x = torch.randn(4)
    with no_host_sync():
        x * x.sum()
    with no_host_sync(), pytest.raises(HostSyncError):
        x * x.sum().item()
