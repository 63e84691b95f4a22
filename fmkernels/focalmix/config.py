"""The configuration of a run: what decides its result, its presets, and its file."""

import json
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fmkernels.focalmix.errors import InputError, first_line
from fmkernels.focalmix.model.anchors import Anchors

CONFIG = "config.json"

SPACINGS = (1e-3, 1e3)
"""Minimum and maximum of ``spacing`` in mm."""

MAX_FILE_BYTES = 1 << 20
"""A larger ``config.json`` is refused."""

MAX_STAGES, MAX_BLOCKS, MAX_CHANNELS, MAX_WEIGHTS = 8, 64, 2048, 1 << 28
"""Of the detector: stages of the backbone, residual blocks of each, channels of the pyramid, weights in all (1 GiB)."""

MAX_PATCH_VOXELS, MAX_BATCH_VOXELS = 1 << 28, 1 << 31
"""Voxels of a patch (as 645^3), and of all patches of a step (4 GiB of int16)."""

MAX_FEATURES = 1 << 31
"""Of a patch in a stage of the backbone (8 GiB of float32)."""

MAX_ANCHORS, MAX_DIAMETER = 16, 1000.0
"""At each place, and millimetres."""

MAX_STEPS, MAX_OBJECTS, MAX_WORKERS = 1 << 30, 1 << 10, 1 << 10


