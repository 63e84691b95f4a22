"""Crops of volumes, resized trilinearly, on the CPU.

Small crops are gathered for all boxes at once. Of large ones, a small box is multiplied with a matrix of weights along
each axis, a large one is interpolated between gathered voxels, and whole voxels that torch's own resize does faster are
left to it. The gradient is the transpose.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fmkernels.cpu.voxels import store, window_voxels
from fmkernels.dtypes import compute_dtype

SMALL = 1000  # samples of a crop: with more, what it costs to handle each box by itself is won back
DENSE = 64  # voxels along an axis: with more, a product does too many multiplications by zero
SPARSE = 3  # voxels per sample: with more, too
ENLARGED = 2  # samples per voxel: with more, a product is faster than torch's resize
GROUP = 1 << 20  # weights, or samples, that are made together

_resize = torch.ops.aten.upsample_trilinear3d.out
_resize_back = torch.ops.aten.upsample_trilinear3d_backward


def products_are_exact() -> bool:
    """Whether torch multiplies float32 matrices in float32, and not in less by the user's leave."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


class _Axis:
    """The samples of some boxes along one axis; ``first`` and ``sizes`` are of the voxels from which they are taken."""

    def __init__(self, bounds: Sequence[Tensor], n: int, first: list[int], sizes: list[int], dtype: torch.dtype):
        self.bounds, self.n, self.first, self.sizes, self.dtype = bounds, n, first, sizes, dtype

    @cached_property
    def positions(self) -> Tensor:
        """[boxes, n], counted from the first voxel."""
        start, step, low, high = (bound[:, None] for bound in self.bounds)
        samples = torch.arange(self.n, dtype=torch.float64).add_(0.5)
        positions = (start + samples * step - 0.5).clamp_(low, high)
        return positions.sub_(torch.tensor(self.first)[:, None])

    @cached_property
    def weights(self) -> Tensor:
        """Share of each voxel in each sample, [boxes, n, at most DENSE]."""
        voxels = torch.arange(min(DENSE, max(self.sizes)))
        return (1 - (self.positions[:, :, None] - voxels).abs()).clamp_(min=0).to(self.dtype)

    def neighbours(self, k: int | slice) -> tuple[Tensor, Tensor, Tensor]:
        """For each sample of a box, or of several, the voxels below and above, and the weight of the one above."""
        below = self.positions[k].floor()
        return below.long(), self.positions[k].ceil().long(), (self.positions[k] - below).to(self.dtype)


class _Group:
    """Boxes that are handled together: their places in the list, their volumes, their three axes, and who resizes."""

    def __init__(
        self,
        rows: Tensor,
        boxes: Tensor,
        shape: Sequence[int],
        output_size: Sequence[int],
        clamp_box: bool,
        dtype: torch.dtype,
    ):
        boxes, edge, n = boxes[rows].double(), torch.tensor(shape[2:]).sub_(1), torch.tensor(output_size)
        start, end = boxes[:, 1:4], boxes[:, 4:]
        low, high = torch.zeros_like(start), edge.double().expand_as(end)
        if clamp_box:
            nearest = ((start + end) / 2).floor().clamp_(low, high)
            low, high = (start - 0.5).ceil().clamp_(min=0), (end - 0.5).ceil().sub_(1).clamp_(max=edge)
            empty = low > high
            low, high = torch.where(empty, nearest, low), torch.where(empty, nearest, high)
        step = (end - start) / n
        ends = [(start + i * step - 0.5).clamp_(low, high) for i in (0.5, n - 0.5)]
        whole = ((low == start) & (high + 1 == end)).all(1)  # a crop of whole voxels, clamped at its faces
        first = torch.where(whole[:, None], low, torch.minimum(*ends).floor())
        sizes = torch.where(whole[:, None], high, torch.maximum(*ends).ceil()) - first + 1
        dense = ((sizes <= DENSE) & (sizes <= SPARSE * n)).all(1) & products_are_exact()
        resized = whole & ((n.prod() <= ENLARGED * sizes.prod(1)) | ~dense)
        self.rows, self.volumes = rows, boxes[:, 0].int().tolist()
        self.dense, self.resized = dense.tolist(), resized.tolist()
        self.axes = [
            _Axis([x[:, i] for x in (start, step, low, high)], *along, dtype)
            for i, along in enumerate(zip(output_size, first.long().T.tolist(), sizes.long().T.tolist(), strict=True))
        ]

    def index(self, k: int) -> tuple[slice, ...]:
        """The voxels of a volume [C, D, H, W] from which the samples are taken."""
        return slice(None), *(slice(axis.first[k], axis.first[k] + axis.sizes[k]) for axis in self.axes)

    def weights(self, k: int) -> list[Tensor]:
        return [axis.weights[k, :, : axis.sizes[k]] for axis in self.axes]


