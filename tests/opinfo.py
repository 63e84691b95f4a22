"""The table of ops. tests/test_ops.py makes from it the tests that every op needs.

To add an op: write its samples and its errors, and append an entry to OPS. A sample holds the
keyword arguments of the public function, made on the CPU: small tensors of irregular shapes. Tests
that are particular to an op stay in the file of its name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fmkernels
import reference
from fmkernels.dtypes import compute_dtype
from fmkernels.kernels.tuning import launch_parameters

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VOXELS = (*FLOATS, torch.int16, torch.uint8)
WINDOW = (-2.0, 3.0)
INF, NAN = math.inf, math.nan

Arguments = dict[str, Any]

VIEWS_OF_TORCH = ("apply_symmetry", "undo_symmetry")
"""Public functions that are only names for functions of PyTorch, with tests of their own."""


@dataclass(frozen=True)
class Error:
    """Arguments that, in place of valid ones, raise `kind` with a message that matches `words`."""

    kind: type[Exception]
    words: str
    arguments: Arguments


@dataclass(frozen=True, kw_only=True)
class OpInfo:
    name: str
    dtypes: tuple[torch.dtype, ...]
    """The types of the data."""
    samples: Callable[[torch.dtype], dict[str, Arguments]]
    """Samples of every variant, by name; the richest one is the last."""
    sized: Callable[[int, torch.dtype], Arguments]
    """A sample whose data, and whose result, grow with a size."""
    empty: Callable[[], dict[str, Arguments]]
    """Samples without elements, without boxes, of an empty batch."""
    result_dtype: Callable[[Arguments], torch.dtype]
    valid: Arguments
    """Arguments that the errors start from."""
    errors: tuple[Error, ...]
    differentiable: tuple[str, ...] = ()
    not_finite: Mapping[str, tuple[float, ...]]
    """Values that are not finite, by the argument that may hold them."""
    in_place: str | None = None
    """The argument that out= may be; None if the op takes no out."""
    launches: bool = True
    """Whether the op launches kernels; if not, it draws at random and has no exact reference."""
    interpreted_block: int | None = None
    """A smaller block for the interpreter, with as many tiles per program as samples fill."""
    functorch: bool = False
    """Whether torch.func.grad and torch.func.vmap are supported."""

    @cached_property
    def function(self) -> Callable:
        return getattr(fmkernels, self.name)

    @cached_property
    def reference(self) -> Callable:
        return getattr(reference, self.name)

    def gradients_to(self, arguments: Arguments) -> tuple[str, ...]:
        """The arguments to which there is a gradient; none where label maps are resized."""
        return () if arguments.get("mode") == "nearest" else self.differentiable

    @cached_property
    def block(self) -> int:
        """Elements that a program computes at once, in the default row of the launch table."""
        return launch_parameters(self.name, torch.device("cpu")).block


def copy(arguments: Any, device: torch.device | str = "cpu") -> Any:
    """The same values in new memory on a device; generators begin anew."""

    def one(x: Any) -> Any:
        if isinstance(x, torch.Generator):
            return torch.Generator(device).manual_seed(x.initial_seed())
        return x.detach().to(device, copy=True) if isinstance(x, Tensor) else x

    return tree_map(one, arguments)


def make(shape, dtype=torch.float32, device="cpu", seed: int = 0, scale: float = 2.0) -> Tensor:
    """Values whose mixtures keep the digits that the tolerances ask for."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    else:
        low = 0 if dtype == torch.uint8 else -50
        values = torch.randint(low, 51, tuple(shape), generator=generator)
    return values.to(device, dtype)


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def integers(high: int, count: int, dtype: torch.dtype = torch.int64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, (count,), generator=generator).to(dtype)


def errors(kind: type[Exception], rows: Mapping[str, Arguments]) -> tuple[Error, ...]:
    return tuple(Error(kind, words, arguments) for words, arguments in rows.items())


# What several ops take

X = torch.zeros(2, 1, 2, 3, 4)
LEAF = torch.zeros(2, 1, 2, 3, 4, requires_grad=True)
LAM, INDEX = torch.ones(2), torch.zeros(2, dtype=torch.int64)
FLIPS = torch.zeros(2, dtype=torch.uint8)
BOXES = torch.zeros(2, 7)


def voxel_dtype(arguments: Arguments) -> torch.dtype:
    volumes = arguments["volumes"]
    windowed = "window" in arguments and not volumes.is_floating_point()
    return arguments.get("dtype", torch.float32 if windowed else volumes.dtype)


