"""Crops of volumes, resized, on the CPU.

A task of the forward owns layers of the crops. A task of the backward owns planes of the volumes.
For one box after the other, it adds up the gradients of the layers that use a plane, weighted along
z, and then distributes the rows of the sum.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fmkernels.cpu.compiled import njit, parallel_for, subroutine
from fmkernels.cpu.sampling import (
    axis_of,
    boxes_of,
    is_usable,
    load_row,
    new_axis,
    sample,
    sample_positions,
    take_nearest,
)
from fmkernels.cpu.voxels import (
    elements,
    empty,
    own_kind,
    part,
    read_block,
    store_block,
    window_of,
    zero_of,
)

GRAIN_SIZE = 1 << 15  # minimum samples per thread


@njit
def _crop_layers(
    first, last, volumes, boxes, out, shape, strides, K, size, clamp_box, nearest, window, zero
):
    """Compute layers ``first`` to ``last`` of all crops at K boxes.

    ``volumes``, ``boxes`` and ``out`` are addresses with dtype codes.
    """
    C, D, H, W = shape[1:]
    d, h, w = size
    boxes = boxes_of(boxes, K)
    z, y, x = new_axis(d, zero), new_axis(h, zero), new_axis(w, zero)
    writable = out[1] == own_kind(z.weight)
    buffer = empty(0 if writable else d * h * w, zero)
    for crop in range(first // d, (last - 1) // d + 1):
        k, c = divmod(crop, C)
        begin, end = max(first - crop * d, 0), min(last - crop * d, d)
        at = (crop * d + begin) * h * w
        layers = part(buffer, 0, (end - begin) * h * w)
        if writable:
            layers = elements(out[0] + buffer.itemsize * at, layers.size, buffer.dtype)
        box = boxes[k]
        if is_usable(box, shape):
            sample_positions(box[1], box[4], D, clamp_box, z)
            sample_positions(box[2], box[5], H, clamp_box, y)
            sample_positions(box[3], box[6], W, clamp_box, x)
            if nearest:
                take_nearest(z)
                take_nearest(y)
                take_nearest(x)
            start = int(box[0]) * strides[0] + c * strides[1]
            sample(volumes, start, strides, window, z, y, x, begin, end, layers)
        else:
            for i in range(layers.size):
                layers[i] = zero
        if not writable:
            store_block(layers, out[0], out[1], at)


@subroutine
def _gather_layers(grad_output, start, z, voxel, layer, block):
    """layer = the gradient of a crop to a plane of voxels; whether any sample uses the plane."""
    one = layer.dtype.type(1)
    used = False
    for i in range(z.weight.size):
        weight = one - one
        if z.below[i] == voxel:
            weight = one - z.weight[i]
        elif z.above[i] == voxel:
            weight = z.weight[i]
        if weight > 0:
            gradient = read_block(grad_output, start + i * layer.size, block)
            for j in range(layer.size):
                layer[j] = weight * gradient[j] + layer[j] if used else weight * gradient[j]
            used = True
    return used


@subroutine
def _scatter_rows(layer, y, x, row, total):
    """total [H * W] += the gradient of a layer of samples to its plane of voxels."""
    one = total.dtype.type(1)
    w, W = x.weight.size, row.size
    left, right = min(x.below[0], x.below[w - 1]), max(x.above[0], x.above[w - 1]) + 1
    for j in range(y.weight.size):
        for i in range(left, right):
            row[i] = one - one
        for i in range(w):
            value, weight = layer[j * w + i], x.weight[i]
            row[x.below[i]] += value * (one - weight)
            if weight > 0:
                row[x.above[i]] += value * weight
        below, above, weight = y.below[j] * W, y.above[j] * W, y.weight[j]
        for i in range(left, right):
            total[below + i] += row[i] * (one - weight)
        if weight > 0:
            for i in range(left, right):
                total[above + i] += row[i] * weight


@njit
def _backward_planes(
    first, last, grad_output, boxes, volumes, out, shape, strides, K, size, clamp_box, window, zero
):
    """Compute planes ``first`` to ``last`` of the gradient to all volumes, of crops at K boxes.

    ``grad_output``, ``boxes``, ``volumes`` and ``out`` are addresses with dtype codes.
    """
    C, D, H, W = shape[1:]
    d, h, w = size
    boxes, batch = boxes_of(boxes, K), empty(K, np.int64)
    z, y, x = new_axis((K, d), zero), new_axis((K, h), zero), new_axis((K, w), zero)
    for k in range(K):
        box, batch[k] = boxes[k], -1
        if is_usable(box, shape):
            batch[k] = int(box[0])
            sample_positions(box[1], box[4], D, clamp_box, axis_of(z, k))
            sample_positions(box[2], box[5], H, clamp_box, axis_of(y, k))
            sample_positions(box[3], box[6], W, clamp_box, axis_of(x, k))
    total, row = empty(H * W, zero), empty(W, zero)
    layer, block = empty(h * w, zero), empty(h * w, zero)
    windowed, low, scale, high = window
    low, high, scale = total.dtype.type(low), total.dtype.type(high), total.dtype.type(scale)
    for plane in range(first, last):
        volume, voxel = divmod(plane, D)
        b, c = divmod(volume, C)
        for i in range(H * W):
            total[i] = zero
        for k in range(K):
            start = (k * C + c) * d * h * w
            if batch[k] != b:
                continue
            if _gather_layers(grad_output, start, axis_of(z, k), voxel, layer, block):
                _scatter_rows(layer, axis_of(y, k), axis_of(x, k), row, total)
        if windowed:
            start = b * strides[0] + c * strides[1] + voxel * strides[2]
            for j in range(H):
                load_row(volumes[0], volumes[1], start + j * strides[3], strides[4], row)
                for i in range(W):
                    at = j * W + i
                    total[at] = total[at] * scale if low <= row[i] <= high else zero
        store_block(total, out[0], out[1], plane * H * W)


def crop_and_resize3d(
    volumes: Tensor,
    boxes: Tensor,
    clamp_box: bool,
    nearest: bool,
    window: Sequence[float] | None,
    crops: Tensor,
) -> None:
    """Write crops [K, C, d, h, w] of strided volumes [B, C, D, H, W] at contiguous boxes [K, 7]."""
    if not crops.numel():
        return
    d, h, w = crops.shape[2:]
    parallel_for(
        _crop_layers, crops.numel() // (h * w), GRAIN_SIZE // (h * w), (volumes, boxes, crops),
        tuple(volumes.shape), volumes.stride(), boxes.shape[0], (d, h, w), clamp_box, nearest,
        window_of(window), zero_of(volumes),
    )  # fmt: skip


def crop_and_resize3d_backward(
    grad_output: Tensor,
    boxes: Tensor,
    volumes: Tensor | None,
    clamp_box: bool,
    window: Sequence[float] | None,
    grad_volumes: Tensor,
) -> None:
    """Write the gradient to the volumes, contiguous. A window needs the volumes themselves."""
    out = grad_volumes
    if not out.numel():
        return
    planes = out.numel() // (out.shape[3] * out.shape[4])
    source = out if volumes is None else volumes  # only read to apply the window
    parallel_for(
        _backward_planes, planes, GRAIN_SIZE * planes // (grad_output.numel() + out.numel()),
        (grad_output, boxes, source, out), tuple(out.shape), source.stride(), boxes.shape[0],
        tuple(grad_output.shape[2:]), clamp_box, window_of(window), zero_of(out),
    )  # fmt: skip