def _option(default: Any, text: str, *, runtime: bool = False) -> Any:
    """A field of Config; ``runtime`` marks what a resumed run may change, as it has no part in the result."""
    return field(default=default, metadata={"help": text, "runtime": runtime})


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run. Lists of three are z, y, x."""

    spacing: tuple[float, ...] = _option((2.0, 2.0, 2.0), "resampled voxel size in mm")
    window: tuple[float, float] = _option((-1200.0, 600.0), "HU mapped to 0 and 1")
    patch_size: tuple[int, ...] = _option((32, 32, 32), "voxels, multiples of the largest stride")
    positive: float = _option(0.7, "share of the patches that are placed on a nodule")
    strides: tuple[int, ...] = _option((2, 4, 8), "of the pyramid's levels, in voxels")
    diameters: tuple[float, ...] = _option(
        (5.0, 10.0, 20.0), "of the anchors in mm, level after level, as many each"
    )
    widths: tuple[int, ...] = _option((16, 32, 48), "channels of the backbone's stages")
    blocks: tuple[int, ...] = _option((1, 1, 1), "residual blocks of the backbone's stages")
    channels: int = _option(16, "channels of the pyramid and the head")
    batch_size: int = _option(16, "patches a step, over all processes")
    steps: int = _option(3000, "training steps")
    learning_rate: float = _option(4e-3, "at its highest")
    weight_decay: float = _option(1e-2, "of AdamW")
    warmup: int = _option(50, "steps over which the learning rate rises")
    schedule: str = _option(
        "restart",
        "of the learning rate: cosine; restart: anew after burn_in; step: 1/10 after 60 %, 1/100 after 85 %",
    )
    ema_decay: float = _option(0.995, "of the averaged weights, which are those evaluated")
    clip: float = _option(1.0, "largest norm of the gradient")
    amp: str = _option(
        "auto",
        "auto (bf16 or else fp16 on a GPU, bf16 on a CPU with AMX, else off), off, bf16 or fp16",
    )
    alpha0: float = _option(0.5, "focal loss: weight of the background")
    alpha1: float = _option(0.5, "focal loss: weight of nodules")
    gamma: float = _option(2.0, "focal loss: exponent")
    box_weight: float = _option(1.0, "of the box loss beside the focal loss")
    train_subsets: tuple[int, ...] = _option((0, 1, 2, 3, 4, 5, 6), "subsets to train on")
    validation_subsets: tuple[int, ...] = _option(
        (7,), "subsets to detect and evaluate on from time to time"
    )
    test_subsets: tuple[int, ...] = _option((8, 9), "subsets to detect and evaluate on at the end")
    labeled: int | None = _option(
        None, "use the labels of so many training scans only, drawn by the seed"
    )
    method: str = _option(
        "supervised", "supervised, or focalmix: with the other training scans, unlabelled"
    )
    unlabeled: int | None = _option(None, "focalmix: use so many of the other training scans only")
    unlabeled_batch_size: int = _option(
        8, "focalmix: unlabelled patches a step, over all processes"
    )
    unlabeled_positive: float = _option(
        0.75,
        "focalmix: share of the unlabelled patches that are placed on what was found there after the burn-in",
    )
    unlabeled_weight: float = _option(
        4.0, "focalmix: of the loss of unlabelled images, once it has risen"
    )
    burn_in: int = _option(
        1800, "focalmix: steps with labelled patches alone before the others come in; see schedule"
    )
    ramp: int = _option(100, "focalmix: steps over which the unlabelled weight rises")
    teacher: str = _option(
        "ema", "focalmix: weights that predict targets: ema (averaged) or current"
    )
    views: int = _option(4, "focalmix: flipped views that a target is predicted from, 1 to 8")
    temperature: float = _option(
        0.7, "focalmix: of the sharpening, in (0, 1]; 1 leaves targets as they are"
    )
    pseudo_labels: str = _option("soft", "focalmix: soft, or hard (0 or 1)")
    loss: str = _option(
        "soft", "soft (soft-target focal loss), or hard (that of common libraries, to compare)"
    )
    ops: str = _option(
        "fused", "fused, or plain: the same step in plain PyTorch, to compare its speed"
    )
    image_mixup: bool = _option(True, "focalmix: mix whole images")
    object_mixup: bool = _option(True, "focalmix: mix objects")
    eta: float = _option(0.2, "focalmix: of the Beta distribution that shares are drawn from")
    confidence: float = _option(
        0.8, "focalmix: target from which a predicted box counts as an object"
    )
    objects: int = _option(4, "focalmix: objects of an image that are mixed, at most")
    groups: int = _option(
        1, "focalmix: parts of the joint batch that are mixed each within itself, some per process"
    )
    search_size: tuple[int, ...] = _option(
        (48, 48, 48), "voxels of the patches in which a whole scan is searched"
    )
    overlap: int = _option(12, "voxels that these patches share")
    nms_threshold: float = _option(
        0.1, "intersection over union above which the less probable box goes"
    )
    log_every: int = _option(20, "steps between rows of the metrics")
    validate_every: int = _option(1500, "steps between validations")
    checkpoint_every: int = _option(300, "steps between checkpoints", runtime=True)
    seed: int = _option(0, "of weights, patches and the choice of scans")
    workers: int = _option(1, "processes that read patches", runtime=True)
    device: str = _option("auto", "auto, cpu, cuda, ...", runtime=True)
    cache: str | None = _option(
        None, "folder for the resampled scans, the data's own where not given", runtime=True
    )

    def __post_init__(self) -> None:
        for option, hint in _HINTS.items():
            object.__setattr__(self, option, _typed(option, hint, getattr(self, option)))

        def expect(name: str, holds: bool, wanted: str) -> None:
            if not holds:
                raise InputError(f"{name}: expected {wanted}, got {str(getattr(self, name))[:200]}")

        for name in ("spacing", "patch_size", "search_size"):
            value = getattr(self, name)
            expect(
                name,
                len(value) == 3 and all(0 < v < math.inf for v in value),
                "three positive numbers (z, y, x)",
            )
        low, high = SPACINGS
        expect(
            "spacing", all(low <= step <= high for step in self.spacing), f"{low:g} to {high:g} mm"
        )
        for name in ("patch_size", "search_size"):
            voxels = math.prod(getattr(self, name))
            expect(name, voxels <= MAX_PATCH_VOXELS, f"at most {MAX_PATCH_VOXELS} voxels")
        rising = len(self.window) == 2 and -math.inf < self.window[0] < self.window[1] < math.inf
        expect("window", rising, "two finite numbers, the lower first")
        expect("widths", 0 < len(self.widths) <= MAX_STAGES, f"1 to {MAX_STAGES} numbers")
        stages = [2 ** (i + 1) for i in range(len(self.widths))]
        last = stages[-len(self.strides) :] if self.strides else None
        expect(
            "strides",
            list(self.strides) == last,
            f"the last of {stages} (one stage for each of the widths)",
        )
        coarsest = self.strides[-1]
        for name in ("patch_size", "search_size"):
            expect(
                name,
                all(side % coarsest == 0 for side in getattr(self, name)),
                f"multiples of {coarsest}",
            )
        expect(
            "blocks",
            len(self.blocks) == len(self.widths),
            f"{len(self.widths)} numbers, as many as widths",
        )
        expect(
            "widths", all(width > 0 and width % 4 == 0 for width in self.widths), "multiples of 4"
        )
        fits = 0 < self.channels <= MAX_CHANNELS and self.channels % 4 == 0
        expect("channels", fits, f"a multiple of 4 up to {MAX_CHANNELS}")
        expect(
            "blocks", all(0 <= count <= MAX_BLOCKS for count in self.blocks), f"0 to {MAX_BLOCKS}"
        )
        kernels = sum(
            (2 * n + 1) * max(self.widths) * w
            for w, n in zip(self.widths, self.blocks, strict=True)
        )
        weights = 27 * (kernels + self.channels**2)  # at least as many as there are
        expect(
            "widths",
            weights <= MAX_WEIGHTS,
            f"with blocks and channels at most {MAX_WEIGHTS} weights",
        )
        most = min(MAX_FEATURES * 8 ** (i + 1) // width for i, width in enumerate(self.widths))
        for name in ("patch_size", "search_size"):
            fits = math.prod(getattr(self, name)) <= most
            expect(name, fits, f"at most {most} voxels, as widths are {self.widths}")
        levels = len(self.strides)
        expect(
            "diameters",
            len(self.diameters) > 0 and len(self.diameters) % levels == 0,
            f"as many for each of {levels} levels",
        )
        expect(
            "diameters",
            len(self.diameters) <= MAX_ANCHORS * levels,
            f"at most {MAX_ANCHORS} for each level",
        )
        expect(
            "diameters",
            all(0 < d <= MAX_DIAMETER for d in self.diameters),
            f"numbers up to {MAX_DIAMETER:g} mm",
        )
        expect(
            "overlap",
            0 <= self.overlap < min(self.search_size),
            f"0 to {min(self.search_size) - 1}",
        )
        whole = (
            "batch_size",
            "unlabeled_batch_size",
            "steps",
            "log_every",
            "validate_every",
            "checkpoint_every",
        )
        for name in (*whole, "objects", "groups"):
            expect(name, getattr(self, name) >= 1, "at least 1")
        expect("steps", self.steps <= MAX_STEPS, f"at most {MAX_STEPS}")
        expect("objects", self.objects <= MAX_OBJECTS, f"at most {MAX_OBJECTS}")
        expect("workers", self.workers <= MAX_WORKERS, f"at most {MAX_WORKERS}")
        most = MAX_BATCH_VOXELS // math.prod(self.patch_size)
        for name in ("batch_size", "unlabeled_batch_size"):
            expect(
                name, getattr(self, name) <= most, f"at most {most} patches of {self.patch_size}"
            )
        if self.method == "focalmix":
            expect("burn_in", self.burn_in < self.steps, f"less than the {self.steps} steps")
            for name in ("batch_size", "unlabeled_batch_size"):
                expect(
                    name,
                    getattr(self, name) % self.groups == 0,
                    f"a multiple of the {self.groups} groups",
                )
        expect("method", self.method in ("supervised", "focalmix"), "supervised or focalmix")
        expect("teacher", self.teacher in ("ema", "current"), "ema or current")
        expect("pseudo_labels", self.pseudo_labels in ("soft", "hard"), "soft or hard")
        expect("loss", self.loss in ("soft", "hard"), "soft or hard")
        expect("ops", self.ops in ("fused", "plain"), "fused or plain")
        expect("views", 1 <= self.views <= 8, "1 to 8")
        expect("temperature", 0 < self.temperature <= 1, "more than 0, at most 1")
        expect("seed", self.seed < 2**63, "less than 2^63")
        for name in ("train_subsets", "validation_subsets", "test_subsets"):
            expect(name, set(getattr(self, name)) <= set(range(10)), "numbers of 0 to 9")
        counted = (
            "weight_decay",
            "warmup",
            "gamma",
            "box_weight",
            "workers",
            "seed",
            "unlabeled_weight",
            "burn_in",
        )
        for name in (*counted, "ramp"):
            expect(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("learning_rate", "clip", "eta"):
            expect(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in (
            "positive",
            "ema_decay",
            "alpha0",
            "alpha1",
            "nms_threshold",
            "confidence",
            "unlabeled_positive",
        ):
            expect(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        expect(
            "schedule", self.schedule in ("cosine", "restart", "step"), "cosine, restart or step"
        )
        expect("amp", self.amp in ("auto", "off", "bf16", "fp16"), "auto, off, bf16 or fp16")
        for name in ("labeled", "unlabeled"):
            expect(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        expect("cache", self.cache is None or self.cache.isprintable(), "the name of a folder")
        expect("train_subsets", len(self.train_subsets) > 0, "at least one")
        for name in ("validation_subsets", "test_subsets"):
            expect(
                name,
                not set(getattr(self, name)) & set(self.train_subsets),
                "none of train_subsets",
            )

    @property
    def result(self) -> dict[str, Any]:
        """What decides the result of a run: all but what a resumed run may change."""
        return {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if not option.metadata["runtime"]
        }

    @property
    def anchors(self) -> Anchors:
        return Anchors.from_mm(self.strides, self.diameters, self.spacing)


def _typed(name: str, hint: Any, value: Any) -> Any:
    """The value in the type of its field: an int of any integer, a float of any real number, a tuple of any sequence.

    Raises:
        InputError: it is of another kind, or an integer of more than 64 bits.
    """
    if typing.get_origin(hint) is types.UnionType:
        return (
            None
            if value is None
            else _typed(name, next(kind for kind in typing.get_args(hint) if kind), value)
        )
    if (
        typing.get_origin(hint) is tuple
        and isinstance(value, Sequence)
        and not isinstance(value, str)
    ):
        return tuple(_typed(name, typing.get_args(hint)[0], part) for part in value)
    kind = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if (
        typing.get_origin(hint) is tuple
        or isinstance(value, bool) != (hint is bool)
        or not isinstance(value, kind)
    ):
        wanted = "a list" if typing.get_origin(hint) is tuple else f"of type {hint.__name__}"
        raise InputError(f"{name}: expected {wanted}, got {reprlib.repr(value)}")
    if isinstance(value, numbers.Integral) and not -(2**63) <= int(value) < 2**63:
        raise InputError(f"{name}: expected a number of at most 64 bits, got {reprlib.repr(value)}")
    return hint(value)


_HINTS = typing.get_type_hints(Config)

PRESETS = {
    "demo": Config(),
    "luna16": Config(
        spacing=(1.0, 1.0, 1.0),
        patch_size=(160, 160, 160),
        search_size=(160, 160, 160),
        positive=0.5,
        strides=(4, 8, 16),
        diameters=(5.0, 10.0, 20.0),
        widths=(24, 48, 96, 128),
        blocks=(1, 2, 2, 2),
        channels=64,
        batch_size=8,
        unlabeled_batch_size=8,
        unlabeled=400,
        steps=50_000,
        burn_in=25_000,
        ramp=2000,
        learning_rate=1e-3,
        warmup=1000,
        ema_decay=0.999,
        train_subsets=(0, 1, 2, 3, 4, 5, 6, 7),
        validation_subsets=(8,),
        test_subsets=(9,),
        overlap=32,
        log_every=50,
        validate_every=1000,
        checkpoint_every=1000,
        workers=8,
    ),
}
"""demo: minutes on two CPU cores with ``fmkernels phantom``; luna16: LUNA16 on GPUs."""


def load_config(run: str | Path) -> Config | None:
    """The configuration of the run in a folder, None where there is none.

    Raises:
        InputError: ``config.json`` is no configuration.
    """
    path = Path(run) / CONFIG
    if not path.exists():
        return None
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise InputError(f"{path}: expected at most {MAX_FILE_BYTES} bytes of JSON, got {size}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {first_line(error)}") from None
    return config_of(values, path)


def config_of(values: Mapping[str, Any], path: Path) -> Config:
    """The configuration that a file holds, in its own words; InputError where it is none of this version."""
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: expected the fields of a configuration, got {type(values).__name__}"
        )
    if wrong := sorted(set(_HINTS) ^ set(values)):
        raise InputError(f"{path}: {wrong[0]}: expected the fields of this version's configuration")
    try:
        return Config(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