VOLUME_ERRORS = (
    *errors(
        TypeError,
        {
            "volumes must be a tensor, got a list of 0": {"volumes": []},
            "volumes must be float16 .* or uint8, got int64": {"volumes": X.long()},
            r"window must be a pair of numbers \(lo, hi\), got float": {"window": 3.0},
            "window must be a pair of numbers": {"window": (1.0, 2.0, 3.0)},
            "window lo must be a number, got str": {"window": ("0", 1.0)},
            "dtype must be float16 .*, got int64": {"dtype": torch.int64},
            "dtype must be float16 .*, got 'float32'": {"dtype": "float32"},
        },
    ),
    *errors(
        ValueError,
        {
            r"volumes must be \[B, C, D, H, W\], got shape \(2, 1, 2, 3\)": {"volumes": X[..., 0]},
            "window hi must be finite, got inf": {"window": (0.0, INF)},
            "window lo must be finite, got nan": {"window": (NAN, 0.0)},
            r"window must have lo < hi, got \(1.0, 1.0\)": {"window": (1.0, 1.0)},
            r"window must have lo < hi, got \(2.0, 1.0\)": {"window": (2.0, 1.0)},
            "window must be at least": {"window": (0, 1e-40)},
        },
    ),
)
OUT_ERRORS = (
    *errors(
        TypeError,
        {
            "out must be a tensor": {"out": 1},
            "out must be float32, got float64": {"out": X.double()},
            "out must be int16, got float32": {"dtype": torch.int16, "out": X.clone()},
            "out must be float32, got int16": {
                "volumes": X.short(),
                "window": (0, 1),
                "out": X.short(),
            },
        },
    ),
    *errors(
        ValueError,
        {
            "out must be on cpu": {"out": X.to("meta")},
            r"out must have the shape of volumes, \(2, 1, 2, 3, 4\), got": {"out": X[:1].clone()},
            "out must have an element of its own": {"out": X[:1].expand(2, -1, -1, -1, -1)},
            "no gradient through out": {"out": LEAF},
        },
    ),
)
LAM_ERRORS = (
    *errors(
        TypeError,
        {
            "lam must be a tensor, got float": {"lam": 0.5},
            "lam must be float16 .*, got int64": {"lam": INDEX},
        },
    ),
    *errors(
        ValueError,
        {
            r"lam must have shape \(2,\), got \(1,\)": {"lam": LAM[:1]},
            "lam must be on cpu": {"lam": LAM.to("meta")},
            "no gradient to lam": {"lam": LEAF[:, 0, 0, 0, 0]},
        },
    ),
)
BOX_ERRORS = (
    *errors(
        TypeError,
        {
            "boxes must be a tensor, got a list of 7": {"boxes": [0.0] * 7},
            "boxes must be float32, got float64": {"boxes": BOXES.double()},
        },
    ),
    *errors(
        ValueError,
        {
            "volumes must have axes of at most 16777216 voxels": {
                "volumes": X[..., :1].expand(2, 1, 2, 3, 2**25)
            },
            r"boxes must be \[K, 7\], .*, got shape \(2, 6\)": {"boxes": BOXES[:, :6]},
            r"boxes must be \[K, 7\], .*, got shape \(7,\)": {"boxes": BOXES[0]},
            "boxes must be on cpu": {"boxes": BOXES.to("meta")},
            "no gradient to boxes is offered": {"boxes": BOXES.clone().requires_grad_()},
        },
    ),
)


def empty_volumes(**arguments: Any) -> dict[str, Arguments]:
    shapes = [(0, 1, 2, 3, 4), (2, 0, 2, 3, 4), (2, 1, 0, 3, 4), (2, 1, 2, 3, 0)]
    return {
        f"volumes {shape}": {"volumes": torch.zeros(shape), "window": WINDOW, **arguments}
        for shape in shapes
    }


# soft_target_focal_loss


def loss_data(shape, dtype: torch.dtype, target_dtype: torch.dtype = torch.float32, seed: int = 0):
    """Logits, and targets of which some are 0, some 1, some ignored."""
    targets, choice = rand(*shape, seed=seed + 1), rand(*shape, seed=seed + 2)
    targets[choice < 0.3], targets[choice > 0.8] = 0, 1
    if target_dtype.is_floating_point:
        targets[(choice > 0.5) & (choice < 0.6)] = -1
    else:
        targets = targets > 0.5
    return {"logits": make(shape, dtype, seed=seed), "targets": targets.to(target_dtype)}


def loss_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    mix = rand(3), torch.tensor([1, 2, 0])
    levels = [loss_data(shape, dtype, seed=i) for i, shape in enumerate([(3, 70, 2), (3, 5, 1)])]
    pyramid = {name: tuple(level[name] for level in levels) for name in ("logits", "targets")}
    return {
        "mean": loss_data((3, 5, 7), dtype),
        "none": {
            **loss_data((3, 5, 7), dtype, torch.bfloat16),
            "weight": rand(3, 1, 7),
            "gamma": 0.0,
            "reduction": "none",
        },
        "sum of booleans": {
            **loss_data((2, 77), dtype, torch.bool),
            "alpha0": 0.5,
            "gamma": 3.25,
            "reduction": "sum",
        },
        "mix, weight per sample": {
            **loss_data((3, 160), dtype),
            "mix": mix,
            "weight": rand(3, 1),
            "gamma": 1.5,
        },
        "mix, none": {**loss_data((3, 40), dtype), "mix": mix, "reduction": "none"},
        "levels, none": {**pyramid, "weight": torch.tensor(0.5), "reduction": "none"},
        "one number": {**loss_data((), dtype), "normalizer": 0.5},
        "levels": {**pyramid, "mix": mix, "normalizer": torch.tensor(4.5)},
    }


def loss_sized(n: int, dtype: torch.dtype = torch.float32) -> Arguments:
    return {
        **loss_data((3, 2, n, 4, 16), dtype),
        "mix": (rand(3), torch.tensor([1, 2, 0])),
        "weight": rand(3, 1, 1, 1, 1),
        "reduction": "none",
    }


