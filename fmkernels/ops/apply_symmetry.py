"""apply_symmetry: one of the 48 symmetries of the cube, by functions of PyTorch."""

from itertools import permutations

from torch import Tensor

from fmkernels.ops.checks import check_integer, check_tensor, shape_of

PERMUTATIONS = tuple(permutations(range(3)))  # DHW, DWH, HDW, HWD, WDH, WHD


def apply_symmetry(volumes: Tensor, code: int) -> Tensor:
    r"""Permute and flip the last three axes: a view for :func:`predict_targets`, or augmentation.

    .. math::
        \mathrm{out} = \mathrm{flip}_{\mathrm{code} \bmod 8}(
        \mathrm{permute}_{\lfloor \mathrm{code} / 8 \rfloor}(\mathrm{volumes}))

    The permutations 0 to 5 are DHW, DWH, HDW, HWD, WDH, WHD: with number 3 the new axes are the old
    H, W, D. A flip is a bit mask of the new axes: 1 = the first, 2 = the second, 4 = the third. The
    48 codes are the 24 rotations of a cube by right angles and their mirror images. Codes below 8
    permute nothing.

    Args:
        volumes: [..., D, H, W] of any dtype and strides.
        code: an int from 0 to 47. Codes of at least 8 need D = H = W.

    Returns:
        A new tensor of the shape and dtype of volumes. PyTorch provides gradients of any order.

    Raises:
        TypeError: volumes is not a tensor, or code not an int.
        ValueError: volumes has fewer than three axes, code is not in [0, 48), or the sizes differ.

    Equivalent PyTorch::

        axes = list(itertools.permutations((-3, -2, -1)))[code // 8]
        out = volumes.permute(*range(volumes.dim() - 3), *axes)
        out = out.flip([i - 3 for i in range(3) if code >> i & 1])

    See also :func:`undo_symmetry`, the inverse.

    Example:
        >>> import torch
        >>> x = torch.arange(8).reshape(2, 2, 2)
        >>> apply_symmetry(x, 8 + 1)[0].tolist()  # H and W exchanged, then D flipped
        [[4, 6], [5, 7]]
    """
    axes, flips = symmetry("apply_symmetry", volumes, code)
    return volumes.permute(axes).flip(flips)


def symmetry(name: str, volumes: Tensor, code: int) -> tuple[list[int], list[int]]:
    """The permutation of all axes, and the new axes that are flipped."""
    check_tensor(name, "volumes", volumes)
    if volumes.dim() < 3:
        raise ValueError(f"{name}: volumes must be [..., D, H, W], got shape {shape_of(volumes)}")
    code = check_integer(name, "code", code)
    if not 0 <= code < 48:
        raise ValueError(f"{name}: code must be in [0, 48), got {code}")
    depth, height, width = volumes.shape[-3:]
    if code >= 8 and not depth == height == width:
        raise ValueError(
            f"{name}: volumes must have three equal sizes for code {code}, "
            f"got shape {shape_of(volumes)}"
        )
    first = volumes.dim() - 3
    axes = [*range(first), *(first + axis for axis in PERMUTATIONS[code // 8])]
    return axes, [first + axis for axis in range(3) if code >> axis & 1]
