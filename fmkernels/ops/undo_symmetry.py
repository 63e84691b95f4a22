"""undo_symmetry: the inverse of apply_symmetry, by functions of PyTorch."""

from torch import Tensor

from fmkernels.ops.apply_symmetry import symmetry


def undo_symmetry(volumes: Tensor, code: int) -> Tensor:
    r"""The inverse of :func:`apply_symmetry`: flip, then permute the last three axes back.

    .. math::
        \mathrm{undo\_symmetry}(\mathrm{apply\_symmetry}(x, \mathrm{code}), \mathrm{code}) = x

    :func:`predict_targets` undoes the views of a detector in the same way.

    Args:
        volumes: [..., D, H, W] of any dtype and strides.
        code: an int from 0 to 47. Codes of at least 8 need D = H = W.

    Returns:
        A new tensor of the shape and dtype of volumes. PyTorch provides gradients of any order.

    Raises:
        TypeError: volumes is not a tensor, or code not an int.
        ValueError: volumes has fewer than three axes, code is not in [0, 48), or the sizes differ.

    Equivalent PyTorch::

        axes = list(itertools.permutations(range(3)))[code // 8]
        out = volumes.flip([i - 3 for i in range(3) if code >> i & 1])
        out = out.movedim([-3, -2, -1], [axis - 3 for axis in axes])

    Example:
        >>> import torch
        >>> from fmkernels import apply_symmetry
        >>> x = torch.rand(2, 1, 4, 4, 4)
        >>> torch.equal(undo_symmetry(apply_symmetry(x, 45), 45), x)
        True
    """
    axes, flips = symmetry("undo_symmetry", volumes, code)
    return volumes.flip(flips).permute(sorted(range(len(axes)), key=axes.__getitem__))