def loss_empty() -> dict[str, Arguments]:
    none = loss_data((0, 5), torch.float32)
    nothing = {"mix": (LAM[:0], INDEX[:0]), "weight": torch.zeros(0, 1)}
    level = loss_data((2, 200), torch.float32)
    pyramid = {k: [v, torch.zeros(2, 0)] for k, v in level.items()}
    return {
        **{f"{r} {s}": {**loss_data(s, torch.float32), "reduction": r}
           for r in ("none", "sum", "mean") for s in ((0,), (0, 3), (2, 0, 4))},
        "no sample": {**none, **nothing},
        "an empty level": {**pyramid, "weight": torch.ones(2, 1)},
        "all ignored": {**level, "targets": torch.full((2, 200), -1.0)},
    }  # fmt: skip


def loss_dtype(arguments: Arguments) -> torch.dtype:
    logits = arguments["logits"]
    dtype = logits.dtype if isinstance(logits, Tensor) else logits[0].dtype
    kept = arguments.get("reduction") == "none" or dtype == torch.float64
    return dtype if kept else torch.float32


L, Y = torch.zeros(2, 3), torch.full((2, 3), 0.5)
Y_LEAF = Y.clone().requires_grad_()
LOSS_ERRORS = (
    *errors(
        TypeError,
        {
            "logits must be a tensor or a list": {"logits": 3.0},
            "logits must be a tensor or a list .*, got a list of 2": {"logits": [L, 1]},
            "logits must be float16 or bfloat16": {"logits": L.int()},
            "logits must be float16 .* got int32": {"logits": [L, L.int()], "targets": [Y, Y]},
            "targets must be .* got int64": {"targets": Y.long()},
            "targets must be .* got int16": {"targets": Y.short()},
            "targets must be float32, got uint8": {"logits": [L, L], "targets": [Y, Y.byte()]},
            "gamma must be a number": {"gamma": "2"},
            "alpha0 must be a number": {"alpha0": torch.tensor(0.1)},
            "weight must be float16": {"weight": torch.ones(2, 3, dtype=torch.int64)},
            "weight must be a tensor": {"weight": 2.0},
            "normalizer must be a number": {"normalizer": "3"},
            "mix must be a pair": {"mix": LAM},
            r"mix must be a pair .* got \(float, a tensor\)": {"mix": (0.5, INDEX)},
            "mix must be a pair .* got dict": {"mix": {"lam": LAM, "index": INDEX}},
            "targets must be a tensor or a list .* got dict": {"targets": {"y": Y}},
            "mix index must be int64": {"mix": (LAM, INDEX.int())},
            "mix lam must be float16": {"mix": (INDEX, INDEX)},
        },
    ),
    *errors(
        ValueError,
        {
            "logits must hold at least one": {"logits": [], "targets": []},
            "targets must have the structure of logits, a tensor": {"targets": [Y]},
            "targets must have the structure": {"logits": [L, L], "targets": [Y]},
            r"targets must have the shape of logits, \(2, 3\), got \(3,\)": {"targets": Y[0]},
            "targets must be on cpu": {"targets": Y.to("meta")},
            "no gradient to targets": {"targets": Y_LEAF},
            "gamma must be >= 0": {"gamma": -0.1},
            "gamma must be finite": {"gamma": NAN},
            "alpha1 must be finite": {"alpha1": INF},
            "reduction must be": {"reduction": "avg"},
            r"weight must broadcast .*\(2,\)": {"weight": torch.ones(2)},
            r"weight must broadcast .*\(1, 2, 3\)": {"weight": torch.ones(1, 2, 3)},
            "weight must be one tensor or one per level": {"weight": [Y, Y]},
            "no gradient to weight": {"weight": Y_LEAF},
            "weight must be on cpu": {"weight": Y.to("meta")},
            'normalizer goes with reduction "mean"': {"normalizer": 3.0, "reduction": "sum"},
            "normalizer must be a number or a real 0-d tensor": {"normalizer": torch.ones(1)},
            "normalizer must be finite": {"normalizer": NAN},
            "no gradient to normalizer": {"normalizer": Y_LEAF.sum()},
            "normalizer must be on cpu": {"normalizer": torch.ones((), device="meta")},
            r"mix needs logits .*lam \(1,\)": {"mix": (LAM[:1], INDEX)},
            r"mix needs logits .*index \(1,\)": {"mix": (LAM, INDEX[:1])},
            r"mix needs logits .*got logits \(\)": {
                "logits": L[0, 0],
                "targets": Y[0, 0],
                "mix": (LAM, INDEX),
            },
            "mix index must be on cpu": {"mix": (LAM, INDEX.to("meta"))},
            "no gradient to mix lam": {"mix": (Y_LEAF[:, 0], INDEX)},
        },
    ),
)


# predict_targets


