"""What is not finite stays where it belongs, as in the reference; and a hundred runs give one gradient."""

import math
from collections.abc import Callable

import pytest
import torch

import fmkernels
import reference
from tests.support import on_gpu

INF, NAN = math.inf, math.nan
SHAPE = (2, 1, 3, 4, 8)
INSIDE = 147  # of the voxels: (1, 0, 1, 2, 3), which lies in boxes of both kinds
BOXES = [[0, 0, 0, 0, 3, 4, 8], [1, 0.3, 0.7, 1.4, 2.9, 3.1, 6.8]]
DONORS = [[1, 0, 1, 1, 2, 4, 7], [0, 1, 0, 2, 3, 3, 8]]


def make(path, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(path.device)


def arguments(path) -> dict[str, dict]:
    """Of each operation, all tensors that may hold what is not finite."""
    lam, index = (
        torch.tensor([0.7, 0.6], device=path.device),
        torch.tensor([1, 0], device=path.device),
    )
    boxes, donor_boxes = (
        torch.tensor(rows, device=path.device).float() for rows in (BOXES, DONORS)
    )
    flips = torch.tensor([1, 6], dtype=torch.uint8, device=path.device)
    volumes, donors = make(path, *SHAPE), make(path, *SHAPE, seed=1)
    return {
        "soft_target_focal_loss": {
            "logits": make(path, 4, 6) - 0.5,
            "targets": make(path, 4, 6, seed=1),
            "weight": make(path, 4, 6, seed=2),
            "reduction": "none",
        },
        "predict_targets": {"view_logits": make(path, 2, *SHAPE) - 0.5, "flips": flips},
        "mixup3d": {
            "volumes": volumes,
            "lam": lam,
            "index": index,
            "donors": donors,
            "flips": (flips, flips),
        },
        "crop_and_resize3d": {"volumes": volumes, "boxes": boxes, "output_size": (2, 4, 5)},
        "object_mixup3d": {
            "volumes": volumes,
            "boxes": boxes,
            "donor_boxes": donor_boxes,
            "lam": lam,
            "donors": donors,
        },
    }


PLACES = [
    ("soft_target_focal_loss", "logits", NAN),  # infinite logits have tests of their own
    ("soft_target_focal_loss", "targets", NAN),
    ("predict_targets", "view_logits", NAN),
    ("object_mixup3d", "lam", NAN),  # infinite weights are out of range
    *(
        (name, argument, value)
        for name, tensors in {
            "soft_target_focal_loss": ("weight",),
            "mixup3d": ("volumes", "donors", "lam"),
            "crop_and_resize3d": ("volumes",),
            "object_mixup3d": ("volumes", "donors"),
        }.items()
        for argument in tensors
        for value in (NAN, INF, -INF)
    ),
]


@pytest.mark.parametrize(("name", "argument", "value"), PLACES)
def test_what_is_not_finite_stays_where_it_belongs(path, name, argument, value):
    """A NaN gives NaN wherever it has a part in the result, an infinity infinity or NaN."""
    given = arguments(path)[name]
    elements = given[argument].view(-1)
    elements[min(INSIDE, len(elements) - 1)] = value
    ours, exact = getattr(fmkernels, name)(**given), getattr(reference, name)(**given)
    finite = exact.isfinite()
    assert finite.any() and not finite.all()
    assert torch.equal(ours.isfinite(), finite)
    assert math.isinf(value) or ours[~finite].isnan().all()
    torch.testing.assert_close(ours[finite].double(), exact[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalizer", [NAN, INF, -INF, 0.0])
def test_a_normalizer_that_is_not_finite(path, normalizer):
    given = {**arguments(path)["soft_target_focal_loss"], "reduction": "mean"}
    given["normalizer"] = torch.tensor(normalizer, device=path.device)
    ours, exact = (
        fmkernels.soft_target_focal_loss(**given),
        reference.soft_target_focal_loss(**given),
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def many(
    device: torch.device,
) -> dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """Of each operation with a gradient, an argument and the rest, large enough to be shared out."""
    draw = torch.Generator().manual_seed(0)
    logits, targets = (torch.rand(3, 70_001, generator=draw).to(device) for _ in range(2))
    volumes = torch.rand(4, 1, 20, 40, 40, generator=draw).to(device)
    lam, index = fmkernels.sample_mixup(4, generator=draw)
    corners = torch.rand(24, 3, generator=draw) * 15
    boxes = torch.cat([torch.arange(24.0)[:, None] % 4, corners, corners + 12], 1).to(device)
    return {
        "soft_target_focal_loss": (logits, lambda x: fmkernels.soft_target_focal_loss(x, targets)),
        "mixup3d": (volumes, lambda x: fmkernels.mixup3d(x, lam.to(device), index.to(device))),
        "crop_and_resize3d": (
            volumes,
            lambda x: fmkernels.crop_and_resize3d(x, boxes, (16, 16, 16)),
        ),
    }


@pytest.mark.parametrize("name", ["soft_target_focal_loss", "mixup3d", "crop_and_resize3d"])
def test_a_hundred_runs_give_one_gradient(name, restore_threads):
    """In one thread, in two and in three."""
    x, operation = many(torch.device("cuda" if on_gpu() else "cpu"))[name]
    x.requires_grad_()
    results = set()
    for run in range(100):
        torch.set_num_threads(1 + run % 3)
        result = operation(x)
        (gradient,) = torch.autograd.grad(result, x, result.detach() + 1)
        results.add((result.detach().cpu().numpy().tobytes(), gradient.cpu().numpy().tobytes()))
    assert len(results) == 1


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
