"""use_fused_norms on networks of MONAI and on blocks that are hard to trace."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmkernels.integrations.norms import use_fused_norms
from fmkernels.nn import GroupNorm3d, InstanceNorm3d

GROUPS = ("group", {"num_groups": 4})


def networks():
    nets = pytest.importorskip("monai.networks.nets")
    dynunet = {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 8, 8],
    }  # fmt: skip

    def resnet(block):
        network = nets.ResNet(block, [1, 1, 1, 1], [8] * 4, n_input_channels=1, num_classes=3)
        for parent in list(network.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm3d):
                    setattr(parent, name, nn.GroupNorm(4, child.num_features))
        return network

    return {
        "ResNet": lambda: resnet("basic"),
        "ResNet of bottlenecks": lambda: resnet("bottleneck"),
        "UNet": lambda: nets.UNet(
            3, 1, 2, (8, 8, 8), (2, 2), num_res_units=1, act="relu", norm="instance"
        ),
        "UNet with PReLU": lambda: nets.UNet(3, 1, 4, (8, 8), (2,), num_res_units=1, norm=GROUPS),
        "SegResNet": lambda: nets.SegResNet(
            3, 8, 1, 2, blocks_down=(1, 2), blocks_up=(1,), norm=GROUPS
        ),
        "DynUNet": lambda: nets.DynUNet(**dynunet),
        "DynUNet with residuals": lambda: nets.DynUNet(**dynunet, res_block=True),
    }  # fmt: skip


# normalizations that took over an activation, and all of them
FUSED = {
    "ResNet": (9, 12), "ResNet of bottlenecks": (13, 17), "UNet": (6, 6),
    "UNet with PReLU": (0, 3), "SegResNet": (9, 9), "DynUNet": (10, 10),
    "DynUNet with residuals": (10, 13),
}  # fmt: skip


def results(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = network(x)
    gradients = torch.autograd.grad(
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum(),
        list(network.parameters()),
        allow_unused=True,
    )
    return [y, *(g for g in gradients if g is not None)]


def norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, (nn.GroupNorm, nn.InstanceNorm3d))]


def activations(network: nn.Module) -> int:
    """How often a forward calls a ReLU."""
    count = []
    hooks = [
        m.register_forward_hook(lambda *_: count.append(1))
        for m in network.modules()
        if isinstance(m, (nn.ReLU, nn.LeakyReLU))
    ]
    network(torch.randn(1, 1, 32, 32, 32, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    return len(count)


@pytest.mark.parametrize("name", FUSED)
def test_networks_of_monai(name):
    torch.manual_seed(0)
    network = networks()[name]().double()
    with torch.no_grad():
        for norm in norms(network):
            if norm.weight is not None:
                norm.weight.normal_()
                norm.bias.normal_()
    x = torch.randn(2, 1, 32, 32, 32, dtype=torch.float64)
    expected, before = results(network, x), activations(network)
    keys = list(network.state_dict())
    parameters = {key: id(p) for key, p in network.named_parameters()}
    fused = use_fused_norms(network)
    for ours, theirs in zip(results(fused, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert list(fused.state_dict()) == keys
    assert {key: id(p) for key, p in fused.named_parameters()} == parameters
    assert all(isinstance(norm, GroupNorm3d) for norm in norms(fused))
    taken = sum(norm.activation is not None for norm in norms(fused))
    assert before - activations(fused) == taken
    assert (taken, len(norms(fused))) == FUSED[name]
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(again.eval()(x), fused.eval()(x))


class Block(nn.Module):
    """A residual block, with what else a forward may do."""

    def __init__(self, kind: str = "plain"):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv3d(4, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "shapes" and x.shape[0] > 5:  # which cannot be traced
            return y
        if self.kind == "mode":
            y = F.dropout(y, 0.5, self.training)
        y = self.norm(y)
        if self.kind == "used twice":
            return F.relu(y + x) + y
        if self.kind == "sum only":
            return y + x
        if self.kind == "broadcast":
            return F.relu(y + self.scale)
        if self.kind == "scaled":
            return F.relu(torch.add(y, x, alpha=2))
        if self.kind == "leaky":
            return F.leaky_relu(y, 0.3)
        if self.kind == "growing":
            return F.leaky_relu(y, -0.3)
        if self.kind == "method":
            return (x + y).relu()
        y += x
        return self.act(y) * self.scale


KINDS = {
    "plain": "relu", "shapes": None, "mode": None, "used twice": None, "sum only": None,
    "broadcast": "relu", "scaled": None, "leaky": "leaky_relu", "growing": None, "method": "relu",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_keeps_its_meaning(kind):
    torch.manual_seed(0)
    block = Block(kind).double().eval()
    x = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64)
    expected, keys = block(x), list(block.state_dict())
    fused = use_fused_norms(block)
    torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-10)
    assert fused.norm.activation == KINDS[kind] and list(fused.state_dict()) == keys
    assert not fused.training and not fused.norm.training


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x, factor=None):
        y = F.relu(self.norm(x))
        return y if factor is None else factor * y


class Asks(Optional):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y if isinstance(x, torch.Tensor) else -y


def test_what_a_tracer_would_take_for_something_else():
    x = torch.randn(1, 4, 3, 3, 3)
    optional, asks = Optional(), Asks()
    expected = optional(x), optional(x, factor=3.0), asks(x)
    optional, asks = use_fused_norms(optional), use_fused_norms(asks)
    torch.testing.assert_close((optional(x), optional(x, factor=3.0), asks(x)), expected)
    assert optional.norm.activation is None and asks.norm.activation == "relu"


def test_what_is_shared_or_hooked_stays():
    norm, act = nn.InstanceNorm3d(4, affine=True), nn.ReLU()
    both = nn.Sequential(norm, act, nn.Conv3d(4, 4, 1), norm)
    x = torch.randn(2, 4, 3, 3, 3)
    expected = both(x)
    torch.testing.assert_close(use_fused_norms(both)(x), expected)
    assert both[0] is both[3] and isinstance(both[0], InstanceNorm3d)
    assert both[0].activation is None and both[1] is act
    hooked = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    assert type(use_fused_norms(hooked)[0]) is nn.GroupNorm
    block = Block()
    block.register_forward_hook(lambda *_: None)
    assert use_fused_norms(block) is block and block.norm.activation is None


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm3d(4), nn.InstanceNorm3d(4, track_running_stats=True), nn.GroupNorm(2, 4)],
)
def test_a_single_module(norm):
    fused = use_fused_norms(norm)
    assert isinstance(fused, GroupNorm3d) == (type(norm) is nn.GroupNorm)
    x = torch.randn(2, 4, 3, 3, 3)
    torch.testing.assert_close(fused(x), norm(x))


def test_no_module():
    with pytest.raises(TypeError, match=r"^use_fused_norms: network must be a torch"):
        use_fused_norms("resnet")
