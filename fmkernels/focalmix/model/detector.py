"""A slim 3D detector of one class: residual backbone, feature pyramid, one head for all levels."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.model.anchors import Anchors
from fmkernels.nn import GroupNorm3d

PRIOR = 0.01  # initial probability of every anchor: easy background does not dominate early steps


def apply_window(volumes: Tensor, window: tuple[float, float]) -> Tensor:
    """Map volumes in HU of any dtype to float32 clamp((v - lo) / (hi - lo), 0, 1)."""
    low, high = window
    return volumes.float().sub(low).div_(high - low).clamp_(0, 1)


class Norm(nn.Module):
    """Normalization, optional residual, ReLU; group: `GroupNorm3d` of 4 channels each."""

    def __init__(self, channels: int, *, kind: str) -> None:
        super().__init__()
        self.layer = (
            GroupNorm3d(channels // 4, channels, activation="relu")
            if kind == "group"
            else nn.BatchNorm3d(channels)
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(self.layer, GroupNorm3d):
            return self.layer(x, residual)
        x = self.layer(x)
        return (x if residual is None else x.add_(residual)).relu_()


class ConvNorm(nn.Sequential):
    """3x3x3 convolution, normalization, optional residual, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, norm: str, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), Norm(outputs, kind=norm)
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        convolution, norm = self
        return norm(convolution(x), residual)


class Residual(nn.Module):
    """x -> ReLU(x + two convolutions of x)."""

    def __init__(self, channels: int, *, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ConvNorm(channels, channels, norm=norm) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return second(first(x), residual=x)


class Detector(nn.Module):
    """Feature-pyramid detector of one class.

    Stage i of the backbone halves the resolution, to stride 2^(i+1), and has ``widths[i]`` channels
    and ``blocks[i]`` residual blocks. ``forward`` takes images float ``[B, 1, D, H, W]``, windowed
    to [0, 1], whose sides are multiples of the last stage's stride. It returns two lists over the
    levels, fine to coarse: logits ``[B, A, d, h, w]`` and box deltas ``[B, A, 6, d, h, w]`` (see
    `anchors.encode_boxes`), where d = D / stride and so on.

    Args:
        strides: strides of the levels with anchors: the last ones of the backbone.
        anchors_per_cell: A, the number of anchors in each cell of a level.
        widths: channels of each backbone stage, multiples of 4.
        blocks: residual blocks of each backbone stage.
        channels: channels of the pyramid and the head, a multiple of 4.
        norm: ``"group"``: `GroupNorm3d` of 4 channels each, whose statistics are those of the
            window; ``"batch"``: batch normalization, whose result does not depend on the window.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        strides: Sequence[int],
        anchors_per_cell: int,
        *,
        widths: Sequence[int],
        blocks: Sequence[int],
        channels: int,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        stages = [2 ** (i + 1) for i in range(len(widths))]
        if not strides or list(strides) != stages[-len(strides) :]:
            raise ValueError(
                f"Detector: strides: expected the last of {stages}, got {list(strides)}"
            )
        if len(blocks) != len(widths):
            raise ValueError(
                f"Detector: blocks: expected {len(widths)} numbers, one per width, "
                f"got {list(blocks)}"
            )
        if any(width % 4 or width < 4 for width in (*widths, channels)):
            raise ValueError(
                f"Detector: expected multiples of 4, got widths {list(widths)}, channels {channels}"
            )
        self.stages = nn.ModuleList(
            nn.Sequential(
                ConvNorm(before, width, stride=2, norm=norm),
                *(Residual(width, norm=norm) for _ in range(count)),
            )
            for before, width, count in zip((1, *widths), widths, blocks, strict=False)
        )
        self.laterals = nn.ModuleList(
            nn.Conv3d(width, channels, 1) for width in widths[-len(strides) :]
        )
        self.head = nn.Conv3d(channels, channels, 3, 1, 1, bias=False)
        # one for each level: batch statistics of the levels differ
        self.norms = nn.ModuleList(Norm(channels, kind=norm) for _ in strides)
        self.logits = nn.Conv3d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv3d(channels, anchors_per_cell * 6, 1)
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
        heads = [norm(self.head(level)) for norm, level in zip(self.norms, levels, strict=True)]
        return [self.logits(x) for x in heads], [
            self.deltas(x).unflatten(1, (-1, 6)) for x in heads
        ]


def build_model(config: Config, device: torch.device | str = "cpu") -> Detector:
    """The detector of a configuration, float32, channels last (fast on CPU and GPU)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            model = Detector(
                config.strides,
                Anchors.from_config(config).per_cell,
                widths=config.widths,
                blocks=config.blocks,
                channels=config.channels,
                norm=config.norm,
            )
    finally:
        torch.set_default_dtype(default)
    return channels_last(model)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model predict: batch norms use their running statistics, and do not change them."""
    if not model.training:  # as the averaged weights: nothing to switch in every step
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def channels_last(model: nn.Module) -> Any:
    """The same model with channels-last weights."""
    return model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision on a device; None is full precision."""
    if config.amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]
    if device.type != "cuda":
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
        return torch.bfloat16 if has_bf16 else None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The precision of the detector on a device."""
    dtype = amp_dtype(config, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def input_dtype(images: Tensor) -> torch.dtype:
    """The dtype in which a detector takes images: that of autocast, or float32 without it."""
    device = images.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
