"""mixup3d against plain PyTorch, the leanest PyTorch, torch.compile of the formula, and the mixup of other libraries.

Those neither flip nor window and draw lam and the partners themselves; here they are told. Partners are the mirror
image of the batch, as in timm; torchvision takes one lam for all and the neighbour. kornia's takes no volumes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
from benchmarks.common import DEVICE, OURS, Comparison, Provider, on_one_thread, rows
from fmkernels import mixup3d

WINDOW = (-1200.0, 600.0)


@dataclass(frozen=True)
class Workload:
    """A batch of volumes [batch, 1, edge, edge, edge]; integers are windowed, and all are flipped where ``flips``."""

    batch: int
    edge: int
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    flips: bool = False
    in_place: bool = False
    gradient: bool = False

    def __str__(self) -> str:
        types = str(self.dtype) if self.result == self.dtype else f"{self.dtype} to {self.result}"
        extras = [", window"] * (not self.dtype.is_floating_point) + [", flips"] * self.flips
        place = ", in place" * self.in_place
        return f"{types.replace('torch.', '')} {self.batch} x {self.edge}^3{''.join(extras)}{place}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shape = (self.batch, 1, *[self.edge] * 3)
        if self.dtype.is_floating_point:
            volumes = torch.randn(shape, device=DEVICE).to(self.dtype).requires_grad_(self.gradient)
        else:
            volumes = torch.randint(-1400, 800, shape, dtype=self.dtype, device=DEVICE)
        lam = torch.rand(self.batch, device=DEVICE) / 2 + 0.5
        flips = torch.randint(8, (self.batch,), dtype=torch.uint8, device=DEVICE) if self.flips else None
        return volumes, lam, torch.arange(self.batch, device=DEVICE).flip(0), flips

    def inputs_for_torchvision(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        volumes, lam, index, flips = self.inputs()
        return volumes, torch.full_like(lam, 0.75), index.sort().values.roll(1), flips

    def window(self) -> tuple[float, float] | None:
        return None if self.dtype.is_floating_point else WINDOW

    def floor(self) -> dict[str, int]:
        """Every voxel read and written once, forward and backward."""
        voxels = self.batch * self.edge**3
        forward = voxels * (self.dtype.itemsize + self.result.itemsize)
        return {"forward": forward, "backward": forward, "both": 2 * forward} if self.gradient else {"forward": forward}


WORKLOADS = [
    Workload(batch, edge, *types, flips=flips, in_place=in_place, gradient=gradient)
    for batch, edge in {"cpu": [(8, 64), (8, 96)], "cuda": [(16, 192), (8, 64), (8, 128), (64, 96)]}[DEVICE.type]
    for types, flips, in_place, gradient in (
        ((torch.float32, torch.float32), False, False, True),
        ((torch.float32, torch.float32), False, True, False),
        ((torch.float32, torch.float32), True, True, False),
        ((torch.bfloat16, torch.bfloat16), False, True, False),
        ((torch.int16, torch.bfloat16), True, False, False),
        ((torch.int16, torch.float32), False, False, False),
    )
]


def ours(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, lam, index, flips):
        out = volumes if workload.in_place else None
        window = workload.window()
        return mixup3d(volumes, lam, index, flips=flips, window=window, dtype=workload.result, out=out)

    return run


def _flipped(volumes: Tensor, flips: Tensor) -> Tensor:
    for axis, bit in ((2, 1), (3, 2), (4, 4)):
        chosen = (flips & bit).bool()[:, None, None, None, None]
        volumes = torch.where(chosen, volumes.flip(axis), volumes)
    return volumes


def _prepared(workload: Workload, volumes: Tensor, flips: Tensor | None) -> Tensor:
    x = volumes.float()
    if workload.window():
        low, high = workload.window()
        x = ((x - low) / (high - low)).clamp(0, 1)
    return x if flips is None else _flipped(x, flips)


def plain(workload: Workload) -> Callable[..., Tensor]:
    """The formula as a trainer writes it."""

    def run(volumes, lam, index, flips):
        x, share = _prepared(workload, volumes, flips), lam[:, None, None, None, None]
        mixed = (share * x + (1 - share) * x[index]).to(workload.result)
        return volumes.copy_(mixed) if workload.in_place else mixed

    return run


def lean(workload: Workload) -> Callable[..., Tensor]:
    """The best of eager PyTorch that does not read lam: one gather, one lerp."""

    def run(volumes, lam, index, flips):
        x = _prepared(workload, volumes, flips)
        mixed = torch.lerp(x[index], x, lam[:, None, None, None, None])
        return volumes.copy_(mixed) if workload.in_place else mixed.to(workload.result)

    return run


def lerp_by_sample(workload: Workload) -> Callable[..., Tensor]:
    """The least that eager PyTorch moves in place; the host reads lam."""

    def run(volumes, lam, index, flips):
        for own, partner, share in zip(volumes, volumes[index], lam.tolist(), strict=True):
            torch.lerp(partner, own, share, out=own)
        return volumes

    return run


def torchvision(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, lam, index, flips):
        v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=Exception)
        video = pytest.importorskip("torchvision.tv_tensors", exc_type=Exception).Video(volumes)
        params = {"lam": 0.75, "labels": None, "batch_size": len(volumes)}
        return v2.MixUp(num_classes=2).transform(video, params).as_subclass(Tensor)

    return run


def timm(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, lam, index, flips):
        mixup = pytest.importorskip("timm.data.mixup", exc_type=Exception).Mixup(mode="elem")
        mixup._params_per_elem = lambda batch: (lam.tolist(), [False] * batch)
        mixup._mix_elem(volumes)
        return volumes

    return run


def monai(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, lam, index, flips):
        array = pytest.importorskip("monai.transforms.regularization.array", exc_type=Exception)
        mixup = array.MixUp(len(volumes))
        mixup._params = lam, index, []
        return mixup.apply(volumes)

    return run


def providers(workload: Workload) -> list[Provider]:
    """Other libraries mix float32 without flips, each either in place or not."""
    functions = {OURS: ours, "eager": plain, "best eager": lean}
    if workload.in_place and not workload.flips:
        functions["lerp by sample"] = lerp_by_sample
    functions["torch.compile"] = plain
    if workload.dtype == torch.float32 and not workload.flips:
        functions |= {"timm": timm} if workload.in_place else {"torchvision": torchvision, "monai": monai}
    return [
        Provider(
            name,
            make(workload),
            inputs=workload.inputs_for_torchvision if name == "torchvision" else None,
            compile=name == "torch.compile",
        )
        for name, make in functions.items()
    ]


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="mixup3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda volumes, lam, index, flips: reference.mixup3d(
            volumes, lam, index, flips=flips, window=workload.window(), dtype=workload.result
        ),
        floor=workload.floor(),
        providers=providers(workload),
    )


EVERY = [
    *map(comparison, WORKLOADS),
    *on_one_thread(comparison(Workload(8, 96, gradient=True))),
    *on_one_thread(comparison(Workload(8, 96, torch.int16))),
]


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_mixup3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
