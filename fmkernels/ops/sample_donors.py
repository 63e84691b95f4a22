"""sample_donors: who is mixed with whom by object_mixup3d, drawn by functions of PyTorch."""

import torch
from torch import Tensor

from fmkernels.ops.checks import (
    check_boxes,
    check_device,
    check_dtype,
    check_generator,
    check_tensor,
    shape_of,
)

_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def sample_donors(
    boxes: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw a donor for each box of :func:`object_mixup3d`: another box of the same label.

    .. math::
        \Pr(\mathrm{donor}_k = \mathrm{box}_j) = \frac{1}{n - 1}, \qquad j \ne k

    for each usable box j of the label of box k, if n boxes of the label are usable, box k among
    them. A box is usable if all its numbers are finite, its batch index is not negative, and its
    ends lie beyond its starts. Donors are drawn independently, from all volumes.

    Args:
        boxes: float32 [K, 7], (batch index, z1, y1, x1, z2, y2, x2), voxels.
        labels: [K], int64, int32, int16, int8, uint8 or bool; None if all are of one label.
        generator: random generator on the device of the boxes; the same state gives the same draw.
            By default the global generator, the only one that ``torch.compile`` can trace.

    Returns:
        float32 [K, 7], the donor of each box. NaN where the box is not usable or is the only one of
        its label: :func:`object_mixup3d` leaves its volume untouched there. No gradient.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes or devices do not fit.

    Equivalent PyTorch, in memory K^2 instead of K::

        score = torch.rand(K, K).masked_fill(labels[:, None] != labels, -1).fill_diagonal_(-1)
        best, donor = score.masked_fill(~usable, -1).max(1)
        donor_boxes = boxes[donor].masked_fill((best < 0)[:, None], nan)

    Source: Wang et al., FocalMix: Semi-Supervised Learning for 3D Medical Image Detection, CVPR
    2020, section 3.3. That donors have the label of the box is this project's choice; the paper has
    one class.

    Example:
        >>> import torch
        >>> boxes = torch.tensor([[0, 0, 0, 0, 4, 4, 4], [1, 2, 2, 2, 9, 9, 9.0]])
        >>> torch.equal(sample_donors(boxes), boxes.flip(0))
        True
    """
    name = "sample_donors"
    check_tensor(name, "boxes", boxes)
    check_boxes(name, "boxes", boxes, boxes.device)
    check_generator(name, generator, boxes.device)
    count, device = len(boxes), boxes.device
    usable = boxes.isfinite().all(1) & (boxes[:, 0] >= 0) & (boxes[:, 4:] > boxes[:, 1:4]).all(1)
    order = torch.arange(count, device=device)
    if labels is not None:
        check_tensor(name, "labels", labels)
        check_dtype(name, "labels", labels, _LABELS)
        check_device(name, "labels", labels, device)
        if labels.shape != (count,):
            raise ValueError(f"{name}: labels must have shape ({count},), got {shape_of(labels)}")
        order = labels.to(torch.int64).argsort(stable=True)
    order = order[usable[order].logical_not().to(torch.uint8).argsort(stable=True)]
    usable = usable[order]
    begins = usable != usable.roll(1)  # of the first row, it does not matter
    if labels is not None:
        begins = begins | (labels[order] != labels[order].roll(1))
    group = begins.cumsum(0)
    start, end = torch.searchsorted(group, group), torch.searchsorted(group, group, right=True)
    # a step of 1 to size - 1 around the circle of the group
    others = end - start - 1
    u = boxes.new_empty(count, dtype=torch.float64).uniform_(generator=generator)[order]
    step = 1 + torch.minimum((u * others).long(), (others - 1).clamp(min=0))
    place = torch.arange(count, device=device)
    donor = start + (place - start + step) % (others + 1)
    rows = boxes[order][donor].masked_fill(~(usable & (others > 0))[:, None], torch.nan)
    return torch.empty_like(rows).index_copy(0, order, rows)
