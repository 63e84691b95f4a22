"""The 48 symmetries of a cube, against the reference, which moves one voxel at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmkernels
import reference
from fmkernels import apply_symmetry
from tests.opinfo import VOXELS, make
from tests.support.cases import cases


def test_the_permutations_are_those_of_the_contract():
    x = torch.rand(2, 3, 4, 4, 4)
    orders = ["DHW", "DWH", "HDW", "HWD", "WDH", "WHD"]
    for number, order in enumerate(orders):
        axes = ["DHW".index(axis) + 2 for axis in order]
        assert torch.equal(apply_symmetry(x, 8 * number), x.permute(0, 1, *axes))
        assert torch.equal(apply_symmetry(x, 8 * number + 5), x.permute(0, 1, *axes).flip([2, 4]))


def test_the_symmetries_are_a_group():
    """All differ; one after the other is again one of them; half are rotations."""
    x = torch.arange(27).reshape(3, 3, 3)
    images = {tuple(apply_symmetry(x, code).flatten().tolist()): code for code in range(48)}
    assert len(images) == 48
    for first in range(48):
        once = apply_symmetry(x, first)
        assert {tuple(apply_symmetry(once, code).flatten().tolist()) for code in range(48)} == {
            *images
        }
    axes = torch.eye(3).flip(0)
    handed = 0
    for code in range(48):
        corner = torch.zeros(3, 3, 3, 3)
        corner[range(3), *(axes + 1).long().T] = 1  # a voxel of each axis from the middle
        moved = apply_symmetry(corner, code).nonzero()[:, 1:].float() - 1
        handed += torch.det(moved) == torch.det(axes)
    assert handed == 24


@pytest.mark.parametrize("dtype", [*VOXELS, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 1, 4, 4, 4)])
def test_any_dtype(dtype, shape):
    x = make(shape).to(dtype)
    for code in (0, 5, 13, 30, 47):
        result = apply_symmetry(x, code)
        assert result.dtype == dtype and result.shape == x.shape
        assert torch.equal(result, reference.apply_symmetry(x, code))


def test_sizes_may_differ_for_flips_alone():
    x = make((2, 3, 4, 5))
    for code in range(8):
        assert torch.equal(apply_symmetry(x, code), reference.apply_symmetry(x, code))


@pytest.mark.parametrize("code", [0, 6, 21])
def test_the_result_is_new_memory(code):
    x = torch.ones(1, 4, 4, 4)
    apply_symmetry(x, code).zero_()
    assert (x == 1).all()


@pytest.mark.parametrize("code", [0, 6, 29])
def test_gradients(code):
    x = torch.rand(2, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_symmetry(x, code), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_symmetry(x, code) ** 2, x)


def test_compiles():
    step = torch.compile(apply_symmetry, fullgraph=True, backend="aot_eager")
    for size in (3, 4):
        x = torch.rand(2, size, size, size)
        assert torch.equal(step(x, 37), apply_symmetry(x, 37))


CUBE, BOX = torch.zeros(2, 2, 2), torch.zeros(2, 2, 3)


@pytest.mark.parametrize(
    ("kind", "words", "volumes", "code"),
    [
        (TypeError, "volumes must be a tensor, got a list of 1", [1.0], 0),
        (TypeError, "code must be an int, got float", CUBE, 1.0),
        (TypeError, "code must be an int, got a tensor", CUBE, torch.tensor(1)),
        (TypeError, "code must be an int, got bool", CUBE, True),
        (ValueError, r"volumes must be \[..., D, H, W\], got shape \(2, 2\)", CUBE[0], 0),
        (ValueError, r"code must be in \[0, 48\), got 48", CUBE, 48),
        (ValueError, r"code must be in \[0, 48\), got -1", CUBE, -1),
        (ValueError, r"volumes must have three equal sizes for code 8, got .* 3\)", BOX, 8),
    ],
)
@pytest.mark.parametrize("name", ["apply_symmetry", "undo_symmetry"])
def test_errors(name, kind, words, volumes, code):
    with pytest.raises(kind, match=f"^{name}: {words}"):
        getattr(fmkernels, name)(volumes, code)


CASE = st.fixed_dictionaries(
    {
        "outer": st.lists(st.integers(0, 3), max_size=2),
        "size": st.integers(0, 4),
        "code": st.integers(0, 47),
        "order": st.permutations(range(3)),
        "seed": st.integers(0, 2**16),
    }
)


def draw(case, device):
    """Volumes in any order of memory."""
    volumes = make([*case["outer"], *[case["size"]] * 3], seed=case["seed"])
    first = len(case["outer"])
    return volumes.permute(*range(first), *(first + axis for axis in case["order"])).to(device)


def check_case(case, device="cpu"):
    volumes = draw(case, device)
    result = apply_symmetry(volumes, case["code"])
    assert torch.equal(result.cpu(), reference.apply_symmetry(volumes.cpu(), case["code"]))


@cases(100)
@given(case=CASE)
def test_any_case(case):
    check_case(case)
