"""``fmkernels doctor``: what is installed, which path each operation takes here and why, and whether it is right.

Every operation is held against its formula in plain float64 PyTorch on the CPU, on small tensors, on every device.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from fmkernels import __version__, functional
from fmkernels.kernels import tuning

TOLERANCE = 1e-5
"""Of float32 results: the error counts as a share of 1 + |expected|."""

SWITCHES = (
    "TRITON_INTERPRET",
    "TRITON_DEBUG",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "OMP_NUM_THREADS",
)
"""Environment variables that change what runs or how."""

_WINDOW = (-1200.0, 600.0)
_Comparison = tuple[
    str, Tensor | None, Tensor | None
]  # what it is of, what came, what was expected


@dataclass(frozen=True)
class Result:
    """How one operation does on one device."""

    op: str
    device: torch.device
    path: str
    launch: str
    """Rows of the launch table that the kernels use, empty where there are none."""
    errors: dict[str, float] = field(default_factory=dict)
    """The worst error of the forward and of the gradient, where there is one."""
    seconds: float = 0.0
    problem: str = ""
    """What went wrong, in one line."""


def doctor() -> int:
    """Print the report and return the exit code: 0 where all is well, 1 where a self-test failed."""
    print("Paste this block into a bug report:\n\n```text")
    print("\n".join((*_versions(), *_devices())), end="\n\n", flush=True)
    results = []
    for result in examine():
        results.append(result)
        print(_row(result), flush=True)
    failed = [result for result in results if result.problem]
    seconds = sum(result.seconds for result in results)
    count = (
        f"{len(failed)} of {len(results)} self-tests failed"
        if failed
        else f"all {len(results)} self-tests passed"
    )
    print(f"\n{count} in {seconds:.1f} s\n```")
    return 1 if failed else 0


def examine() -> Iterator[Result]:
    """Test every operation on every device that torch finds."""
    for device in _usable_devices():
        missing = _missing_kernels() if device.type == "cuda" else ""
        path = _path(device, missing)
        for op, test in _TESTS.items():
            if op == "sample_mixup":
                yield _examine(op, test, device, "calls of torch on any device", "")
            else:
                yield _examine(
                    op,
                    test,
                    device,
                    path,
                    _launch(op, device) if device.type == "cuda" else "",
                    missing,
                )


def _examine(
    op: str, test: Callable, device: torch.device, path: str, launch: str, missing: str = ""
) -> Result:
    if missing:
        return Result(op, device, path, launch, problem=missing)
    errors: dict[str, float] = {}
    problem = ""
    start = time.perf_counter()
    try:
        for what, actual, expected in test(device):
            errors[what] = max(errors.get(what, 0.0), _error(actual, expected))
    except Exception as error:  # whatever it is, the other operations are still to be examined
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    seconds = time.perf_counter() - start
    wrong = [what for what, error in errors.items() if not error <= TOLERANCE]
    if wrong and not problem:
        problem = f"{wrong[0]} is wrong: error {errors[wrong[0]]:.1e}, at most {TOLERANCE:.0e} is due to rounding"
    return Result(op, device, path, launch, errors, seconds, problem)


def _error(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        raise ValueError("expected a gradient, got none")
    if actual.shape != expected.shape:
        raise ValueError(
            f"expected a result of shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    difference = (actual.detach().cpu().double() - expected.detach()).abs() / (
        1 + expected.detach().abs()
    )
    return difference.nan_to_num(nan=torch.inf).max().item()


def _row(result: Result) -> str:
    errors = ", ".join(f"{what} {error:.0e}" for what, error in result.errors.items())
    lines = [
        f"{'WRONG' if result.problem else 'ok':5} {result.op} on {result.device}: {result.path}",
        f"      errors: {errors or 'none measured'}; {result.seconds:.2f} s",
    ]
    if result.launch:
        lines.append(f"      launch: {result.launch}")
    if result.problem:
        lines.append(f"      {result.problem}")
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    compiled = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield f"fmkernels {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__} ({compiled if torch.version.cuda or torch.version.hip else 'for the CPU alone'})"
    for module in ("triton", "numba", "numpy"):
        yield f"{module} {_version(module) or 'is not installed'}"
    extra = {
        module: _version(module)
        for module in ("SimpleITK", "scipy", "matplotlib", "tensorboard", "tqdm")
    }
    yield (
        ", ".join(f"{module} {version}" for module, version in extra.items() if version)
        or "nothing of fmkernels[train]"
    )
    if absent := [module for module, version in extra.items() if not version]:
        yield f"not installed: {', '.join(absent)}; the extra fmkernels[train] brings what training and scans need"
    if switches := [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]:
        yield f"environment: {', '.join(switches)}"


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


def _devices() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"cpu: {platform.processor() or platform.machine()}, {capability}, {torch.get_num_threads()} threads of torch"
    for device in _usable_devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        gigabytes = properties.total_memory / 2**30
        yield f"{device}: {properties.name}, {tuning.architecture(device)}, {gigabytes:.1f} GiB"
    other = torch.accelerator.current_accelerator()
    if other is not None and other.type != "cuda":
        yield f"{other.type}: no operation of fmkernels runs there, move tensors to the CPU"


def _usable_devices() -> list[torch.device]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def _missing_kernels() -> str:
    """Why the kernels cannot be loaded, empty where they can."""
    try:
        importlib.import_module("fmkernels.kernels.soft_target_focal_loss")
    except ImportError as error:
        return f"Triton is missing: {error}"
    return ""


def _path(device: torch.device, missing: str) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return (
            f"none, {missing}"
            if missing
            else f"Triton kernels on {name} {tuning.architecture(device)}"
        )
    if torch.cuda.is_available():
        return "CPU path: for tensors on the CPU"
    if torch.version.cuda or torch.version.hip:
        return "CPU path: no GPU found"
    return "CPU path: this torch is built without CUDA and ROCm"


def _launch(op: str, device: torch.device) -> str:
    architecture = tuning.architecture(device)
    rows = [name for name in tuning.TABLE if name == op or name.startswith(f"{op}_")]
    return "; ".join(
        f"{name} row {architecture if architecture in tuning.TABLE[name] else tuning.DEFAULT} "
        f"{tuning.launch_parameters(name, device)}"
        for name in rows
    )


def _soft_target_focal_loss(device: torch.device) -> Iterator[_Comparison]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 5, 6), (2, 3, 2, 2, 3)]
    logits = [torch.randn(shape, generator=generator) * 4 for shape in shapes]
    targets = [torch.rand(shape, generator=generator) for shape in shapes]
    for y in targets:
        y[:, 0, 0] = torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0, -1.0])[: y.shape[-1]]  # -1 is ignored
    ours = [x.to(device, copy=True).requires_grad_() for x in logits]
    loss = functional.soft_target_focal_loss(
        ours, [y.to(device) for y in targets], alpha0=0.25, alpha1=0.75
    )
    plain = [x.double().requires_grad_() for x in logits]
    x, y = (
        torch.cat([level.flatten() for level in levels]).double() for levels in (plain, targets)
    )
    cross_entropy = binary_cross_entropy_with_logits(x, y, reduction="none")
    losses = (0.25 + 0.5 * y) * (y - x.sigmoid()).abs() ** 2 * cross_entropy
    expected = losses.masked_fill(y < 0, 0).sum() / (y >= 0).sum()
    yield "forward", loss, expected
    factor = 100.0  # the mean's gradients are small beside the 1 of the tolerance
    (loss * factor).backward()
    (expected * factor).backward()
    for actual, level in zip(ours, plain, strict=True):
        yield "gradient", actual.grad, level.grad


def _predict_targets(device: torch.device) -> Iterator[_Comparison]:
    views = torch.randn(4, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 3
    flips = torch.tensor([0, 1, 6, 7], dtype=torch.uint8)
    targets = functional.predict_targets(views.to(device), flips.to(device), temperature=0.7)
    mean = (
        torch.stack(
            [_flipped(view.double(), mask) for view, mask in zip(views, flips, strict=True)]
        )
        .sigmoid()
        .mean(0)
    )
    sharp, rest = mean ** (1 / 0.7), (1 - mean) ** (1 / 0.7)
    yield "forward", targets, sharp / (sharp + rest)


def _sample_mixup(device: torch.device) -> Iterator[_Comparison]:
    count = 4096
    (lam, index), again = (
        functional.sample_mixup(count, eta=1.0, generator=torch.Generator(device).manual_seed(0))
        for _ in range(2)
    )
    yield "permutation", index.sort().values, torch.arange(count).double()
    yield "same seed", lam, again[0].cpu().double()
    yield "range", lam.clamp(0.5, 1), lam.cpu().double()
    if (
        abs(lam.mean().item() - 0.75) > 0.01
    ):  # the mean of a uniform distribution over [0.5, 1], 4 standard errors
        raise ValueError(f"expected lambdas whose mean is 0.75, got {lam.mean().item():.3f}")


def _mixup3d(device: torch.device) -> Iterator[_Comparison]:
    scans = torch.randint(
        -1500, 900, (3, 2, 4, 5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int16
    )
    lam, index = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([1, 2, 1])
    flips = torch.tensor([0, 5, 2], dtype=torch.uint8)

    def plain(volumes: Tensor) -> Tensor:
        x = torch.stack(
            [_flipped(_windowed(v), mask) for v, mask in zip(volumes, flips, strict=True)]
        )
        share = lam.double().reshape(-1, 1, 1, 1, 1)
        return share * x + (1 - share) * x[index]

    def mix(volumes: Tensor) -> Tensor:
        return functional.mixup3d(
            volumes, lam.to(device), index.to(device), flips=flips.to(device), window=_WINDOW
        )

    yield "forward", mix(scans.to(device)), plain(scans.double())
    yield from _gradient(mix, plain, scans, device)


def _crop_and_resize3d(device: torch.device) -> Iterator[_Comparison]:
    scans = torch.randint(
        -1500, 900, (2, 2, 9, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.int16
    )
    boxes = torch.tensor([[0.0, 1, 2, 3, 8, 6, 9], [1, 0, 0, 0, 2, 8, 5], [1, 4, 4, 4, 9, 8, 10]])
    size = (4, 5, 6)

    def plain(volumes: Tensor) -> Tensor:
        x = _windowed(volumes)
        return torch.cat(
            [
                interpolate(x[[b]][_region(box)], size, mode="trilinear")
                for b, *box in boxes.int().tolist()
            ]
        )

    def crop(volumes: Tensor) -> Tensor:
        return functional.crop_and_resize3d(volumes, boxes.to(device), size, window=_WINDOW)

    yield "forward", crop(scans.to(device)), plain(scans.double())
    yield from _gradient(crop, plain, scans, device)


def _object_mixup3d(device: torch.device) -> Iterator[_Comparison]:
    scans = torch.randint(
        -1500, 900, (2, 2, 9, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.int16
    )
    boxes = torch.tensor(
        [[0.0, 1, 2, 3, 6, 6, 9], [0, 4, 4, 4, 9, 8, 10], [1, 0, 0, 0, 2, 8, 5]]
    )  # two of them overlap
    donor_boxes = torch.tensor(
        [[1.0, 0, 0, 0, 4, 4, 4], [0, 1, 2, 3, 4, 7, 9], [0, 3, 3, 3, 9, 8, 10]]
    )
    lam = torch.tensor([0.5, 0.7, 0.9])
    x = _windowed(scans.double())
    expected = x.clone()
    for (b, *box), (j, *source), share in zip(
        boxes.int().tolist(), donor_boxes.int().tolist(), lam.double(), strict=True
    ):
        target = expected[[b]][_region(box)]
        donor = interpolate(x[[j]][_region(source)], target.shape[2:], mode="trilinear")
        expected[b : b + 1][_region(box)] = share * target + (1 - share) * donor
    arguments = (boxes.to(device), donor_boxes.to(device), lam.to(device))
    yield (
        "forward",
        functional.object_mixup3d(scans.to(device), *arguments, window=_WINDOW),
        expected,
    )
    volumes = x.float().to(device)
    yield "in place", functional.object_mixup3d(volumes, *arguments, out=volumes), expected


_TESTS: dict[str, Callable[[torch.device], Iterator[_Comparison]]] = {
    "soft_target_focal_loss": _soft_target_focal_loss,
    "predict_targets": _predict_targets,
    "sample_mixup": _sample_mixup,
    "mixup3d": _mixup3d,
    "crop_and_resize3d": _crop_and_resize3d,
    "object_mixup3d": _object_mixup3d,
}


def _gradient(
    op: Callable, plain: Callable, scans: Tensor, device: torch.device
) -> Iterator[_Comparison]:
    """The gradients of two functions of volumes, for the same one that arrives from above."""
    ours = scans.to(device, torch.float32).requires_grad_()
    theirs = scans.double().requires_grad_()
    result, expected = op(ours), plain(theirs)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)) * (
        _WINDOW[1] - _WINDOW[0]
    )
    result.backward(upstream.to(device))
    expected.backward(upstream.double())
    yield "gradient", ours.grad, theirs.grad


def _windowed(volumes: Tensor) -> Tensor:
    low, high = _WINDOW
    return ((volumes - low) / (high - low)).clamp(0, 1)


def _flipped(volume: Tensor, mask: Tensor) -> Tensor:
    """The last three axes of a tensor, flipped as the bits of a mask say."""
    return volume.flip([axis - 3 for axis in range(3) if int(mask) >> axis & 1])


def _region(box: list[int]) -> tuple:
    z1, y1, x1, z2, y2, x2 = box
    return ..., slice(z1, z2), slice(y1, y2), slice(x1, x2)
