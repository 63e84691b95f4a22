"""undo_symmetry is the exact inverse of apply_symmetry; test_apply_symmetry.py has its errors."""

import pytest
import torch
from hypothesis import given

import reference
from fmkernels import apply_symmetry, undo_symmetry
from tests.support.cases import cases
from tests.test_apply_symmetry import CASE, draw


@pytest.mark.parametrize("code", range(48))
def test_inverse_on_either_side(code):
    x = torch.rand(2, 1, 5, 5, 5)
    assert torch.equal(undo_symmetry(apply_symmetry(x, code), code), x)
    assert torch.equal(apply_symmetry(undo_symmetry(x, code), code), x)


@pytest.mark.parametrize("code", range(8))
def test_flips_undo_themselves_and_need_no_cube(code):
    x = torch.rand(2, 3, 4, 5)
    assert torch.equal(undo_symmetry(x, code), apply_symmetry(x, code))
    assert torch.equal(undo_symmetry(apply_symmetry(x, code), code), x)


@pytest.mark.parametrize("code", [0, 6, 29])
def test_gradients(code):
    x = torch.rand(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: undo_symmetry(x, code), x)


def test_compiles():
    step = torch.compile(undo_symmetry, fullgraph=True, backend="aot_eager")
    for size in (3, 4):
        x = torch.rand(2, size, size, size)
        assert torch.equal(step(x, 37), undo_symmetry(x, 37))


def check_case(case, device="cpu"):
    volumes = draw(case, device)
    result = undo_symmetry(volumes, case["code"])
    assert torch.equal(result.cpu(), reference.undo_symmetry(volumes.cpu(), case["code"]))


@cases(100)
@given(case=CASE)
def test_any_case(case):
    check_case(case)
