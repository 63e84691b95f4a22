"""What holds for every op alike: autocast, forward-mode derivatives, traced and fake tensors, errors."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fmkernels import (
    crop_and_resize3d,
    mixup3d,
    object_mixup3d,
    predict_targets,
    sample_mixup,
    soft_target_focal_loss,
)

VOLUMES = torch.randn(2, 1, 20, 20, 20, generator=torch.Generator().manual_seed(0)) * 1000
BOXES = torch.tensor([[0, 0.5, 1.5, 2.5, 18.5, 17.5, 19.5], [1, 3, 4, 5, 12, 14, 16]])
LAM, INDEX = torch.tensor([0.7, 0.6]), torch.tensor([1, 0])
FLIPS = torch.tensor([0, 5], dtype=torch.uint8)
CALLS = {
    "soft_target_focal_loss": lambda x: soft_target_focal_loss(x, torch.full_like(x, 0.3)),
    "predict_targets": lambda x: predict_targets(x[:, None] / 1000, FLIPS),
    "mixup3d": lambda x: mixup3d(x, LAM, INDEX),
    "crop_and_resize3d": lambda x: crop_and_resize3d(x, BOXES, (32, 32, 32)),
    "object_mixup3d": lambda x: object_mixup3d(x, BOXES, BOXES.flip(0), LAM),
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name):
    expected = CALLS[name](VOLUMES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CALLS[name](VOLUMES), expected)


@pytest.mark.parametrize("name", ["soft_target_focal_loss", "mixup3d", "crop_and_resize3d"])
def test_autocast_changes_no_gradient(name):
    def gradient():
        x = VOLUMES.clone().requires_grad_()
        CALLS[name](x).float().square().sum().backward()
        return x.grad

    expected = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_forward_mode_derivative_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: no forward-mode derivative by .* is offered"):
        torch.func.jvp(CALLS[name], (VOLUMES,), (torch.ones_like(VOLUMES),))
    assert (
        torch.func.jvp(lambda x: x * CALLS[name](VOLUMES).sum(), (LAM,), (LAM,))[1].isfinite().all()
    )


def test_a_tangent_of_the_shares_is_refused():
    with pytest.raises(ValueError, match="no forward-mode derivative by lam"):
        torch.func.jvp(lambda lam: mixup3d(VOLUMES, lam, INDEX), (LAM,), (LAM,))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_channels_last_volumes_of_changing_size(name):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="eager")
    for size in (12, 14, 18):
        x = VOLUMES[..., :size].repeat(1, 2, 1, 1, 1).to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(compiled(x), CALLS[name](x))


def test_sample_mixup_compiles_for_changing_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sample_mixup(x.shape[0]), fullgraph=True, backend="eager")
    for size in (5, 6, 9):
        lam, index = compiled(torch.empty(size))
        assert lam.shape == (size,) and sorted(index.tolist()) == list(range(size))


def test_levels_of_any_tuple_give_a_tuple():
    Levels = namedtuple("Levels", "fine coarse")
    views = Levels(torch.zeros(2, 1, 1, 4, 4, 4), torch.zeros(2, 1, 1, 2, 2, 2))
    assert [y.shape[-1] for y in predict_targets(views, FLIPS)] == [4, 2]
    losses = soft_target_focal_loss(views, Levels(*map(torch.zeros_like, views)), reduction="none")
    assert [type(x) for x in (losses, predict_targets(views, FLIPS))] == [tuple, tuple]


def test_fake_and_meta_tensors_have_no_addresses_to_overlap():
    with FakeTensorMode():
        x, donors, lam, index = (
            torch.empty(2, 1, 4, 4, 4),
            torch.empty(3, 1, 4, 4, 4),
            torch.empty(2),
            torch.empty(2, dtype=torch.int64),
        )
        assert mixup3d(x, lam, index, donors=donors, out=torch.empty_like(x)).shape == x.shape
    x, donors, lam, index = (t.to("meta") for t in (VOLUMES, VOLUMES[:1], LAM, INDEX))
    assert mixup3d(x, lam, index, donors=donors, out=torch.empty_like(x)).is_meta


def test_memory_of_another_width_is_refused():
    volumes = VOLUMES.clone()
    out = volumes.view(torch.float16).flatten()[: volumes.numel()].view(volumes.shape)
    with pytest.raises(ValueError, match="must not overlap"):
        mixup3d(volumes, LAM, INDEX, dtype=torch.float16, out=out)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (
            TypeError,
            "dtype must be float16 or .* got 'float32'",
            lambda: mixup3d(VOLUMES, LAM, INDEX, dtype="float32"),
        ),
        (
            ValueError,
            "window must be at least",
            lambda: mixup3d(VOLUMES, LAM, INDEX, window=(0, 1e-40)),
        ),
    ],
)
def test_errors(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_numbers_of_numpy():
    assert sample_mixup(np.int64(3))[0].shape == (3,)
