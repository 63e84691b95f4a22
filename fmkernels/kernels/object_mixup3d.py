"""Objects mixed with other objects, resized, on the GPU: one launch, or two if donors overlap out.

A voxel belongs to the first target box that holds its center. The programs of a box divide its
tiles among themselves: the host need not know the size of a box, and no box is padded to the size
of another. A program looks once whether other boxes are near its own.

Where none is, a tile is ``LANES`` positions in several layers. The program marches along z and
keeps the planes of the donor between which the next layer lies. Else a tile is ``LANES`` positions
of ``DEPTH`` layers. The program leaves out the voxels that belong to an earlier box, and mixes the
others with the donors of its own and of later boxes, in list order, in registers.

Unless the op works in place and without a window, further programs of the same launch write the
voxels outside of all boxes, in tiles of consecutive voxels.

If ``out`` overlaps donors, the first launch writes the mixed voxels to a scratch tensor of the
shape of ``out``, and the second launch copies them. The host does not know the boxes, so only such
a scratch has room for any of them; its voxels outside of boxes are never touched.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.launching import quick
from fmkernels.kernels.sampling import (
    load_box,
    march,
    sample_axis,
    sample_position,
    taps,
    trilinear,
)
from fmkernels.kernels.tuning import debug, launch_parameters
from fmkernels.kernels.voxels import to_storage, window_voxels

LANES = 256  # positions per layer of a tile
LAYERS = 4  # of a tile along z, at least, where no other box is near
BOXES = 128  # boxes tested at once
PROGRAMS = 1024  # target number of programs over all boxes
COPY = 4096  # voxels outside of boxes per program
COPY_PART = 512  # voxels per step of a program near a box
WIDE_FROM = 1 << 31  # voxels, and offsets in a plane, from which they take int64
INFINITY = tl.constexpr(float("inf"))
ALL_SAMPLED = tl.constexpr(1 << 30)  # a plane behind the last one of any volume


@triton.jit
def _clipped(bound, size):
    return tl.minimum(tl.maximum(bound, 0.0), size.to(tl.float32))


@triton.jit
def _first_center(bound):
    """The first voxel with its center at or beyond a bound."""
    below = tl.floor(bound)
    return (below + tl.where(bound - below > 0.5, 1.0, 0.0)).to(tl.int32)


@triton.jit
def _load_target(boxes, donor_boxes, k, shape, donor_shape):
    """Whether pair ``k`` is mixed, its volume, and the first and the end voxel along each axis."""
    batch, start, end = load_box(boxes, k)
    donor_batch, donor_start, donor_end = load_box(donor_boxes, k)
    usable = (batch >= 0) & (batch < shape[0]) & (donor_batch >= 0) & (donor_batch < donor_shape[0])
    for axis in tl.static_range(3):
        usable = usable & (tl.abs(start[axis]) < INFINITY) & (tl.abs(end[axis]) < INFINITY)
        usable = usable & (tl.abs(donor_start[axis]) < INFINITY)
        usable = usable & (tl.abs(donor_end[axis]) < INFINITY)
        size = donor_shape[1 + axis]
        usable = usable & (_clipped(donor_start[axis], size) < _clipped(donor_end[axis], size))
    z = _first_center(_clipped(start[0], shape[1]))
    y = _first_center(_clipped(start[1], shape[2]))
    x = _first_center(_clipped(start[2], shape[3]))
    z_end = _first_center(_clipped(end[0], shape[1]))
    y_end = _first_center(_clipped(end[1], shape[2]))
    x_end = _first_center(_clipped(end[2], shape[3]))
    return usable, batch.to(tl.int32), (z, y, x), (z_end, y_end, x_end)


@triton.jit
def _next_near(boxes, after, K, but, batch, last_batch, start, end, BOXES: tl.constexpr):
    """The first box after ``after`` that may overlap the given box of the given volumes, else K.

    Box number ``but`` does not count.
    """
    nearest = K
    group = after + 1
    while group < nearest:
        candidate = group + tl.arange(0, BOXES)
        other, other_start, other_end = load_box(boxes, candidate, candidate < K)
        near = (other >= tl.floor(batch)) & (other < tl.floor(last_batch) + 1.0)
        near = near & (candidate != but)
        for axis in tl.static_range(3):
            near = near & (other_start[axis] < end[axis]) & (other_end[axis] > start[axis])
        nearest = tl.min(tl.where(near, candidate, K), 0)
        group += BOXES
    return nearest


@triton.jit
def _next_neighbor(boxes, after, K, k, but, BOXES: tl.constexpr):
    """The first box after ``after``, but one, that may overlap box ``k``, else K."""
    batch, start, end = load_box(boxes, k)
    return _next_near(boxes, after, K, but, batch, batch, start, end, BOXES)


@triton.jit
def _inside(z, y, x, first, stop):
    in_plane = (y >= first[1]) & (y < stop[1]) & (x >= first[2]) & (x < stop[2])
    return (z >= first[0]) & (z < stop[0]) & in_plane


@triton.jit
def _voxel(b, c, z, y, x, strides):
    """Offset of a voxel."""
    row = y.to(tl.int64) * strides[3] + x.to(tl.int64) * strides[4]
    volume = b.to(tl.int64) * strides[0] + c.to(tl.int64) * strides[1]
    return volume + (z.to(tl.int64) * strides[2] + row)


@triton.jit
def _load_voxels(pointer, mask, low, scale, WINDOW: tl.constexpr):
    value = tl.load(pointer, mask, None if mask is None else 0)
    return window_voxels(value, low, scale) if WINDOW else value.to(low.dtype)


@triton.jit
def _in_plane(y, x, strides, INDEX: tl.constexpr):
    return y.to(INDEX) * strides[3].to(INDEX) + x.to(INDEX) * strides[4].to(INDEX)


@triton.jit
def _mix(own, donor, weight):
    return _weighted(tl.where(weight == 0.0, 0.0, own), donor, weight)  # it may not be finite


@triton.jit
def _weighted(own, donor, weight):
    return tl.fma(tl.broadcast_to(weight, own.shape), own, (1.0 - weight) * donor)


@triton.jit
def _donor_axes(donor_boxes, k, layers, rows, columns, shape):
    """Volume of a donor, and the axes of `sample_axis` for so many samples, clipped to it."""
    batch, start, end = load_box(donor_boxes, k)
    z1, z2 = _clipped(start[0], shape[1]), _clipped(end[0], shape[1])
    y1, y2 = _clipped(start[1], shape[2]), _clipped(end[1], shape[2])
    x1, x2 = _clipped(start[2], shape[3]), _clipped(end[2], shape[3])
    z_axis = sample_axis(z1, z2, shape[1], layers, True)
    y_axis = sample_axis(y1, y2, shape[2], rows, True)
    return batch, z_axis, y_axis, sample_axis(x1, x2, shape[3], columns, True)


@triton.jit
def _sample(
    donors, donor_boxes, k, c, z, y, x, first, stop, shape, strides, low, scale,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """The donor of pair ``k`` at the voxels z [DEPTH, 1], y and x [1, LANES].

    Voxels outside of the box take the value at its edge.
    """
    T: tl.constexpr = low.dtype
    batch, z_axis, y_axis, x_axis = _donor_axes(
        donor_boxes, k, stop[0] - first[0], stop[1] - first[1], stop[2] - first[2], shape
    )
    origin = donors + _voxel(batch, c, z_axis[0], y_axis[0], x_axis[0], strides)
    z = sample_position(z - first[0], z_axis[1], z_axis[2], z_axis[3], z_axis[4])
    y = sample_position(y - first[1], y_axis[1], y_axis[2], y_axis[3], y_axis[4])
    x = sample_position(x - first[2], x_axis[1], x_axis[2], x_axis[3], x_axis[4])
    z, dz, fz = taps(z, strides[2], T)
    y, dy, fy = taps(y, strides[3], T)
    x, dx, fx = taps(x, strides[4], T)
    return trilinear(origin + (z + (y + x)), dz, dy, dx, fz, fy, fx, low, scale, WINDOW)


@triton.jit
def _load_weight(lam, k, T: tl.constexpr):
    weight = tl.load(lam + k).to(T)
    tl.device_assert(
        ((weight < 0.0) | (weight > 1.0)) == 0, "object_mixup3d: lam must be in [0, 1]"
    )
    return weight


@triton.jit
def _mix_alone(
    volumes, donors, out, donor_boxes, lam, k, tile, programs, b, first, stop, C, donor_shape,
    strides, donor_strides, low, scale,
    LANES: tl.constexpr, LAYERS: tl.constexpr, IN_PLACE: tl.constexpr, MIXED: tl.constexpr,
    WINDOW: tl.constexpr, DONOR_WINDOW: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write the voxels of box ``k``, which no other box overlaps (no earlier one, if MIXED)."""
    T: tl.constexpr = low.dtype
    layers, rows, columns = stop[0] - first[0], stop[1] - first[1], stop[2] - first[2]
    plane = rows.to(INDEX) * columns
    across = tl.cdiv(plane, LANES)
    chunks = tl.minimum(programs // (across * C), tl.cdiv(layers, LAYERS)).to(tl.int32)
    chunks = tl.maximum(chunks, 1)
    depth = tl.cdiv(layers, chunks)
    if not MIXED:
        weight = _load_weight(lam, k, T)
        batch, z_axis, y_axis, x_axis = _donor_axes(
            donor_boxes, k, layers, rows, columns, donor_shape
        )
    lane = tl.arange(0, LANES)
    while tile < across * chunks * C:
        column_of_tiles = tile // across
        position = (tile - column_of_tiles * across) * LANES
        c = (column_of_tiles // chunks).to(tl.int32)
        layer = (column_of_tiles - c * chunks).to(tl.int32) * depth
        lanes = plane - position
        inside = position + tl.minimum(lane, lanes - 1)  # lanes past the end repeat the last one
        there = lane < lanes
        row = (inside // columns).to(tl.int32)
        column = (inside - row * columns.to(INDEX)).to(tl.int32)
        layers_left = tl.minimum(depth, layers - layer)
        z = first[0] + layer
        at = _voxel(b, c, z, first[1], first[2], strides)
        at_lane = _in_plane(row, column, strides, INDEX)
        own = volumes + at
        to = own if IN_PLACE else out + at
        if MIXED:
            mixed = donors + at
            for _ in range(layers_left):
                tl.store(to + at_lane, tl.load(mixed + at_lane, there), there)
                mixed += strides[2]
                to += strides[2]
        else:
            origin = donors + _voxel(batch, c, z_axis[0], y_axis[0], x_axis[0], donor_strides)
            y = sample_position(row, y_axis[1], y_axis[2], y_axis[3], y_axis[4])
            x = sample_position(column, x_axis[1], x_axis[2], x_axis[3], x_axis[4])
            y_below, x_below = tl.floor(y), tl.floor(x)
            fy, fx = (y - y_below).to(T), (x - x_below).to(T)
            offset = _in_plane(y_below, x_below, donor_strides, INDEX)
            near, far = tl.zeros([LANES], T), tl.zeros([LANES], T)
            seen = there & (weight != 0.0)  # else it may not be finite
            sampled = tl.where(weight != 1.0, z_axis[3].to(tl.int32) - 1, ALL_SAMPLED)
            for _ in range(layers_left):
                value = _load_voxels(own + at_lane, seen, low, scale, WINDOW)
                z_donor = sample_position(layer, z_axis[1], z_axis[2], z_axis[3], z_axis[4])
                donor, near, far, sampled = march(
                    origin, offset, donor_strides[2], donor_strides[3], donor_strides[4], z_donor,
                    fy, fx, near, far, sampled, True, low, scale, False, DONOR_WINDOW,
                )  # fmt: skip
                tl.store(
                    to + at_lane,
                    to_storage(_weighted(value, donor, weight), out.dtype.element_ty),
                    there,
                )
                layer += 1
                own += strides[2]
                to += strides[2]
        tile += programs


@triton.jit
def _mix_overlapping(
    volumes, donors, out, boxes, donor_boxes, lam, k, tile, programs, K, b, first, stop, C, shape,
    donor_shape, strides, donor_strides, low, scale,
    LANES: tl.constexpr, DEPTH: tl.constexpr, BOXES: tl.constexpr, MIXED: tl.constexpr,
    WINDOW: tl.constexpr, DONOR_WINDOW: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write the voxels of box ``k`` that belong to it."""
    T: tl.constexpr = low.dtype
    columns = (stop[2] - first[2]).to(INDEX)
    plane = (stop[1] - first[1]).to(INDEX) * columns
    across, layers = tl.cdiv(plane, LANES), tl.cdiv(stop[0] - first[0], DEPTH)
    while tile < across * layers * C:
        layer = tile // across
        c = layer // layers
        lane = (tile - layer * across) * LANES + tl.arange(0, LANES)
        row = lane // columns
        x = first[2] + (lane - row * columns).to(tl.int32)[None, :]
        y = first[1] + row.to(tl.int32)[None, :]
        slices = (layer - c * layers) * DEPTH + tl.arange(0, DEPTH)
        z = first[0] + slices.to(tl.int32)[:, None]
        mask = (z < stop[0]) & (lane < plane)[None, :]
        value = tl.zeros([DEPTH, LANES], T)
        j = _next_neighbor(boxes, -1, K, k, K, BOXES)
        while j < (k if MIXED else K):
            applied, _, from_, to = _load_target(boxes, donor_boxes, j, shape, donor_shape)
            inside = applied & _inside(z, y, x, from_, to)
            if j < k:
                mask = mask & ~inside
            elif not MIXED:
                if j == k:
                    at = _voxel(b, c, z, y, x, strides)
                    value = _load_voxels(volumes + at, mask, low, scale, WINDOW)
                weight = _load_weight(lam, j, T)
                if applied & (weight != 1.0):  # not 0 * donor: it may not be finite
                    donor = _sample(
                        donors, donor_boxes, j, c, z, y, x, from_, to, donor_shape, donor_strides,
                        low, scale, DONOR_WINDOW,
                    )  # fmt: skip
                    value = tl.where(inside, _mix(value, donor, weight), value)
            j = _next_neighbor(boxes, j, K, k, K, BOXES)
        at = _voxel(b, c, z, y, x, strides)
        if MIXED:
            tl.store(out + at, tl.load(donors + at, mask), mask)
        else:
            tl.store(out + at, to_storage(value, out.dtype.element_ty), mask)
        tile += programs


@quick
@triton.jit(
    do_not_specialize=[
        "K", "programs", "B", "C", "D", "H", "W", "inner",
        "num_donors", "donor_D", "donor_H", "donor_W",
        "stride_b", "stride_c", "stride_z", "stride_y", "stride_x",
        "donor_b", "donor_c", "donor_z", "donor_y", "donor_x",
    ]
)  # fmt: skip
def fmkernels_object_mixup_kernel(
    volumes,  # [B, C, D, H, W], with strides
    donors,  # [num_donors, C, donor_D, donor_H, donor_W], with strides; if MIXED, like out
    out,  # [B, C, D, H, W], with the strides of volumes, written; may be volumes
    boxes,  # [K, 7] float32
    donor_boxes,  # [K, 7] float32
    lam,  # [K]
    K, programs,  # programs per box
    B, C, D, H, W,
    inner,  # adjacent channels: 1, or C for channels_last_3d
    num_donors, donor_D, donor_H, donor_W,
    stride_b, stride_c, stride_z, stride_y, stride_x,
    donor_b, donor_c, donor_z, donor_y, donor_x,
    window_low: tl.float64, window_scale: tl.float64,
    LANES: tl.constexpr, DEPTH: tl.constexpr, LAYERS: tl.constexpr, BOXES: tl.constexpr,
    COPY: tl.constexpr,  # voxels per tile; 0 if only voxels in boxes are written
    COPY_PART: tl.constexpr,
    IN_PLACE: tl.constexpr,  # out is volumes: known of those with COPY 0
    MIXED: tl.constexpr, WINDOW: tl.constexpr, DONOR_WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if volumes.dtype.element_ty == tl.float64 else tl.float32
    TYPE: tl.constexpr = out.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    low, scale = window_low.to(T), window_scale.to(T)
    shape, donor_shape = (B, D, H, W), (num_donors, donor_D, donor_H, donor_W)
    program = tl.program_id(0)
    if program < K * programs:
        k = program // programs
        tile = (program - k * programs).to(INDEX)
        usable, b, first, stop = _load_target(boxes, donor_boxes, k, shape, donor_shape)
        plane = tl.maximum(stop[1] - first[1], 0).to(INDEX) * tl.maximum(stop[2] - first[2], 0)
        SHALLOWEST: tl.constexpr = DEPTH if DEPTH < LAYERS else LAYERS  # layers of either tile
        layers = tl.cdiv(tl.maximum(stop[0] - first[0], 0), SHALLOWEST)
        if usable & (tile < tl.cdiv(plane, LANES) * layers * C):
            strides = (stride_b, stride_c, stride_z, stride_y, stride_x)
            donor_strides = (donor_b, donor_c, donor_z, donor_y, donor_x)
            if _next_neighbor(boxes, -1, K, k, k, BOXES) >= (k if MIXED else K):
                _mix_alone(
                    volumes, donors, out, donor_boxes, lam, k, tile, programs, b, first, stop, C,
                    donor_shape, strides, donor_strides, low, scale,
                    LANES, LAYERS, IN_PLACE, MIXED, WINDOW, DONOR_WINDOW, INDEX,
                )  # fmt: skip
            else:
                _mix_overlapping(
                    volumes, donors, out, boxes, donor_boxes, lam, k, tile, programs, K, b, first,
                    stop, C, shape, donor_shape, strides, donor_strides, low, scale,
                    LANES, DEPTH, BOXES, MIXED, WINDOW, DONOR_WINDOW, INDEX,
                )  # fmt: skip
    elif COPY > 0:
        begin = (program - K * programs).to(INDEX) * COPY
        length = W.to(INDEX) * inner
        rows = (B * (C // inner)).to(INDEX) * D * H
        last = tl.minimum(begin + COPY, rows * length) - 1
        first_row, last_row = begin // length, last // length
        first_plane, last_plane = first_row // H, last_row // H
        first_volume, last_volume = first_plane // D, last_plane // D
        outer = C // inner
        batch = (first_volume // outer).to(tl.float32)
        last_batch = (last_volume // outer).to(tl.float32)
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
        nearest = _next_near(boxes, -1, K, K, batch, last_batch, start, end, BOXES)
        if (nearest == K) & (last - begin == COPY - 1):
            here = begin.to(tl.int64) + tl.arange(0, COPY)
            value = _load_voxels(volumes + here, None, low, scale, WINDOW)
            tl.store(out + here, to_storage(value, TYPE))
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
                    k = _next_near(boxes, k, K, K, batch, last_batch, start, end, BOXES)
                value = _load_voxels(volumes + at, free, low, scale, WINDOW)
                tl.store(out + at, to_storage(value, TYPE), free)


def object_mixup3d(
    volumes: Tensor,
    donors: Tensor | None,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donor_window: Sequence[float] | None,
    out: Tensor,
    in_place: bool = False,
    overlap: bool = False,
) -> None:
    """Write the mixed volumes.

    ``volumes`` and ``out`` are both contiguous or both channels_last_3d; they may have any strides
    in place without a window. ``donors`` may have any strides, None stands for the volumes. Boxes
    and ``lam`` are contiguous. ``donor_window`` equals ``window``, unless that is None.
    ``in_place``: ``out`` is the volumes. ``overlap``: ``out`` and the donors overlap.
    """
    if not out.numel():
        return
    donors = volumes if donors is None else donors
    inputs = volumes, boxes, donor_boxes, lam, window
    if in_place and window is None:
        inner = None
    else:
        inner = 1 if volumes.is_contiguous() else volumes.shape[1]
    if overlap and donors.numel():
        scratch = out.new_empty_strided(out.shape, volumes.stride())
        _launch(*inputs, donors, donor_window, scratch, None)
        _launch(*inputs, donors, None, out, inner, scratch)
    else:
        _launch(*inputs, donors, donor_window, out, inner, in_place=inner is None)


def programs_per_box(shape: Sequence[int], boxes: int) -> int:
    """The number of programs that divide the tiles of each of so many boxes among themselves."""
    _, C, D, H, W = shape
    tiles = -(-H * W // LANES) * -(-D // LAYERS) * C
    return min(tiles, max(1, PROGRAMS // max(boxes, 1)))


def _launch(
    volumes: Tensor,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    window: Sequence[float] | None,
    donors: Tensor,
    donor_window: Sequence[float] | None,
    out: Tensor,
    inner: int | None,
    scratch: Tensor | None = None,
    in_place: bool = False,
) -> None:
    """Write the voxels in boxes, from ``scratch`` if given, and all others if ``inner`` is."""
    launch = launch_parameters("object_mixup3d", out.device)
    (B, C, D, H, W), K = out.shape, boxes.shape[0]
    programs = programs_per_box(out.shape, K)
    copies = 0 if inner is None else -(-out.numel() // COPY)
    grid = K * programs + copies
    if not grid:
        return
    sources = donors if scratch is None else scratch
    planes = (x.shape[3] * x.stride(3) + x.shape[4] * x.stride(4) for x in (volumes, donors))
    wide = max(out.numel() + COPY, *planes) >= WIDE_FROM
    low, high = window or donor_window or (0.0, 1.0)
    with torch.cuda.device_of(out):
        fmkernels_object_mixup_kernel[(grid,)](
            volumes, sources, out, boxes, donor_boxes, lam, K, programs, B, C, D, H, W, inner or 1,
            donors.shape[0], *donors.shape[2:], *volumes.stride(), *donors.stride(),
            low, 1 / (high - low),
            LANES=LANES, DEPTH=launch.block // LANES, LAYERS=LAYERS, BOXES=BOXES,
            COPY=COPY if copies else 0, COPY_PART=COPY_PART, IN_PLACE=in_place,
            MIXED=scratch is not None,
            WINDOW=window is not None, DONOR_WINDOW=donor_window is not None, WIDE=wide,
            num_warps=launch.num_warps, debug=debug(), **launch.register_limit,
        )  # fmt: skip
