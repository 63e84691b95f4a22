"""Augmentation of the images that a detector is trained on: contrast, brightness, blur, noise.

The teacher sees images as they are. Flips, and the other symmetries, are those of `data.patches`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.training.seeds import derive_seed


def augmented(model: Callable[[Tensor], Any], config: Config, key: Sequence[int]) -> Callable:
    """The model, applied to images that are augmented first, if the options ask for it.

    Args:
        model: takes images [B, 1, D, H, W], windowed to [0, 1].
        config: ``contrast``, ``blur`` and ``noise``; if all are 0, nothing is changed.
        key: integers of at least 0 that decide the random numbers.
    """
    if not (config.contrast or config.blur or config.noise):
        return model
    return lambda images: model(augment(images, config, key))


def augment(images: Tensor, config: Config, key: Sequence[int]) -> Tensor:
    """Change contrast and brightness, blur, add noise and clamp to [0, 1], in float32.

    Each image has its own strengths: out = blur((1 + c) v + b) + n, with c and b uniform within
    ``contrast``, and standard deviations of blur and noise uniform up to ``blur`` and ``noise``.

    Returns:
        A new tensor of the shape, device and dtype of ``images``.
    """
    generator = torch.Generator(images.device).manual_seed(derive_seed(*key))

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(
            len(images), generator=generator, dtype=torch.float32, device=images.device
        )
        return values.mul_(high - low).add_(low).view(-1, 1, 1, 1, 1)

    contrast, brightness = (uniform(-config.contrast, config.contrast) for _ in range(2))
    result = images.float() * (1 + contrast) + brightness
    if config.blur:
        result = blur(result, uniform(0, config.blur).flatten(), reach=math.ceil(3 * config.blur))
    if config.noise:
        low, high = config.window
        noise = torch.randn(
            result.shape, generator=generator, dtype=torch.float32, device=images.device
        )
        result = result + noise * uniform(0, config.noise / (high - low))
    return result.clamp_(0, 1).to(images.dtype)


def blur(images: Tensor, sigma: Tensor, *, reach: int) -> Tensor:
    """Gaussian blur of each image [B, 1, D, H, W] with its own standard deviation [B] in voxels.

    The kernel reaches ``reach`` voxels to either side; beyond the border the last voxel goes on.
    """
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernels = kernels / kernels.sum(1, keepdim=True)
    result = images.transpose(0, 1)  # [1, B, D, H, W]: a channel per image
    for axis in range(3):
        shape, padding = [len(kernels), 1, 1, 1, 1], [0] * 6
        shape[2 + axis] = -1
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = reach
        padded = F.pad(result, padding, mode="replicate")
        result = F.conv3d(padded, kernels.view(shape), groups=len(kernels))
    return result.transpose(0, 1)
