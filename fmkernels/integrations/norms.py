"""Fused normalization for a network that is already there: MONAI's, nnU-Net's, or any other."""

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fmkernels.nn import GroupNorm3d, InstanceNorm3d

__all__ = ["use_fused_norms"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_SUMS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, "relu")
_Norm = GroupNorm3d | InstanceNorm3d


def use_fused_norms(network: nn.Module) -> nn.Module:
    """Replace group and instance normalization by fused modules, in place.

    Every ``torch.nn.GroupNorm`` and ``torch.nn.InstanceNorm3d`` without running statistics becomes
    a :class:`fmkernels.nn.GroupNorm3d` or :class:`fmkernels.nn.InstanceNorm3d`. It takes over the
    ReLU or leaky ReLU that follows, and the sum in between, as in a residual block. Where that is
    in a ``forward``, its module becomes a ``torch.fx.GraphModule`` of the same code without these
    steps. A module whose ``forward`` cannot be traced, or has hooks, keeps it and only gets the
    fused normalization.

    Parameters stay the same objects under the same names: optimizers, checkpoints and
    ``state_dict`` are not affected. Results are those of the original within rounding; under
    autocast the normalization no longer leaves the 16-bit type. Call it after the network is built,
    before ``torch.compile`` or DistributedDataParallel.

    Args:
        network: on any device, in training or evaluation mode.

    Returns:
        The network; a new module only if ``network`` is itself a normalization or a traced module.

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
    own = _fused(network)
    if own is not None:
        return own
    return _with_activations(network, shared, {})


def _fused(module: nn.Module) -> _Norm | None:
    """The fused module with the same parameters; None if this is no normalization."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
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


def _with_activations(
    module: nn.Module, shared: set[int], done: dict[nn.Module, nn.Module]
) -> nn.Module:
    """The module after its normalizations, and those of its children, took over what follows."""
    if module in done:
        return done[module]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _with_activations(child, shared, done)
    new = module
    if any(map(_is_norm, module.children())):
        if isinstance(module, nn.Sequential):
            _fuse_neighbors(module, shared)
        else:
            new = _fused_forward(module, shared)
    done[module] = new
    return new


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, GroupNorm3d) and module.activation is None


def _slope(module: nn.Module) -> float | None:
    """The slope below 0 of a ReLU or a leaky ReLU."""
    if type(module) is nn.ReLU:
        return 0.0
    if type(module) is nn.LeakyReLU and module.negative_slope >= 0:
        return module.negative_slope
    return None


def _activate(norm: nn.Module, slope: float) -> None:
    norm.activation = "leaky_relu" if slope else "relu"  # type: ignore[assignment]
    norm.negative_slope = slope  # type: ignore[assignment]


def _fuse_neighbors(sequence: nn.Sequential, shared: set[int]) -> None:
    """Dropout in between may come after the activation instead: its factors are not negative."""
    names = [n for n, child in sequence._modules.items() if not isinstance(child, _DROPOUTS)]
    for name, following in pairwise(names):
        norm, activation = sequence._modules[name], sequence._modules[following]
        if norm is None or activation is None or not _is_norm(norm) or id(norm) in shared:
            continue
        if (slope := _slope(activation)) is not None:
            _activate(norm, slope)
            sequence._modules[following] = nn.Identity()


class _TensorProxy(fx.Proxy):
    """A proxy that isinstance takes for a tensor."""

    __class__ = property(lambda self: Tensor)
    _is_param = _is_buffer = False  # and not for a parameter


class _Shallow(fx.Tracer):
    """Traces one forward; all children are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _TensorProxy else super().create_arg(a)


def _fused_forward(module: nn.Module, shared: set[int]) -> nn.Module:
    """The module with a forward that leaves to normalizations what follows them, if it can be."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks) or any(True for _ in module._state_dict_hooks):
        return module
    graph = _traced(module)
    if graph is None:
        return module
    calls = [node for node in graph.nodes if node.op == "call_module"]
    changed = False
    for node in calls:
        norm = module.get_submodule(str(node.target))
        once = sum(other.target == node.target for other in calls) == 1
        if _is_norm(norm) and once and id(norm) not in shared:
            changed |= _fuse_following(module, graph, node)
    if not changed:
        return module
    graph.lint()
    fused = fx.GraphModule(module, graph, type(module).__name__)
    for name, child in module._modules.items():  # also those that forward does not call, in order
        fused._modules[name] = fused._modules.pop(name, child)
    for name, parameter in module._parameters.items():
        fused._parameters[name] = parameter
    for name, buffer in module._buffers.items():
        fused._buffers[name] = buffer
    fused._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return fused.train(module.training)


def _traced(module: nn.Module) -> fx.Graph | None:
    """The graph of forward; None if it cannot be traced or depends on the mode.

    A proxy is not None: optional arguments could be traced wrongly.
    """
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.default is not parameter.empty or parameter.kind in _VARIADIC:
            return None
    was_training = module.training
    graphs = []
    try:
        for training in (True, False):
            module.training = training
            graphs.append(_Shallow().trace(module))
    except Exception:  # whatever a forward may do with what is no tensor
        return None
    finally:
        module.training = was_training
    for node in (*graphs[0].nodes, *graphs[1].nodes):
        node.type = None  # a GraphModule with annotations in quotes cannot be pickled
    codes = [graph.python_code("self").src for graph in graphs]
    return graphs[0] if codes[0] == codes[1] else None


def _fuse_following(module: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Fuse a sum and an activation behind a normalization, if they are there."""
    if len(node.args) != 1 or node.kwargs:
        return False
    (x,), last, residual = node.args, node, None
    following = _only_user(last)
    if following is not None and following.op == "call_function" and following.target in _SUMS:
        others = [arg for arg in following.args if arg is not node]
        if following.kwargs or len(others) != 1 or not isinstance(others[0], fx.Node):
            return False
        last, residual = following, others[0]
        following = _only_user(last)
    if following is None:
        return False
    slope = _slope_of(module, following)
    if slope is None or (residual is not None and _is_written(module, x, node, last)):
        return False
    norm = module.get_submodule(str(node.target))
    _activate(norm, slope)
    with graph.inserting_before(following):
        args: tuple[Any, ...] = (x,)
        if residual is not None:
            args += (graph.call_method("expand_as", (residual, x)),)
        call = graph.call_module(str(node.target), args)
    following.replace_all_uses_with(call)
    for old in dict.fromkeys((following, last, node)):
        graph.erase_node(old)
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _slope_of(module: nn.Module, node: fx.Node) -> float | None:
    """The slope below 0 of a call of an activation."""
    if node.op == "call_module":
        return _slope(module.get_submodule(str(node.target)))
    if node.target in _RELUS:
        return 0.0
    if node.target is F.leaky_relu:
        slope = (*node.args[1:2], node.kwargs.get("negative_slope", 0.01))[0]
        return slope if isinstance(slope, (int, float)) and slope >= 0 else None
    return None


def _is_written(module: nn.Module, x: Any, start: fx.Node, end: fx.Node) -> bool:
    """Whether a step between two others may change x in place."""
    return any(x in node.args and _in_place(module, node) for node in _between(start, end))


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    node = start.next
    while node is not end:
        yield node
        node = node.next


def _in_place(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = name.endswith("_") or (name.startswith("i") and hasattr(operator, name))
    return inplace or bool(node.kwargs.get("inplace") or node.kwargs.get("out"))
