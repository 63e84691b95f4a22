"""object_mixup3d against PyTorch box by box, by interpolate or grid_sample, and torch.compile of the former.

The peers are given the boxes as Python numbers, whole ones, for free; ours reads them where they are.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks.common import DEVICE, OURS, Comparison, Provider, on_one_thread, rows
from fmkernels import object_mixup3d

MOST_COMPILED = 64
Box = tuple[int, ...]  # batch index, start and end along z, y and x


@dataclass(frozen=True)
class Workload:
    """Boxes of ``low`` to ``high`` voxels a side, apart from each other, in volumes [batch, 1, edge, edge, edge]."""

    batch: int
    edge: int
    boxes: int
    low: int
    high: int
    dtype: torch.dtype = torch.float32
    donors: bool = False
    in_place: bool = True

    def __str__(self) -> str:
        source = "donors" if self.donors else "no donors"
        place = "in place" if self.in_place else "new"
        sizes = f"{self.boxes} boxes of {self.low} to {self.high}"
        return f"{str(self.dtype).removeprefix('torch.')} {self.batch} x {self.edge}^3, {sizes}, {source}, {place}"

    @cached_property
    def pairs(self) -> list[tuple[Box, Box]]:
        """Target and donor boxes, on a grid of places so that none overlap; donors are the targets, shuffled."""
        generator = torch.Generator().manual_seed(0)
        side = self.edge // self.high
        places = torch.randperm(self.batch * side**3, generator=generator)[: self.boxes]
        targets = []
        for place, size in zip(
            places.tolist(), torch.randint(self.low, self.high + 1, (self.boxes, 3), generator=generator).tolist(),
            strict=True,
        ):  # fmt: skip
            start = [place // side**axis % side * self.high for axis in range(3)]
            targets.append((place // side**3, *start, *(s + n for s, n in zip(start, size, strict=True))))
        order = torch.randperm(self.boxes, generator=generator).tolist()
        return [(target, targets[i]) for target, i in zip(targets, order, strict=True)]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        shape = (self.batch, 1, *[self.edge] * 3)
        boxes, donor_boxes = torch.tensor(self.pairs, dtype=torch.float32, device=DEVICE).unbind(1)
        lam = torch.rand(self.boxes, device=DEVICE) / 2 + 0.5
        volumes, donors = (torch.randn(shape, device=DEVICE).to(self.dtype) for _ in range(2))
        return volumes, boxes, donor_boxes, lam, donors if self.donors else None

    @property
    def voxels(self) -> int:
        """Of all targets."""
        return sum(_voxels(target) for target, _ in self.pairs)

    def floor(self) -> dict[str, int]:
        """Targets read and written, donors read; out of place all voxels read and written, and donors read."""
        donors = sum(_voxels(donor) for _, donor in self.pairs)
        written = self.voxels if self.in_place else self.batch * self.edge**3
        return {"forward": (2 * written + donors) * self.dtype.itemsize}


def _voxels(box: Box) -> int:
    return math.prod(end - start for start, end in zip(box[1:4], box[4:], strict=True))


WORKLOADS = {
    "cpu": [
        Workload(8, 96, 8, 8, 24),
        Workload(8, 96, 8, 8, 24, donors=True),
        Workload(8, 96, 256, 8, 24),
        Workload(8, 96, 16, 24, 24, torch.bfloat16, donors=True),
        Workload(8, 64, 8, 8, 24, in_place=False),
    ],
    "cuda": [
        Workload(batch, 160, boxes, low, high, dtype, donors, in_place)
        for batch, boxes, low, high in ((16, 16, 8, 24), (16, 64, 8, 40), (16, 1000, 8, 24))
        for dtype in (torch.float32, torch.bfloat16)
        for donors, in_place in ((True, True), (False, True), (True, False))
    ],
}[DEVICE.type]


def ours(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, boxes, donor_boxes, lam, donors):
        out = volumes if workload.in_place else None
        return object_mixup3d(volumes, boxes, donor_boxes, lam, donors=donors, out=out)

    return run


def _region(volumes: Tensor, box: Box) -> Tensor:
    b, z1, y1, x1, z2, y2, x2 = box
    return volumes[b : b + 1, :, z1:z2, y1:y2, x1:x2]


def box_by_box(workload: Workload, resize: Callable[[Tensor, list[int]], Tensor]) -> Callable[..., Tensor]:
    """Resize all donors, then blend each into its target; float32 shares."""

    def donors_of(volumes: Tensor, donors: Tensor | None) -> Iterator[Tensor]:
        for target, source in workload.pairs:
            size = [end - start for start, end in zip(target[1:4], target[4:], strict=True)]
            yield resize(_region(volumes if donors is None else donors, source).float(), size)

    def run(volumes, boxes, donor_boxes, lam, donors):
        resized = donors_of(volumes, donors)
        if donors is None and workload.in_place:  # all are read before anything is written
            resized = list(resized)
        out = volumes if workload.in_place else volumes.clone()
        for k, ((target, _), donor) in enumerate(zip(workload.pairs, resized, strict=True)):
            region = _region(out, target)
            region.copy_(torch.lerp(donor, region.float(), lam[k]))
        return out

    return run


def interpolate(crop: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(crop, size, mode="trilinear")


def grid_sample(crop: Tensor, size: list[int]) -> Tensor:
    theta = torch.eye(3, 4, device=crop.device)[None]
    grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
    return F.grid_sample(crop, grid, padding_mode="border", align_corners=False)


def providers(workload: Workload) -> list[Provider]:
    """Compiled is one graph of all boxes, which takes minutes where they are many."""
    interpolated = box_by_box(workload, interpolate)
    result = [
        Provider(OURS, ours(workload)),
        Provider("interpolate", interpolated),
        Provider("grid_sample", box_by_box(workload, grid_sample)),
    ]
    if workload.boxes <= MOST_COMPILED:
        result.append(Provider("torch.compile", interpolated, compile=True))
    return result


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="object_mixup3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda volumes, boxes, donor_boxes, lam, donors: reference.object_mixup3d(
            volumes, boxes, donor_boxes, lam, donors=donors
        ),
        floor=workload.floor(),
        providers=providers(workload),
    )


EVERY = [*map(comparison, WORKLOADS), *on_one_thread(comparison(Workload(8, 96, 8, 8, 24, donors=True)))]


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_object_mixup3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
