"""``fmkernels doctor``: versions, devices, and a self-test of every operation.

On every device, every operation is compared with its formula in float64 PyTorch, on small tensors.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, group_norm, interpolate

from fmkernels import __version__, functional
from fmkernels.kernels import tuning

TOLERANCE = 1e-5
"""Maximum error of float32 results, relative to 1 + |expected|."""

SWITCHES = (
    "TRITON_INTERPRET",
    "TRITON_DEBUG",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "NUMBA_CACHE_DIR",
)
"""Environment variables that affect the operations."""

_WINDOW = (-1200.0, 600.0)
_Comparison = tuple[str, Tensor | None, Tensor | None]  # name, actual, expected


@dataclass(frozen=True)
class Result:
    """Self-test of one operation on one device."""

    op: str
    device: torch.device
    path: str
    launch: str
    """Launch parameters of the kernels; empty on the CPU."""
    errors: dict[str, float] = field(default_factory=dict)
    """Maximum error of each comparison: the forward, the gradient, ..."""
    seconds: float = 0.0
    problem: str = ""
    """The failure in one line; empty if there is none."""


def doctor() -> int:
    """Print the report and return the exit code: 1 if a self-test failed, else 0."""
    print("Paste this block into a bug report:\n\n```text")
    print("\n".join((*_versions(), *_devices())), end="\n\n", flush=True)
    results = []
    with _without_warnings():  # about compiling, they would come between the lines of the block
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
    print(f"\n{count} in {seconds:.1f} s, compiling included\n```")
    return 1 if failed else 0


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    log = logging.getLogger("fmkernels")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def examine() -> Iterator[Result]:
    """Test every operation on the CPU and on every GPU."""
    for device in _usable_devices():
        missing = _missing_kernels() if device.type == "cuda" else ""
        path = _path(device, missing)
        for op, test in _TESTS.items():
            if op == "sample_mixup":
                yield _examine(op, test, device, "PyTorch operations on any device", "")
            else:
                launch = _launch(op, device) if device.type == "cuda" else ""
                yield _examine(op, test, device, path, launch, missing)


def _examine(
    op: str, test: Callable, device: torch.device, path: str, launch: str, missing: str = ""
) -> Result:
    if missing:
        return Result(op, device, path, launch, problem=missing)
    errors: dict[str, float] = {}
    problem = ""
    start = time.perf_counter()
    try:
        for name, actual, expected in test(device):
            errors[name] = max(errors.get(name, 0.0), _error(actual, expected))
    except Exception as error:  # the other operations are tested all the same
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    seconds = time.perf_counter() - start
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]
    if wrong and not problem:
        worst = f"error {errors[wrong[0]]:.1e}, expected at most {TOLERANCE:.0e}"
        problem = f"{wrong[0]} is wrong: {worst}"
    return Result(op, device, path, launch, errors, seconds, problem)


def _error(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        raise ValueError("expected a gradient, got none")
    if actual.shape != expected.shape:
        raise ValueError(
            f"expected a result of shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    actual, expected = actual.detach().cpu().double(), expected.detach()
    error = (actual - expected).abs() / (1 + expected.abs())
    return error.nan_to_num(nan=torch.inf).max().item()


def _row(result: Result) -> str:
    errors = ", ".join(f"{name} {error:.0e}" for name, error in result.errors.items())
    lines = [
        f"{'WRONG' if result.problem else 'ok':5} {result.op} on {result.device}: {result.path}",
        f"      errors: {errors or 'not measured'}; {result.seconds:.2f} s",
    ]
    if result.launch:
        lines.append(f"      launch: {result.launch}")
    if result.problem:
        lines.append(f"      {result.problem}")
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    compiled = "CPU only"
    if torch.version.cuda or torch.version.hip:
        cuda, rocm = torch.version.cuda, torch.version.hip
        compiled = f"CUDA {cuda}" if cuda else f"ROCm {rocm}"
    yield f"fmkernels {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__} ({compiled})"
    for module in ("triton", "numba", "numpy"):
        yield f"{module} {_version(module) or 'is not installed'}"
    extra = {
        module: _version(module)
        for module in ("SimpleITK", "scipy", "matplotlib", "tensorboard", "tqdm")
    }
    yield (
        ", ".join(f"{module} {version}" for module, version in extra.items() if version)
        or "fmkernels[train] is not installed"
    )
    if absent := [module for module, version in extra.items() if not version]:
        yield f"not installed: {', '.join(absent)}; training and scans need fmkernels[train]"
    if switches := [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]:
        yield f"environment: {', '.join(switches)}"
    yield from _compiled_loops()


def _compiled_loops() -> Iterator[str]:
    try:
        from fmkernels.cpu.compiled import cache_folders
    except ImportError:  # the self-tests say why
        return
    writable = False
    for folder in cache_folders():
        files = len(list(folder.glob("*.loop"))) if folder.is_dir() else 0
        if writable and not files:
            continue  # neither read nor written
        where = next(path for path in (folder, *folder.parents) if path.is_dir())
        writable = os.access(where, os.W_OK)
        end = "" if writable else ", which cannot be written"
        yield f"compiled loops of the CPU path: {files} in {folder}{end}"


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(distributions[0]) if distributions else "(unknown version)"


def _devices() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    name, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    yield f"cpu: {name}, {capability}, {threads} threads of torch"
    if threads > 1 and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        yield "OMP_WAIT_POLICY is not set: on shared cores, OMP_WAIT_POLICY=passive avoids stalls"
    for device in _usable_devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        gigabytes = properties.total_memory / 2**30
        yield f"{device}: {properties.name}, {tuning.architecture(device)}, {gigabytes:.1f} GiB"
    other = torch.accelerator.current_accelerator()
    if other is not None and other.type != "cuda":
        yield f"{other.type}: not supported, move tensors to the CPU"


def _usable_devices() -> list[torch.device]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def _missing_kernels() -> str:
    """The reason why the kernels cannot be loaded; empty if they can."""
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
        return "CPU path, for tensors on the CPU"
    if torch.version.cuda or torch.version.hip:
        return "CPU path, no GPU was found"
    return "CPU path, this build of torch has no CUDA or ROCm"


def _launch(op: str, device: torch.device) -> str:
    architecture = tuning.architecture(device)
    rows = [name for name in tuning.TABLE if name == op or name.startswith(f"{op}_")]
    return "; ".join(
        f"{name} row {architecture if architecture in tuning.TABLE[name] else tuning.DEFAULT} "
        f"{tuning.launch_parameters(name, device)}"
        for name in rows
    )


def _soft_target_focal_loss(device: torch.device) -> Iterator[_Comparison]:
    shapes = [(2, 3, 4, 5, 6), (2, 3, 2, 2, 3)]
    logits = [_randn(shape) * 4 for shape in shapes]
    targets = [_randn(shape, seed=1).sigmoid() for shape in shapes]
    for y in targets:
        y[:, 0, 0] = _tensor([0, 1, -1, 0, 1, -1])[: y.shape[-1]]  # -1 is ignored
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
    factor = 100.0  # makes the gradients of the mean large, relative to the tolerance
    (loss * factor).backward()
    (expected * factor).backward()
    for actual, level in zip(ours, plain, strict=True):
        yield "gradient", actual.grad, level.grad


def _predict_targets(device: torch.device) -> Iterator[_Comparison]:
    views = _randn((4, 2, 3, 4, 5, 6)) * 3
    flips = _tensor([0, 1, 6, 7]).byte()
    targets = functional.predict_targets(views.to(device), flips.to(device), temperature=0.7)
    pairs = zip(views.double(), flips, strict=True)
    mean = torch.stack([_flipped(view, mask) for view, mask in pairs]).sigmoid().mean(0)
    up, down = mean ** (1 / 0.7), (1 - mean) ** (1 / 0.7)
    yield "forward", targets, up / (up + down)
    views, codes = _randn((2, 1, 4, 5, 5, 5)), _tensor([0, 29]).byte()
    targets = functional.predict_targets(views.to(device), codes.to(device), classes=2)
    undone = views[1].flip([-3, -1]).permute(0, 1, 4, 2, 3)  # 29 = 8 * 3 + 5, HWD
    both = torch.stack([views[0], undone]).double().unflatten(2, (2, 2)).softmax(3)
    power = both.mean(0) ** (1 / 0.7)
    yield "classes", targets, (power / power.sum(2, keepdim=True)).flatten(1, 2)


def _apply_symmetry(device: torch.device) -> Iterator[_Comparison]:
    x = _randn((2, 3, 3, 3))
    result = functional.apply_symmetry(x.to(device), 29)
    yield "forward", result, x.double().permute(0, 2, 3, 1).flip([1, 3])


def _undo_symmetry(device: torch.device) -> Iterator[_Comparison]:
    x = _randn((2, 3, 3, 3))
    result = functional.undo_symmetry(x.to(device), 29)
    yield "forward", result, x.double().flip([1, 3]).permute(0, 3, 1, 2)


def _sample_mixup(device: torch.device) -> Iterator[_Comparison]:
    count = 4096
    (lam, index), again = (
        functional.sample_mixup(
            count, eta=1.0, generator=torch.Generator(device).manual_seed(0), device=device
        )
        for _ in range(2)
    )
    permutation = torch.arange(count, dtype=torch.float64, device="cpu")
    yield "permutation", index.sort().values, permutation
    yield "same seed", lam, again[0].cpu().double()
    yield "range", lam.clamp(0.5, 1), lam.cpu().double()
    # lam is uniform in [0.5, 1]; 0.01 is 4 standard errors
    if abs(lam.mean().item() - 0.75) > 0.01:
        raise ValueError(f"expected lam with a mean of 0.75, got {lam.mean().item():.3f}")


def _sample_donors(device: torch.device) -> Iterator[_Comparison]:
    boxes = _tensor([[k % 2, k, 0, 0, k + 2, 3, 4] for k in range(6)])
    labels = _tensor([0, 1, 0, 2, 1, 0]).long()
    donors = functional.sample_donors(boxes.to(device), labels=labels.to(device)).cpu()
    found = (donors[:, None] == boxes).all(2)
    other = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool, device="cpu")
    yield "labels", (found & other).any(1), _tensor([1, 1, 1, 0, 1, 1]).double()
    yield "no donor", donors.isnan().all(1), (~other.any(1)).double()


def _mixup3d(device: torch.device) -> Iterator[_Comparison]:
    scans = _scans(3, 2, 4, 5, 16)
    lam, index, flips = (
        _tensor([0.9, 0.5, 0.7]),
        _tensor([1, 2, 1]).long(),
        _tensor([0, 5, 2]).byte(),
    )

    def plain(volumes: Tensor) -> Tensor:
        pairs = zip(_windowed(volumes), flips, strict=True)
        x = torch.stack([_flipped(volume, mask) for volume, mask in pairs])
        weight = lam.double().reshape(-1, 1, 1, 1, 1)
        return weight * x + (1 - weight) * x[index]

    def mix(volumes: Tensor) -> Tensor:
        return functional.mixup3d(
            volumes, lam.to(device), index.to(device), flips=flips.to(device), window=_WINDOW
        )

    yield "forward", mix(scans.to(device)), plain(scans.double())
    yield from _gradient(mix, plain, scans, device)


def _crop_and_resize3d(device: torch.device) -> Iterator[_Comparison]:
    scans = _scans(2, 2, 9, 8, 10)
    boxes = _tensor([[0, 1, 2, 3, 8, 6, 9], [1, 0, 0, 0, 2, 8, 5], [1, 4, 4, 4, 9, 8, 10]])
    size = (4, 5, 6)

    def plain(volumes: Tensor) -> Tensor:
        x = _windowed(volumes)
        crops = [x[[b]][_region(box)] for b, *box in boxes.int().tolist()]
        return torch.cat([interpolate(crop, size, mode="trilinear") for crop in crops])

    def crop(volumes: Tensor) -> Tensor:
        return functional.crop_and_resize3d(volumes, boxes.to(device), size, window=_WINDOW)

    yield "forward", crop(scans.to(device)), plain(scans.double())
    yield from _gradient(crop, plain, scans, device)


def _group_norm3d(device: torch.device) -> Iterator[_Comparison]:
    shape = (2, 24, 4, 5, 6)
    tensors = (_randn(shape) + 5, _randn((24,), 1), _randn((24,), 2), _randn(shape, 3))
    for name, layout in (
        ("contiguous", torch.contiguous_format),
        ("channels last", torch.channels_last_3d),
    ):
        ours = [t.to(device, copy=True).requires_grad_() for t in tensors]
        x, weight, bias, residual = (
            t.contiguous(memory_format=layout) if t.dim() == 5 else t for t in ours
        )
        actual = functional.group_norm3d(x, 6, weight, bias, residual=residual, activation="relu")
        plain = [t.double().requires_grad_() for t in tensors]
        expected = (group_norm(plain[0], 6, plain[1], plain[2]) + plain[3]).relu()
        yield f"{name} forward", actual, expected
        grad_output = _randn(shape, seed=4)
        actual.backward(grad_output.to(device))
        expected.backward(grad_output.double())
        for leaf, exact in zip(ours, plain, strict=True):
            yield f"{name} gradient", leaf.grad, exact.grad


def _object_mixup3d(device: torch.device) -> Iterator[_Comparison]:
    scans = _scans(2, 2, 9, 8, 10)
    # the first two boxes overlap
    boxes = _tensor([[0, 1, 2, 3, 6, 6, 9], [0, 4, 4, 4, 9, 8, 10], [1, 0, 0, 0, 2, 8, 5]])
    donor_boxes = _tensor([[1, 0, 0, 0, 4, 4, 4], [0, 1, 2, 3, 4, 7, 9], [0, 3, 3, 3, 9, 8, 10]])
    lam = _tensor([0.5, 0.7, 0.9])
    x = _windowed(scans.double())
    expected = x.clone()
    for (b, *box), (j, *source), weight in zip(
        boxes.int().tolist(), donor_boxes.int().tolist(), lam.double(), strict=True
    ):
        target = expected[[b]][_region(box)]
        donor = interpolate(x[[j]][_region(source)], target.shape[2:], mode="trilinear")
        expected[b : b + 1][_region(box)] = weight * target + (1 - weight) * donor
    arguments = (boxes.to(device), donor_boxes.to(device), lam.to(device))
    mixed = functional.object_mixup3d(scans.to(device), *arguments, window=_WINDOW)
    yield "forward", mixed, expected
    volumes = x.float().to(device)
    yield "in place", functional.object_mixup3d(volumes, *arguments, out=volumes), expected


_TESTS: dict[str, Callable[[torch.device], Iterator[_Comparison]]] = {
    "soft_target_focal_loss": _soft_target_focal_loss,
    "apply_symmetry": _apply_symmetry,
    "undo_symmetry": _undo_symmetry,
    "predict_targets": _predict_targets,
    "sample_mixup": _sample_mixup,
    "sample_donors": _sample_donors,
    "mixup3d": _mixup3d,
    "crop_and_resize3d": _crop_and_resize3d,
    "group_norm3d": _group_norm3d,
    "object_mixup3d": _object_mixup3d,
}


def _gradient(
    op: Callable, plain: Callable, scans: Tensor, device: torch.device
) -> Iterator[_Comparison]:
    """Gradients of two functions of volumes, for the same grad_output."""
    ours = scans.to(device, torch.float32).requires_grad_()
    theirs = scans.double().requires_grad_()
    result, expected = op(ours), plain(theirs)
    grad_output = _randn(result.shape, seed=1) * (_WINDOW[1] - _WINDOW[0])
    result.backward(grad_output.to(device))
    expected.backward(grad_output.double())
    yield "gradient", ours.grad, theirs.grad


def _randn(shape: Sequence[int], seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _scans(*shape: int) -> Tensor:
    """int16 HU."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(-1500, 900, shape, generator=generator, dtype=torch.int16, device="cpu")


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _windowed(volumes: Tensor) -> Tensor:
    low, high = _WINDOW
    x = (volumes - low) / (high - low)
    # the derivative of clamp at its bounds is 1 before torch 2.14 and 0 since
    return torch.where((x >= 0) & (x <= 1), x, x.detach().clamp(0, 1))


def _flipped(volume: Tensor, mask: Tensor) -> Tensor:
    """Flip the last three axes by a bit mask."""
    return volume.flip([axis - 3 for axis in range(3) if int(mask) >> axis & 1])


def _region(box: list[int]) -> tuple:
    z1, y1, x1, z2, y2, x2 = box
    return ..., slice(z1, z2), slice(y1, y2), slice(x1, x2)