def target_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    flips = torch.tensor([0, 3, 6, 5], dtype=torch.uint8)
    codes = torch.tensor([0, 13, 26, 47], dtype=torch.uint8)
    shapes = [(4, 2, 3, 8, 4, 8), (4, 2, 3, 5, 4, 3), (4, 2, 3, 0, 1, 1), (4, 2, 3, 1, 1, 1)]
    levels = [make(shape, dtype) for shape in shapes]
    cubes = [make((4, 2, 6, n, n, n), dtype) for n in (5, 8)]
    return {
        "views": {"view_logits": make((4, 2, 3, 5, 6, 7), dtype), "flips": flips},
        "sharp": {"view_logits": levels[0], "flips": flips, "temperature": 0.25},
        "mean": {
            "view_logits": make((3, 2, 1, 4, 2, 16), dtype),
            "flips": flips[:3],
            "temperature": 1.0,
        },
        "one view": {"view_logits": make((1, 1, 2, 3, 2, 5), dtype), "flips": flips[2:3]},
        "many views": {
            "view_logits": make((33, 1, 1, 2, 3, 4), dtype),
            "flips": integers(8, 33, torch.uint8),
        },
        "classes": {"view_logits": make((4, 2, 6, 5, 4, 3), dtype), "flips": flips, "classes": 3},
        "levels, symmetries": {"view_logits": cubes, "flips": codes},
        "levels, symmetries, classes": {"view_logits": cubes, "flips": codes, "classes": 2},
        "levels": {"view_logits": levels, "flips": flips},
    }


def target_sized(n: int, dtype: torch.dtype = torch.float32) -> Arguments:
    flips = torch.tensor([0, 5], dtype=torch.uint8)
    return {"view_logits": make((2, 4, 2, n, 4, 16), dtype), "flips": flips}


def target_empty() -> dict[str, Arguments]:
    shapes = [(2, 0, 1, 2, 2, 2), (2, 1, 0, 2, 2, 2), (2, 1, 1, 2, 2, 0)]
    return {f"{shape}": {"view_logits": torch.zeros(shape), "flips": FLIPS} for shape in shapes}


VIEWS = torch.zeros(2, 1, 1, 2, 2, 2)
TARGET_ERRORS = (
    *errors(
        TypeError,
        {
            "view_logits must be a tensor or a list": {"view_logits": 1.0},
            "view_logits must be float16 or": {"view_logits": VIEWS.int()},
            "view_logits must be float16 .* got int32": {"view_logits": [VIEWS, VIEWS.int()]},
            "flips must be a tensor": {"flips": [0, 1]},
            "flips must be uint8, got int64": {"flips": FLIPS.long()},
            "temperature must be a number, got str": {"temperature": "0.7"},
            "temperature must be a number, got a tensor": {"temperature": torch.tensor(0.7)},
            "classes must be an int, got float": {"classes": 2.0},
        },
    ),
    *errors(
        ValueError,
        {
            "view_logits must hold at least one": {"view_logits": []},
            r"view_logits must be \[K, B, A, D, H, W\] .* got \(1, 1, 2, 2, 2\)": {
                "view_logits": VIEWS[0]
            },
            "view_logits must be .* K >= 1": {"view_logits": VIEWS[:0], "flips": FLIPS[:0]},
            "view_logits must be .* the same at every level": {"view_logits": [VIEWS, VIEWS[:1]]},
            "view_logits must be on cpu": {"view_logits": [VIEWS, VIEWS.to("meta")]},
            r"no gradient to view_logits .* torch\.no_grad": {
                "view_logits": VIEWS.clone().requires_grad_()
            },
            r"flips must have shape \(2,\), got \(1,\)": {"flips": FLIPS[:1]},
            "flips must be on cpu": {"flips": FLIPS.to("meta")},
            r"flips must be in \[0, 48\), got \[48, 48\]": {"flips": FLIPS + 48},
            r"flips must be in \[0, 8\) where .* differ, got \[8, 8\] and sizes \(2, 3, 2\)": {
                "flips": FLIPS + 8,
                "view_logits": [VIEWS, torch.zeros(2, 1, 1, 2, 3, 2)],
            },
            "classes must be at least 2, got 1": {"classes": 1},
            "classes must divide the channels of view_logits, 1, got 2": {"classes": 2},
            r"temperature must be in \(0, 1\], got 0": {"temperature": 0},
            r"temperature must be in \(0, 1\], got 1.5": {"temperature": 1.5},
            "temperature must be finite": {"temperature": NAN},
        },
    ),
)


# sample_mixup


def draw_samples(_: torch.dtype) -> dict[str, Arguments]:
    generator = torch.Generator().manual_seed(3)
    return {
        "default": {"batch_size": 7, "generator": generator},
        "eta": {"batch_size": 5, "eta": 1.5, "generator": generator},
    }


DRAW_ERRORS = (
    *errors(
        TypeError,
        {
            "batch_size must be an int, got float": {"batch_size": 2.0},
            "batch_size must be an int, got bool": {"batch_size": True},
            "eta must be a number, got str": {"eta": "1"},
            "generator must be a torch.Generator, got int": {"generator": 3},
        },
    ),
    *errors(
        ValueError,
        {
            "batch_size must be >= 0, got -1": {"batch_size": -1},
            "eta must be > 0, got 0": {"eta": 0},
            "eta must be finite": {"eta": INF},
            "generator must be on meta, got cpu": {
                "generator": torch.Generator(),
                "device": "meta",
            },
        },
    ),
)


# sample_donors


def donor_samples(_: torch.dtype) -> dict[str, Arguments]:
    generator = torch.Generator().manual_seed(3)
    boxes = donor_boxes(7)
    boxes[2, 3] = NAN
    return {
        "one label": {"boxes": donor_boxes(5), "generator": generator},
        "labels": {
            "boxes": boxes,
            "labels": torch.tensor([0, 1, 0, 2, 1, 0, 0]),
            "generator": generator,
        },
    }


def donor_boxes(count: int) -> Tensor:
    """Usable boxes, all different."""
    k = torch.arange(count, dtype=torch.float32)[:, None]
    return torch.cat([k % 3, k, k, k, k + 4, k + 5, k + 6], 1)


