"""crop_and_resize3d against F.interpolate, F.grid_sample, torch.compile and other libraries.

Boxes of whole voxels are clamped at the box, like a crop followed by a resize. Others are clamped
at the volume, like grid_sample. Libraries get transforms and images ready made. Loops over crops
are not compiled, because every set of boxes would need its own graph.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
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
from fmkernels import crop_and_resize3d
from tests.support.tolerance import assert_close

WINDOW = (-1200.0, 600.0)
BF16, I16 = torch.bfloat16, torch.int16


@dataclass(frozen=True)
class Workload:
    """Crops of ``size``^3 out of 8 volumes of ``edge``^3; integers are windowed.

    Edges are powers of 2, boxes begin on quarters of a voxel, and samples are a binary fraction of
    a voxel apart. So every coordinate is exact in float32 and providers agree. Boxes keep one voxel
    away from the faces of a volume, because kornia reads zeros beyond them.
    """

    boxes: int
    size: int
    extents: tuple[int, int] = (8, 48)  # of a box along an axis, in voxels
    edge: int = 64
    whole: bool = False  # boxes of whole voxels
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    gradient: bool = True

    def __str__(self) -> str:
        types = str(self.dtype) if self.result == self.dtype else f"{self.dtype} to {self.result}"
        kind = "whole voxels" if self.whole else "fractions"
        window = (
            ", window"
            if not self.dtype.is_floating_point
            else ""
            if self.gradient
            else ", without gradient"
        )
        low, high = self.extents
        sizes = f"{self.boxes} boxes of {low}-{high} to {self.size}^3"
        return f"{types.replace('torch.', '')} {sizes}, {kind}{window}"

    @property
    def clamp(self) -> str:
        return "box" if self.whole else "volume"

    @property
    def window(self) -> tuple[float, float] | None:
        return None if self.dtype.is_floating_point else WINDOW

    @property
    def output_size(self) -> tuple[int, int, int]:
        return (self.size,) * 3

    @cached_property
    def table(self) -> Tensor:
        """The boxes, [boxes, 7]."""
        generator = torch.Generator().manual_seed(0)
        low, high = self.extents
        grain = 1.0 if self.whole else 0.25
        step = (
            grain * self.size / (self.size & -self.size)
        )  # of extents: multiples of the odd part of the size
        extents = (
            (low + torch.rand(self.boxes, 3, generator=generator) * (high - low)) / step
        ).round() * step
        start = 1 + torch.rand(self.boxes, 3, generator=generator) * (self.edge - 2 - extents)
        start = (start / grain).round() * grain
        batch = torch.randint(8, (self.boxes, 1), generator=generator)
        return torch.cat([batch, start, start + extents], 1)

    def inputs(self) -> tuple[Tensor, Tensor]:
        shape = (8, 1, *[self.edge] * 3)
        if self.dtype.is_floating_point:
            volumes = torch.randn(shape, device=DEVICE).to(self.dtype).requires_grad_(self.gradient)
        else:
            volumes = torch.randint(-1400, 800, shape, dtype=self.dtype, device=DEVICE)
        return volumes, self.table.to(DEVICE)

    @cached_property
    def voxels(self) -> int:
        """Of all volumes, how many a sample takes from."""
        taken = torch.zeros(8, *[self.edge] * 3, dtype=torch.bool)
        for b, *bounds in self.table.tolist():
            sides = zip(bounds[:3], bounds[3:], strict=True)
            z, y, x = (
                voxels_taken(*side, self.size, *(side if self.whole else (0, self.edge)))
                for side in sides
            )
            taken[int(b), z[:, None, None], y[:, None], x] = True
        return int(taken.sum())

    def floor(self) -> dict[str, int]:
        """Every sample, every voxel that is taken from, and for the gradient every voxel, once."""
        samples = self.boxes * self.size**3 * self.result.itemsize
        forward = samples + self.voxels * self.dtype.itemsize
        if not self.gradient:
            return {"forward": forward}
        backward = samples + 8 * self.edge**3 * self.dtype.itemsize
        return {"forward": forward, "backward": backward, "both": forward + backward}


def voxels_taken(start: float, end: float, samples: int, low: float, high: float) -> Tensor:
    """Voxels along an axis that samples of [start, end) read, clamped to [low, high)."""
    middles = 2 * torch.arange(samples, dtype=torch.float64) + 1
    positions = (middles * (end - start) + samples * (2 * start - 1)) / (
        2 * samples
    )  # whole where they should be
    positions = positions.clamp(low, high - 1)
    return torch.cat([positions.floor(), positions.ceil()]).unique().long()


TARGETS = {  # the workloads of the aims; compiled too
    "cpu": [Workload(64, 24, whole=True, gradient=False), Workload(64, 24, gradient=False)],
    "cuda": [Workload(16, 32, edge=128, whole=whole, gradient=False) for whole in (True, False)],
}[DEVICE.type]
OTHERS = {
    "cpu": [
        Workload(1, 24, whole=True, gradient=False),
        Workload(16, 24, gradient=False),
        Workload(256, 8, gradient=False),
        Workload(64, 24, dtype=torch.int16, result=torch.bfloat16, gradient=False),
        Workload(16, 64, whole=True, gradient=False),
        Workload(64, 24, whole=True),
        Workload(64, 24),
    ],
    "cuda": [
        *(
            Workload(boxes, 32, edge=128, whole=whole, gradient=False)
            for boxes in (256, 1)
            for whole in (True, False)
        ),
        *(
            Workload(
                64,
                size,
                edge=128,
                whole=whole,
                dtype=dtype,
                result=result,
                gradient=dtype.is_floating_point,
            )
            for size in (32, 64)
            for whole, dtype, result in (
                (True, torch.float32, torch.float32),
                (False, torch.float32, torch.float32),
                (False, torch.bfloat16, torch.bfloat16),
                (False, torch.int16, torch.bfloat16),
            )
        ),
    ],
}[DEVICE.type]


def ours(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, boxes):
        return crop_and_resize3d(
            volumes,
            boxes,
            workload.output_size,
            clamp=workload.clamp,
            window=workload.window,
            dtype=workload.result,
        )

    return run


def _windowed(workload: Workload, volumes: Tensor) -> Tensor:
    x = volumes.float()
    if workload.window:
        low, high = workload.window
        x = ((x - low) / (high - low)).clamp(0, 1)
    return x


def interpolate_loop(workload: Workload) -> Callable[..., Tensor]:
    """The crop of each box, resized."""

    def run(volumes, boxes):
        crops = [
            F.interpolate(
                volumes[b : b + 1, :, z1:z2, y1:y2, x1:x2], workload.output_size, mode="trilinear"
            )
            for b, z1, y1, x1, z2, y2, x2 in boxes.int().tolist()
        ]
        return torch.cat(crops)

    return run


def _positions(workload: Workload, boxes: Tensor) -> Tensor:
    """Of the samples of each box along each axis, [K, 3, n]."""
    middles = torch.arange(workload.size, device=boxes.device) + 0.5
    start, end = boxes[:, 1:4, None], boxes[:, 4:, None]
    low, high = (start, end - 1) if workload.whole else (0 * start, 0 * end + workload.edge - 1)
    return (start + (end - start) / workload.size * middles - 0.5).maximum(low).minimum(high)


def _grid(positions: Tensor, extents: int | Tensor) -> Tensor:
    """The grid of F.grid_sample, [K, n, n, n, 3], for positions [K, 3, n] in these volumes."""
    z, y, x = ((2 * positions + 1) / extents - 1).unbind(1)
    n = positions.shape[2]
    axes = x[:, None, None, :], y[:, None, :, None], z[:, :, None, None]
    return torch.stack([axis.expand(-1, n, n, n) for axis in axes], -1)


def _grid_sample(volumes: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(volumes, grid, padding_mode="border", align_corners=False)


def grid_sample(workload: Workload) -> Callable[..., Tensor]:
    """One call, for which each box has a copy of its volume."""

    def run(volumes, boxes):
        x = _windowed(workload, volumes)
        grid = _grid(_positions(workload, boxes), workload.edge)
        return _grid_sample(x[boxes[:, 0].long()], grid).to(workload.result)

    return run


def grid_sample_loop(workload: Workload) -> Callable[..., Tensor]:
    """One call for each box, on the part of a volume that it takes from."""

    def run(volumes, boxes):
        positions = _positions(workload, boxes)
        first, last = positions[:, :, 0].floor(), positions[:, :, -1].floor() + 2
        grid = _grid(positions - first[:, :, None], (last - first)[:, :, None])
        parts = torch.cat([boxes[:, :1], first, last], 1).int().tolist()
        crops = [
            _grid_sample(
                _windowed(workload, volumes[b : b + 1, :, z1:z2, y1:y2, x1:x2]), grid[k : k + 1]
            )
            for k, (b, z1, y1, x1, z2, y2, x2) in enumerate(parts)
        ]
        return torch.cat(crops).to(workload.result)

    return run


def formula(workload: Workload) -> Callable[..., Tensor]:
    """The 8 voxels around every sample, gathered for all boxes at once."""

    def run(volumes, boxes):
        position = _positions(workload, boxes)
        below = position.floor()
        sides = [(below.long(), 1 - (position - below)), (position.ceil().long(), position - below)]
        batch = boxes[:, 0].long()[:, None, None, None]
        out = 0.0
        for z, y, x in itertools.product(sides, repeat=3):
            voxels = volumes[
                batch,
                :,
                z[0][:, 0, :, None, None],
                y[0][:, 1, None, :, None],
                x[0][:, 2, None, None, :],
            ]
            share = (
                z[1][:, 0, :, None, None] * y[1][:, 1, None, :, None] * x[1][:, 2, None, None, :]
            )
            out = out + _windowed(workload, voxels) * share[..., None]
        return out.movedim(-1, 1).to(workload.result)

    return run


def kornia(workload: Workload) -> Provider:
    """kornia's crop of the same name, on a copy of the volume per box; corners are samples."""

    def inputs():
        crop = pytest.importorskip(
            "kornia.geometry.transform", exc_type=Exception
        ).crop_and_resize3d
        clockwise = [(z, y, x) for z in (0, 1) for y, x in ((0, 0), (0, 1), (1, 1), (1, 0))]
        return *workload.inputs(), crop, torch.tensor(clockwise, dtype=torch.bool, device=DEVICE)

    def run(volumes, boxes, crop, at_end):
        half = (boxes[:, 4:] - boxes[:, 1:4]) / workload.size / 2
        start, end = boxes[:, 1:4] + half - 0.5, boxes[:, 4:] - half - 0.5
        corners = torch.where(at_end, end[:, None], start[:, None]).flip(-1)
        x = _windowed(workload, volumes)[boxes[:, 0].long()]
        return crop(x, corners, workload.output_size, align_corners=True).to(workload.result)

    return Provider("kornia", run, inputs)


