"""A whole training step of FocalMix, with our ops and with plain PyTorch (``--ops plain``).

Rows differ in two things: whose ops run between the networks, and whether the networks' norms are
`fmkernels.nn.GroupNorm3d` or group_norm, sum and ReLU of PyTorch. On GPUs the networks are also
compiled, last. "networks alone" is what no op between the networks can change: the teacher on
all views, and the detector forward and backward. The rest of a step is ops and the matching of
anchors.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import DEVICE, OURS, Comparison, Provider, rows
from fmkernels.focalmix.config import PRESETS, Config
from fmkernels.focalmix.model.detector import apply_window, autocast, build_model
from fmkernels.focalmix.training.step import focalmix_loss, sample_draws
from fmkernels.nn import GroupNorm3d


@dataclass(frozen=True)
class Workload:
    """The step of a preset with group norms, and its numbers of labeled and unlabeled patches."""

    preset: str

    @property
    def config(self) -> Config:
        preset = PRESETS[self.preset]
        return replace(preset, method="focalmix", norm="group", roi_size=preset.patch_size)

    def __str__(self) -> str:
        config = self.config
        sizes = f"{config.batch_size} + {config.unlabeled_batch_size}"
        patches = f"{sizes} patches of {config.patch_size[0]}^3"
        return f"{self.preset}, {patches}, K = {config.views}"

    def inputs(self) -> tuple:
        """Model, teacher, labeled and unlabeled patches, draws, and trained parameters."""
        config = self.config
        model, teacher = build_model(config).to(DEVICE), build_model(config).to(DEVICE)
        labels, others = config.batch_size, config.unlabeled_batch_size
        shape = (labels + others, 1, *config.patch_size)
        images = torch.randint(-1200, 600, shape, dtype=torch.int16, device=DEVICE)
        corner, side = torch.rand(labels, 1, 3) * config.patch_size[0] / 2, config.diameters[0]
        boxes = [torch.cat([low, low + side], 1).round().to(DEVICE) for low in corner]
        labeled = {
            "image": images[:labels],
            "boxes": boxes,
            "ignore": [boxes[0].new_empty(0, 6)] * labels,
        }
        draws = sample_draws(config, config.burn_in_steps + config.rampup_steps).to(DEVICE)
        return model, teacher, labeled, images[labels:], draws, *model.parameters()


WORKLOADS = {"cpu": [Workload("demo")], "cuda": [Workload("demo"), Workload("luna16")]}[DEVICE.type]


def _group_norm(norm: GroupNorm3d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What the module computes, in PyTorch."""
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.relu_(y if residual is None else y + residual)


def step(
    workload: Workload, ops: str, *, fused_norms: bool = True, compiled: bool = False
) -> Callable[..., Tensor]:
    config = replace(workload.config, ops=ops)
    networks: dict[nn.Module, Callable] = {}

    def network(module: nn.Module) -> Callable:
        if module not in networks:
            networks[module] = torch.compile(module, dynamic=False) if compiled else module
        return networks[module]

    def run(model, teacher, labeled, unlabeled, draws, *_):
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast(config, DEVICE))
            if not fused_norms:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr(GroupNorm3d, "forward", _group_norm)
            losses = focalmix_loss(
                network(model), network(teacher), labeled, unlabeled, config, draws
            )
        return losses.classification + config.box_weight * losses.box

    return run


def networks(workload: Workload) -> Callable[..., Tensor]:
    config = workload.config
    images: dict[nn.Module, Tensor] = {}

    def run(model, teacher, labeled, unlabeled, draws, *_):
        if model not in images:
            images[model] = apply_window(torch.cat([labeled["image"], unlabeled]), config.window)
        views = images[model][config.batch_size :].repeat(config.views, 1, 1, 1, 1)
        with autocast(config, DEVICE):
            with torch.no_grad():
                teacher(views)
            return sum(
                level.float().mean() for outputs in model(images[model]) for level in outputs
            )

    return run


def comparison(workload: Workload, *, compiled: bool = False) -> Comparison:
    plain, alone = step(workload, "plain", fused_norms=False), networks(workload)
    providers = [
        Provider(OURS, step(workload, "fused")),
        Provider("our ops, PyTorch's norms", step(workload, "fused", fused_norms=False)),
        Provider("PyTorch's ops, our norms", step(workload, "plain")),
        Provider("plain PyTorch", plain),
        Provider("networks alone", alone, reference=alone),
    ]
    if compiled:
        ours = step(workload, "fused", compiled=True)
        theirs = step(workload, "plain", fused_norms=False, compiled=True)
        providers = [providers[0], Provider("compiled", ours), Provider("plain, compiled", theirs)]
    return Comparison(
        op="focalmix_step",
        workload=f"{workload}{', compiled networks' if compiled else ''}",
        inputs=workload.inputs,
        reference=plain,
        floor=dict.fromkeys(("forward", "backward", "both")),
        providers=providers,
        precision=torch.bfloat16,  # under autocast that of the networks
    )


COMPARISONS = [*map(comparison, WORKLOADS)]
if DEVICE.type == "cuda":  # last: compiling takes minutes
    COMPARISONS.append(comparison(WORKLOADS[-1], compiled=True))


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(COMPARISONS))
def test_focalmix_step(record, comparison, provider, phase):
    record(comparison, provider, phase)