LABELS = torch.zeros(2, dtype=torch.int64)
DONOR_ERRORS = (
    *errors(
        TypeError,
        {
            "boxes must be a tensor, got a list of 7": {"boxes": [0.0] * 7},
            "boxes must be float32, got float64": {"boxes": BOXES.double()},
            "labels must be a tensor, got a list of 2": {"labels": [0, 1]},
            "labels must be int64 .*, got float32": {"labels": LABELS.float()},
            "generator must be a torch.Generator, got int": {"generator": 3},
        },
    ),
    *errors(
        ValueError,
        {
            r"boxes must be \[K, 7\], .*, got shape \(2, 6\)": {"boxes": BOXES[:, :6]},
            "no gradient to boxes is offered": {"boxes": BOXES.clone().requires_grad_()},
            r"labels must have shape \(2,\), got \(1,\)": {"labels": LABELS[:1]},
            "labels must be on cpu": {"labels": LABELS.to("meta")},
            "generator must be on meta, got cpu": {
                "boxes": BOXES.to("meta"),
                "generator": torch.Generator(),
            },
        },
    ),
)


# mixup3d


def mixup_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    def sample(batch: int, *size: int, **arguments: Any) -> Arguments:
        volumes, index = make((batch, *size), dtype), torch.tensor([2, 0, 0, 1][:batch])
        return {"volumes": volumes, "lam": rand(batch), "index": index, **arguments}

    donors = make((5, 2, 4, 3, 7), dtype, seed=1)
    flips, donor_flips = integers(8, 4, torch.uint8, 4), integers(8, 5, torch.uint8, 2)
    return {
        "plain": sample(3, 2, 4, 3, 8),
        "window": sample(3, 2, 4, 3, 7, window=WINDOW),
        "flips": sample(4, 1, 3, 5, 8, flips=flips),
        "flips, window": sample(4, 2, 3, 2, 7, flips=flips, window=WINDOW),
        "donors": sample(3, 2, 4, 3, 7, donors=donors),
        "both flips": sample(4, 2, 4, 3, 7, donors=donors, flips=(flips, donor_flips)),
        "donors, flips": sample(
            4, 2, 4, 3, 7, donors=donors, flips=(None, donor_flips), window=WINDOW
        ),
    }


def mixup_sized(n: int, dtype: torch.dtype = torch.float32) -> Arguments:
    flips = torch.tensor([0, 1, 6], dtype=torch.uint8)
    index = torch.tensor([1, 2, 0])
    volumes = make((3, 2, n, 4, 16), dtype)
    return {"volumes": volumes, "lam": rand(3), "index": index, "flips": flips, "window": WINDOW}


def mixup_empty() -> dict[str, Arguments]:
    pairs = {"lam": LAM, "index": INDEX}
    none = {"lam": LAM[:0], "index": INDEX[:0]}
    samples = empty_volumes(flips=FLIPS, **pairs)
    samples["volumes (0, 1, 2, 3, 4)"] |= {**none, "flips": FLIPS[:0]}
    return {**samples, "no sample takes a donor": {"volumes": X[:0], "donors": X, **none}}


MIXUP_ERRORS = (
    *VOLUME_ERRORS,
    *LAM_ERRORS,
    *OUT_ERRORS,
    *errors(
        TypeError,
        {
            "index must be a tensor, got a list of 2": {"index": [0, 1]},
            "index must be int64, got int32": {"index": INDEX.int()},
            "donors must be a tensor": {"donors": 3},
            "donors must be float32, got float64": {"donors": X.double()},
            "flips must be a tensor, got a tuple of 2": {"flips": (FLIPS, FLIPS)},
            "flips must be uint8, got bool": {"flips": FLIPS.bool()},
            "flips must be a pair where donors are given, got a tensor": {
                "flips": FLIPS,
                "donors": X,
            },
            "flips must be a pair where donors are given": {"flips": (FLIPS,), "donors": X},
            "flips of the volumes must be uint8": {"flips": (INDEX, None), "donors": X},
        },
    ),
    *errors(
        ValueError,
        {
            r"index must have shape \(2,\), got \(2, 1\)": {"index": INDEX[:, None]},
            "index must be on cpu": {"index": INDEX.to("meta")},
            "donors must be on cpu": {"donors": X.to("meta")},
            r"donors must hold volumes of shape \(1, 2, 3, 4\), got": {"donors": X[:, :, :1]},
            "donors must hold volumes": {"donors": X[:0]},
            r"donors must be \[B, C, D, H, W\]": {"donors": X[0]},
            r"flips must have shape \(2,\), got \(1,\)": {"flips": FLIPS[:1]},
            "flips must be on cpu": {"flips": FLIPS.to("meta")},
            r"flips of the donors must have shape \(1,\)": {
                "flips": (None, FLIPS),
                "donors": X[:1],
            },
            "no gradient through out .*": {"volumes": LEAF, "out": X.clone()},
            "no gradient through out .* detached": {"donors": LEAF, "out": X.clone()},
            "no gradient through torch.int16": {"volumes": LEAF, "dtype": torch.int16},
        },
    ),
)


# crop_and_resize3d: the coordinates are exact in float32, so that float64 results are exact too


