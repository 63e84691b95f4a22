"""crop_and_resize3d against loops over F.interpolate and F.grid_sample, torch.compile of the formula, MONAI, SimpleITK.

Boxes of whole voxels are clamped at the box, as a crop followed by a resize does; others at the volume, as grid_sample
does. kornia has crops of one box for each volume only, torchvision has them in two dimensions only.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks.common import DEVICE, OURS, Comparison, Provider, on_one_thread, rows
from fmkernels import crop_and_resize3d

WINDOW = (-1200.0, 600.0)


@dataclass(frozen=True)
class Workload:
    """Crops of ``size``^3 out of 8 volumes of ``edge``^3; integers are windowed.

    Both are powers of 2 and boxes lie on quarters of a voxel: so float32 has every coordinate, in whatever way a
    provider computes it, and what is compared is the work.
    """

    boxes: int
    size: int
    extents: tuple[int, int] = (8, 32)  # of a box along an axis, in voxels
    edge: int = 64
    whole: bool = False  # boxes of whole voxels
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    gradient: bool = True

    def __str__(self) -> str:
        types = str(self.dtype) if self.result == self.dtype else f"{self.dtype} to {self.result}"
        kind = "whole voxels" if self.whole else "fractions"
        window = ", window" if not self.dtype.is_floating_point else "" if self.gradient else ", without gradient"
        low, high = self.extents
        return f"{types.replace('torch.', '')} {self.boxes} boxes of {low}-{high} to {self.size}^3, {kind}{window}"

    @property
    def clamp(self) -> str:
        return "box" if self.whole else "volume"

    @property
    def window(self) -> tuple[float, float] | None:
        return None if self.dtype.is_floating_point else WINDOW

    @property
    def output_size(self) -> tuple[int, int, int]:
        return (self.size,) * 3

    def inputs(self) -> tuple[Tensor, Tensor]:
        shape = (8, 1, *[self.edge] * 3)
        if self.dtype.is_floating_point:
            volumes = torch.randn(shape, device=DEVICE).to(self.dtype).requires_grad_(self.gradient)
        else:
            volumes = torch.randint(-1400, 800, shape, dtype=self.dtype, device=DEVICE)
        low, high = self.extents
        extents = low + torch.rand(self.boxes, 3, device=DEVICE) * (high - low)
        start = torch.rand(self.boxes, 3, device=DEVICE) * (self.edge - extents - 1)
        parts = 1 if self.whole else 4
        start, extents = (start * parts).round() / parts, (extents * parts).round() / parts
        batch = torch.randint(8, (self.boxes, 1), device=DEVICE)
        return volumes, torch.cat([batch, start, start + extents], 1)

    def floor(self) -> dict[str, int]:
        """Every sample, every voxel of a box of mean extents, and for the gradient every voxel, once."""
        samples = self.boxes * self.size**3
        voxels = self.boxes * (sum(self.extents) // 2) ** 3
        forward = samples * self.result.itemsize + voxels * self.dtype.itemsize
        if not self.gradient:
            return {"forward": forward}
        backward = samples * self.result.itemsize + 8 * self.edge**3 * self.dtype.itemsize
        return {"forward": forward, "backward": backward, "both": forward + backward}


WORKLOADS = {
    "cpu": [
        Workload(64, 32, whole=True),
        Workload(16, 64, whole=True),
        Workload(64, 8, whole=True),
        Workload(64, 32),
        Workload(64, 8),
        Workload(64, 32, gradient=False),
        Workload(64, 32, dtype=torch.int16, result=torch.bfloat16, gradient=False),
    ],
    "cuda": [
        Workload(boxes, size, edge=128, whole=whole, dtype=dtype, result=result, gradient=dtype.is_floating_point)
        for boxes, size in ((64, 32), (16, 32), (512, 32), (64, 64))
        for whole, dtype, result in (
            (True, torch.float32, torch.float32),
            (False, torch.float32, torch.float32),
            (False, torch.bfloat16, torch.bfloat16),
            (False, torch.int16, torch.bfloat16),
        )
    ],
}[DEVICE.type]


def ours(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, boxes):
        return crop_and_resize3d(
            volumes, boxes, workload.output_size, clamp=workload.clamp, window=workload.window, dtype=workload.result
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
            F.interpolate(volumes[b : b + 1, :, z1:z2, y1:y2, x1:x2], workload.output_size, mode="trilinear")
            for b, z1, y1, x1, z2, y2, x2 in boxes.int().tolist()
        ]
        return torch.cat(crops)

    return run


def monai(workload: Workload) -> Callable[..., Tensor]:
    """The crop of each box, resized by MONAI's transform."""

    def run(volumes, boxes):
        resize = pytest.importorskip("monai.transforms").Resize(workload.output_size, mode="trilinear")
        crops = [
            resize(volumes[b, :, z1:z2, y1:y2, x1:x2]).as_tensor() for b, z1, y1, x1, z2, y2, x2 in boxes.int().tolist()
        ]
        return torch.stack(crops)

    return run


