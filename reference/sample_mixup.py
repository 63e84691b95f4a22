"""How a batch is mixed, drawn in the textbook form; eta not so small that both draws are 0."""

import torch
from torch import Tensor


def sample_mixup(batch_size, *, eta=0.2, generator=None, device=None) -> tuple[Tensor, Tensor]:
    """lam = max(l, 1 - l), l ~ Beta(eta, eta) as a ratio of Gamma(eta) draws; a permutation."""
    shape = torch.full((2, batch_size), eta, dtype=torch.float64, device=device)
    first, second = torch._standard_gamma(shape, generator=generator)
    l = first / (first + second)  # noqa: E741
    return torch.maximum(l, 1 - l), torch.randperm(batch_size, generator=generator, device=device)