def torchvision(workload: Workload) -> Provider:
    """roi_align of two slices for each along z of a crop, which it lies between."""

    def inputs():
        return *workload.inputs(), pytest.importorskip(
            "torchvision.ops", exc_type=Exception
        ).roi_align

    def run(volumes, boxes, roi_align):
        z = _positions(workload, boxes)[:, 0]
        slices = boxes[:, :1] * workload.edge + torch.stack([z.floor(), z.ceil()])  # [2, K, n]
        corners = boxes[:, None, [3, 2, 6, 5]].expand(2, -1, workload.size, -1)
        rois = torch.cat([slices[..., None], corners], -1).flatten(0, 2)
        x = _windowed(workload, volumes).flatten(0, 2)[:, None]
        planes = roi_align(x, rois, workload.output_size[1:], sampling_ratio=1, aligned=True)
        below, above = planes.view(2, len(boxes), 1, *workload.output_size)
        return below.lerp(above, z.frac()[:, None, :, None, None]).to(workload.result)

    return Provider("torchvision", run, inputs)


def monai(workload: Workload) -> Provider:
    """SpatialCrop, one for each box, and Resize."""

    def inputs():
        transforms = pytest.importorskip("monai.transforms", exc_type=Exception)
        cuts = [
            transforms.SpatialCrop(roi_start=b[1:4], roi_end=b[4:])
            for b in workload.table.int().tolist()
        ]
        return *workload.inputs(), cuts, transforms.Resize(workload.output_size, mode="trilinear")

    def run(volumes, boxes, cuts, resize):
        batch = boxes[:, 0].int().tolist()
        return torch.stack(
            [resize(cut(volumes[b])).as_tensor() for b, cut in zip(batch, cuts, strict=True)]
        )

    return Provider("MONAI", run, inputs)


