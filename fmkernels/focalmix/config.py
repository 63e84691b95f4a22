"""The configuration of a run: its options with their checks, the presets, and the file."""

import json
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from fmkernels.focalmix.errors import InputError, first_line

CONFIG = "config.json"

GROUPS = ("data", "patches", "detector", "optimization", "loss", "FocalMix", "inference", "run")
"""Groups of options, in the order of ``--help``."""


class _Check(NamedTuple):
    expected: str
    holds: Callable[[Any], bool]


_POSITIVE = _Check("a positive number", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Check("0 or more", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = _Check("at least 1", lambda value: value >= 1)
_FRACTION = _Check("0 to 1", lambda value: 0 <= value <= 1)
_SIZE = _Check(
    "three positive numbers (z, y, x)",
    lambda value: len(value) == 3 and all(0 < length < math.inf for length in value),
)
_WINDOW = _Check(
    "two finite numbers, the lower first",
    lambda value: len(value) == 2 and -math.inf < value[0] < value[1] < math.inf,
)
_WIDTHS = _Check(
    "one or more positive multiples of 4",
    lambda value: len(value) > 0 and all(width > 0 and width % 4 == 0 for width in value),
)
_SUBSETS = _Check("numbers of 0 to 9", lambda value: set(value) <= set(range(10)))


def _option(
    default: Any,
    group: str,
    text: str,
    *,
    check: _Check | None = None,
    choices: Sequence[str] = (),
    runtime: bool = False,
) -> Any:
    """A field of Config: its default, its group and text in ``--help``, and what it may be.

    ``runtime`` marks the options that do not affect the result: a resumed run may change them.
    """
    assert group in GROUPS
    if choices:
        check = _Check(" or ".join(choices), lambda value: value in choices)
    metadata = {
        "group": group,
        "help": text,
        "check": check,
        "choices": choices,
        "runtime": runtime,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All options of a run. Lists of three are z, y, x.

    The default of a new option is what was done before: files of earlier versions lack it.
    """

    spacing: tuple[float, ...] = _option(
        (2.0, 2.0, 2.0), "data", "voxel size of the resampled scans in mm", check=_SIZE
    )
    window: tuple[float, float] = _option(
        (-1200.0, 600.0), "data", "HU values mapped to 0 and 1", check=_WINDOW
    )
    train_subsets: tuple[int, ...] = _option(
        (0, 1, 2, 3, 4, 5, 6),
        "data",
        "subsets to train on",
        check=_Check("numbers of 0 to 9, at least one", lambda v: v and _SUBSETS.holds(v)),
    )
    validation_subsets: tuple[int, ...] = _option(
        (7,), "data", "subsets to evaluate on during training", check=_SUBSETS
    )
    test_subsets: tuple[int, ...] = _option(
        (8, 9), "data", "subsets to evaluate on after training", check=_SUBSETS
    )
    labeled: int | None = _option(
        None,
        "data",
        "number of labeled training scans (default: all), chosen by --seed",
        check=_AT_LEAST_1,
    )
    cache: str | None = _option(
        None,
        "data",
        "folder for resampled scans (default: inside DATA)",
        check=_Check("the name of a folder", str.isprintable),
        runtime=True,
    )
    coordinates: str = _option(
        "LPS",
        "data",
        "world coordinates of the annotations: LPS (DICOM, LUNA16) or RAS (NIfTI, 3D Slicer)",
        choices=("LPS", "RAS"),
    )
    unlabeled_data: tuple[str, ...] = _option(
        (),
        "data",
        "folders of more scans, without labels (focalmix; default: none)",
        check=_Check("names of folders", lambda value: all(map(str.isprintable, value))),
        runtime=True,
    )
    patch_size: tuple[int, ...] = _option(
        (32, 32, 32),
        "patches",
        "patch size in voxels, multiples of the largest stride",
        check=_SIZE,
    )
    batch_size: int = _option(
        16, "patches", "labeled patches per step, summed over all processes", check=_AT_LEAST_1
    )
    positive_fraction: float = _option(
        0.7, "patches", "fraction of labeled patches placed around a nodule", check=_FRACTION
    )
    contrast: float = _option(
        0.0,
        "patches",
        "augmentation: largest relative change of contrast, and change of brightness in widths of "
        "the window",
        check=_FRACTION,
    )
    noise: float = _option(
        0.0,
        "patches",
        "augmentation: largest standard deviation of noise in HU",
        check=_NOT_NEGATIVE,
    )
    blur: float = _option(
        0.0,
        "patches",
        "augmentation: largest standard deviation of the blur in voxels",
        check=_Check("0 to 4", lambda value: 0 <= value <= 4),
    )
    rotations: bool = _option(
        False,
        "patches",
        "also rotate patches and views by right angles; needs cubic patches and cubic voxels",
    )
    strides: tuple[int, ...] = _option(
        (2, 4, 8), "detector", "strides of the pyramid levels in voxels, the last of 2, 4, 8, ..."
    )
    diameters: tuple[float, ...] = _option(
        (5.0, 10.0, 20.0),
        "detector",
        "anchor diameters in mm, fine to coarse, the same number for every level",
        check=_Check(
            "positive numbers", lambda value: value and all(0 < d < math.inf for d in value)
        ),
    )
    widths: tuple[int, ...] = _option(
        (16, 32, 64), "detector", "channels of each backbone stage, multiples of 4", check=_WIDTHS
    )
    blocks: tuple[int, ...] = _option(
        (1, 1, 1),
        "detector",
        "residual blocks of each backbone stage",
        check=_Check("numbers of 0 or more", lambda value: all(count >= 0 for count in value)),
    )
    channels: int = _option(
        16,
        "detector",
        "channels of the pyramid and the head, a multiple of 4",
        check=_Check("a positive multiple of 4", lambda value: value > 0 and value % 4 == 0),
    )
    norm: str = _option(
        "batch",
        "detector",
        "normalization: batch, or group, whose statistics are those of a window, so that windows "
        "must not be larger than the patches",
        choices=("batch", "group"),
    )
    steps: int = _option(3000, "optimization", "training steps", check=_AT_LEAST_1)
    learning_rate: float = _option(4e-3, "optimization", "peak learning rate", check=_POSITIVE)
    weight_decay: float = _option(1e-2, "optimization", "AdamW weight decay", check=_NOT_NEGATIVE)
    warmup: int = _option(50, "optimization", "warm-up steps", check=_NOT_NEGATIVE)
    schedule: str = _option(
        "restart",
        "optimization",
        "learning rate: cosine; restart: a second cosine after the burn-in; "
        "step: /10 at 60%, /100 at 85%",
        choices=("cosine", "restart", "step"),
    )
    ema_decay: float = _option(
        0.995,
        "optimization",
        "decay of the weight average (EMA); the averaged weights are evaluated",
        check=_FRACTION,
    )
    max_grad_norm: float = _option(
        1.0, "optimization", "gradient-norm clipping threshold", check=_POSITIVE
    )
    amp: str = _option(
        "auto",
        "optimization",
        "mixed precision; auto: bf16 on devices that compute in it (fp16 on old GPUs), else off",
        choices=("auto", "off", "bf16", "fp16"),
    )
    compile: str = _option(
        "off",
        "optimization",
        "torch.compile of the detector: off, on, or graph: on, with CUDA graphs",
        choices=("off", "on", "graph"),
    )
    alpha0: float = _option(0.5, "loss", "focal-loss weight of the background", check=_FRACTION)
    alpha1: float = _option(0.5, "loss", "focal-loss weight of nodules", check=_FRACTION)
    gamma: float = _option(2.0, "loss", "focal-loss exponent", check=_NOT_NEGATIVE)
    box_weight: float = _option(1.0, "loss", "weight of the box loss", check=_NOT_NEGATIVE)
    loss: str = _option(
        "soft",
        "loss",
        "soft: soft-target focal loss; hard: the usual focal loss, for comparison",
        choices=("soft", "hard"),
    )
    method: str = _option(
        "supervised",
        "FocalMix",
        "supervised, or focalmix: also use the other training scans, without labels",
        choices=("supervised", "focalmix"),
    )
    unlabeled: int | None = _option(
        None,
        "FocalMix",
        "number of unlabeled scans (default: all the others)",
        check=_AT_LEAST_1,
    )
    unlabeled_batch_size: int = _option(
        8, "FocalMix", "unlabeled patches per step, summed over all processes", check=_AT_LEAST_1
    )
    unlabeled_positive_fraction: float = _option(
        0.75,
        "FocalMix",
        "fraction of unlabeled patches placed around detections of the burn-in model",
        check=_FRACTION,
    )
    pseudo_box_probability: float = _option(
        0.0,
        "FocalMix",
        "minimum probability of a detection that unlabeled patches are placed around",
        check=_FRACTION,
    )
    unlabeled_weight: float = _option(
        4.0, "FocalMix", "final weight of the unlabeled loss", check=_NOT_NEGATIVE
    )
    unlabeled_normalizer: str = _option(
        "labeled",
        "FocalMix",
        "what divides the unlabeled loss: the number of labeled positives, or the sum of its own "
        "pseudo-targets",
        choices=("labeled", "own"),
    )
    burn_in: float = _option(
        0.5,
        "FocalMix",
        "supervised steps before unlabeled patches are added; below 1, a fraction of the steps",
        check=_Check(
            "a number of steps, or a fraction of them below 1",
            lambda value: 0 <= value < 1 or (value >= 1 and value.is_integer()),
        ),
    )
    rampup_steps: int = _option(
        100,
        "FocalMix",
        "steps over which the weight of the unlabeled loss ramps up",
        check=_NOT_NEGATIVE,
    )
    student: str = _option(
        "continued",
        "FocalMix",
        "after the burn-in, continue with its weights, or with fresh ones (supervised runs too)",
        choices=("continued", "fresh"),
    )
    teacher: str = _option(
        "ema",
        "FocalMix",
        "weights that predict the pseudo-targets: averaged, current, or the averaged ones of the "
        "burn-in (fixed)",
        choices=("ema", "current", "fixed"),
    )
    follow_after: int | None = _option(
        None,
        "FocalMix",
        "steps after the burn-in from which a fixed teacher is replaced by the averaged weights "
        "(default: never)",
        check=_NOT_NEGATIVE,
    )
    views: int = _option(
        4,
        "FocalMix",
        "number of flipped views averaged into a pseudo-target (1 to 8; with --rotations, to 48)",
        check=_AT_LEAST_1,
    )
    temperature: float = _option(
        0.7,
        "FocalMix",
        "sharpening temperature in (0, 1]; 1: no sharpening",
        check=_Check("more than 0, at most 1", lambda value: 0 < value <= 1),
    )
    pseudo_labels: str = _option(
        "soft",
        "FocalMix",
        "pseudo-targets are probabilities (soft), or 0 and 1 (hard)",
        choices=("soft", "hard"),
    )
    ignored_targets: tuple[float, float] = _option(
        (0.0, 0.0),
        "FocalMix",
        "pseudo-targets between these two have no loss",
        check=_Check(
            "two numbers of 0 to 1, the lower first",
            lambda value: len(value) == 2 and 0 <= value[0] <= value[1] <= 1,
        ),
    )
    image_mixup: bool = _option(True, "FocalMix", "mix whole images")
    mixed_images: str = _option(
        "all",
        "FocalMix",
        "images that image MixUp changes: all, or unlabeled ones",
        choices=("all", "unlabeled"),
    )
    object_mixup: bool = _option(True, "FocalMix", "mix objects")
    supervised_mixup: bool = _option(
        False, "FocalMix", "mix images and objects in supervised steps too"
    )
    eta: float = _option(0.2, "FocalMix", "Beta(eta, eta) parameter of MixUp", check=_POSITIVE)
    confidence: float = _option(
        0.8,
        "FocalMix",
        "minimum pseudo-target of a predicted box that takes part in object MixUp",
        check=_FRACTION,
    )
    max_objects: int = _option(
        4, "FocalMix", "maximum number of objects mixed per image", check=_AT_LEAST_1
    )
    groups: int = _option(
        1,
        "FocalMix",
        "MixUp groups: images are only mixed within their group (set to the number of processes)",
        check=_AT_LEAST_1,
    )
    roi_size: tuple[int, ...] = _option(
        (96, 96, 96), "inference", "largest sliding window in voxels", check=_SIZE
    )
    overlap: int = _option(
        12, "inference", "overlap of the sliding windows in voxels", check=_NOT_NEGATIVE
    )
    nms_threshold: float = _option(
        0.1, "inference", "IoU threshold of non-maximum suppression", check=_FRACTION
    )
    log_every: int = _option(20, "run", "steps between rows of metrics.csv", check=_AT_LEAST_1)
    validate_every: int = _option(1500, "run", "steps between validations", check=_AT_LEAST_1)
    checkpoint_every: int = _option(
        300, "run", "steps between checkpoints", check=_AT_LEAST_1, runtime=True
    )
    seed: int = _option(
        0,
        "run",
        "random seed",
        check=_Check("0 or more, less than 2^63", lambda value: 0 <= value < 2**63),
    )
    workers: int = _option(
        1, "run", "data-loading worker processes", check=_NOT_NEGATIVE, runtime=True
    )
    device: str = _option("auto", "run", "auto, cpu, cuda, cuda:1, ...", runtime=True)
    ops: str = _option(
        "fused",
        "run",
        "fused: this library; plain: the same operations in PyTorch, to compare speed",
        choices=("fused", "plain"),
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _typed(option.name, HINTS[option.name], getattr(self, option.name))
            object.__setattr__(self, option.name, value)
            check = option.metadata["check"]
            if value is not None and check is not None:
                self._expect(option.name, bool(check.holds(value)), check.expected)
        self._check_together()

    def _check_together(self) -> None:
        """The rules that involve several options."""
        stages = [2 ** (i + 1) for i in range(len(self.widths))]
        is_tail = list(self.strides) == stages[-len(self.strides) :] != []
        self._expect("strides", is_tail, f"the last of {stages} (one stage per width)")
        self._expect(
            "blocks", len(self.blocks) == len(stages), f"{len(stages)} numbers, one per width"
        )
        levels, coarsest = len(self.strides), self.strides[-1]
        self._expect(
            "diameters",
            len(self.diameters) % levels == 0,
            f"the same number for each of {levels} levels",
        )
        for name in ("patch_size", "roi_size"):
            fits = all(side % coarsest == 0 for side in getattr(self, name))
            self._expect(name, fits, f"multiples of the largest stride {coarsest}")
        if self.norm == "group":
            fits = all(w <= p for w, p in zip(self.roi_size, self.patch_size, strict=True))
            self._expect("roi_size", fits, "at most patch_size with the norm group")
        largest = min(self.roi_size) - 1
        self._expect("overlap", self.overlap <= largest, f"0 to {largest}, as roi_size is given")
        for name in ("validation_subsets", "test_subsets"):
            apart = not set(getattr(self, name)) & set(self.train_subsets)
            self._expect(name, apart, "none of train_subsets")
        self._expect(
            "supervised_mixup",
            not self.supervised_mixup or self.image_mixup or self.object_mixup,
            "image_mixup or object_mixup with it",
        )
        self._expect(
            "follow_after",
            self.follow_after is None or self.teacher == "fixed",
            "none where teacher is not fixed",
        )
        for name in ("patch_size", "spacing") if self.rotations else ():
            is_cube = len(set(getattr(self, name))) == 1
            self._expect(name, is_cube, "three equal numbers with rotations")
        most = 48 if self.rotations else 8
        self._expect("views", self.views <= most, f"1 to {most}")
        if self.method == "focalmix":
            self._expect(
                "burn_in",
                self.burn_in_steps > 0 or self.teacher != "fixed",
                "more than 0, so that a fixed teacher has learned something",
            )
            if self.burn_in_steps >= self.steps:
                raise InputError(
                    f"burn_in: expected less than the {self.steps} steps, got {self.burn_in_steps}"
                )
            for name in ("batch_size", "unlabeled_batch_size"):
                fits = getattr(self, name) % self.groups == 0
                self._expect(name, fits, f"a multiple of the {self.groups} groups")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            value = str(getattr(self, name))[:200]
            raise InputError(f"{name}: expected {expected}, got {value}")

    @property
    def burn_in_steps(self) -> int:
        """The number of supervised steps that ``burn_in`` stands for."""
        if self.burn_in >= 1:
            return int(self.burn_in)
        return min(round(self.burn_in * self.steps), self.steps - 1)

    @property
    def result(self) -> dict[str, Any]:
        """The options that affect the result of a run, the burn-in in steps."""
        values = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if not option.metadata["runtime"]
        }
        return values | {"burn_in": self.burn_in_steps}


def _typed(name: str, hint: Any, value: Any) -> Any:
    """Convert a value to the type of its field: int from any integer, float from any real number,
    tuple from any sequence.

    Raises:
        InputError: the value is of another type, or an integer of more than 64 bits.
    """
    if typing.get_origin(hint) is types.UnionType:
        hint = typing.get_args(hint)[0]  # of: int | None
        return None if value is None else _typed(name, hint, value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_typed(name, typing.get_args(hint)[0], part) for part in value)
        raise InputError(f"{name}: expected a list, got {reprlib.repr(value)}")
    accepted = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, accepted):
        raise InputError(f"{name}: expected type {hint.__name__}, got {reprlib.repr(value)}")
    if isinstance(value, numbers.Integral) and not -(2**63) <= int(value) < 2**63:
        raise InputError(f"{name}: expected a number of at most 64 bits, got {reprlib.repr(value)}")
    return hint(value)


HINTS = typing.get_type_hints(Config)
"""The type of every field of Config."""

PRESETS = {
    "demo": Config(),
    "luna16": Config(
        spacing=(1.0, 1.0, 1.0),
        train_subsets=(0, 1, 2, 3, 4, 5, 6, 7),
        validation_subsets=(8,),
        test_subsets=(9,),
        patch_size=(160, 160, 160),
        batch_size=8,
        positive_fraction=0.5,
        strides=(4, 8, 16),
        diameters=(5.0, 10.0, 20.0),
        widths=(24, 48, 96, 128),
        blocks=(1, 2, 2, 2),
        channels=64,
        norm="group",
        steps=50_000,
        learning_rate=1e-3,
        warmup=1000,
        ema_decay=0.999,
        unlabeled=400,
        unlabeled_batch_size=8,
        burn_in=0.5,
        rampup_steps=2000,
        roi_size=(160, 160, 160),
        overlap=32,
        log_every=50,
        validate_every=1000,
        checkpoint_every=1000,
        workers=8,
    ),
}
"""demo: minutes on two CPU cores with ``fmkernels phantom``; luna16: LUNA16 on GPUs."""


def load_config(run: str | Path) -> Config | None:
    """Read the configuration of the run in a folder; None if there is none.

    Raises:
        InputError: ``config.json`` is not a configuration.
    """
    path = Path(run) / CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {first_line(error)}") from None
    return config_from_dict(values, path)


def config_from_dict(values: Mapping[str, Any], path: Path) -> Config:
    """Build the configuration from the contents of a file, which error messages name.

    Options that the file lacks have their default, except for ``norm``.

    Raises:
        InputError: the values are no configuration, or an option is not one of this version.
    """
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: expected the fields of a configuration, got {type(values).__name__}"
        )
    if unknown := sorted(set(values) - set(HINTS)):
        raise InputError(f"{path}: expected options of this version, got {unknown[0]}")
    if "norm" not in values:  # runs before this option had group norms under other names
        raise InputError(f"{path}: norm: expected batch or group, found none")
    try:
        return Config(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
