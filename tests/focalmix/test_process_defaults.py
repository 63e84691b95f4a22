"""Defaults of the process (dtype and device of new tensors) change nothing."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fmkernels.focalmix.data.volume import Volume
from fmkernels.focalmix.distributed import any_process
from fmkernels.focalmix.model.anchors import Anchors, box_iou
from fmkernels.focalmix.model.detector import build_model
from fmkernels.focalmix.model.inference import detect, nms
from fmkernels.focalmix.model.matcher import atss_match
from fmkernels.focalmix.training.checkpoint import State
from fmkernels.focalmix.training.step import focalmix_loss, sample_draws, supervised_loss
from tests.focalmix.training.test_step import TINY, images, labeled

CPU = torch.device("cpu")


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def other_default(request) -> Iterator[Callable[[], None]]:
    """Switch to another default dtype or device."""
    is_dtype = isinstance(request.param, torch.dtype)
    yield lambda: (torch.set_default_dtype if is_dtype else torch.set_default_device)(request.param)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def state() -> State:
    torch.manual_seed(0)
    return State(TINY, CPU)


BATCH, UNLABELED, MODEL = labeled(), images(4, 1), build_model(TINY)
BOXES = torch.cat(BATCH["boxes"])
VOLUME = Volume(images(1, 2)[0, 0].numpy(), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), tuple(np.eye(3)))
RESULTS = {
    "anchors": lambda: Anchors.from_config(TINY).boxes((24, 24, 24)),
    "matches": lambda: list(
        vars(
            atss_match(Anchors.from_config(TINY), (16, 16, 16), BATCH["boxes"], BATCH["ignore"])
        ).values()
    ),
    "iou": lambda: box_iou(BOXES, BOXES[:1]),
    "nms": lambda: nms(BOXES, BOXES[:, 0], threshold=0.1),
    "draws": lambda: list(sample_draws(TINY, 5).to(CPU)),
    "weights": lambda: list(state().model.state_dict().values()),
    "sums": lambda: state().loss_sums,
    "supervised": lambda: list(supervised_loss(MODEL, BATCH, TINY)),
    "focalmix": lambda: list(
        focalmix_loss(MODEL, MODEL, BATCH, UNLABELED, TINY, sample_draws(TINY, 5))
    ),
    "detections": lambda: [torch.from_numpy(x) for x in vars(detect(TINY, MODEL, VOLUME)).values()],
    "flag": lambda: torch.tensor([any_process(True, CPU)], device="cpu"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_change_nothing(name, other_default):
    expected = RESULTS[name]()
    other_default()
    torch.testing.assert_close(RESULTS[name](), expected, rtol=0, atol=0)
