"""use_fused_norms on networks of MONAI, and what it leaves alone."""

import copy
import pickle

import pytest
import torch
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
    "ResNet": (0, 12), "ResNet of bottlenecks": (0, 17), "UNet": (6, 6),
    "UNet with PReLU": (0, 3), "SegResNet": (1, 9), "DynUNet": (0, 10),
    "DynUNet with residuals": (0, 13),
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


def test_a_sequential_with_a_forward_of_its_own_stays():
    class Sums(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return y + self[1](y)

    block, x = Sums(nn.GroupNorm(2, 4), nn.ReLU()), torch.randn(2, 4, 3, 3, 3)
    expected = block(x)
    torch.testing.assert_close(use_fused_norms(block)(x), expected)
    assert isinstance(block[0], GroupNorm3d) and block[0].activation is None


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_in_between(inplace):
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout3d(0.5, inplace), nn.LeakyReLU(0.2))
    x = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    torch.manual_seed(0)
    expected = block(x)
    use_fused_norms(block)
    torch.manual_seed(0)
    y = block(x)
    torch.testing.assert_close(y, expected)
    assert (block[0].activation is None) == inplace
    for ours, theirs in zip(*(torch.autograd.grad(z.sum(), x) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_mode_of_each_module_stays():
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.BatchNorm3d(4))
    block[2].eval()
    use_fused_norms(block)
    assert block.training and block[0].training and not block[2].training


@pytest.mark.parametrize("shape", [(4, 4, 5, 6), (3, 4, 5, 6), (2, 4, 3, 3, 3)])
def test_instance_norm_takes_what_torch_takes(shape):
    """Without a batch; and any number of channels where there are no parameters."""
    x, channels = torch.randn(shape), shape[-4]
    for norm in (nn.InstanceNorm3d(channels), nn.InstanceNorm3d(channels, affine=True)):
        expected = norm(x)
        torch.testing.assert_close(use_fused_norms(norm)(x), expected)
    torch.testing.assert_close(InstanceNorm3d(2)(x), nn.InstanceNorm3d(channels)(x))
    assert InstanceNorm3d(2).num_features == 2


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 2, 2, 2, 3), (0, 4, 2, 2, 2, 3)])
def test_group_norm_takes_any_number_of_axes(shape):
    norm, x = nn.GroupNorm(2, 4), torch.randn(shape)
    torch.testing.assert_close(use_fused_norms(norm)(x), norm(x))


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
    ours = nn.Sequential(GroupNorm3d(2, 4), nn.ReLU())
    ours[0].register_forward_hook(lambda *_: None)
    assert use_fused_norms(ours)[0].activation is None
    block, called = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()), []
    block[1].register_forward_hook(lambda *_: called.append(1))
    use_fused_norms(block)(x)
    assert called and block[0].activation is None


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