def simple_itk(workload: Workload) -> Provider:
    """ResampleImageFilter per box, or on its region; it computes in double precision."""

    def inputs():
        sitk = pytest.importorskip("SimpleITK", exc_type=Exception)
        resample = sitk.ResampleImageFilter()
        resample.SetInterpolator(sitk.sitkLinear)
        resample.SetSize(workload.output_size)
        volumes, boxes = workload.inputs()
        images = [sitk.GetImageFromArray(volume[0].numpy()) for volume in volumes]
        return volumes, boxes, images, resample, sitk.GetArrayFromImage

    def run(volumes, boxes, images, resample, array):
        resample.SetNumberOfThreads(torch.get_num_threads())
        crops = []
        for b, *bounds in boxes.tolist():
            image, sides = images[int(b)], list(zip(bounds[:3], bounds[3:], strict=True))[::-1]
            if workload.whole:
                image = image[tuple(slice(int(start), int(end)) for start, end in sides)]
            steps = [(end - start) / workload.size for start, end in sides]
            resample.SetOutputSpacing(steps)
            resample.SetOutputOrigin(
                [s + 0.5 * step - 0.5 for (s, _), step in zip(sides, steps, strict=True)]
            )
            crops.append(torch.from_numpy(array(resample.Execute(image))))
        return torch.stack(crops)[:, None]

    return Provider("SimpleITK", run, inputs)


