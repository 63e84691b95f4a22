"""mixup3d against plain and the best PyTorch, torch.compile, a copy, and other libraries.

Other libraries neither flip nor window. They draw lam and partners themselves; here they get them.
Partners are the reversed batch, as in timm. torchvision takes one lam and the next sample; kornia
takes 2D images, so slices are stacked. The copy moves the minimum number of bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
from benchmarks.common import (
    DEVICE,
    LARGE_ROWS,
    OURS,
    Comparison,
    Provider,
    Sweep,
    large_volume,
    on_one_thread,
    rows,
)
from fmkernels import mixup3d

WINDOW = (-1200.0, 600.0)
FLIPS = [
    [axis for bit, axis in ((1, 1), (2, 2), (4, 3)) if mask & bit] for mask in range(8)
]  # of [1, D, H, W]
BF16, I16 = torch.bfloat16, torch.int16


@dataclass(frozen=True)
class Workload:
    """Volumes [batch, 1, edge, edge, edge]; integers are windowed, ``flips`` flips all."""

    batch: int
    edge: int
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    flips: bool = False
    in_place: bool = False
    gradient: bool = False

    def __str__(self) -> str:
        types = str(self.dtype) if self.result == self.dtype else f"{self.dtype} to {self.result}"
        extras = [", window"] * (not self.dtype.is_floating_point) + [", flips"] * self.flips
        place = ", in place" * self.in_place
        return f"{types.replace('torch.', '')} {self.batch} x {self.edge}^3{''.join(extras)}{place}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shape = (self.batch, 1, *[self.edge] * 3)
        if self.dtype.is_floating_point:
            volumes = torch.randn(shape, device=DEVICE).to(self.dtype).requires_grad_(self.gradient)
        else:
            volumes = torch.randint(-1400, 800, shape, dtype=self.dtype, device=DEVICE)
        lam = torch.rand(self.batch, device=DEVICE) / 2 + 0.5
        flips = (
            torch.randint(8, (self.batch,), dtype=torch.uint8, device=DEVICE)
            if self.flips
            else None
        )
        return volumes, lam, torch.arange(self.batch, device=DEVICE).flip(0), flips

    def inputs_for_torchvision(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        volumes, lam, index, flips = self.inputs()
        return volumes, torch.full_like(lam, 0.75), index.sort().values.roll(1), flips

    def window(self) -> tuple[float, float] | None:
        return None if self.dtype.is_floating_point else WINDOW

    def floor(self) -> dict[str, int]:
        """Every voxel read and written once, forward and backward."""
        voxels = self.batch * self.edge**3
        forward = voxels * (self.dtype.itemsize + self.result.itemsize)
        return (
            {"forward": forward, "backward": forward, "both": 2 * forward}
            if self.gradient
            else {"forward": forward}
        )


TARGETS = {  # the workloads of the aims, where the best form is compiled too
    "cpu": [Workload(8, 96, gradient=True), Workload(8, 96, I16)],
    "cuda": [Workload(16, 192, in_place=True), Workload(16, 192, I16, BF16, flips=True)],
}[DEVICE.type]
OTHERS = [
    workload
    for batch, edge in {"cpu": [(8, 96)], "cuda": [(16, 192), (16, 96), (2, 96), (8, 160)]}[
        DEVICE.type
    ]
    for workload in (
        Workload(batch, edge, gradient=True),
        Workload(batch, edge, in_place=True),
        Workload(batch, edge, flips=True, in_place=True),
        Workload(batch, edge, BF16, BF16, in_place=True),
        Workload(batch, edge, I16, BF16, flips=True),
        Workload(batch, edge, I16),
    )
    if workload not in TARGETS
]
if DEVICE.type == "cpu":
    OTHERS += [Workload(2, 160, gradient=True), Workload(2, 160, I16)]


def ours(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, lam, index, flips):
        out = volumes if workload.in_place else None
        window = workload.window()
        return mixup3d(
            volumes, lam, index, flips=flips, window=window, dtype=workload.result, out=out
        )

    return run


def _flipped(volumes: Tensor, flips: Tensor) -> Tensor:
    for axis, bit in ((2, 1), (3, 2), (4, 4)):
        chosen = (flips & bit).bool()[:, None, None, None, None]
        volumes = torch.where(chosen, volumes.flip(axis), volumes)
    return volumes


def plain(workload: Workload) -> Callable[..., Tensor]:
    """The formula as a trainer writes it."""

    def run(volumes, lam, index, flips):
        x, share = volumes.float(), lam[:, None, None, None, None]
        if workload.window():
            low, high = WINDOW
            x = ((x - low) / (high - low)).clamp(0, 1)
        if flips is not None:
            x = _flipped(x, flips)
        mixed = (share * x + (1 - share) * x[index]).to(workload.result)
        return volumes.copy_(mixed) if workload.in_place else mixed

    return run


def _windowed(volumes: Tensor) -> Tensor:
    low, high = WINDOW
    return volumes.float().sub_(low).div_(high - low).clamp_(0, 1)


def gather_and_lerp(workload: Workload) -> Callable[..., Tensor]:
    """The best of eager PyTorch that does not read lam."""

    def run(volumes, lam, index, flips):
        x = _windowed(volumes) if workload.window() else volumes.float()
        if flips is not None:
            x = _flipped(x, flips)
        mixed = torch.lerp(x.index_select(0, index), x, lam[:, None, None, None, None])
        return volumes.copy_(mixed) if workload.in_place else mixed.to(workload.result)

    return run


def lerp_by_sample(workload: Workload) -> Callable[..., Tensor]:
    """The least traffic that eager PyTorch allows; reads lam, index and flips on the host."""

    def run(volumes, lam, index, flips):
        own = (
            volumes
            if flips is None
            else [x.flip(FLIPS[mask]) for x, mask in zip(volumes, flips.tolist(), strict=True)]
        )
        if workload.window():
            own = [_windowed(x) for x in own]
        overwritten = workload.in_place and flips is None
        partners = own.index_select(0, index) if overwritten else [own[i] for i in index.tolist()]
        out = volumes if workload.in_place else torch.empty_like(volumes, dtype=workload.result)
        for *pair, share, row in zip(partners, own, lam.tolist(), out, strict=True):
            torch.lerp(*pair, share, out=row)
        return out

    def run_with_graph(volumes, *told):
        return (
            _BySample.apply(run, volumes, *told) if volumes.requires_grad else run(volumes, *told)
        )

    return run_with_graph


class _BySample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, volumes, lam, index, flips):
        ctx.told = lam, index
        return run(volumes, lam, index, flips)

    @staticmethod
    def backward(ctx, upstream):
        lam, index = (each.tolist() for each in ctx.told)
        gradient = torch.empty_like(upstream)
        for row, own, share in zip(upstream, gradient, lam, strict=True):
            torch.mul(row, share, out=own)
        for row, i, share in zip(upstream, index, lam, strict=True):
            gradient[i].add_(row, alpha=1 - share)
        return None, gradient, None, None, None


@torch.library.custom_op("fmkernels_benchmarks::as_float", mutates_args=())
def _as_float(x: Tensor) -> Tensor:
    """An op that torch.compile does not fuse: its CPU code does not vectorize int16 loads."""
    return x.float()


_as_float.register_fake(lambda x: x.float())


def _flipped_at_once(volumes: Tensor, flips: Tensor, rows: Tensor) -> Tensor:
    """The volumes of these rows, each flipped by its mask, in one indexing operation."""
    place = torch.arange(volumes.shape[-1], device=DEVICE)
    z, y, x = (
        torch.where((flips[rows] & bit).bool()[:, None], place.flip(0), place) for bit in (1, 2, 4)
    )
    chosen = volumes[
        rows[:, None, None, None], 0, z[:, :, None, None], y[:, None, :, None], x[:, None, None]
    ]
    return chosen[:, None]


def to_compile(workload: Workload) -> Callable[..., Tensor]:
    """The best form for torch.compile, which fuses it into one pass."""

    def run(volumes, lam, index, flips):
        x = _as_float(volumes) if DEVICE.type == "cpu" and volumes.dtype == I16 else volumes
        own, partner = x, x[index]
        if flips is not None:
            own, partner = (
                _flipped_at_once(x, flips, rows)
                for rows in (torch.arange(len(x), device=DEVICE), index)
            )
        own, partner = own.float(), partner.float()
        if workload.window():
            low, high = WINDOW
            own, partner = (((each - low) / (high - low)).clamp(0, 1) for each in (own, partner))
        mixed = torch.lerp(partner, own, lam[:, None, None, None, None]).to(workload.result)
        return volumes.copy_(mixed) if workload.in_place else mixed

    return run


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, target):
        ctx.target = target
        return target.copy_(source)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.target.copy_(upstream), None


def copy(workload: Workload) -> Provider:
    """A copy of as many bytes, in the same rounds with the same caches."""

    def inputs():
        source = torch.randn(workload.floor()["forward"] // 8, device=DEVICE).requires_grad_(
            workload.gradient
        )
        return source, torch.empty_like(source)

    return Provider("copy", _Copy.apply, inputs, reference=lambda source, _: source.double())


def torchvision(workload: Workload) -> Provider:
    def inputs():
        v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=Exception)
        video = pytest.importorskip("torchvision.tv_tensors", exc_type=Exception).Video
        return *workload.inputs_for_torchvision(), v2.MixUp(num_classes=2), video

    def run(volumes, lam, index, flips, mixup, video):
        params = {"lam": 0.75, "labels": None, "batch_size": len(volumes)}
        return mixup.transform(video(volumes), params).as_subclass(Tensor)

    return Provider("torchvision", run, inputs)


def timm(workload: Workload) -> Provider:
    def inputs():
        mixup = pytest.importorskip("timm.data.mixup", exc_type=Exception).Mixup(mode="elem")
        volumes, lam, *others = workload.inputs()
        shares = lam.tolist()
        mixup._params_per_elem = lambda batch: (shares, [False] * batch)
        return volumes, lam, *others, mixup

    def run(volumes, lam, index, flips, mixup):
        mixup._mix_elem(volumes)
        return volumes

    return Provider("timm", run, inputs)


def monai(workload: Workload) -> Provider:
    def inputs():
        array = pytest.importorskip("monai.transforms.regularization.array", exc_type=Exception)
        volumes, lam, index, flips = workload.inputs()
        mixup = array.MixUp(workload.batch)
        mixup._params = lam, index, []
        return volumes, lam, index, flips, mixup

    def run(volumes, lam, index, flips, mixup):
        return mixup.apply(volumes)

    return Provider("monai", run, inputs)


def kornia(workload: Workload) -> Provider:
    """Its lambda is the weight of the partner."""

    def inputs():
        mixup = pytest.importorskip("kornia.augmentation", exc_type=Exception).RandomMixUpV2()
        volumes, lam, index, flips = workload.inputs()
        params = {
            "mixup_pairs": index,
            "mixup_lambdas": lam,
            "batch_prob": torch.ones(workload.batch),
        }
        return volumes, lam, index, flips, mixup, params

    def run(volumes, lam, index, flips, mixup, params):
        return mixup(volumes.flatten(2, 3), params=params).view_as(volumes)

    def expected(volumes, lam, *others):
        return oracle(workload)(volumes, 1 - lam, *others)

    return Provider("kornia", run, inputs, reference=expected)


def providers(workload: Workload) -> list[Provider]:
    """Other libraries mix float32 without flips, either in place or not."""
    functions = {
        OURS: ours,
        "eager": plain,
        "gather and lerp": gather_and_lerp,
        "best eager": lerp_by_sample,
    }
    result = [Provider(name, make(workload)) for name, make in functions.items()]
    result.append(Provider("torch.compile", plain(workload), compile=True))
    if workload in TARGETS:
        result.append(Provider("torch.compile of the best", to_compile(workload), compile=True))
    libraries = []
    if workload.dtype == torch.float32 and not workload.flips:
        libraries = [timm] if workload.in_place else [torchvision, monai, kornia]
    return [*result, *(make(workload) for make in (copy, *libraries))]


def oracle(workload: Workload) -> Callable[..., Tensor]:
    def run(volumes, lam, index, flips, *_):
        window = workload.window()
        return reference.mixup3d(
            volumes, lam, index, flips=flips, window=window, dtype=workload.result
        )

    return run


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="mixup3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=oracle(workload),
        floor=workload.floor(),
        providers=providers(workload),
    )


EVERY = [
    *map(comparison, TARGETS),
    *(alone for workload in TARGETS for alone in on_one_thread(comparison(workload))),
    *map(comparison, OTHERS),
]

SECONDS = 65
ONE = comparison(Workload(1, 1, gradient=True))
SMALL = [
    comparison(Workload(3, 12, gradient=True)),
    comparison(Workload(3, 12, in_place=True)),
    comparison(Workload(3, 12, flips=True, in_place=True)),
    comparison(Workload(3, 12, flips=True, gradient=True)),
    comparison(Workload(3, 12, I16, BF16, flips=True)),
]


def tuned() -> list[tuple[Comparison, str]]:
    return [
        (comparison(Workload(8, 128, gradient=True)), "forward"),
        (comparison(Workload(8, 128, gradient=True)), "backward"),
        (comparison(Workload(16, 160, I16, BF16, flips=True)), "forward"),
    ]


def tuned_in_place() -> list[tuple[Comparison, str]]:
    workloads = (
        Workload(8, 64, in_place=True),
        Workload(8, 160, in_place=True),
        Workload(16, 160, BF16, BF16, in_place=True),
    )
    return [(comparison(workload), "forward") for workload in workloads]


_VECTORS = {128: (1, 2, 4), 256: (2, 4, 8), 512: (2, 4, 8), 1024: (4, 8)}
SWEEPS = [
    Sweep("mixup3d", _VECTORS, tuned),
    Sweep("mixup3d_in_place", _VECTORS, tuned_in_place),
]


def growth() -> Iterator[tuple[Workload, int]]:
    yield Workload(1, 1), 1
    for edge in (4, 16, 64, 256) if DEVICE.type == "cuda" else (2, 4, 8, 16, 32, 64):
        yield Workload(8, edge), 8 * edge**3


LARGE_BYTES = 5


def large(elements: int, part: int) -> None:
    volumes = large_volume(2 * elements, torch.uint8)
    volumes = volumes.view(2, 1, -1, *volumes.shape[3:])
    lam, index = torch.tensor([0.75, 0.5], device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    last = volumes[:, :, -part // LARGE_ROWS :].clone()
    mixed = mixup3d(volumes, lam, index, out=volumes)[:, :, -part // LARGE_ROWS :]
    assert torch.equal(mixup3d(last, lam, index), mixed)


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_mixup3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
