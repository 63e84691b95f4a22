"""Batched 3D mixup on the GPU: one launch for any batch, flips, window and dtypes.

A volume is read and written in vectors of ``V`` voxels that never straddle one of its rows, so that
every access is a vector access. A flip along the row reverses the order of the vectors and, in
registers, the voxels of each vector. A program computes a tile of ``VECTORS`` positions:

* Out of place, of one sample. The samples are the fastest axis of the grid: those that share a
  donor run side by side, and a cache serves the second read.
* In place, of all samples. Donors are read at the positions that the program writes, so that no
  program reads what another one writes, whatever the index map. Within the program, a barrier
  separates the last load from the first store.

The loads of a source are masked where its weight is exactly 0: its voxels do not show, even if they
are not finite, and their bytes are not moved.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.kernels.launching import quick
from fmkernels.kernels.tuning import debug, launch_parameters
from fmkernels.kernels.voxels import to_storage, window_voxels

VECTOR_BYTES = 16
MIN_RUN_BYTES = 64  # of a tile's row, unless the batch is too large for it
MAX_TILE = 4096  # vectors of a program, all samples together
MAX_WARPS = 16  # of a program: 1024 threads on AMD
MIN_WIDE = 1 << 30  # vectors of a volume from which positions are counted in int64


@triton.jit
def _divide(a, b):
    """a // b for a >= 0: unsigned, which takes half the instructions."""
    UNSIGNED: tl.constexpr = tl.uint64 if a.dtype == tl.int64 else tl.uint32
    return (a.to(UNSIGNED) // b.to(UNSIGNED)).to(a.dtype)


@triton.jit
def _mirror_offsets(position, n0, n1, n2, n3):
    """The offset from each position to its mirror image along each axis, in vectors."""
    row = _divide(position, n3)
    plane = _divide(row, n2)
    i0 = _divide(plane, n1)
    i1 = plane - i0 * n1
    i2 = row - plane * n2
    i3 = position - row * n3
    return (
        (n0 - 1 - 2 * i0) * (n1 * n2 * n3),
        (n1 - 1 - 2 * i1) * (n2 * n3),
        (n2 - 1 - 2 * i2) * n3,
        n3 - 1 - 2 * i3,
    )


@triton.jit
def _flip(position, mirror_offsets, flip, AXES: tl.constexpr):
    """The positions flipped by masks: [ROWS, VECTORS] from [VECTORS] and [ROWS]."""
    position = position[None, :]
    for axis in tl.static_range(4):
        if AXES[axis] and flip is not None:
            flipped = (flip & AXES[axis])[:, None] != 0
            position += tl.where(flipped, mirror_offsets[axis][None, :], 0)
    return position


@triton.jit
def _offsets(start, position, V: tl.constexpr):
    """[ROWS, VECTORS, V]: voxels at positions [_, VECTORS] of volumes that start at [ROWS]."""
    return ((start[:, None] + position) * V)[:, :, None] + tl.arange(0, V)[None, None, :]


@triton.jit
def _reverse(value, flip, AXES: tl.constexpr, V: tl.constexpr):
    """The voxels of each vector reversed where the mask says so: a choice between registers."""
    if AXES[3] and V > 1:
        value = tl.where(((flip & AXES[3]) != 0)[:, None, None], tl.flip(value, 2), value)
    return value


@triton.jit
def _load(
    x, start, flip, position, mirror_offsets, mask, low, scale,
    AXES: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """[ROWS, VECTORS, V]: a tile of volumes that start at ``start`` [ROWS], flipped, windowed."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    position = _flip(position, mirror_offsets, flip, AXES)
    value = tl.load(x + _offsets(start, position, V), mask, other=0)
    if flip is not None:
        value = _reverse(value, flip, AXES, V)
    return window_voxels(value, low.to(T), scale.to(T)) if WINDOW else value.to(T)


@quick
@triton.jit(do_not_specialize=["batch", "num_donors", "n0", "n1", "n2", "n3"])
def fmkernels_mixup3d_kernel(
    volumes,  # [batch, n0, n1, n2, n3] vectors of V
    donors,  # [num_donors, n0, n1, n2, n3] vectors of V
    out,  # like volumes, written; the memory of donors where SAMPLES > 1
    lam,  # [batch]
    index,  # [batch] int64
    flips,  # [batch] uint8, or None; needs SAMPLES == 1
    donor_flips,  # [num_donors] uint8, or None; needs SAMPLES == 1
    batch, num_donors, n0, n1, n2, n3,
    low: tl.float64, scale: tl.float64,
    SAMPLES: tl.constexpr,  # of a program: 1, or at least the batch
    VECTORS: tl.constexpr, V: tl.constexpr,
    AXES: tl.constexpr,  # bit of a flip mask for each axis, 0 for an axis that is never flipped
    WINDOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    T: tl.constexpr = tl.float64 if volumes.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    if SAMPLES == 1:
        tile = program // batch
        sample = (program - tile * batch) + tl.arange(0, 1)
    else:
        tile = program
        sample = tl.arange(0, SAMPLES)
    valid = sample < batch
    n0, n1, n2, n3 = n0.to(INDEX), n1.to(INDEX), n2.to(INDEX), n3.to(INDEX)
    size = n0.to(tl.int64) * n1 * n2 * n3
    position = tile.to(INDEX) * VECTORS + tl.arange(0, VECTORS)
    mirror_offsets = _mirror_offsets(position, n0, n1, n2, n3)  # after the loads, 2 more per voxel

    donor = tl.load(index + sample, valid, other=0)
    tl.device_assert((donor >= 0) & (donor < num_donors), "mixup3d: index out of range")
    weight = tl.load(lam + sample, valid, other=0).to(T)
    in_range = ((weight >= 0) & (weight <= 1)) | (weight != weight)
    tl.device_assert(in_range, "mixup3d: lam must lie in [0, 1]")
    flip = None if flips is None else tl.load(flips + sample).to(tl.int32)
    donor_flip = None if donor_flips is None else tl.load(donor_flips + donor).to(tl.int32)
    start = sample.to(tl.int64) * size
    mask = (valid[:, None] & (position < size.to(INDEX))[None, :])[:, :, None]
    weight = weight[:, None, None]
    own = _load(
        volumes, start, flip, position, mirror_offsets, mask & (weight != 0), low, scale,
        AXES, V, WINDOW,
    )  # fmt: skip
    other = _load(
        donors, donor * size, donor_flip, position, mirror_offsets, mask & (weight != 1),
        low, scale, AXES, V, WINDOW,
    )  # fmt: skip
    mixed = tl.fma(tl.broadcast_to(weight, own.shape), own, (1.0 - weight) * other)
    mixed = to_storage(mixed, out.dtype.element_ty)
    if SAMPLES > 1:
        tl.debug_barrier()
    tl.store(out + _offsets(start, position[None, :], V), mixed, mask)


@quick
@triton.jit(do_not_specialize=["rows", "batch", "n0", "n1", "n2", "n3"])
def fmkernels_mixup3d_backward_kernel(
    grad_output,  # [batch, n0, n1, n2, n3] vectors of V
    input,  # [rows, n0, n1, n2, n3] vectors of V, or None where there was no window
    grad_input,  # [rows, n0, n1, n2, n3] vectors of V, written
    lam,  # [batch]
    index,  # [batch] int64
    flips,  # [rows] uint8, or None
    rows, batch, n0, n1, n2, n3,
    low: tl.float64, high: tl.float64, scale: tl.float64,
    AS_VOLUMES: tl.constexpr, AS_DONORS: tl.constexpr,  # what the input was used as
    VECTORS: tl.constexpr, V: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    T: tl.constexpr = tl.float64 if grad_input.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    tile = program // rows
    row = program - tile * rows
    n0, n1, n2, n3 = n0.to(INDEX), n1.to(INDEX), n2.to(INDEX), n3.to(INDEX)
    size = n0.to(tl.int64) * n1 * n2 * n3
    position = tile.to(INDEX) * VECTORS + tl.arange(0, VECTORS)
    mask = (position < size.to(INDEX))[None, :, None]
    zero = tl.zeros([1], tl.int64)
    here = _offsets(row.to(tl.int64) * size + zero, position[None, :], V)
    if flips is None:
        there = _offsets(zero, position[None, :], V)
    else:
        flip = tl.load(flips + row + tl.arange(0, 1)).to(tl.int32)
        mirror_offsets = _mirror_offsets(position, n0, n1, n2, n3)
        there = _offsets(zero, _flip(position, mirror_offsets, flip, AXES), V)
    total = tl.zeros([1, VECTORS, V], T)
    if AS_VOLUMES:
        weight = tl.load(lam + row).to(T)
        grad = tl.load(
            grad_output + row.to(tl.int64) * size * V + there, mask & (weight != 0), other=0
        )
        total += weight * grad.to(T)
    if AS_DONORS:
        for sample in range(batch):
            if tl.load(index + sample) == row:
                weight = 1.0 - tl.load(lam + sample).to(T)
                grad = tl.load(
                    grad_output + sample * size * V + there, mask & (weight != 0), other=0
                )
                total += weight * grad.to(T)
    if flips is not None:
        total = _reverse(total, flip, AXES, V)
    if input is not None:
        value = tl.load(input + here, mask, other=0).to(T)
        total = tl.where((value >= low.to(T)) & (value <= high.to(T)), total * scale.to(T), 0.0)
    tl.store(grad_input + here, to_storage(total, grad_input.dtype.element_ty), mask)


class _Geometry(NamedTuple):
    """How a kernel counts the voxels of one volume."""

    v: int  # voxels of a vector
    sizes: tuple[int, ...]  # n0 ... n3, in vectors
    axes: tuple[int, ...]
    wide: bool

    @staticmethod
    def of(shape: Sequence[int], axes: Sequence[int], flipped: bool, itemsize: int) -> "_Geometry":
        """Of volumes [rows, *sizes] of at most ``itemsize`` bytes per voxel."""
        sizes = tuple(shape[1:]) if flipped else (1, 1, 1, math.prod(shape[1:]))
        v = math.gcd(sizes[3], VECTOR_BYTES // itemsize)
        wide = math.prod(sizes) // v >= MIN_WIDE
        return _Geometry(
            v, (*sizes[:3], sizes[3] // v), tuple(axes) if flipped else (0, 0, 0, 0), wide
        )

    @property
    def vectors(self) -> int:
        return math.prod(self.sizes)


def _power_of_2(n: int) -> int:
    """The next power of 2; triton's function takes a microsecond."""
    return 1 << (n - 1).bit_length()


def mixup3d(
    volumes: Tensor,
    donors: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    donor_flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    out: Tensor,
    in_place: bool = False,
) -> None:
    """Write the mixed volumes, [batch, n0, n1, n2, n3] contiguous as all tensors are.

    Args:
        donors: None for the volumes, with their flips.
        axes: the bit of a flip mask that flips each of the four axes, 0 for the channels.
        out: memory of its own, or without flips that of the volumes or donors.
        in_place: whether that is the memory of the donors (of the volumes where donors are None);
            takes at most ops.mixup3d.MAX_IN_PLACE samples.
    """
    if not out.numel():
        return
    if donors is None:
        donors, donor_flips = volumes, flips
    batch = volumes.shape[0]
    flipped = flips is not None or donor_flips is not None
    geometry = _Geometry.of(
        volumes.shape, axes, flipped, max(volumes.element_size(), out.element_size())
    )
    launch = launch_parameters("mixup3d_in_place" if in_place else "mixup3d", out.device)
    samples = _power_of_2(batch) if in_place else 1
    run = _power_of_2(-(-MIN_RUN_BYTES // (geometry.v * volumes.element_size())))
    vectors = min(max(launch.block // samples, run), MAX_TILE // samples)
    tiles = -(-geometry.vectors // vectors)
    low, high = window or (0.0, 1.0)
    with torch.cuda.device_of(out):
        fmkernels_mixup3d_kernel[(tiles if samples > 1 else tiles * batch,)](
            volumes, donors, out, lam, index, flips, donor_flips, batch, donors.shape[0],
            *geometry.sizes, low, 1 / (high - low), SAMPLES=samples, VECTORS=vectors, V=geometry.v,
            AXES=geometry.axes, WINDOW=window is not None, WIDE=geometry.wide, debug=debug(),
            num_warps=min(MAX_WARPS, launch.num_warps * max(1, samples * vectors // launch.block)),
        )  # fmt: skip


def mixup3d_backward(
    grad_output: Tensor,
    input: Tensor | None,
    lam: Tensor,
    index: Tensor,
    flips: Tensor | None,
    axes: Sequence[int],
    window: Sequence[float] | None,
    as_volumes: bool,
    as_donors: bool,
    grad_input: Tensor,
) -> None:
    """Write the gradient to what was the volumes, the donors, or both.

    Args:
        input: that tensor, [rows, n0, n1, n2, n3]; None where there was no window.
        flips: its masks.
    """
    if not grad_input.numel():
        return
    itemsize = max(grad_output.element_size(), grad_input.element_size())
    geometry = _Geometry.of(grad_input.shape, axes, flips is not None, itemsize)
    launch = launch_parameters("mixup3d", grad_input.device)
    rows, low, high = grad_input.shape[0], *(window or (0.0, 1.0))
    with torch.cuda.device_of(grad_input):
        fmkernels_mixup3d_backward_kernel[(-(-geometry.vectors // launch.block) * rows,)](
            grad_output, input, grad_input, lam, index, flips, rows, grad_output.shape[0],
            *geometry.sizes, low, high, 1 / (high - low), AS_VOLUMES=as_volumes,
            AS_DONORS=as_donors, VECTORS=launch.block, V=geometry.v, AXES=geometry.axes,
            WIDE=geometry.wide, num_warps=launch.num_warps,
        )  # fmt: skip
