"""Draws of sample_mixup: distribution, permutation, generators, devices, defaults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from fmkernels import sample_mixup
from tests.support.cases import cases

CASE = st.fixed_dictionaries(
    {
        "batch_size": st.sampled_from([0, 1, 2, 3, 8, 1000, 5000]),
        "eta": st.sampled_from([1e-6, 0.05, 0.2, 1.0, 4.0, 1e6]) | st.floats(1e-6, 1e6),
        "seed": st.integers(0, 2**32),
    }
)
CHANCE = 1e-12
"""Probability that a case of right draws fails."""


def check_case(case, device="cpu"):
    """A permutation and weights in [0.5, 1], the same from the same state.

    The distribution of the weights is that of max(l, 1 - l) within the inequality of Dvoretzky,
    Kiefer, Wolfowitz and Massart.
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
    special = pytest.importorskip("scipy.special")
    for x in (0.5001, 0.501, 0.51, 0.55, 0.6, 0.75, 0.9, 0.99, 0.999) if size else ():
        below = 2 * special.betainc(eta, eta, x) - 1  # l is symmetric about 1/2
        assert abs((lam <= x).double().mean().item() - below) <= math.sqrt(
            math.log(2 / CHANCE) / 2 / size
        ), x


@cases(500)
@given(case=CASE)
def test_any_case(case):
    check_case(case)


@pytest.mark.parametrize("wrong", ["eta", "minimum", "index"])
def test_wrong_draws_are_noticed(monkeypatch, wrong):
    right = sample_mixup

    def draw(size, *, eta, generator):
        lam, index = right(size, eta=2 * eta if wrong == "eta" else eta, generator=generator)
        return (1 - lam if wrong == "minimum" else lam), (
            index.clamp(max=size - 2) if wrong == "index" else index
        )

    monkeypatch.setitem(globals(), "sample_mixup", draw)
    with pytest.raises(AssertionError):
        check_case({"batch_size": 5000, "eta": 0.2, "seed": 0})


@pytest.mark.parametrize("eta", [0.05, 0.2, 1.0, 4.0])
def test_lam_follows_its_distribution(eta):
    stats = pytest.importorskip("scipy.stats")
    lam, _ = sample_mixup(20_000, eta=eta, generator=torch.Generator().manual_seed(4))
    assert lam.dtype == torch.float32 and lam.shape == (20_000,)
    assert lam.min() >= 0.5 and lam.max() <= 1
    at = 1 - 1e-6  # many draws lie above, where float32 has few numbers
    below = lam.double().clamp(max=at)

    def cdf(x):  # of max(l, 1 - l): l is symmetric about 1/2
        return 2 * stats.beta.cdf(x, eta, eta) - 1

    assert stats.kstest(below[below < at], lambda x: cdf(x) / cdf(at)).pvalue > 0.05
    assert abs((below < at).double().mean() - cdf(at)) < 0.01
    expected, _ = reference.sample_mixup(
        20_000, eta=eta, generator=torch.Generator().manual_seed(5)
    )
    assert stats.ks_2samp(below, expected.clamp(max=at)).pvalue > 0.05


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 64])
def test_index_is_a_permutation(batch):
    lam, index = sample_mixup(batch, generator=torch.Generator().manual_seed(0))
    assert index.dtype == torch.int64 and sorted(index.tolist()) == list(range(batch))
    assert lam.shape == (batch,)


def test_every_permutation_comes_up():
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(sample_mixup(3, generator=generator)[1].tolist()) for _ in range(100)}
    assert len(seen) == 6


def test_same_generator_state_same_draw():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    first = sample_mixup(6, generator=generator)
    other = sample_mixup(6, generator=generator)
    generator.set_state(state)
    again = sample_mixup(6, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample_mixup(6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    first = sample_mixup(6)
    torch.manual_seed(5)
    assert torch.equal(sample_mixup(6)[0], first[0])


@pytest.mark.parametrize("eta", [1e-300, 1e-8, 1e-3, 1e6])
def test_extreme_eta_gives_numbers(eta):
    lam, _ = sample_mixup(1000, eta=eta, generator=torch.Generator().manual_seed(0))
    assert lam.isfinite().all() and lam.min() >= 0.5
    assert (lam == 1).float().mean() > 0.9 if eta < 0.1 else lam.max() < 0.51


def test_sample_mixup_on_a_device(path):
    lam, index = sample_mixup(4, device=path.device)
    assert lam.device.type == index.device.type == path.device.type
    generator = torch.Generator(path.device).manual_seed(0)
    assert sample_mixup(4, generator=generator)[0].device.type == path.device.type


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_process_wide_defaults_change_nothing(dtype, device):
    def draw():
        generator = torch.Generator("cpu").manual_seed(3)
        return sample_mixup(6, generator=generator, device=device)

    expected, before = draw(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        ours = draw()
        default = sample_mixup(6)
        global_generator = sample_mixup(6, device="cpu")
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(map(torch.equal, ours, expected))
    assert all(x.is_meta for x in default)
    for draws in (default, global_generator):
        assert (draws[0].dtype, draws[1].dtype) == (torch.float32, torch.int64)
    assert global_generator[0].device.type == "cpu"


@pytest.mark.parametrize("batch_size", [np.int64(3), np.uint8(3)])
def test_numpy_integers_are_sizes(batch_size):
    draws = [sample_mixup(n, generator=torch.Generator().manual_seed(0)) for n in (batch_size, 3)]
    assert all(map(torch.equal, *draws))


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "batch_size must be an int, got float", {"batch_size": 2.0}),
        (TypeError, "batch_size must be an int, got bool", {"batch_size": True}),
        (ValueError, "batch_size must be >= 0, got -1", {"batch_size": -1}),
        (TypeError, "eta must be a number, got str", {"eta": "1"}),
        (ValueError, "eta must be > 0, got 0", {"eta": 0}),
        (ValueError, "eta must be finite", {"eta": math.inf}),
        (TypeError, "generator must be a torch.Generator, got int", {"generator": 3}),
        (
            ValueError,
            "generator must be on meta, got cpu",
            {"generator": torch.Generator(), "device": "meta"},
        ),
    ],
)
def test_bad_arguments_of_sample_mixup(error, words, arguments):
    with pytest.raises(error, match=f"sample_mixup: {words}"):
        sample_mixup(**{"batch_size": 2, **arguments})