def crop_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    volumes = make((2, 2, 5, 6, 7), dtype)
    whole = torch.tensor([[1, 0, 1, 2, 5, 6, 7], [0, 2, 0, 0, 3, 6, 4]]).float()
    parts = torch.tensor(
        [
            [0, 0, 1, 1, 4, 5, 6],
            [1, 0.25, 1.75, -2.5, 4.75, 3, 9.5],
            [1, 3.25, 2.5, 0.5, 3.5, 2.75, 5.5],  # smaller than a voxel
            [0, 4.25, 0.25, 5.5, 1.25, 4.5, 2.5],  # partly inverted
        ]
    )
    outside = torch.tensor([[2, 0, 0, 0, 2, 3, 4], [1, 0, NAN, 0, 2, 3, 4], [0, 1, 1, 1, 3, 3, 9]])
    return {
        "whole voxels": {"volumes": volumes, "boxes": whole, "output_size": (1, 1, 2)},
        "parts of voxels": {"volumes": volumes, "boxes": parts, "output_size": (2, 4, 8)},
        "volume": {
            "volumes": volumes,
            "boxes": parts,
            "output_size": (4, 1, 4),
            "clamp": "volume",
            "window": WINDOW,
        },
        "unusable boxes": {"volumes": volumes, "boxes": outside, "output_size": (2, 2, 2)},
        "a thin volume": {
            "volumes": make((2, 1, 1, 9, 1), dtype),
            "boxes": parts[:2],
            "output_size": (2, 4, 2),
        },
        "nearest": {
            "volumes": volumes,
            "boxes": torch.cat([whole, parts, outside]),
            "output_size": (3, 2, 5),
            "mode": "nearest",
        },
        "window": {"volumes": volumes, "boxes": parts, "output_size": (1, 2, 4), "window": WINDOW},
    }


def crop_sized(n: int, dtype: torch.dtype = torch.float32) -> Arguments:
    rows = [[0, 0, 1, 1, n, 5, 6], [1, 0.25, 1.75, -2.5, n - 1, 3, 9.5]]
    volumes = make((2, 2, n, 6, 7), dtype)
    return {"volumes": volumes, "boxes": torch.tensor(rows).float(), "output_size": (n, 8, 4)}


def crop_empty() -> dict[str, Arguments]:
    boxes = torch.tensor([[0.0, 0, 0, 0, 2, 3, 4]] * 2)
    box = {"boxes": boxes, "output_size": (2, 1, 3)}
    return {
        **empty_volumes(**box),
        "no box": {"volumes": make((2, 1, 2, 3, 4)), **box, "boxes": boxes[:0]},
    }


CROP_ERRORS = (
    *VOLUME_ERRORS,
    *BOX_ERRORS,
    *errors(
        TypeError,
        {
            r"output_size must be three ints \(d, h, w\), got int": {"output_size": 3},
            "output_size must be three ints .*, got a tuple of 2": {"output_size": (3, 3)},
            "output_size h must be an int, got float": {"output_size": (3, 3.0, 3)},
            "output_size w must be an int, got bool": {"output_size": (3, 3, True)},
        },
    ),
    *errors(
        ValueError,
        {
            r"output_size d must be in \[1, 16777216\], got 0": {"output_size": (0, 3, 3)},
            "output_size w must be in .*, got -1": {"output_size": (3, 3, -1)},
            "clamp must be one of 'box', 'volume', got 'border'": {"clamp": "border"},
            "clamp must be one of 'box', 'volume', got None": {"clamp": None},
            "mode must be one of 'trilinear', 'nearest', got 'linear'": {"mode": "linear"},
            "window must be None in mode 'nearest', got a tuple of 2": {
                "mode": "nearest",
                "window": WINDOW,
            },
            "no gradient through torch.int16": {"volumes": LEAF, "dtype": torch.int16},
            "no gradient through mode 'nearest'": {"volumes": LEAF, "mode": "nearest"},
        },
    ),
)


# group_norm3d


def norm_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    def sample(*shape: int, last: bool = False, **arguments: Any) -> Arguments:
        x = make(shape, dtype) + 3
        return {"x": x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x, **arguments}

    own = compute_dtype(dtype)  # gradcheck needs float64
    narrow = own if own == torch.float64 else torch.bfloat16

    def affine(channels: int, weight_dtype: torch.dtype = own) -> Arguments:
        bias = make((channels,), own, seed=2)
        return {"weight": make((channels,), weight_dtype, seed=1), "bias": bias}

    shape, small = (2, 24, 3, 4, 5), (2, 6, 3, 7)
    return {
        "plain": sample(*small, num_groups=2, residual=make(small, dtype, seed=3), eps=0.5),
        "3 axes, leaky ReLU": sample(
            3, 5, 17, num_groups=1, weight=rand(5).to(own), activation="leaky_relu",
            negative_slope=0.25,
        ),
        "3 axes, channels last": sample(
            2, 5, 17, last=True, num_groups=5, bias=rand(5).to(own), activation="relu"
        ),
        "instance norm, ReLU": sample(
            *small, num_groups=6, **affine(6), residual=make(small, torch.float64, seed=3),
            activation="relu",
        ),
        "channels last": sample(*shape, last=True, num_groups=8, **affine(24, narrow)),
        "one element": sample(2, 9, 1, 1, num_groups=1, **affine(9), activation="leaky_relu"),
        "channels last, residual, ReLU": sample(
            *shape, last=True, num_groups=6, **affine(24), activation="relu",
            residual=make(shape, dtype, seed=3),
        ),
    }  # fmt: skip


