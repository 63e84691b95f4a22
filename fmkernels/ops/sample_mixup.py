"""sample_mixup: the random numbers of MixUp, drawn by functions of PyTorch."""

import math
from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.checks import check_generator, check_integer, check_number


def sample_mixup(
    batch_size: int,
    *,
    eta: float = 0.2,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw weights and donors for :func:`mixup3d` and :func:`soft_target_focal_loss`.

    .. math::
        \lambda = \max(l, 1 - l), \qquad l \sim \mathrm{Beta}(\eta, \eta)

    Args:
        batch_size: number of samples B, >= 0.
        eta: both parameters of the Beta distribution, > 0; a small eta mixes little.
        generator: random generator on the device; the same state gives the same draw. By default
            the global generator, the only one that ``torch.compile`` can trace.
        device: device of the result. By default that of the generator, or else torch's default.

    Returns:
        The pair ``(lam, index)``: float32 [B], in [0.5, 1]; and int64 [B], a permutation.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a value is out of range, or the generator is not on the device.

    Equivalent PyTorch::

        l = torch.distributions.Beta(eta, eta).sample([batch_size])
        lam, index = torch.maximum(l, 1 - l), torch.randperm(batch_size)

    Source: Berthelot et al., MixMatch, NeurIPS 2019 (the maximum); Zhang et al., mixup, ICLR 2018;
    Devroye, Random variate generation in one line of code, WSC 1996 (the draw of l).

    Example:
        >>> import torch
        >>> lam, index = sample_mixup(4, generator=torch.Generator().manual_seed(0))
        >>> bool((lam >= 0.5).all()), sorted(index.tolist())
        (True, [0, 1, 2, 3])
    """
    name = "sample_mixup"
    batch_size = check_integer(name, "batch_size", batch_size)
    if batch_size < 0:
        raise ValueError(f"{name}: batch_size must be >= 0, got {batch_size}")
    eta = check_number(name, "eta", eta)
    if eta <= 0:
        raise ValueError(f"{name}: eta must be > 0, got {eta}")
    if generator is not None:
        check_generator(name, generator, None if device is None else torch.device(device))
        device = generator.device
    # left out where there is none: with generator=None, compiled code is made for each batch size
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    # Devroye: |2 l - 1| = (1 + 1 / ((u^(-1 / eta) - 1) cos^2 (2 pi v)))^(-1/2), u and v uniform
    u, v = torch.empty(2, batch_size, dtype=torch.float64, device=device).uniform_(**options)
    odds = torch.expm1(-u.log() / eta) * torch.cos(2 * math.pi * v) ** 2
    lam = 0.5 + 0.5 * (1 + 1 / odds).rsqrt()
    index = torch.randperm(batch_size, dtype=torch.int64, device=device, **options)
    return lam.float(), index
