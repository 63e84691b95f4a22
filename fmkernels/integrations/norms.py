"""Fused normalization for a network that is already there: MONAI's, nnU-Net's, or any other."""

from collections import Counter
from itertools import pairwise

from torch import nn

from fmkernels.nn import GroupNorm3d, InstanceNorm3d

__all__ = ["use_fused_norms"]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_Norm = GroupNorm3d | InstanceNorm3d


def use_fused_norms(network: nn.Module) -> nn.Module:
    """Replace group and instance normalization by fused modules, in place.

    Every ``torch.nn.GroupNorm`` and ``torch.nn.InstanceNorm3d`` without running statistics becomes
    a :class:`fmkernels.nn.GroupNorm3d` or :class:`fmkernels.nn.InstanceNorm3d`. In a
    ``torch.nn.Sequential`` it takes over the ReLU or leaky ReLU that follows, also behind a
    dropout, and an identity replaces the activation. A network that calls single modules of such a
    Sequential would compute something else: do not use this function on it. Modules with hooks, and
    modules that are registered twice, are not fused with what follows them.

    Parameters stay the same objects under the same names: optimizers, checkpoints and
    ``state_dict`` are not affected. Results are those of the original within rounding; under
    autocast the normalization no longer leaves the 16-bit type. Call it after the network is built,
    before ``torch.compile`` or DistributedDataParallel.

    Args:
        network: on any device, in training or evaluation mode.

    Returns:
        The network; a new module only if ``network`` is itself a normalization.

    Equivalent PyTorch: the network as it was.

    Example:
        >>> import torch
        >>> block = nn.Sequential(nn.Conv3d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
        >>> use_fused_norms(block)
        Sequential(
          (0): Conv3d(1, 8, kernel_size=(3, 3, 3), stride=(1, 1, 1))
          (1): GroupNorm3d(2, 8, eps=1e-05, affine=True, activation='relu')
          (2): Identity()
        )
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"use_fused_norms: network must be a torch.nn.Module, got {type(network).__name__}"
        )
    places = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
    fused = {id(child): _fused(child) for _, _, child in places}
    for parent, name, child in places:
        if (norm := fused[id(child)]) is not None:
            parent._modules[name] = norm
    uses = Counter(id(parent._modules[name]) for parent, name, _ in places)
    shared = {module for module, count in uses.items() if count > 1}
    for module in network.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _fuse_neighbors(module, shared)
    return _fused(network) or network


def _fused(module: nn.Module) -> _Norm | None:
    """The fused module with the same parameters; None if this is no normalization."""
    if _has_hooks(module):
        return None
    norm: _Norm
    if type(module) is nn.GroupNorm:
        norm = GroupNorm3d(module.num_groups, module.num_channels, module.eps, affine=False)
    elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
        norm = InstanceNorm3d(module.num_features, module.eps)
    else:
        return None
    norm.affine = module.affine
    norm.weight, norm.bias = module.weight, module.bias
    return norm.train(module.training)


def _has_hooks(module: nn.Module) -> bool:
    return any(
        hooks
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    )


def _slope(module: nn.Module) -> float | None:
    """The slope below 0 of a ReLU or a leaky ReLU."""
    if _has_hooks(module):
        return None
    if type(module) is nn.ReLU:
        return 0.0
    if type(module) is nn.LeakyReLU and module.negative_slope >= 0:
        return module.negative_slope
    return None


def _fuse_neighbors(sequence: nn.Sequential, shared: set[int]) -> None:
    """Fuse activations, also behind dropout: its factors are not negative, so the order is free."""
    names = [name for name, child in sequence._modules.items() if not _is_transparent(child)]
    for name, following in pairwise(names):
        norm, activation = sequence._modules[name], sequence._modules[following]
        if not isinstance(norm, GroupNorm3d) or activation is None:
            continue
        if norm.activation is not None or id(norm) in shared or _has_hooks(norm):
            continue
        if (slope := _slope(activation)) is not None:
            norm.activation, norm.negative_slope = "leaky_relu" if slope else "relu", slope
            sequence._modules[following] = nn.Identity()


def _is_transparent(module: nn.Module | None) -> bool:
    return isinstance(module, _DROPOUTS) and not (module.inplace or _has_hooks(module))
