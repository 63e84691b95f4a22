"""Batched 3D mixup on the GPU: one launch whatever the batch, the flips, the window and the types.

A volume is read and written in vectors of ``V`` voxels that never straddle a row of it, so that every access is a
vector access, and a flip along the row mirrors the order of the vectors and, in registers, the voxels of each. A
program owns a tile of ``VECTORS`` positions, in one of two ways:

* Out of place, of one sample. The samples are the fastest axis of the grid: those that share a source run side by side,
  and a cache serves the second read.
* In place, of every sample that another one may take as its partner, and (where there are flips) together with the
  mirror images of the tile along all axes. Sources lie at the same positions or at mirror images of them, so that,
  whatever the index map, no program reads what another one writes. Within the program a barrier parts the last load
  from the first store.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.tuning import launch_parameters
from fmkernels.kernels.voxels import to_storage, window_voxels

VECTOR_BYTES = 16
RUN_BYTES = 64  # of a row of a tile: shorter ones only where the batch is too large for them
LARGEST_TILE = (
    4096  # vectors that a program may own in place, all samples and mirror images together
)
MOST_WARPS = 16  # of a program: 1024 threads on AMD
WIDE_FROM = 1 << 30  # vectors of a volume from which positions are counted in int64


@triton.jit
def _divided(a, b):
    """a // b for a >= 0: unsigned, which takes half the instructions."""
    UNSIGNED: tl.constexpr = tl.uint64 if a.dtype == tl.int64 else tl.uint32
    return (a.to(UNSIGNED) // b.to(UNSIGNED)).to(a.dtype)


@triton.jit
def _positions(at, n0, n1, n2, n3, AXES: tl.constexpr, ORBITS: tl.constexpr):
    """Of positions number ``at``: the place in the volume, the way from there to the mirror image along each axis (both
    counted in vectors), and the axes along which a position is its own image (a mask).

    With ORBITS, positions are counted over the first half of every axis that can be flipped, the middle included.
    """
    m1 = (n1 + 1) // 2 if ORBITS and AXES[1] else n1
    m2 = (n2 + 1) // 2 if ORBITS and AXES[2] else n2
    m3 = (n3 + 1) // 2 if ORBITS and AXES[3] else n3
    row = _divided(at, m3)
    plane = _divided(row, m2)
    i0 = _divided(plane, m1)
    i1 = plane - i0 * m1
    i2 = row - plane * m2
    i3 = at - row * m3
    place = ((i0 * n1 + i1) * n2 + i2) * n3 + i3 if ORBITS else at
    across = (n0 - 1 - 2 * i0, n1 - 1 - 2 * i1, n2 - 1 - 2 * i2, n3 - 1 - 2 * i3)
    ways = (across[0] * (n1 * n2 * n3), across[1] * (n2 * n3), across[2] * n3, across[3])
    middle = tl.zeros(at.shape, tl.int32)
    for axis in tl.static_range(4):
        middle |= tl.where(across[axis] == 0, AXES[axis], 0)
    return place, ways, middle


@triton.jit
def _mirrored(place, ways, flip, IMAGE: tl.constexpr, AXES: tl.constexpr):
    """The images ``IMAGE ^ flip`` of places: [ROWS, VECTORS] from [VECTORS] and [ROWS]."""
    place = place[None, :]
    for axis in tl.static_range(4):
        if AXES[axis]:
            there = (
                0
                if flip is None
                else tl.where((flip & AXES[axis])[:, None] != 0, ways[axis][None, :], 0)
            )
            place += ways[axis][None, :] - there if IMAGE & AXES[axis] else there
    return place


@triton.jit
def _offsets(first, place, V: tl.constexpr):
    """[ROWS, VECTORS, V]: offsets of the voxels at ``place`` of volumes that begin at vectors ``first`` [ROWS]."""
    return ((first[:, None] + place) * V)[:, :, None] + tl.arange(0, V)[None, None, :]


@triton.jit
def _reversed(value, flip, AXES: tl.constexpr, V: tl.constexpr):
    """The voxels of each vector in reverse where the mask says so: a choice between registers."""
    if AXES[3] and V > 1:
        value = tl.where(((flip & AXES[3]) != 0)[:, None, None], tl.flip(value, 2), value)
    return value


@triton.jit
def _load_flipped(
    x, first, flip, place, ways, mask, low, scale,
    IMAGE: tl.constexpr, AXES: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """[ROWS, VECTORS, V]: a tile of volumes that begin at ``first`` [ROWS], flipped by their masks, windowed."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    value = tl.load(
        x + _offsets(first, _mirrored(place, ways, flip, IMAGE, AXES), V), mask, other=0
    )
    if flip is not None:
        value = _reversed(value, flip, AXES, V)
    return window_voxels(value, low.to(T), scale.to(T)) if WINDOW else value.to(T)


@triton.jit(do_not_specialize=["batch", "donor_batch", "positions", "n0", "n1", "n2", "n3"])
def mixup_kernel(
    volumes,  # [batch, n0, n1, n2, n3] vectors of V
    donors,  # [donor_batch, n0, n1, n2, n3] vectors of V
    out,  # like volumes, written; may be volumes or donors where IN_PLACE
    lam,  # [batch]
    index,  # [batch] int64
    flips,  # [batch] uint8, or None
    donor_flips,  # [donor_batch] uint8, or None
    batch, donor_batch,
    positions,  # n0 n1 n2 n3, or as many as ORBITS counts
    n0, n1, n2, n3,
    low: tl.float64, scale: tl.float64,
    SAMPLES: tl.constexpr,  # of one program; all of them where more than 1
    VECTORS: tl.constexpr, V: tl.constexpr,
    AXES: tl.constexpr,  # bit of a flip mask for each axis, 0 for one that is never flipped
    ORBITS: tl.constexpr,  # own all 8 mirror images of the tile
    IN_PLACE: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    if SAMPLES == 1:
        tile = program // batch
        sample = (program - tile * batch) + tl.arange(0, 1)
    else:
        tile = program
        sample = tl.arange(0, SAMPLES)
    there = sample < batch
    n0, n1, n2, n3 = n0.to(INDEX), n1.to(INDEX), n2.to(INDEX), n3.to(INDEX)
    size = n0.to(tl.int64) * n1 * n2 * n3
    at = tile.to(INDEX) * VECTORS + tl.arange(0, VECTORS)
    place, ways, middle = _positions(at, n0, n1, n2, n3, AXES, ORBITS)

    partner = tl.load(index + sample, there, other=0)
    tl.device_assert((partner >= 0) & (partner < donor_batch), "mixup3d: index out of range")
    share = tl.load(lam + sample, there, other=0)[:, None, None]
    own_flip = None if flips is None else tl.load(flips + sample, there, other=0).to(tl.int32)
    flip = None if donor_flips is None else tl.load(donor_flips + partner).to(tl.int32)
    first, partner = sample.to(tl.int64) * size, partner * size
    mixed = ()
    for image in tl.static_range(8 if ORBITS else 1):
        mask = (there[:, None] & ((at < positions) & ((middle & image) == 0))[None, :])[:, :, None]
        own = _load_flipped(
            volumes, first, own_flip, place, ways, mask, low, scale, image, AXES, V, WINDOW
        )
        donor = _load_flipped(
            donors, partner, flip, place, ways, mask, low, scale, image, AXES, V, WINDOW
        )
        part = share.to(own.dtype)
        value = tl.fma(tl.broadcast_to(part, own.shape), own, (1.0 - part) * donor)
        mixed = mixed + (to_storage(value, out.dtype.element_ty),)  # type: ignore[assignment]  # noqa: RUF005
    if IN_PLACE:
        tl.debug_barrier()
    for image in tl.static_range(8 if ORBITS else 1):
        mask = (there[:, None] & ((at < positions) & ((middle & image) == 0))[None, :])[:, :, None]
        tl.store(
            out + _offsets(first, _mirrored(place, ways, None, image, AXES), V), mixed[image], mask
        )


@triton.jit(do_not_specialize=["sources", "batch", "n0", "n1", "n2", "n3"])
def gradient_kernel(
    upstream,  # [batch, n0, n1, n2, n3] vectors of V: gradient of the result
    windowed,  # [sources, n0, n1, n2, n3] vectors of V: the data itself; or None where there was no window
    gradient,  # [sources, n0, n1, n2, n3] vectors of V, written
    lam,  # [batch]
    index,  # [batch] int64
    flips,  # [sources] uint8, or None
    sources, batch, n0, n1, n2, n3,
    low: tl.float64, high: tl.float64, scale: tl.float64,
    OWN: tl.constexpr,  # the sources are the volumes
    DONOR: tl.constexpr,  # the sources are the donors
    VECTORS: tl.constexpr, V: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    T: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    tile = program // sources
    row = program - tile * sources
    n0, n1, n2, n3 = n0.to(INDEX), n1.to(INDEX), n2.to(INDEX), n3.to(INDEX)
    size = n0.to(tl.int64) * n1 * n2 * n3
    at = tile.to(INDEX) * VECTORS + tl.arange(0, VECTORS)
    mask = (at < size)[None, :, None]
    here = _offsets(row.to(tl.int64) * size + tl.zeros([1], tl.int64), at[None, :], V)
    flip = None
    place = at[None, :]
    if flips is not None:
        flip = tl.load(flips + row + tl.arange(0, 1)).to(tl.int32)
        _, ways, _ = _positions(at, n0, n1, n2, n3, AXES, False)
        place = _mirrored(at, ways, flip, 0, AXES)
    image = _offsets(tl.zeros([1], tl.int64), place, V)
    total = tl.zeros([1, VECTORS, V], T)
    if OWN:
        total += tl.load(lam + row).to(T) * tl.load(
            upstream + row.to(tl.int64) * size * V + image, mask, other=0
        ).to(T)
    if DONOR:
        for sample in range(batch):
            if tl.load(index + sample) == row:
                part = 1.0 - tl.load(lam + sample).to(T)
                total += part * tl.load(upstream + sample * size * V + image, mask, other=0).to(T)
    if flips is not None:
        total = _reversed(total, flip, AXES, V)
    if windowed is not None:
        value = tl.load(windowed + here, mask, other=0).to(T)
        total = tl.where((value >= low.to(T)) & (value <= high.to(T)), total * scale.to(T), 0.0)
    tl.store(gradient + here, to_storage(total, gradient.dtype.element_ty), mask)


class _Geometry(NamedTuple):
    """How a kernel counts the voxels of one volume."""

    v: int  # voxels of a vector
    sizes: tuple[int, ...]  # n0 ... n3, in vectors
    axes: tuple[int, ...]
    wide: bool

    @staticmethod
    def of(shape: Sequence[int], axes: Sequence[int], flipped: bool, itemsize: int) -> "_Geometry":
        """Of volumes [batch, *sizes], ``itemsize`` bytes a voxel at most; ``axes`` are the bits of a flip mask."""
        sizes = tuple(shape[1:]) if flipped else (1, 1, 1, math.prod(shape[1:]))
        v = math.gcd(sizes[3], VECTOR_BYTES // itemsize)
        wide = math.prod(sizes) // v >= WIDE_FROM
        return _Geometry(
            v, (*sizes[:3], sizes[3] // v), tuple(axes) if flipped else (0, 0, 0, 0), wide
        )

    @property
    def vectors(self) -> int:
        return math.prod(self.sizes)

    @property
    def orbits(self) -> int:
        """Vectors in the first half of every axis that can be flipped."""
        return math.prod(
            (n + 1) // 2 if bit else n for n, bit in zip(self.sizes, self.axes, strict=True)
        )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def launch_mixup(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The mixed volumes, in a new tensor of type ``dtype``.

    Tensors are contiguous [batch, n0, n1, n2, n3]; ``axes`` has the bit of a flip mask that belongs to each of the four
    axes of a volume, 0 for the channels. ``donors`` None stands for the volumes (and their flips).
    """
    out = torch.empty_like(volumes, dtype=dtype)
    launch_mixup_into(volumes, donors, lam, index, flips, donor_flips, axes, window, out)
    return out


def launch_mixup_into(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    out: Tensor,
) -> None:
    """As launch_mixup, into ``out``: memory of its own, or that of ``volumes`` or ``donors``."""
    if not out.numel():
        return
    if donors is None:
        donors, donor_flips = volumes, flips
    batch = volumes.shape[0]
    flipped = flips is not None or donor_flips is not None
    geometry = _Geometry.of(
        volumes.shape, axes, flipped, max(volumes.element_size(), out.element_size())
    )
    over_donors = _same_memory(out, donors)
    orbits = flipped and (over_donors or _same_memory(out, volumes))
    op = "mixup3d_in_place_flipped" if orbits else "mixup3d_in_place" if over_donors else "mixup3d"
    launch = launch_parameters(op, out.device)
    samples = triton.next_power_of_2(batch) if over_donors else 1
    rows = samples * (8 if orbits else 1)
    if rows > LARGEST_TILE:
        out.copy_(
            launch_mixup(volumes, donors, lam, index, flips, donor_flips, axes, window, out.dtype)
        )
        return
    run = triton.next_power_of_2(triton.cdiv(RUN_BYTES, geometry.v * volumes.element_size()))
    vectors = min(max(launch.block // rows, run), LARGEST_TILE // rows)
    positions = geometry.orbits if orbits else geometry.vectors
    low, high = window or (0.0, 1.0)
    with torch.cuda.device_of(out):
        mixup_kernel[(triton.cdiv(positions, vectors) * (1 if samples > 1 else batch),)](
            volumes, donors, out, lam, index, flips, donor_flips, batch, donors.shape[0], positions, *geometry.sizes,
            low, 1 / (high - low), SAMPLES=samples, VECTORS=vectors, V=geometry.v, AXES=geometry.axes, ORBITS=orbits,
            IN_PLACE=over_donors or orbits, WINDOW=window is not None, WIDE=geometry.wide,
            num_warps=min(MOST_WARPS, launch.num_warps * max(1, rows * vectors // launch.block)),
        )  # fmt: skip


def launch_gradient(
    upstream: Tensor,
    windowed: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    sources: int,
    dtype: torch.dtype,
    own: bool,
    donor: bool,
) -> Tensor:
    """The gradient to the volumes (``own``), to the donors (``donor``), or to what was used as both.

    ``windowed`` is that tensor itself, of ``sources`` volumes of type ``dtype``, needed only where there is a window.
    """
    gradient = upstream.new_empty((sources, *upstream.shape[1:]), dtype=dtype)
    if not gradient.numel():
        return gradient
    itemsize = max(upstream.element_size(), gradient.element_size())
    geometry = _Geometry.of(gradient.shape, axes, flips is not None, itemsize)
    launch = launch_parameters("mixup3d", gradient.device)
    low, high = window or (0.0, 1.0)
    with torch.cuda.device_of(gradient):
        gradient_kernel[(triton.cdiv(geometry.vectors, launch.block) * sources,)](
            upstream, windowed, gradient, lam, index, flips, sources, upstream.shape[0], *geometry.sizes,
            low, high, 1 / (high - low), OWN=own, DONOR=donor,
            VECTORS=launch.block, V=geometry.v, AXES=geometry.axes, WIDE=geometry.wide, num_warps=launch.num_warps,
        )  # fmt: skip
    return gradient
