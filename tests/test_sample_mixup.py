"""Draws of sample_mixup for any size, eta and generator state; test_mixup3d.py has the rest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmkernels import sample_mixup
from tests.support.cases import cases

special = pytest.importorskip("scipy.special")

CASE = st.fixed_dictionaries(
    {
        "batch_size": st.sampled_from([0, 1, 2, 3, 8, 1000, 5000]),
        "eta": st.sampled_from([1e-6, 0.05, 0.2, 1.0, 4.0, 1e6]) | st.floats(1e-6, 1e6),
        "seed": st.integers(0, 2**32),
    }
)
CHANCE = 1e-12
"""Probability that a correct draw fails."""


def check_case(case, device="cpu"):
    """A permutation; lam in [0.5, 1], nearly distributed as max(l, 1 - l); repeatable.

    The bound is the inequality of Dvoretzky, Kiefer, Wolfowitz and Massart.
    """
    size, eta = case["batch_size"], case["eta"]
    generator = torch.Generator(device).manual_seed(case["seed"])
    state = generator.get_state()
    lam, index = sample_mixup(size, eta=eta, generator=generator)
    assert lam.dtype == torch.float32 and lam.shape == (size,)
    assert torch.equal(index.sort().values, torch.arange(size, device=device))
    assert ((lam >= 0.5) & (lam <= 1)).all()
    generator.set_state(state)
    again = sample_mixup(size, eta=eta, generator=generator)
    assert torch.equal(lam, again[0]) and torch.equal(index, again[1])
    for x in (0.5001, 0.501, 0.51, 0.55, 0.6, 0.75, 0.9, 0.99, 0.999) if size else ():
        below = 2 * special.betainc(eta, eta, x) - 1  # l is symmetric about 1/2
        assert abs((lam <= x).double().mean().item() - below) <= math.sqrt(
            math.log(2 / CHANCE) / 2 / size
        ), x


@cases(2000)
@given(case=CASE)
def test_any_case(case):
    check_case(case)


@pytest.mark.parametrize("wrong", ["eta", "minimum", "index"])
def test_wrong_draws_are_told(monkeypatch, wrong):
    right = sample_mixup

    def draw(size, *, eta, generator):
        lam, index = right(size, eta=2 * eta if wrong == "eta" else eta, generator=generator)
        return (1 - lam if wrong == "minimum" else lam), (
            index.clamp(max=size - 2) if wrong == "index" else index
        )

    monkeypatch.setitem(globals(), "sample_mixup", draw)
    with pytest.raises(AssertionError):
        check_case({"batch_size": 5000, "eta": 0.2, "seed": 0})
