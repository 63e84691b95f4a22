"""The ops behind object_mixup3d: schemas and fakes. They have no gradient."""

import torch
from torch import Tensor

from fmkernels.ops.checks import (
    FLOATS,
    check_axes,
    check_boxes,
    check_device,
    check_no_grad,
    check_out,
    check_per_sample,
    check_volumes,
    check_window,
    result_dtype,
    shape_of,
)
from fmkernels.ops.library import define, fake
from fmkernels.ops.tensors import is_same, may_overlap

_MODULE = "object_mixup3d"
_INPUTS = (
    "Tensor volumes, Tensor? donors, Tensor boxes, Tensor donor_boxes, Tensor lam, "
    "float[]? window, float[]? donor_window"
)

define("object_mixup3d", f"({_INPUTS}, ScalarType dtype) -> Tensor", _MODULE, "launch_object_mixup")
define(
    "object_mixup3d_into", f"({_INPUTS}, Tensor(a!) out) -> ()", _MODULE, "launch_object_mixup_into"
)


@fake("object_mixup3d")
def _(volumes, donors, boxes, donor_boxes, lam, window, donor_window, dtype):
    return torch.empty_like(volumes, dtype=dtype)


@fake("object_mixup3d_into")
def _(volumes, donors, boxes, donor_boxes, lam, window, donor_window, out):
    return None


mixed = torch.ops.fmkernels.object_mixup3d.default
mixed_into = torch.ops.fmkernels.object_mixup3d_into.default


def object_mixup3d(
    volumes: Tensor,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    *,
    donors: Tensor | None = None,
    window: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Mix objects with other objects, each resized to the one it is mixed into: all boxes in one launch, or in two.

    For each k, in order, the voxels v of volumes[boxes[k, 0]] whose centres lie in boxes[k, 1:] become

    .. math::
        \mathrm{out}_v = \lambda_k \, \mathrm{out}_v + (1 - \lambda_k) \, \mathrm{donor}_{k, v}

    where donor_k is donors[donor_boxes[k, 0]] cropped to donor_boxes[k, 1:] and resized to as many voxels, as
    :func:`crop_and_resize3d` does it with clamp="box". Both boxes are first clipped to their volumes. Donors are read
    as they were before the call; a voxel in several boxes is mixed in the order of the list, and rounded once.
    Arithmetic is float32 (float64 for float64) whatever the storage.

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides.
        boxes: float32 [K, 7], the targets: (batch index, z1, y1, x1, z2, y2, x2), voxel units, half-open, voxel i
            covering [i, i + 1). Never read back to the host. A pair of boxes of which either is empty once clipped,
            not finite, or has a batch index out of range changes nothing.
        donor_boxes: float32 [K, 7], the box to mix into each target; of any size.
        lam: [K], the share of each target; any float type.
        donors: [B', C, D', H', W'], in which the donor boxes lie; of any type that volumes may have; the volumes by
            default.
        window: (lo, hi), finite, lo < hi: every voxel v of volumes and donors counts as
            clamp((v - lo) / (hi - lo), 0, 1), and so do voxels in no box, in place as well. None keeps the values.
            Integer donors of floating volumes are windowed alone: objects in int16 HU are mixed into volumes that are
            windowed already. Other donors with a window have the type of the volumes.
        dtype: type of the result: one of those of the volumes. By default that of the volumes, float32 for windowed
            integers. Integer results are rounded to nearest, ties to even, and saturate; NaN becomes 0.
        out: where to write, of the shape and type of the result; ``volumes`` to mix in place, in which case, without a
            window, only the voxels in boxes are read and written. It may share memory with the donors in any way, with
            the volumes in no other.

    Returns:
        The mixed volumes; channels_last_3d where ``volumes`` are, else contiguous. ``out`` where given.

    No gradient is offered. On a GPU, where ``out`` shares memory with the donors, a scratch as large as ``out`` is
    allocated and there are two launches, else one; of the scratch, only the voxels in boxes are touched. The CPU keeps
    the voxels in boxes until all are mixed. A voxel that is not finite shows where it has a weight, and only there.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or a gradient is asked for.

    Equivalent PyTorch, for boxes of whole numbers inside the volumes::

        out, donors = volumes.clone(), volumes
        for (b, *box), (j, *source), share in zip(boxes.long(), donor_boxes.long(), lam):
            z1, y1, x1, z2, y2, x2 = box
            i1, j1, k1, i2, j2, k2 = source
            crop = donors[j, None, :, i1:i2, j1:j2, k1:k2]
            donor = F.interpolate(crop, (z2 - z1, y2 - y1, x2 - x1), mode="trilinear")[0]
            out[b, :, z1:z2, y1:y2, x1:x2].mul_(share).add_((1 - share) * donor)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR 2020 (object-level
    MixUp). The interpolation and the treatment of overlaps are this project's choice.

    Example:
        >>> import torch
        >>> volumes = torch.arange(8.0).reshape(1, 1, 1, 1, 8)
        >>> target, donor = torch.tensor([[0.0, 0, 0, 0, 1, 1, 2]]), torch.tensor([[0.0, 0, 0, 4, 1, 1, 8]])
        >>> object_mixup3d(volumes, target, donor, torch.tensor([0.5])).flatten().tolist()
        [2.25, 3.75, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    name = "object_mixup3d"
    check_volumes(name, "volumes", volumes)
    check_boxes(name, "boxes", boxes, volumes.device)
    check_boxes(name, "donor_boxes", donor_boxes, volumes.device)
    if donor_boxes.shape != boxes.shape:
        raise ValueError(
            f"{name}: donor_boxes must be as many as boxes, {boxes.shape[0]}, got shape {shape_of(donor_boxes)}"
        )
    check_per_sample(name, "lam", lam, volumes.device, FLOATS, boxes.shape[0])
    check_no_grad(name, "lam", lam)
    check_no_grad(name, "volumes", volumes)
    check_axes(name, "volumes", volumes)
    if donors is not None:
        check_volumes(name, "donors", donors)
        check_device(name, "donors", donors, volumes.device)
        if donors.shape[1] != volumes.shape[1]:
            raise ValueError(
                f"{name}: donors must have the channels of volumes, {volumes.shape[1]}, got shape {shape_of(donors)}"
            )
        check_no_grad(name, "donors", donors)
        check_axes(name, "donors", donors)
    donor_window = check_window(name, window)
    window = donor_window if donors is None or donors.dtype == volumes.dtype else None
    if (
        donors is not None
        and donor_window != window
        and (donors.is_floating_point() or not volumes.is_floating_point())
    ):
        raise ValueError(
            f"{name}: window must be None for donors of another type than volumes, unless integers are mixed into "
            f"floats, got {donors.dtype} for {volumes.dtype}"
        )
    dtype = result_dtype(name, dtype, volumes, window)
    arguments = (
        donors,
        boxes.contiguous(),
        donor_boxes.contiguous(),
        lam.contiguous(),
        window,
        donor_window,
    )
    if out is None:
        dense = volumes.is_contiguous() or volumes.is_contiguous(
            memory_format=torch.channels_last_3d
        )
        return mixed(volumes if dense else volumes.contiguous(), *arguments, dtype)
    check_out(name, out, volumes, dtype)
    dense = volumes.is_contiguous() and out.is_contiguous()
    if dense and may_overlap(volumes, out) and not is_same(volumes, out):
        raise ValueError(f"{name}: out may be volumes itself but must not overlap it otherwise")
    mixed_into(volumes, *arguments, out)
    return out