def norm_sized(n: int, dtype: torch.dtype = torch.float32) -> Arguments:
    shape = (2, 8, n, 4, 16)
    residual = make(shape, dtype, seed=1)
    return {"x": make(shape, dtype), "num_groups": 4, "residual": residual, "activation": "relu"}


def norm_empty() -> dict[str, Arguments]:
    shapes = [(0, 4, 2, 3, 4), (2, 0, 2, 3, 4), (2, 4, 0, 3, 4), (2, 4, 0)]
    return {
        f"x {shape}": {
            "x": torch.zeros(shape),
            "num_groups": 2,
            "weight": torch.ones(shape[1]),
            "bias": torch.ones(shape[1]),
            "residual": torch.zeros(shape),
            "activation": "relu",
        }
        for shape in shapes
    }


M = torch.zeros(2, 4, 2, 3, 4)
NORM_ERRORS = (
    *errors(
        TypeError,
        {
            "x must be a tensor, got float": {"x": 1.0},
            "x must be float16 .* got int64": {"x": M.long()},
            "num_groups must be an int, got float": {"num_groups": 2.0},
            "num_groups must be an int, got bool": {"num_groups": True},
            "weight must be a tensor, got float": {"weight": 1.0},
            "weight must be float16 .* got int64": {"weight": torch.ones(4, dtype=torch.int64)},
            "bias must be a tensor, got a list of 4": {"bias": [0.0] * 4},
            "residual must be a tensor, got int": {"residual": 0},
            "residual must be float16 .* got uint8": {"residual": M.byte()},
            "negative_slope must be a number, got str": {"negative_slope": "0.1"},
            "eps must be a number, got a tensor": {"eps": torch.tensor(1e-5)},
        },
    ),
    *errors(
        ValueError,
        {
            r"x must be \[N, C, ...\] of 3 to 5 axes, got shape \(2, 4\)": {"x": M[..., 0, 0, 0]},
            "x must be .* of 3 to 5 axes": {"x": M[None]},
            "num_groups must divide the number of channels, 4, got 3": {"num_groups": 3},
            "num_groups must divide .* got 0": {"num_groups": 0},
            "num_groups must divide .* got -2": {"num_groups": -2},
            r"weight must have shape \(4,\), .* got \(3,\)": {"weight": torch.ones(3)},
            "weight must be on cpu": {"weight": torch.ones(4, device="meta")},
            r"bias must have shape \(4,\), .* got \(1, 4\)": {"bias": torch.ones(1, 4)},
            r"residual must have the shape of x, \(2, 4, 2, 3, 4\), got": {"residual": M[:1]},
            "residual must be on cpu": {"residual": M.to("meta")},
            "activation must be one of None, 'relu', 'leaky_relu', got 'gelu'": {
                "activation": "gelu"
            },
            "negative_slope must be >= 0, got -0.1": {"negative_slope": -0.1},
            "negative_slope must be finite": {"negative_slope": NAN},
            "eps must be >= 0, got -1": {"eps": -1.0},
            "eps must be finite, got inf": {"eps": INF},
        },
    ),
)


# object_mixup3d: coordinates as in crop_and_resize3d; targets overlap, and one pair is left out


def object_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    volumes, donors = make((2, 2, 6, 5, 8), dtype), make((3, 2, 5, 9, 4), dtype, seed=1)
    boxes = torch.tensor(
        [
            [0, 1, 1, 0, 5, 5, 8],
            [0, 0.25, 0.5, 3.75, 2, 4.25, 8],
            [1, -3, 2.5, 2, 4, 4.5, 6],
            [1, NAN, 0, 0, 4, 4, 4],
        ]
    )
    sources = torch.tensor(
        [
            [1, 0, 0.5, 0, 4, 4.5, 4],
            [0, 1, 1.25, 0.5, 3, 3.25, 2.5],
            [1, 1, 0.25, -1, 3.5, 4, 3.5],
            [1, 0, 0, 0, 4, 4, 4],
        ]
    )
    pairs = {"boxes": boxes, "donor_boxes": sources, "lam": rand(4)}
    return {
        "plain": {"volumes": volumes, **pairs},
        "window": {"volumes": volumes, **pairs, "window": WINDOW},
        "donors": {"volumes": volumes, **pairs, "donors": donors},
        "swap": {
            "volumes": volumes,
            "boxes": boxes[[0, 2]],
            "donor_boxes": boxes[[2, 0]],
            "lam": torch.zeros(2),
        },
        "donors, window": {"volumes": volumes, **pairs, "donors": donors, "window": WINDOW},
    }


def object_sized(n: int, dtype: torch.dtype = torch.float32) -> Arguments:
    boxes = torch.tensor([[0, 0, 0, 0, n, 8, 16], [1, 0, 4, 8, n, 8, 12]]).float()
    volumes = make((2, 2, n, 8, 16), dtype)
    return {"volumes": volumes, "boxes": boxes, "donor_boxes": boxes.flip(0), "lam": rand(2) / 2}