def _groups(
    boxes: Tensor, shape: Sequence[int], output_size: Sequence[int], clamp_box: bool, dtype: torch.dtype
) -> Iterator[_Group]:
    """The boxes that lie in a volume of ``shape`` [B, C, D, H, W], in order."""
    extents = boxes[:, 4:] - boxes[:, 1:4]
    usable = (boxes[:, 0] >= 0) & (boxes[:, 0] < shape[0]) & extents.isfinite().all(1)
    rows = usable.nonzero().flatten() if all(shape[2:]) else torch.empty(0, dtype=torch.int64)
    d, h, w = output_size
    for part in rows.split(max(1, GROUP // max(shape[1] * d * h * w, DENSE * max(output_size)))):
        if len(part):
            yield _Group(part, boxes, shape, output_size, clamp_box, dtype)


def _multiplied(part: Tensor, weights: Sequence[Tensor], out: Tensor) -> None:
    """out [C, d, h, w] = samples of part [C, Z, Y, X]; each product turns the first axis into the last."""
    x = part.permute(1, 2, 3, 0)
    for w in weights[:2]:
        x = torch.mm(x.reshape(w.shape[1], -1).T, w.T)
    w = weights[2]
    torch.mm(x.view(w.shape[1], -1).T, w.T, out=out.view(-1, w.shape[0]))


def _multiplied_back(upstream: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The transpose: [C, d, h, w] to [C, Z, Y, X]."""
    x = upstream
    for w in reversed(weights):
        x = torch.mm(w.T, x.reshape(-1, w.shape[0]).T)
    return x.view(*(w.shape[1] for w in weights), len(upstream)).permute(3, 0, 1, 2)


def _between(near: Tensor, far: Tensor, fraction: Tensor) -> Tensor:
    """Where the fraction is 0, what is far has no share, finite or not."""
    return torch.where(fraction > 0, torch.addcmul(near * (1 - fraction), far, fraction), near)


def _gathered(volumes: Tensor, prepare: Callable[[Tensor], Tensor], group: _Group) -> Tensor:
    """All crops of a group [n, C, d, h, w] at once, from the 8 voxels around each sample."""
    neighbours = [axis.neighbours(slice(None)) for axis in group.axes]
    batch, channel, *strides = volumes.stride()
    offsets = (torch.tensor(group.volumes) * batch)[:, None] + torch.arange(volumes.shape[1]) * channel
    for axis, (below, above, _), stride in zip(group.axes, neighbours, strides, strict=True):
        pairs = torch.stack((below, above), 2).flatten(1) + torch.tensor(axis.first)[:, None]
        offsets = offsets[..., None] + (pairs * stride).view(len(pairs), *[1] * (offsets.dim() - 1), -1)
    span = 1 + sum((n - 1) * stride for n, stride in zip(volumes.shape, volumes.stride(), strict=True))
    voxels = volumes.as_strided((span,), (1,)).index_select(0, offsets.flatten())
    voxels = prepare(voxels).view(offsets.shape)  # [n, C, 2d, 2h, 2w]
    for dim, (_, _, fraction) in enumerate(neighbours, 2):
        near, far = voxels.unflatten(dim, (-1, 2)).unbind(dim + 1)
        voxels = _between(near, far, fraction.view(len(offsets), *[1] * (dim - 1), -1, *[1] * (4 - dim)))
    return voxels


def _interpolated(part: Tensor, prepare: Callable[[Tensor], Tensor], axes: Sequence[_Axis], k: int) -> Tensor:
    """[C, d, h, w] from the voxels of box k."""
    for dim, axis in enumerate(axes, 1):
        below, above, fraction = axis.neighbours(k)
        near, far = part.index_select(dim, below), part.index_select(dim, above)
        if dim == 1:
            near, far = prepare(near), prepare(far)
        part = _between(near, far, fraction.view(-1, *[1] * (3 - dim)))
    return part


def _spread(upstream: Tensor, axes: Sequence[_Axis], k: int) -> Tensor:
    """The transpose of ``_interpolated``."""
    for dim, axis in enumerate(axes, 1):
        below, above, fraction = axis.neighbours(k)
        fraction = fraction.view(-1, *[1] * (3 - dim))
        near, far = upstream * (1 - fraction), torch.where(fraction > 0, upstream * fraction, 0)
        shape = *upstream.shape[:dim], axis.sizes[k], *upstream.shape[dim + 1 :]
        upstream = upstream.new_zeros(shape).index_add_(dim, below, near).index_add_(dim, above, far)
    return upstream


def _crop_each(volumes: Tensor, prepare: Callable[[Tensor], Tensor], group: _Group, crops: Tensor) -> None:
    """Write the crops of a group, box by box."""
    parts = [volumes[volume][group.index(k)] for k, volume in enumerate(group.volumes)]
    for k, (part, crop) in enumerate(zip(parts, crops, strict=True)):
        if group.resized[k]:
            _resize(prepare(part)[None], crop.shape[1:], False, out=crop[None])
        elif group.dense[k]:
            _multiplied(prepare(part), group.weights(k), crop)
        else:
            crop.copy_(_interpolated(part, prepare, group.axes, k))
    if volumes.is_floating_point():  # 0 * inf
        for k in crops.flatten(1).sum(1).isfinite().logical_not_().nonzero().flatten().tolist():
            crops[k] = _interpolated(parts[k], prepare, group.axes, k)


def launch_crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    clamp_box: bool,
    window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """As fmkernels.kernels.crop_and_resize3d.launch_crop_and_resize3d."""
    out = volumes.new_zeros((len(boxes), volumes.shape[1], *output_size), dtype=dtype)
    if not out.numel():
        return out
    compute = compute_dtype(volumes.dtype)

    def prepare(part: Tensor) -> Tensor:
        return part.to(compute) if window is None else window_voxels(part.to(compute, copy=True), window)

    for group in _groups(boxes, volumes.shape, output_size, clamp_box, compute):
        first, last = int(group.rows[0]), int(group.rows[-1]) + 1
        direct = dtype == compute and last - first == len(group.rows)
        crops = out[first:last] if direct else torch.empty((len(group.rows), *out.shape[1:]), dtype=compute)
        if out[0, 0].numel() <= SMALL:
            crops.copy_(_gathered(volumes, prepare, group))
        else:
            _crop_each(volumes, prepare, group, crops)
        if not direct:
            stored = torch.empty_like(crops, dtype=dtype)
            store(crops, stored)
            out[group.rows] = stored
    return out


def launch_crop_and_resize3d_gradient(
    upstream: Tensor,
    boxes: Tensor,
    windowed: Tensor | None,
    shape: Sequence[int],
    clamp_box: bool,
    window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """As fmkernels.kernels.crop_and_resize3d.launch_crop_and_resize3d_gradient."""
    output_size = upstream.shape[2:]
    compute = compute_dtype(dtype)
    total = upstream.new_zeros(shape, dtype=compute)
    if not total.numel() or not upstream.numel():
        return total.to(dtype)
    for group in _groups(boxes, shape, output_size, clamp_box, compute):
        for k, row in enumerate(group.rows.tolist()):
            crop = upstream[row].to(compute)
            if group.resized[k]:
                size = [1, len(crop), *(axis.sizes[k] for axis in group.axes)]
                part = _resize_back(crop[None], output_size, size, False)[0]
            elif group.dense[k]:
                part = _multiplied_back(crop, group.weights(k))
            else:
                part = _spread(crop, group.axes, k)
            if not part.sum().isfinite():  # 0 * inf
                part = _spread(crop, group.axes, k)
            total[group.volumes[k]][group.index(k)].add_(part)
    if windowed is not None:
        (low, high), values = window, windowed.to(compute)
        total = torch.where((values >= low) & (values <= high), total.mul_(1 / (high - low)), 0)
    return total.to(dtype)
