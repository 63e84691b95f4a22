"""object_mixup3d against PyTorch box by box, torch.compile, and resizing by other libraries.

Peers get whole-voxel boxes as Python numbers; ours reads them on the device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks.bench_crop_and_resize3d import voxels_taken
from benchmarks.common import (
    DEVICE,
    LARGE_ROWS,
    OURS,
    Comparison,
    Provider,
    Sweep,
    large_volume,
    on_one_thread,
    rows,
    wall_time,
)
from fmkernels import object_mixup3d

MOST_FOR_LIBRARIES = 16  # boxes, each of which takes them a millisecond or more
Box = tuple[int, ...]  # batch index, start and end along z, y and x
Resize = Callable[[Tensor, tuple[int, ...]], Tensor]  # of a crop [1, 1, ...]


@dataclass(frozen=True)
class Workload:
    """Separate boxes of ``low`` to ``high`` voxels a side in volumes of ``edge``^3."""

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
        volumes = f"{str(self.dtype).removeprefix('torch.')} {self.batch} x {self.edge}^3"
        return f"{volumes}, {sizes}, {source}, {place}"

    @cached_property
    def pairs(self) -> list[tuple[Box, Box]]:
        """Target and donor boxes on a grid, so that none overlap; donors are shuffled targets."""
        generator = torch.Generator().manual_seed(0)
        side = self.edge // self.high
        places = torch.randperm(self.batch * side**3, generator=generator)[: self.boxes]
        targets = []
        sizes = torch.randint(self.low, self.high + 1, (self.boxes, 3), generator=generator)
        for place, size in zip(places.tolist(), sizes.tolist(), strict=True):
            start = [place // side**axis % side * self.high for axis in range(3)]
            targets.append(
                (place // side**3, *start, *(s + n for s, n in zip(start, size, strict=True)))
            )
        order = torch.randperm(self.boxes, generator=generator).tolist()
        return [(target, targets[i]) for target, i in zip(targets, order, strict=True)]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        shape = (self.batch, 1, *[self.edge] * 3)
        boxes, donor_boxes = (
            torch.tensor(self.pairs, dtype=torch.float32, device=DEVICE)
            .transpose(0, 1)
            .contiguous()
        )
        lam = torch.rand(self.boxes, device=DEVICE) / 2 + 0.5
        volumes, donors = (torch.randn(shape, device=DEVICE).to(self.dtype) for _ in range(2))
        return volumes, boxes, donor_boxes, lam, donors if self.donors else None

    @property
    def voxels(self) -> int:
        """Voxels of all targets."""
        return sum(math.prod(_size(target)) for target, _ in self.pairs)

    def floor(self) -> dict[str, int]:
        """Targets, or out of place all voxels, are read and written once, donor voxels read once.

        Without separate donors, the donor voxels lie in the targets.
        """
        written = self.voxels if self.in_place else self.batch * self.edge**3
        taken = sum(
            math.prod(
                len(voxels_taken(0, voxels, samples, 0, voxels))
                for voxels, samples in zip(_size(source), _size(target), strict=True)
            )
            for target, source in self.pairs
        )
        return {"forward": (2 * written + taken * self.donors) * self.dtype.itemsize}


def _size(box: Box) -> tuple[int, ...]:
    return tuple(end - start for start, end in zip(box[1:4], box[4:], strict=True))


TARGETS = {  # the workloads of the aims
    "cpu": [Workload(8, 96, 16, 8, 48, donors=True)],
    "cuda": [Workload(16, 160, 16, 8, 48, donors=donors) for donors in (False, True)],
}[DEVICE.type]
OTHERS = {
    "cpu": [
        Workload(8, 96, 16, 8, 48),
        Workload(8, 96, 16, 8, 48, torch.bfloat16, donors=True),
        Workload(8, 96, 1, 48, 48),
        Workload(8, 96, 256, 8, 24),
        Workload(8, 64, 8, 8, 24, in_place=False),
    ],
    "cuda": [
        workload
        for dtype in (torch.float32, torch.bfloat16)
        for boxes in (16, 256, 1)
        for donors, in_place in ((True, True), (False, True), (True, False))
        if (workload := Workload(16, 160, boxes, 8, 48, dtype, donors, in_place)) not in TARGETS
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


def box_by_box(workload: Workload) -> Callable[..., Tensor]:
    """Resize all donors, then blend each into its target, with float32 weights."""

    def run(volumes, boxes, donor_boxes, lam, donors, resize):
        wide, pool = (
            torch.promote_types(volumes.dtype, lam.dtype),
            volumes if donors is None else donors,
        )
        resized = (
            resize(_region(pool, source).to(wide), _size(target))
            for target, source in workload.pairs
        )
        if donors is None and workload.in_place:  # all are read before anything is written
            resized = list(resized)
        out = volumes if workload.in_place else volumes.clone()
        for (target, _), donor, share in zip(
            workload.pairs, resized, (1 - lam).unbind(), strict=True
        ):
            region = _region(out, target)
            region.copy_(region.to(wide).lerp_(donor, share))  # which is no copy where it is wide
        return out

    return run


def interpolate() -> Resize:
    return partial(F.interpolate, mode="trilinear")


def grid_sample() -> Resize:
    def resize(crop, size):
        theta = torch.eye(3, 4, device=crop.device)[None]
        grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
        return F.grid_sample(crop, grid, padding_mode="border", align_corners=False)

    return resize


def monai() -> Resize:
    transform = cache(
        partial(
            pytest.importorskip("monai.transforms", exc_type=Exception).Resize, mode="trilinear"
        )
    )
    return lambda crop, size: transform(size)(crop[0]).as_tensor()[None]


def simple_itk() -> Resize:
    sitk = pytest.importorskip("SimpleITK", exc_type=Exception)
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(sitk.sitkLinear)

    def resize(crop, size):
        image, size = sitk.GetImageFromArray(crop[0, 0].numpy()), size[::-1]
        steps = [voxels / samples for voxels, samples in zip(image.GetSize(), size, strict=True)]
        resample.SetNumberOfThreads(torch.get_num_threads())
        resample.SetSize(size)
        resample.SetOutputSpacing(steps)
        resample.SetOutputOrigin([step / 2 - 0.5 for step in steps])
        return torch.from_numpy(sitk.GetArrayFromImage(resample.Execute(image)))[None, None]

    return resize


def kornia() -> Resize:
    """From corner to corner of a crop."""
    crop_and_resize = pytest.importorskip(
        "kornia.geometry.transform", exc_type=Exception
    ).crop_and_resize3d
    clockwise = [(x, y, z) for z in (0, 1) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
    corners = torch.tensor(clockwise, dtype=torch.float32, device=DEVICE)[None]

    def resize(crop, size):
        last = torch.tensor([voxels - 1.0 for voxels in crop.shape[:1:-1]], device=crop.device)
        return crop_and_resize(crop, corners * last, size, align_corners=True)

    return resize


def from_corner_to_corner(workload: Workload) -> Callable[..., Tensor]:
    """What kornia is held to, in float64."""
    resize = partial(F.interpolate, mode="trilinear", align_corners=True)

    def run(volumes, boxes, donor_boxes, lam, donors, _):
        pool = None if donors is None else donors.double()
        return box_by_box(workload)(
            volumes.double(), boxes, donor_boxes, lam.double(), pool, resize
        )

    return run


def providers(workload: Workload) -> list[Provider]:
    """torch.compile runs on one box only: for more, one graph takes minutes per set of boxes.

    kornia solves float32 equations for coordinates; only its 16-bit results are precise enough.
    """

    def provider(name: str, make: Callable[[], Resize], **more) -> Provider:
        return Provider(name, box_by_box(workload), lambda: (*workload.inputs(), make()), **more)

    result = [Provider(OURS, ours(workload))]
    result += [provider("interpolate", interpolate), provider("grid_sample", grid_sample)]
    if workload.boxes == 1:
        result.append(provider("torch.compile", interpolate, compile=True))
    if workload.boxes <= MOST_FOR_LIBRARIES:
        result.append(provider("MONAI", monai))
        if DEVICE.type == "cpu":
            result.append(provider("SimpleITK", simple_itk))
        if workload.dtype == torch.bfloat16:
            result.append(provider("kornia", kornia, reference=from_corner_to_corner(workload)))
    return result


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="object_mixup3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda volumes, boxes, donor_boxes, lam, donors, *_: reference.object_mixup3d(
            volumes, boxes, donor_boxes, lam, donors=donors
        ),
        floor=workload.floor(),
        providers=providers(workload),
    )


AIMS = [comparison(workload) for workload in TARGETS]
EVERY = [
    *AIMS,
    *(each for whole in AIMS for each in [*wall_time(whole), *on_one_thread(whole)]),
    *map(comparison, OTHERS),
]

SECONDS = 40
ONE = comparison(Workload(1, 1, 1, 1, 1, donors=True))
SMALL = [
    comparison(Workload(2, 32, 5, 4, 8, donors=True)),
    comparison(Workload(2, 32, 5, 4, 8)),
    comparison(Workload(2, 32, 5, 4, 8, torch.bfloat16, in_place=False)),
]


def tuned() -> list[tuple[Comparison, str]]:
    workloads = (
        Workload(16, 160, 16, 8, 24, donors=True),
        Workload(16, 160, 64, 8, 40, torch.bfloat16),
        Workload(16, 160, 256, 8, 40, donors=True, in_place=False),
    )
    return [(comparison(workload), "forward") for workload in workloads]


SWEEPS = [Sweep("object_mixup3d", {256: (2, 4), 512: (2, 4), 1024: (4, 8), 2048: (4, 8)}, tuned)]


def growth() -> Iterator[tuple[Workload, int]]:
    """A box in each of 16 volumes, of half its edge at most."""
    sizes = (4, 16, 64) if DEVICE.type == "cuda" else (2, 4, 8, 16)
    for batch, size in [(1, 1), *((16, size) for size in sizes)]:
        workload = Workload(batch, 2 * size, batch, (size + 1) // 2, size, donors=True)
        yield workload, workload.voxels


LARGE_BYTES = 5


def large(elements: int, part: int) -> None:
    volumes = large_volume(elements, torch.uint8)
    planes, planes_of_part = volumes.shape[2], part // LARGE_ROWS
    boxes = torch.tensor(
        [[0, 2, 3, 4, planes_of_part - 1, 30, 60]], dtype=torch.float32, device=DEVICE
    )
    lam, shift = torch.tensor([0.5], device=DEVICE), planes - planes_of_part
    moved = boxes + torch.tensor([0, shift, 0, 0, shift, 0, 0], device=DEVICE)
    last = volumes[:, :, -planes_of_part:].contiguous()
    expected = object_mixup3d(last, boxes, boxes, lam)
    for out in (None, volumes):
        result = object_mixup3d(volumes, moved, moved, lam, out=out)
        assert torch.equal(result[:, :, -planes_of_part:], expected)


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_object_mixup3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