def object_empty() -> dict[str, Arguments]:
    boxes = torch.tensor([[0.0, 0, 0, 0, 2, 2, 2]])
    pair = {"boxes": boxes, "donor_boxes": boxes, "lam": LAM[:1] / 2}
    full, none = make((2, 1, 4, 4, 4)), {name: x[:0] for name, x in pair.items()}
    return {
        **empty_volumes(**pair),
        "no pair": {"volumes": full, **none},
        "no donor": {"volumes": full, **pair, "donors": full[:0]},
        "donors without voxels": {"volumes": full, **pair, "donors": full[:, :, :, :0]},
    }


OBJECT_ERRORS = (
    *VOLUME_ERRORS,
    *BOX_ERRORS,
    *LAM_ERRORS,
    *OUT_ERRORS,
    *errors(
        TypeError,
        {
            "donor_boxes must be float32, got int64": {"donor_boxes": BOXES.long()},
            "donors must be a tensor, got int": {"donors": 3},
            "donors must be float16 or .* got int64": {"donors": X.long()},
        },
    ),
    *errors(
        ValueError,
        {
            "no gradient to volumes is offered": {"volumes": LEAF},
            r"donor_boxes must be \[K, 7\]": {"donor_boxes": BOXES[0]},
            r"donor_boxes must be as many as boxes, 2, got shape \(1, 7\)": {
                "donor_boxes": BOXES[:1]
            },
            "no gradient to donor_boxes": {"donor_boxes": BOXES.clone().requires_grad_()},
            r"donors must be \[B, C, D, H, W\]": {"donors": X[0]},
            "donors must be on cpu": {"donors": X.to("meta")},
            "donors must have the channels of volumes, 1, got shape": {
                "donors": X.expand(2, 3, 2, 3, 4)
            },
            "no gradient to donors": {"donors": LEAF},
            "window must be None for donors of another dtype": {
                "donors": X.double(),
                "window": WINDOW,
            },
        },
    ),
)


ANY = (NAN, INF, -INF)
OPS = (
    OpInfo(
        name="soft_target_focal_loss",
        dtypes=FLOATS,
        samples=loss_samples,
        sized=loss_sized,
        empty=loss_empty,
        result_dtype=loss_dtype,
        valid={"logits": L, "targets": Y},
        errors=LOSS_ERRORS,
        differentiable=("logits",),
        not_finite={"logits": (NAN,), "targets": (NAN,), "weight": ANY},
        functorch=True,
    ),
    OpInfo(
        name="predict_targets",
        dtypes=FLOATS,
        samples=target_samples,
        sized=target_sized,
        empty=target_empty,
        result_dtype=lambda _: torch.float32,
        valid={"view_logits": VIEWS, "flips": FLIPS},
        errors=TARGET_ERRORS,
        not_finite={"view_logits": (NAN,)},
    ),
    OpInfo(
        name="sample_mixup",
        dtypes=(torch.float32,),
        samples=draw_samples,
        sized=lambda n, _=None: {"batch_size": n},
        empty=lambda: {"no sample": {"batch_size": 0}},
        result_dtype=lambda _: torch.float32,
        valid={"batch_size": 2},
        errors=DRAW_ERRORS,
        not_finite={},
        launches=False,
    ),
    OpInfo(
        name="sample_donors",
        dtypes=(torch.float32,),
        samples=donor_samples,
        sized=lambda n, _=None: {"boxes": donor_boxes(n)},
        empty=lambda: {"no box": {"boxes": BOXES[:0]}},
        result_dtype=lambda _: torch.float32,
        valid={"boxes": BOXES},
        errors=DONOR_ERRORS,
        not_finite={},
        launches=False,
    ),
    OpInfo(
        name="mixup3d",
        dtypes=VOXELS,
        samples=mixup_samples,
        sized=mixup_sized,
        empty=mixup_empty,
        result_dtype=voxel_dtype,
        valid={"volumes": X, "lam": LAM, "index": INDEX},
        errors=MIXUP_ERRORS,
        differentiable=("volumes", "donors"),
        not_finite={"volumes": ANY, "donors": ANY, "lam": (NAN,)},
        in_place="volumes",
        functorch=True,
    ),
    OpInfo(
        name="crop_and_resize3d",
        dtypes=VOXELS,
        samples=crop_samples,
        sized=crop_sized,
        empty=crop_empty,
        result_dtype=voxel_dtype,
        valid={"volumes": X, "boxes": BOXES, "output_size": (2, 2, 2)},
        errors=CROP_ERRORS,
        differentiable=("volumes",),
        not_finite={"volumes": ANY},
        interpreted_block=64,
        functorch=True,
    ),
    OpInfo(
        name="group_norm3d",
        dtypes=FLOATS,
        samples=norm_samples,
        sized=norm_sized,
        empty=norm_empty,
        result_dtype=lambda arguments: arguments["x"].dtype,
        valid={"x": M, "num_groups": 2},
        errors=NORM_ERRORS,
        differentiable=("x", "weight", "bias", "residual"),
        not_finite={"x": ANY, "weight": (NAN,), "bias": ANY, "residual": ANY},
        interpreted_block=256,  # also for several chunks of several tiles
        functorch=True,
    ),
    OpInfo(
        name="object_mixup3d",
        dtypes=VOXELS,
        samples=object_samples,
        sized=object_sized,
        empty=object_empty,
        result_dtype=voxel_dtype,
        valid={"volumes": X, "boxes": BOXES, "donor_boxes": BOXES, "lam": LAM},
        errors=OBJECT_ERRORS,
        not_finite={"volumes": ANY, "donors": ANY, "lam": (NAN,)},
        in_place="volumes",
    ),
)