def providers(workload: Workload, compiled: bool) -> list[Provider]:
    """Resizing needs boxes of whole voxels, grid_sample clamps at the volume; SimpleITK: CPU.

    kornia solves float32 equations for coordinates; only its 16-bit results are precise enough.
    """
    functions = {OURS: ours}
    if workload.whole:
        functions |= {"interpolate loop": interpolate_loop}
        libraries = [monai]
    else:
        functions |= {"grid_sample": grid_sample, "grid_sample loop": grid_sample_loop}
        libraries = [torchvision, *[kornia] * (workload.result == torch.bfloat16)]
    if DEVICE.type == "cpu" and not (workload.window or workload.gradient):
        libraries.append(simple_itk)
    functions["formula"] = formula
    result = [Provider(name, make(workload)) for name, make in functions.items()]
    if compiled:
        result.append(Provider("torch.compile", formula(workload), compile=True))
        if not workload.whole:
            result.append(
                Provider("torch.compile of grid_sample", grid_sample(workload), compile=True)
            )
    return [*result, *(make(workload) for make in libraries)]


def comparison(workload: Workload, compiled: bool = True) -> Comparison:
    return Comparison(
        op="crop_and_resize3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda volumes, boxes, *_: reference.crop_and_resize3d(
            volumes,
            boxes,
            workload.output_size,
            clamp=workload.clamp,
            window=workload.window,
            dtype=workload.result,
        ),
        floor=workload.floor(),
        providers=providers(workload, compiled),
    )


UNCOMPILED = [comparison(workload, compiled=False) for workload in TARGETS]
EVERY = [
    *map(comparison, TARGETS),
    *(each for whole in UNCOMPILED for each in [*wall_time(whole), *on_one_thread(whole)]),
    *(comparison(workload, compiled=False) for workload in OTHERS),
]

SECONDS = 45
ONE = comparison(Workload(1, 1, (1, 2), edge=4))
SMALL = [
    comparison(Workload(5, 8, whole=True)),
    comparison(Workload(5, 8, dtype=BF16, result=BF16)),
    comparison(Workload(5, 8, dtype=I16, result=BF16, gradient=False)),
]


def tuned() -> list[tuple[Comparison, str]]:
    workloads = (
        Workload(16, 32, edge=128, gradient=False),
        Workload(256, 32, edge=128, dtype=BF16, result=BF16, gradient=False),
        Workload(64, 64, edge=128, dtype=I16, result=BF16, gradient=False),
    )
    return [(comparison(workload), "forward") for workload in workloads]


def tuned_backward() -> list[tuple[Comparison, str]]:
    workloads = (
        Workload(16, 32, edge=128),
        Workload(256, 32, edge=128, dtype=BF16, result=BF16),
    )
    return [(comparison(workload), "backward") for workload in workloads]


SWEEPS = [
    Sweep("crop_and_resize3d", {256: (1, 2, 4), 512: (2, 4), 1024: (4, 8)}, tuned),
    Sweep(
        "crop_and_resize3d_backward", {256: (2, 4), 512: (2, 4, 8), 1024: (4, 8)}, tuned_backward
    ),
]


def growth() -> Iterator[tuple[Workload, int]]:
    yield Workload(1, 1, (1, 2), edge=4, whole=True, gradient=False), 1
    for size in (4, 16, 64, 128) if DEVICE.type == "cuda" else (2, 4, 8, 16, 32):
        extents = min(size, 32), min(2 * size, 64)
        edge = 2 * extents[1]
        yield Workload(16, size, extents, edge=edge, whole=True, gradient=False), 16 * size**3


LARGE_BYTES = 3


def large(elements: int, part: int) -> None:
    volumes = large_volume(elements, torch.uint8)
    planes, planes_of_part = volumes.shape[2], part // LARGE_ROWS
    boxes = torch.tensor([[0, 2, 3, 4, 6, 19, 36]], dtype=torch.float32, device=DEVICE)
    shift = planes - planes_of_part
    moved = boxes + torch.tensor([0, shift, 0, 0, shift, 0, 0], device=DEVICE)
    last = volumes[:, :, -planes_of_part:].contiguous()
    size = 8, 8, 64  # samples on quarters of a voxel, which float32 has there
    expected = crop_and_resize3d(last, boxes, size, dtype=torch.float32)
    assert_close(crop_and_resize3d(volumes, moved, size, dtype=torch.float32), expected)


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_crop_and_resize3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
