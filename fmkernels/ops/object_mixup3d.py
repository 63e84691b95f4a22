"""object_mixup3d: objects mixed with other objects, each resized to the one it is mixed into."""

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
    varying_window,
)
from fmkernels.ops.library import functional_op, mutating_op
from fmkernels.ops.tensors import is_same, may_overlap


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
    r"""Mix objects with other objects, each resized to the box that it is mixed into.

    For each k, in order, the voxels v of volumes[boxes[k, 0]] whose centers lie in boxes[k, 1:]
    become

    .. math::
        \mathrm{out}_v = \lambda_k \, \mathrm{out}_v + (1 - \lambda_k) \, \mathrm{donor}_{k, v}

    where donor_k is donors[donor_boxes[k, 0]] cropped to donor_boxes[k, 1:] and resized to the
    voxels of the target, as :func:`crop_and_resize3d` does it with clamp="box". Both boxes are
    first clipped to their volumes. Donors are read as they were before the call. A voxel in several
    boxes is mixed in the order of the list and rounded once. Arithmetic is float32 (float64 for
    float64 volumes).

    Args:
        volumes: [B, C, D, H, W]; float16, bfloat16, float32, float64, int16 or uint8; any strides.
        boxes: float32 [K, 7], the targets: (batch index, z1, y1, x1, z2, y2, x2) in voxels,
            half-open, voxel i covering [i, i + 1). A pair of boxes changes nothing if either box is
            empty after clipping, is not finite, or has a batch index out of range.
        donor_boxes: float32 [K, 7], the box to mix into each target; of any size.
        lam: [K], the weight of each target, in [0, 1]; any float dtype. On a CPU, a weight outside
            [0, 1] raises. A GPU does not check it, and extrapolates, unless the environment
            variable FMKERNELS_DEBUG is 1: then it fails with a device assert.
        donors: [B', C, D', H', W'], the volumes of the donor boxes; any of the dtypes of volumes.
            The volumes themselves by default.
        window: (lo, hi), finite, lo < hi. Every voxel v of volumes and donors, in a box or not,
            becomes clamp((v - lo) / (hi - lo), 0, 1). None keeps the values. If donors are integers
            and volumes floating point, only the donors are windowed (int16 HU objects into already
            windowed volumes). Otherwise a window requires donors of the dtype of the volumes.
        dtype: dtype of the result, any of those of the volumes. By default that of the volumes,
            float32 for windowed integers. Integer results are rounded to nearest, ties to even, and
            saturate; NaN becomes 0.
        out: output tensor, of the shape and dtype of the result. It may be ``volumes`` itself (in
            place), but must not overlap it otherwise. It may overlap ``donors``. In place and
            without a window, only the voxels in boxes are read and written.

    Returns:
        The mixed volumes; channels_last_3d if ``volumes`` are, else contiguous. ``out`` if given.

    No gradient is offered. No value is read back to the host. A voxel that is not finite affects
    only the voxels in which its weight is not exactly 0, the weights of the interpolation included:
    with lam = 1 the donor does not show, with lam = 0 the target does not.

    A GPU needs one launch. If ``out`` overlaps the donors, it needs two, and scratch memory of the
    size of ``out``, of which only the voxels in boxes are touched.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or a gradient is requested.

    Equivalent PyTorch, for boxes of whole numbers inside the volumes::

        out, donors = volumes.clone(), volumes
        for (b, *box), (j, *source), weight in zip(boxes.long(), donor_boxes.long(), lam):
            z1, y1, x1, z2, y2, x2 = box
            i1, j1, k1, i2, j2, k2 = source
            crop = donors[j, None, :, i1:i2, j1:j2, k1:k2]
            donor = F.interpolate(crop, (z2 - z1, y2 - y1, x2 - x1), mode="trilinear")[0]
            out[b, :, z1:z2, y1:y2, x1:x2].mul_(weight).add_((1 - weight) * donor)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR
    2020 (object-level MixUp). Interpolation and the order of overlaps are this project's choice.

    Example:
        >>> import torch
        >>> volumes = torch.arange(8.0).reshape(1, 1, 1, 1, 8)
        >>> target = torch.tensor([[0.0, 0, 0, 0, 1, 1, 2]])
        >>> donor = torch.tensor([[0.0, 0, 0, 4, 1, 1, 8]])
        >>> object_mixup3d(volumes, target, donor, torch.tensor([0.5])).flatten().tolist()
        [2.25, 3.75, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    name = "object_mixup3d"
    check_volumes(name, "volumes", volumes)
    check_no_grad(name, "volumes", volumes)
    check_axes(name, "volumes", volumes)
    check_boxes(name, "boxes", boxes, volumes.device)
    check_boxes(name, "donor_boxes", donor_boxes, volumes.device)
    if donor_boxes.shape != boxes.shape:
        raise ValueError(
            f"{name}: donor_boxes must be as many as boxes, {boxes.shape[0]}, "
            f"got shape {shape_of(donor_boxes)}"
        )
    check_per_sample(name, "lam", lam, volumes.device, FLOATS, boxes.shape[0])
    if donors is not None:
        check_volumes(name, "donors", donors)
        check_device(name, "donors", donors, volumes.device)
        if donors.shape[1] != volumes.shape[1]:
            raise ValueError(
                f"{name}: donors must have the channels of volumes, {volumes.shape[1]}, "
                f"got shape {shape_of(donors)}"
            )
        check_no_grad(name, "donors", donors)
        check_axes(name, "donors", donors)
    donor_window = check_window(name, window)
    window = donor_window
    if donors is not None and donors.dtype != volumes.dtype and window is not None:
        if donors.is_floating_point() or not volumes.is_floating_point():
            raise ValueError(
                f"{name}: window must be None for donors of another dtype than volumes, unless "
                f"integers are mixed into floats, got {donors.dtype} for {volumes.dtype}"
            )
        window = None
    dtype = result_dtype(name, dtype, volumes, window)
    if out is not None:
        check_out(name, out, volumes, dtype)
        overlaps = not is_same(volumes, out) and may_overlap(volumes, out)
        if overlaps and _are_dense(volumes) and _are_dense(out):
            raise ValueError(f"{name}: out may be volumes itself but must not overlap it otherwise")
    bounds, donor_bounds = varying_window(window), varying_window(donor_window)
    pairs = boxes.contiguous(), donor_boxes.contiguous(), lam.contiguous()
    if out is None:
        dense = volumes if _are_dense(volumes) else volumes.contiguous()
        return object_mixup3d_op(dense, donors, *pairs, bounds, donor_bounds, dtype=dtype)
    object_mixup3d_out_op(volumes, donors, *pairs, bounds, donor_bounds, out)
    return out


def _are_dense(*tensors: Tensor) -> bool:
    """Whether all tensors are contiguous, or all are channels_last_3d."""
    return any(
        all(x.is_contiguous(memory_format=memory_format) for x in tensors)
        for memory_format in (torch.contiguous_format, torch.channels_last_3d)
    )


_INPUTS = (
    "Tensor volumes, Tensor? donors, Tensor boxes, Tensor donor_boxes, Tensor lam, "
    "float[]? window, float[]? donor_window"
)


@functional_op(f"object_mixup3d({_INPUTS}, *, ScalarType dtype) -> Tensor")
def object_mixup3d_op(volumes, donors, boxes, donor_boxes, lam, window, donor_window, *, dtype):
    return torch.empty_like(volumes, dtype=dtype)


@mutating_op(f"object_mixup3d_out({_INPUTS}, Tensor(a!) out) -> ()", "object_mixup3d")
def object_mixup3d_out_op(
    launch, volumes, donors, boxes, donor_boxes, lam, window, donor_window, out
):
    inputs = donors, boxes, donor_boxes, lam, window, donor_window
    in_place = is_same(volumes, out)
    writable = in_place and window is None  # with any strides: only voxels in boxes are written
    if not writable and (in_place or not may_overlap(volumes, out)):
        writable = _are_dense(volumes, out)
    if writable:
        overlap = may_overlap(volumes if donors is None else donors, out)
        launch(volumes, *inputs, out, in_place, overlap)
    else:
        dense = volumes.contiguous()
        result = torch.empty_like(dense, dtype=out.dtype)
        launch(dense, *inputs, result)
        out.copy_(result)
