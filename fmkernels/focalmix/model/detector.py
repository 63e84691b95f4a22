"""A slim 3D detector: residual backbone, feature pyramid, one head for all levels; one class, group normalisation."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fmkernels.focalmix.group_norm import GroupNorm

PRIOR = 0.01  # the probability every anchor starts with, so that easy background does not fill the first steps


def apply_window(volumes: Tensor, window: tuple[float, float]) -> Tensor:
    """float32 clamp((v - lo) / (hi - lo), 0, 1) of volumes in HU of any dtype; window = (lo, hi)."""
    low, high = window
    return volumes.float().sub(low).div_(high - low).clamp_(0, 1)


def flipped(volumes: Tensor, mask: int) -> Tensor:
    """Volumes [..., D, H, W] flipped along the axes that a mask names: 1 = D, 2 = H, 4 = W."""
    return volumes.flip([axis for axis, bit in ((-3, 1), (-2, 2), (-1, 4)) if mask & bit])


class ConvNorm(nn.Sequential):
    """Convolution of 3 voxels, group normalisation (groups of 4), sum with a residual if one is given, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False),
            GroupNorm(outputs // 4, outputs, relu=True),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        convolution, norm = self
        return norm(convolution(x), residual)


class Residual(nn.Module):
    """x -> ReLU(x + two convolutions of x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(ConvNorm(channels, channels), ConvNorm(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return second(first(x), residual=x)


class Detector(nn.Module):
    """Feature-pyramid detector of one class.

    Stage i of the backbone halves the resolution, to stride 2^(i+1), and has ``widths[i]`` channels and ``blocks[i]``
    residual blocks. ``forward`` takes images float ``[B, 1, D, H, W]``, windowed to [0, 1], sides multiples of the last
    stage's stride, and returns two lists over the levels, fine to coarse: logits ``[B, A, d, h, w]`` and box deltas
    ``[B, A, 6, d, h, w]`` (see `anchors.encode_boxes`), d = D / stride and so on.

    Args:
        strides: of the levels that carry anchors; successive powers of two that end with the backbone's last.
        per_place: A, anchors at each place.
        widths: channels of the backbone's stages, multiples of 4.
        blocks: residual blocks of each.
        channels: of the pyramid and the head, a multiple of 4.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        strides: Sequence[int],
        per_place: int,
        *,
        widths: Sequence[int],
        blocks: Sequence[int],
        channels: int,
    ) -> None:
        super().__init__()
        every = [2 ** (i + 1) for i in range(len(widths))]
        if not strides or list(strides) != every[-len(strides) :]:
            raise ValueError(
                f"Detector: strides: expected the last of {every}, got {list(strides)}"
            )
        if len(blocks) != len(widths):
            raise ValueError(
                f"Detector: blocks: expected {len(widths)}, as many as widths, got {list(blocks)}"
            )
        if any(width % 4 or width < 4 for width in (*widths, channels)):
            raise ValueError(
                f"Detector: expected multiples of 4, got widths {list(widths)}, channels {channels}"
            )
        self.stages = nn.ModuleList(
            nn.Sequential(
                ConvNorm(before, width, stride=2), *(Residual(width) for _ in range(count))
            )
            for before, width, count in zip((1, *widths), widths, blocks, strict=False)
        )
        self.laterals = nn.ModuleList(
            nn.Conv3d(width, channels, 1) for width in widths[-len(strides) :]
        )
        self.head = ConvNorm(channels, channels)
        self.logits = nn.Conv3d(channels, per_place, 1)
        self.deltas = nn.Conv3d(channels, per_place * 6, 1)
        for layer in (self.logits, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.constant_(self.logits.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        levels = [
            lateral(x)
            for lateral, x in zip(self.laterals, features[-len(self.laterals) :], strict=True)
        ]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0)
        heads = [self.head(level) for level in levels]
        return [self.logits(x) for x in heads], [
            self.deltas(x).unflatten(1, (-1, 6)) for x in heads
        ]
