"""Objects mixed with other objects, resized, on the GPU: one launch, or two where donors share memory with the result.

A voxel belongs to the first target box that holds its centre. A program takes ``LANES`` positions of a few slices of
one box, leaves out what belongs to an earlier one, and mixes the rest with the donors of its own box and of the later
ones, in list order, in registers. The programs of a box share its tiles out among themselves: the host need not know
how large a box is, and none is padded to another. Where the result has memory of its own, or there is a window,
further programs of the same launch write the voxels in no box, in tiles of consecutive voxels.

Where donors share memory with the result, the first launch writes the mixed voxels to the same places of a scratch as
large as the volumes, and the second moves them from there. No other place has room for any boxes without the host
knowing them; of the scratch only the voxels in boxes are ever touched.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.sampling import load_box, place, place_samples, taps, trilinear
from fmkernels.kernels.tuning import launch_parameters
from fmkernels.kernels.voxels import to_storage, window_voxels

LANES = 128  # positions of a slice of a box that a program takes at a time
BOXES = 128  # that are tested at once
PROGRAMS = 2048  # for all boxes together, about
COPY, COPY_PART = (
    4096,
    512,
)  # voxels in no box that a program writes: all at once, or where a box is near
WIDE_FROM = 1 << 31  # voxels from which they are counted in int64
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _clipped(bound, size):
    return tl.minimum(tl.maximum(bound, 0.0), size.to(tl.float32))


@triton.jit
def _first_centre(bound):
    """The first voxel with its centre at or beyond a bound."""
    below = tl.floor(bound)
    return (below + tl.where(bound - below > 0.5, 1.0, 0.0)).to(tl.int32)


@triton.jit
def _load_target(boxes, donor_boxes, k, shape, donor_shape):
    """Of pair ``k``: whether it is mixed at all, the volume, and the voxels whose centres lie in the target: the first
    along each axis, and the first beyond."""
    batch, start, end = load_box(boxes, k)
    donor_batch, donor_start, donor_end = load_box(donor_boxes, k)
    usable = (batch >= 0) & (batch < shape[0]) & (donor_batch >= 0) & (donor_batch < donor_shape[0])
    for axis in tl.static_range(3):
        usable = usable & (tl.abs(start[axis]) < INFINITY) & (tl.abs(end[axis]) < INFINITY)
        usable = (
            usable & (tl.abs(donor_start[axis]) < INFINITY) & (tl.abs(donor_end[axis]) < INFINITY)
        )
        size = donor_shape[1 + axis]
        usable = usable & (_clipped(donor_start[axis], size) < _clipped(donor_end[axis], size))
    z = _first_centre(_clipped(start[0], shape[1]))
    y = _first_centre(_clipped(start[1], shape[2]))
    x = _first_centre(_clipped(start[2], shape[3]))
    z_end = _first_centre(_clipped(end[0], shape[1]))
    y_end = _first_centre(_clipped(end[1], shape[2]))
    x_end = _first_centre(_clipped(end[2], shape[3]))
    return usable, batch.to(tl.int32), (z, y, x), (z_end, y_end, x_end)


@triton.jit
def _next_near(boxes, after, K, batch, last_batch, start, end, BOXES: tl.constexpr):
    """The first box after number ``after`` that may hold a voxel of the given box of the given volumes, else K."""
    found = K
    group = after + 1
    while group < found:
        candidate = group + tl.arange(0, BOXES)
        other, other_start, other_end = load_box(boxes, candidate, candidate < K)
        near = (other >= tl.floor(batch)) & (other < tl.floor(last_batch) + 1.0)
        for axis in tl.static_range(3):
            near = near & (other_start[axis] < end[axis]) & (other_end[axis] > start[axis])
        found = tl.min(tl.where(near, candidate, K), 0)
        group += BOXES
    return found


@triton.jit
def _next_neighbour(boxes, after, K, k, BOXES: tl.constexpr):
    """The first box after number ``after`` that may share a voxel with box ``k``, such as itself, else K."""
    batch, start, end = load_box(boxes, k)
    return _next_near(boxes, after, K, batch, batch, start, end, BOXES)


@triton.jit
def _inside(z, y, x, first, stop):
    in_plane = (y >= first[1]) & (y < stop[1]) & (x >= first[2]) & (x < stop[2])
    return (z >= first[0]) & (z < stop[0]) & in_plane


@triton.jit
def _voxel(b, c, z, y, x, strides):
    """Offset of a voxel."""
    plane = z.to(tl.int64) * strides[2] + (
        y.to(tl.int64) * strides[3] + x.to(tl.int64) * strides[4]
    )
    return b.to(tl.int64) * strides[0] + c.to(tl.int64) * strides[1] + plane


@triton.jit
def _loaded(pointer, mask, low, scale, WINDOW: tl.constexpr):
    value = tl.load(pointer, mask, None if mask is None else 0)
    return window_voxels(value, low, scale) if WINDOW else value.to(low.dtype)


@triton.jit
def _sample(
    donors,
    donor_boxes,
    k,
    c,
    z,
    y,
    x,
    first,
    stop,
    shape,
    strides,
    low,
    scale,
    WINDOW: tl.constexpr,
):
    """The donor of pair ``k`` at the voxels z [DEPTH, 1], y and x [1, LANES]; at an edge for voxels outside the box."""
    T: tl.constexpr = low.dtype
    batch, start, end = load_box(donor_boxes, k)
    start = (
        _clipped(start[0], shape[1]),
        _clipped(start[1], shape[2]),
        _clipped(start[2], shape[3]),
    )
    end = (_clipped(end[0], shape[1]), _clipped(end[1], shape[2]), _clipped(end[2], shape[3]))
    z_origin, z_first, z_step, z_low, z_high = place_samples(
        start[0], end[0], shape[1], stop[0] - first[0], True
    )
    y_origin, y_first, y_step, y_low, y_high = place_samples(
        start[1], end[1], shape[2], stop[1] - first[1], True
    )
    x_origin, x_first, x_step, x_low, x_high = place_samples(
        start[2], end[2], shape[3], stop[2] - first[2], True
    )
    origin = donors + batch.to(tl.int64) * strides[0] + c.to(tl.int64) * strides[1]
    origin += z_origin.to(tl.int64) * strides[2] + y_origin.to(tl.int64) * strides[3]
    origin += x_origin.to(tl.int64) * strides[4]
    z, dz, fz = taps(place(z - first[0], z_first, z_step, z_low, z_high), strides[2], T)
    y, dy, fy = taps(place(y - first[1], y_first, y_step, y_low, y_high), strides[3], T)
    x, dx, fx = taps(place(x - first[2], x_first, x_step, x_low, x_high), strides[4], T)
    return trilinear(origin + (z + (y + x)), dz, dy, dx, fz, fy, fx, low, scale, WINDOW)


@triton.jit(
    do_not_specialize=[
        "K", "programs", "B", "C", "D", "H", "W", "inner", "pool", "donor_D", "donor_H", "donor_W",
        "stride_b", "stride_c", "stride_z", "stride_y", "stride_x",
        "out_b", "out_c", "out_z", "out_y", "out_x",
        "donor_b", "donor_c", "donor_z", "donor_y", "donor_x",
    ]
)  # fmt: skip
def object_mixup_kernel(
    volumes,  # [B, C, D, H, W], with strides
    donors,  # [pool, C, donor_D, donor_H, donor_W], with strides; or the mixed voxels, where MIXED
    out,  # [B, C, D, H, W], with strides, written; may be volumes
    boxes,  # [K, 7] float32
    donor_boxes,  # [K, 7] float32
    lam,  # [K]
    K, programs,  # for each box
    B, C, D, H, W,
    inner,  # channels that lie side by side: 1, or C where channels are the last in memory
    pool, donor_D, donor_H, donor_W,
    stride_b, stride_c, stride_z, stride_y, stride_x,
    out_b, out_c, out_z, out_y, out_x,
    donor_b, donor_c, donor_z, donor_y, donor_x,
    window_low: tl.float64, window_scale: tl.float64,
    LANES: tl.constexpr, DEPTH: tl.constexpr, BOXES: tl.constexpr,
    COPY: tl.constexpr,  # voxels of a tile, or 0 where only voxels in boxes are written
    COPY_PART: tl.constexpr,
    MIXED: tl.constexpr, WINDOW: tl.constexpr, DONOR_WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if volumes.dtype.element_ty == tl.float64 else tl.float32
    TYPE: tl.constexpr = out.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    low, scale = window_low.to(T), window_scale.to(T)
    shape, donor_shape = (B, D, H, W), (pool, donor_D, donor_H, donor_W)
    program = tl.program_id(0)
    if program < K * programs:
        k = program // programs
        tile = (program - k * programs).to(INDEX)
        tiles = tile + 1
        while (
            tile < tiles
        ):  # the box is loaded again for every tile: few boxes have more than one for a program
            usable, b, first, stop = _load_target(boxes, donor_boxes, k, shape, donor_shape)
            columns = tl.maximum(stop[2] - first[2], 0).to(INDEX)
            plane = tl.maximum(stop[1] - first[1], 0).to(INDEX) * columns
            across, layers = (
                tl.cdiv(plane, LANES),
                tl.cdiv(tl.maximum(stop[0] - first[0], 0), DEPTH),
            )
            tiles = tl.where(usable, across * layers * C, 0)
            if tile < tiles:
                layer = tile // across
                c = layer // layers
                lane = (tile - layer * across) * LANES + tl.arange(0, LANES)
                row = lane // columns
                x = first[2] + (lane - row * columns).to(tl.int32)[None, :]
                y = first[1] + row.to(tl.int32)[None, :]
                z = (
                    first[0]
                    + ((layer - c * layers) * DEPTH + tl.arange(0, DEPTH)).to(tl.int32)[:, None]
                )
                mask = (z < stop[0]) & (lane < plane)[None, :]
                donor_strides = (donor_b, donor_c, donor_z, donor_y, donor_x)
                value = tl.zeros([DEPTH, LANES], T)
                j = _next_neighbour(boxes, -1, K, k, BOXES)
                while j < (k if MIXED else K):
                    applied, _, from_, to = _load_target(boxes, donor_boxes, j, shape, donor_shape)
                    inside = applied & _inside(z, y, x, from_, to)
                    if j < k:
                        mask = mask & ~inside
                    elif not MIXED:
                        if j == k:
                            at = _voxel(
                                b, c, z, y, x, (stride_b, stride_c, stride_z, stride_y, stride_x)
                            )
                            value = _loaded(volumes + at, mask, low, scale, WINDOW)
                        if applied:
                            donor = _sample(
                                donors, donor_boxes, j, c, z, y, x, from_, to, donor_shape, donor_strides, low, scale,
                                DONOR_WINDOW,
                            )  # fmt: skip
                            part = tl.load(lam + j).to(T)
                            mixed = tl.fma(
                                tl.broadcast_to(part, value.shape), value, (1.0 - part) * donor
                            )
                            value = tl.where(inside, mixed, value)
                    j = _next_neighbour(boxes, j, K, k, BOXES)
                at = _voxel(b, c, z, y, x, (out_b, out_c, out_z, out_y, out_x))
                if MIXED:
                    tl.store(
                        out + at, tl.load(donors + _voxel(b, c, z, y, x, donor_strides), mask), mask
                    )
                else:
                    tl.store(out + at, to_storage(value, TYPE), mask)
            tile += programs
    elif COPY > 0:
        begin = (program - K * programs).to(INDEX) * COPY
        length = W.to(INDEX) * inner
        rows = (B * (C // inner)).to(INDEX) * D * H
        last = tl.minimum(begin + COPY, rows * length) - 1
        first_row, last_row = begin // length, last // length
        first_plane, last_plane = first_row // H, last_row // H
        first_volume, last_volume = first_plane // D, last_plane // D
        outer = C // inner
        batch, last_batch = (
            (first_volume // outer).to(tl.float32),
            (last_volume // outer).to(tl.float32),
        )
        one_volume, one_plane = first_volume == last_volume, first_plane == last_plane
        start = (
            tl.where(one_volume, first_plane - first_volume * D, 0).to(tl.float32),
            tl.where(one_plane, first_row - first_plane * H, 0).to(tl.float32),
            0.0,
        )
        end = (
            tl.where(one_volume, last_plane - last_volume * D + 1, D).to(tl.float32),
            tl.where(one_plane, last_row - last_plane * H + 1, H).to(tl.float32),
            W.to(tl.float32),
        )
        nearest = _next_near(boxes, -1, K, batch, last_batch, start, end, BOXES)
        if (nearest == K) & (last - begin == COPY - 1):
            here = begin.to(tl.int64) + tl.arange(0, COPY)
            tl.store(
                out + here, to_storage(_loaded(volumes + here, None, low, scale, WINDOW), TYPE)
            )
        else:
            for piece in range(0, last - begin + 1, COPY_PART):
                at = begin + piece + tl.arange(0, COPY_PART)
                row = at // length
                x = (at - row * length) // inner
                plane = row // H
                volume = plane // D
                y, z, b = row - plane * H, plane - volume * D, volume // outer
                free = at <= last
                k = nearest
                while k < K:
                    applied, b_box, from_, to = _load_target(
                        boxes, donor_boxes, k, shape, donor_shape
                    )
                    free = free & ~(applied & (b == b_box) & _inside(z, y, x, from_, to))
                    k = _next_near(boxes, k, K, batch, last_batch, start, end, BOXES)
                tl.store(
                    out + at,
                    to_storage(_loaded(volumes + at, free, low, scale, WINDOW), TYPE),
                    free,
                )


def _same_voxels(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


def _span(x: Tensor) -> tuple[int, int]:
    """First address of a tensor that is not empty, and the first beyond."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    (begin, end), (start, stop) = _span(a), _span(b)
    return begin < stop and start < end