def _grid(workload: Workload, boxes: Tensor) -> Tensor:
    """What grid_sample takes, [K, d, h, w, 3]."""
    step = (torch.arange(workload.size, device=boxes.device) + 0.5) / workload.size
    start, end = boxes[:, 1:4, None], boxes[:, 4:, None]
    z, y, x = ((start + (end - start) * step) * 2 / workload.edge - 1).unbind(1)
    n = workload.size
    axes = x[:, None, None, :], y[:, None, :, None], z[:, :, None, None]
    return torch.stack([axis.expand(-1, n, n, n) for axis in axes], -1)


def _grid_sample(volumes: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(volumes, grid, padding_mode="border", align_corners=False)


def grid_sample(workload: Workload) -> Callable[..., Tensor]:
    """One call, for which each box has a copy of its volume."""

    def run(volumes, boxes):
        x = _windowed(workload, volumes)
        return _grid_sample(x[boxes[:, 0].long()], _grid(workload, boxes)).to(workload.result)

    return run


def grid_sample_loop(workload: Workload) -> Callable[..., Tensor]:
    """One call for each box."""

    def run(volumes, boxes):
        x, grid = _windowed(workload, volumes), _grid(workload, boxes)
        batch = boxes[:, 0].int().tolist()
        return torch.cat([_grid_sample(x[b : b + 1], grid[k : k + 1]) for k, b in enumerate(batch)]).to(workload.result)

    return run


def formula(workload: Workload) -> Callable[..., Tensor]:
    """The 8 voxels around every sample, gathered for all boxes at once."""

    def run(volumes, boxes):
        step = (torch.arange(workload.size, device=boxes.device) + 0.5) / workload.size
        start, end = boxes[:, 1:4, None], boxes[:, 4:, None]
        low, high = (start, end - 1) if workload.whole else (0 * start, 0 * end + workload.edge - 1)
        position = (start + (end - start) * step - 0.5).maximum(low).minimum(high)  # [K, 3, n]
        below = position.floor()
        sides = [(below.long(), 1 - (position - below)), (position.ceil().long(), position - below)]
        batch = boxes[:, 0].long()[:, None, None, None]
        out = 0.0
        for z, y, x in itertools.product(sides, repeat=3):
            voxels = volumes[batch, :, z[0][:, 0, :, None, None], y[0][:, 1, None, :, None], x[0][:, 2, None, None, :]]
            share = z[1][:, 0, :, None, None] * y[1][:, 1, None, :, None] * x[1][:, 2, None, None, :]
            out = out + _windowed(workload, voxels) * share[..., None]
        return out.movedim(-1, 1).to(workload.result)

    return run


def simple_itk(workload: Workload) -> Callable[..., Tensor]:
    """ResampleImageFilter for each box, which computes coordinates in double precision."""

    def run(volumes, boxes):
        sitk = pytest.importorskip("SimpleITK")
        images = [sitk.GetImageFromArray(volume[0].numpy()) for volume in volumes]
        resample = sitk.ResampleImageFilter()
        resample.SetInterpolator(sitk.sitkLinear)
        resample.SetSize(workload.output_size)
        crops = []
        for b, *bounds in boxes.tolist():
            steps = [(end - start) / workload.size for start, end in zip(bounds[:3], bounds[3:], strict=True)]
            first = [start + 0.5 * step - 0.5 for start, step in zip(bounds[:3], steps, strict=True)]
            resample.SetOutputSpacing(steps[::-1])
            resample.SetOutputOrigin(first[::-1])
            crops.append(torch.from_numpy(sitk.GetArrayFromImage(resample.Execute(images[int(b)]))))
        return torch.stack(crops)[:, None]

    return run


def providers(workload: Workload) -> list[Provider]:
    """Resizing takes boxes of whole voxels, grid_sample clamps at the volume; so does SimpleITK, forward on the CPU."""
    functions = {OURS: ours}
    if workload.whole:
        functions |= {"interpolate loop": interpolate_loop, "MONAI": monai}
    else:
        functions |= {"grid_sample": grid_sample, "grid_sample loop": grid_sample_loop}
    functions |= {"formula": formula, "torch.compile": formula}
    if DEVICE.type == "cpu" and not (workload.whole or workload.window or workload.gradient):
        functions["SimpleITK"] = simple_itk
    return [Provider(name, make(workload), compile=name == "torch.compile") for name, make in functions.items()]


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="crop_and_resize3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda volumes, boxes: reference.crop_and_resize3d(
            volumes, boxes, workload.output_size, clamp=workload.clamp, window=workload.window, dtype=workload.result
        ),
        floor=workload.floor(),
        providers=providers(workload),
    )


EVERY = [*map(comparison, WORKLOADS), *on_one_thread(comparison(Workload(64, 32)))]


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_crop_and_resize3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
