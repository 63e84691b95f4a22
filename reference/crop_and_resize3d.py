"""Crops of volumes resized trilinearly, one box after another, in float64."""

import itertools
import math

import torch
from torch import Tensor


def crop_and_resize3d(
    volumes, boxes, output_size, *, clamp="box", mode="trilinear", window=None, dtype=None
) -> Tensor:
    """out[k, :, i, j, l] = sum over 8 voxels of (1 - |dz|) (1 - |dy|) (1 - |dx|) f(voxel).

    Along an axis with voxels at 0, 1, 2 ..., sample i of n lies at start + (i + 0.5) (end - start)
    / n - 0.5. It is clamped between the first and the last voxel whose center (+ 0.5) lies in
    [start, end), or to the voxel nearest to the box center if there is none; or ("volume") between
    the first and the last voxel of the volume. f is the window. mode "nearest" takes the voxel at
    floor(position + 0.5) along each axis. A box that is not finite or lies in
    no volume gives zeros.
    """
    crops = [_crop(volumes, box, output_size, clamp, mode, window) for box in boxes]
    shape = (0, volumes.shape[1], *output_size)
    out = (
        torch.stack(crops)
        if crops
        else torch.zeros(shape, dtype=torch.float64, device=volumes.device)
    )
    if dtype is None:
        dtype = torch.float32 if window and not volumes.is_floating_point() else volumes.dtype
    if not dtype.is_floating_point:
        out = out.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return out


def apply_window(x: Tensor, window: tuple[float, float]) -> Tensor:
    """clamp((x - low) / (high - low), 0, 1); at the bounds the derivative is that between them.

    That of `torch.clamp` at its bounds is 1 before torch 2.14 and 0 since.
    """
    low, high = window
    x = (x - low) / (high - low)
    return torch.where((x >= 0) & (x <= 1), x, x.detach().clamp(0, 1))


def _crop(volumes: Tensor, box: Tensor, output_size, clamp: str, mode: str, window) -> Tensor:
    batch, *bounds = box.tolist()
    extents_are_finite = bool((box[4:] - box[1:4]).isfinite().all())  # as float32 has them
    if not (0 <= batch < len(volumes) and extents_are_finite and volumes.numel()):
        return torch.zeros(
            volumes.shape[1], *output_size, dtype=torch.float64, device=volumes.device
        )
    volume = volumes[int(batch)].double()
    if window:
        volume = apply_window(volume, window)
    axes = [
        _positions(start, end, n, size, clamp, volume.device)
        for start, end, n, size in zip(
            bounds[:3], bounds[3:], output_size, volume.shape[1:], strict=True
        )
    ]
    if mode == "nearest":
        z, y, x = ((position + 0.5).floor().long() for position in axes)
        return volume[:, z][:, :, y][:, :, :, x]
    out = 0.0
    for z, y, x in itertools.product(*([position.floor(), position.ceil()] for position in axes)):
        weight = 1.0
        for axis, position, voxel in zip((2, 1, 0), axes, (z, y, x), strict=True):
            # at a voxel center, floor and ceil are the same voxel: half of the weight each
            at_center = position.floor() == position.ceil()
            along = torch.where(at_center, 0.5, 1 - (position - voxel).abs())
            weight = weight * along.reshape(-1, *[1] * axis)
        voxels = volume[:, z.long()][:, :, y.long()][:, :, :, x.long()]
        out = out + weight * voxels
    return out


def _positions(start: float, end: float, n: int, size: int, clamp: str, device) -> Tensor:
    first, last = 0, size - 1
    if clamp == "box":
        inside = [voxel for voxel in range(size) if start <= voxel + 0.5 < end]
        nearest = min(max(math.floor((start + end) / 2), 0), size - 1)
        first, last = (inside[0], inside[-1]) if inside else (nearest, nearest)
    positions = [start + (i + 0.5) * (end - start) / n - 0.5 for i in range(n)]
    return torch.tensor(
        [min(max(p, first), last) for p in positions], dtype=torch.float64, device=device
    )