def _inner_channels(x: Tensor) -> int | None:
    """How many channels lie side by side, where the voxels are consecutive in memory."""
    if x.is_contiguous():
        return 1
    return x.shape[1] if x.is_contiguous(memory_format=torch.channels_last_3d) else None


def launch_object_mixup(
    volumes: Tensor,
    donors: Tensor | None,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The mixed volumes, in a new tensor of type ``dtype``.

    ``volumes`` are contiguous or channels_last_3d; ``donors`` may be strided, None stands for the volumes; boxes and
    ``lam`` are contiguous. ``donor_window`` is the same as ``window``, unless that is None.
    """
    out = torch.empty_like(volumes, dtype=dtype)
    launch_object_mixup_into(volumes, donors, boxes, donor_boxes, lam, window, donor_window, out)
    return out


def launch_object_mixup_into(
    volumes: Tensor,
    donors: Tensor | None,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    out: Tensor,
) -> None:
    """As launch_object_mixup, into ``out``: the volumes themselves or memory apart from them, with any strides."""
    donors = volumes if donors is None else donors
    if not out.numel():
        return
    only_boxes = window is None and _same_voxels(volumes, out)
    inner = None if only_boxes else _inner_channels(volumes)
    if not only_boxes and (inner is None or volumes.stride() != out.stride()):
        dense = volumes.contiguous() if inner is None else volumes
        out.copy_(
            launch_object_mixup(
                dense, donors, boxes, donor_boxes, lam, window, donor_window, out.dtype
            )
        )
    elif donors.numel() and _share_memory(donors, out):
        scratch = torch.empty_like(out, memory_format=torch.contiguous_format)
        _launch(volumes, donors, boxes, donor_boxes, lam, window, donor_window, scratch)
        _launch(
            volumes,
            donors,
            boxes,
            donor_boxes,
            lam,
            window,
            donor_window,
            out,
            inner=inner,
            mixed=scratch,
        )
    else:
        _launch(volumes, donors, boxes, donor_boxes, lam, window, donor_window, out, inner=inner)


def programs_of(shape: Sequence[int], boxes: int, block: int) -> int:
    """How many programs share the tiles of a box, for so many boxes: enough of them together, and none too many."""
    _, C, D, H, W = shape
    tiles = triton.cdiv(H * W, LANES) * triton.cdiv(D, block // LANES) * C
    return min(tiles, max(1, PROGRAMS // max(boxes, 1)))


def _launch(
    volumes: Tensor,
    donors: Tensor,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    out: Tensor,
    *,
    inner: int | None = None,
    mixed: Tensor | None = None,
) -> None:
    """Write the voxels in boxes, taken from ``mixed`` where they lie there, and, given ``inner``, all others too."""
    launch = launch_parameters("object_mixup3d", out.device)
    (B, C, D, H, W), K = out.shape, boxes.shape[0]
    programs = programs_of(out.shape, K, launch.block)
    copies = 0 if inner is None else triton.cdiv(out.numel(), COPY)
    grid = K * programs + copies
    if not grid:
        return
    sources = donors if mixed is None else mixed
    low, high = window or donor_window or (0.0, 1.0)
    with torch.cuda.device_of(out):
        object_mixup_kernel[(grid,)](
            volumes, sources, out, boxes, donor_boxes, lam, K, programs, B, C, D, H, W, inner or 1, donors.shape[0],
            *donors.shape[2:], *volumes.stride(), *out.stride(), *sources.stride(), low, 1 / (high - low),
            LANES=LANES, DEPTH=launch.block // LANES, BOXES=BOXES, COPY=COPY if copies else 0, COPY_PART=COPY_PART,
            MIXED=mixed is not None, WINDOW=window is not None, DONOR_WINDOW=donor_window is not None and mixed is None,
            WIDE=out.numel() + COPY >= WIDE_FROM, num_warps=launch.num_warps, **launch.register_limit,
        )  # fmt: skip
