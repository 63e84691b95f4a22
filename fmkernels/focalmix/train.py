"""Train the detector: configuration, one straight loop, checkpoints, and the report on the test scans at its end.

Runs on the CPU, on one GPU, and on several under ``torchrun``. Stopped at any step and resumed, a run on the CPU ends
with the same weights and the same metrics, bit for bit, as one that was never stopped.
"""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fmkernels.functional import soft_target_focal_loss

from . import froc, report
from .anchors import Anchors, encode_boxes, match
from .detection import Detections, detect
from .detector import Detector, apply_window
from .errors import InputError
from .files import atomic_write
from .luna16 import LUNA16, Volume
from .patches import PatchDataset, patch_loader

CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.json", "metrics.csv"
COLUMNS = ("step", "loss", "loss_cls", "loss_box", "positives", "lr", "val_cpm", "seconds")


def _option(default: Any, text: str, *, runtime: bool = False) -> Any:
    """A field of Config; ``runtime`` marks what a resumed run may change, as it has no part in the result."""
    return field(default=default, metadata={"help": text, "runtime": runtime})


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run. Lists of three are z, y, x."""

    spacing: tuple[float, ...] = _option((2.0, 2.0, 2.0), "resampled voxel size in mm")
    window: tuple[float, ...] = _option((-1200.0, 600.0), "HU mapped to 0 and 1")
    patch_size: tuple[int, ...] = _option((32, 32, 32), "voxels, multiples of the largest stride")
    positive: float = _option(0.7, "share of the patches that are placed on a nodule")
    strides: tuple[int, ...] = _option((2, 4, 8), "of the pyramid's levels, in voxels")
    diameters: tuple[float, ...] = _option((5.0, 10.0, 20.0), "of the anchors in mm, level after level, as many each")
    widths: tuple[int, ...] = _option((16, 32, 48), "channels of the backbone's stages")
    blocks: tuple[int, ...] = _option((1, 1, 1), "residual blocks of the backbone's stages")
    channels: int = _option(16, "channels of the pyramid and the head")
    batch_size: int = _option(16, "patches a step, over all processes")
    steps: int = _option(2400, "training steps")
    learning_rate: float = _option(4e-3, "at its highest")
    weight_decay: float = _option(1e-2, "of AdamW")
    warmup: int = _option(50, "steps over which the learning rate rises")
    schedule: str = _option("cosine", "of the learning rate: cosine, or step (1/10 after 60 %, 1/100 after 85 %)")
    ema_decay: float = _option(0.99, "of the averaged weights, which are those evaluated")
    clip: float = _option(1.0, "largest norm of the gradient")
    amp: str = _option("auto", "auto (bf16 or else fp16 on a GPU, off on the CPU), off, bf16 or fp16")
    alpha0: float = _option(0.25, "focal loss: weight of the background")
    alpha1: float = _option(0.75, "focal loss: weight of nodules")
    gamma: float = _option(2.0, "focal loss: exponent")
    box_weight: float = _option(1.0, "of the box loss beside the focal loss")
    train_subsets: tuple[int, ...] = _option((0, 1, 2, 3, 4, 5, 6), "subsets to train on")
    validation_subsets: tuple[int, ...] = _option((7,), "subsets to detect and evaluate on from time to time")
    test_subsets: tuple[int, ...] = _option((8, 9), "subsets to detect and evaluate on at the end")
    labeled: int | None = _option(None, "train on so many scans only, drawn by the seed")
    search_size: tuple[int, ...] = _option((32, 32, 32), "voxels of the patches in which a whole scan is searched")
    overlap: int = _option(12, "voxels that these patches share")
    nms_threshold: float = _option(0.1, "intersection over union above which the less probable box goes")
    log_every: int = _option(20, "steps between rows of the metrics")
    validate_every: int = _option(1200, "steps between validations")
    checkpoint_every: int = _option(250, "steps between checkpoints")
    seed: int = _option(0, "of weights, patches and the choice of scans")
    workers: int = _option(1, "processes that read patches", runtime=True)
    device: str = _option("auto", "auto, cpu, cuda, ...", runtime=True)

    def __post_init__(self) -> None:
        def expect(name: str, holds: bool, wanted: str) -> None:
            if not holds:
                raise InputError(f"{name}: expected {wanted}, got {getattr(self, name)}")

        for name in ("spacing", "patch_size", "search_size"):
            value = getattr(self, name)
            expect(name, len(value) == 3 and all(0 < v < math.inf for v in value), "three positive numbers (z, y, x)")
        expect("window", len(self.window) == 2 and self.window[0] < self.window[1], "two numbers, the lower first")
        stages = [2 ** (i + 1) for i in range(len(self.widths))]
        last = stages[-len(self.strides) :] if self.strides else None
        expect("strides", list(self.strides) == last, f"the last of {stages} (one stage for each of the widths)")
        coarsest = self.strides[-1]
        for name in ("patch_size", "search_size"):
            expect(name, all(side % coarsest == 0 for side in getattr(self, name)), f"multiples of {coarsest}")
        expect("blocks", len(self.blocks) == len(self.widths), f"{len(self.widths)} numbers, as many as widths")
        expect("widths", all(width > 0 and width % 4 == 0 for width in self.widths), "multiples of 4")
        expect("channels", self.channels > 0 and self.channels % 4 == 0, "a multiple of 4")
        levels = len(self.strides)
        expect(
            "diameters", self.diameters and len(self.diameters) % levels == 0, f"as many for each of {levels} levels"
        )
        expect("diameters", all(0 < d < math.inf for d in self.diameters), "positive numbers")
        expect("overlap", 0 <= self.overlap < min(self.search_size), f"0 to {min(self.search_size) - 1}")
        for name in ("batch_size", "steps", "log_every", "validate_every", "checkpoint_every"):
            expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("weight_decay", "warmup", "gamma", "box_weight", "workers", "seed"):
            expect(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("learning_rate", "clip"):
            expect(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("positive", "ema_decay", "alpha0", "alpha1", "nms_threshold"):
            expect(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        expect("schedule", self.schedule in ("cosine", "step"), "cosine or step")
        expect("amp", self.amp in ("auto", "off", "bf16", "fp16"), "auto, off, bf16 or fp16")
        expect("labeled", self.labeled is None or self.labeled >= 1, "at least 1")
        expect("train_subsets", len(self.train_subsets) > 0, "at least one")
        for name in ("validation_subsets", "test_subsets"):
            expect(name, not set(getattr(self, name)) & set(self.train_subsets), "none of train_subsets")

    @property
    def anchors(self) -> Anchors:
        return Anchors.from_mm(self.strides, self.diameters, self.spacing)


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
        steps=50_000,
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


class Losses(NamedTuple):
    """Scalars of a step whose sums over the processes are those of the joint batch."""

    classification: Tensor
    box: Tensor
    positives: Tensor


def supervised_loss(model: nn.Module, batch: Mapping[str, Any], config: Config) -> Losses:
    """Focal loss of every anchor and smooth L1 loss of the boxes of the positive ones, on the device of the batch."""
    logits, deltas = model(apply_window(batch["image"], config.window))
    anchors = config.anchors
    matches = match(anchors, config.patch_size, batch["boxes"], batch["ignore"])
    positives = matches.positive.sum().float()
    normalizer = _sum_of_ranks(positives).clamp(min=1)
    classification = soft_target_focal_loss(
        logits,
        matches.targets,
        alpha0=config.alpha0,
        alpha1=config.alpha1,
        gamma=config.gamma,
        normalizer=normalizer,
    )
    flat = torch.cat([level.movedim(2, -1).reshape(len(level), -1, 6) for level in deltas], 1)
    wanted = encode_boxes(matches.boxes, anchors.boxes(config.patch_size, flat.device)[matches.anchor])
    error = F.smooth_l1_loss(flat[matches.image, matches.anchor].float(), wanted, reduction="none", beta=0.1).sum(1)
    return Losses(classification, (error * matches.positive).sum() / normalizer, positives)


def build_model(config: Config) -> Detector:
    """The detector of a configuration, on the CPU, in the memory format that is fast on CPU and GPU."""
    model = Detector(
        config.strides,
        config.anchors.per_place,
        widths=config.widths,
        blocks=config.blocks,
        channels=config.channels,
    )
    return model.to(memory_format=torch.channels_last_3d)


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[Config, nn.Module]:
    """Configuration and averaged weights of a run, the latter on the device.

    Raises:
        InputError: there is no run, or its checkpoint is broken.
    """
    path = Path(run) / CHECKPOINT
    with _reading(path) as checkpoint:
        config = _config_of(checkpoint["config"], path)
        average = AveragedModel(build_model(config))
        average.load_state_dict(checkpoint["average"])
    return config, average.module.to(device)


def load_config(run: str | Path) -> Config | None:
    """The configuration of the run in a folder, None where there is none.

    Raises:
        InputError: ``config.json`` is no configuration.
    """
    path = Path(run) / CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {_first_line(error)}") from None
    return _config_of(values, path)


def search(config: Config, model: nn.Module, volume: Volume) -> Detections:
    """Detect in one scan with the settings of a run, on the device of the model."""
    device = next(model.parameters()).device
    with _autocast(config, device):
        return detect(
            model,
            config.anchors,
            volume,
            patch_size=config.search_size,
            overlap=config.overlap,
            window=config.window,
            nms_threshold=config.nms_threshold,
        )


def choose_device(name: str) -> torch.device:
    """``auto``: the process's GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: expected auto, cpu or cuda, got {name!r} ({_first_line(error)})") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device: expected a GPU for {name!r}, found none")
        own = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        device = torch.device("cuda", own)
    return device


class State:
    """All that changes from step to step, and its checkpoint."""

    _PARTS = ("model", "average", "optimizer", "scheduler", "scaler")

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(device)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, config)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=_amp_dtype(config, device) == torch.float16)
        self.step = 0
        self.sums = torch.zeros(len(Losses._fields), device=device)
        """Of the losses since the last row of the metrics."""
        self.summed = 0
        """The number of steps they are of."""

    def save(self, path: Path, config: Config, series: Sequence[str]) -> None:
        checkpoint = {
            "config": asdict(config),
            "series": list(series),
            "step": self.step,
            "sums": self.sums,
            "summed": self.summed,
            "rng": torch.get_rng_state(),
            **{name: getattr(self, name).state_dict() for name in self._PARTS},
        }
        buffer = io.BytesIO()  # torch.save to a file hides a full disk behind a RuntimeError
        torch.save(checkpoint, buffer)
        with atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load(self, path: Path, series: Sequence[str]) -> None:
        """Take over a checkpoint.

        Raises:
            InputError: it is broken, or of a run with other training scans.
        """
        with _reading(path) as checkpoint:
            if checkpoint["series"] != list(series):
                was, got = len(checkpoint["series"]), len(series)
                raise InputError(
                    f"{path}: series: expected the {was} training scans of the run, got {got}, not the same"
                )
            for name in self._PARTS:
                getattr(self, name).load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
            self.sums.copy_(checkpoint["sums"])
            self.summed, self.step = checkpoint["summed"], checkpoint["step"]


def learning_rate_factor(step: int, config: Config) -> float:
    """Share of ``config.learning_rate`` at a step: a linear rise over ``warmup`` steps times the schedule."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    done = step / config.steps
    if config.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * done))
    return rise * (1.0 if done < 0.6 else 0.1 if done < 0.85 else 0.01)


class Stopwatch:
    """Seconds of each stage of each step.

    On a GPU the stages run behind the host; only with ``wait`` does each lap wait for them. Without, a lap there says
    how long the host took, and only the wait for data and the sum of all mean something.
    """

    def __init__(self, device: torch.device, wait: bool) -> None:
        self.device = device
        self.wait = wait and device.type == "cuda"
        self.steps: list[Counter[str]] = []
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.steps.append(Counter())
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on a stage."""
        if self.wait:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.steps[-1][stage] += now - self.last
        self.last = now

    def summary(self) -> dict[str, Any]:
        """Medians in milliseconds, and the share of all time that the loop waited for data; empty without a step."""
        steps = [step for step in self.steps if step]
        if not steps:
            return {}
        stages = {stage: 1e3 * statistics.median(step[stage] for step in steps) for stage in steps[0]}
        totals = [step.total() for step in steps]
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "steps": len(steps),
            "stages_told_apart": self.wait or self.device.type != "cuda",
            "milliseconds": stages | {"step": 1e3 * statistics.median(totals)},
            "share_waiting_for_data": sum(step["data"] for step in steps) / sum(totals),
        }


class Metrics:
    """``metrics.csv`` and the TensorBoard events of a run, written by the first process.

    Rows after ``step``, which a stopped run left behind, are dropped.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / METRICS
        self.events = None
        if _place()[0] > 0:
            return
        rows = []
        if step and self.path.exists():
            with open(self.path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdecimal() and int(row[0]) <= step]
        with atomic_write(self.path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        self.events = SummaryWriter(out, purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self.events is None:
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow({"step": step, **values})
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


class Interrupt:
    """While active, the first Ctrl-C or SIGTERM only sets ``requested``; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.usual = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        self.__exit__()


class Scans(NamedTuple):
    """Series ids by their part in a run."""

    train: list[str]
    validation: list[str]
    test: list[str]


def train(
    config: Config, root: str | Path, out: str | Path, *, resume: bool = False, profile: bool = False
) -> froc.Froc | None:
    """Train a detector and report on the test scans.

    Writes into ``out``: ``config.json``, ``checkpoint.pt``, ``metrics.csv``, TensorBoard events, ``timing.json``,
    ``training.png``; where there are test subsets also ``candidates.csv``, ``evaluation.json``, ``froc.png`` and
    ``sheet.png``.

    Args:
        config: see :class:`Config`.
        root: a folder in LUNA16's layout.
        out: the run's folder.
        resume: go on from the checkpoint in ``out`` where there is one.
        profile: wait for the GPU after every stage of a step, so that ``timing.json`` tells the stages apart there too.

    Returns:
        The evaluation on the test scans; None without test subsets.

    Raises:
        InputError: bad data; a broken checkpoint; ``out`` holds another configuration, or any run without ``resume``.
        FloatingPointError: the loss is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    out, device = Path(out), choose_device(config.device)
    with _process_group(device):
        _claim(out, config, resume)
        data, scans = _open_data(config, root)
        state = State(config, device)
        if (out / CHECKPOINT).exists():
            state.load(out / CHECKPOINT, scans.train)
        stopwatch = Stopwatch(device, profile)
        with Interrupt() as interrupt:
            _fit(config, state, data, scans, out, interrupt, stopwatch)
        return _report(config, state, data, scans, out, stopwatch)


def _fit(
    config: Config, state: State, data: LUNA16, scans: Scans, out: Path, interrupt: Interrupt, stopwatch: Stopwatch
) -> None:
    """The training loop."""
    (rank, world), device = _place(), stopwatch.device
    patches = PatchDataset(
        data,
        scans.train,
        patch_size=config.patch_size,
        positive=config.positive,
        length=config.steps * config.batch_size,
        seed=config.seed,
    )
    loader = patch_loader(
        patches,
        batch_size=config.batch_size // world,
        start=state.step,
        workers=config.workers,
        rank=rank,
        world_size=world,
    )
    model = DistributedDataParallel(state.model) if world > 1 else state.model
    forward = state.model.register_forward_hook(lambda *_: stopwatch.lap("forward"))
    metrics = Metrics(out, state.step)
    bar = tqdm(loader, "training", config.steps, initial=state.step, unit="step", disable=rank > 0)
    began = time.monotonic()
    with contextlib.closing(metrics), contextlib.closing(bar):
        stopwatch.start()
        for batch in bar:
            batch = _to_device(batch, device)
            stopwatch.lap("data")

            with _autocast(config, device):
                losses = supervised_loss(model, batch, config)
            loss = losses.classification + config.box_weight * losses.box
            stopwatch.lap("loss")

            state.scaler.scale(loss * world).backward()  # DistributedDataParallel takes the mean over the processes
            stopwatch.lap("backward")

            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad()
            state.scheduler.step()
            state.average.update_parameters(state.model)
            state.sums += torch.stack(losses).detach()
            state.summed += 1
            state.step += 1
            stopwatch.lap("optimizer")

            last = state.step == config.steps
            validate = bool(scans.validation) and (last or state.step % config.validate_every == 0)
            log = last or validate or state.step % config.log_every == 0
            stop = interrupt.requested if world == 1 else log and _any_process(interrupt.requested, device)
            save = last or stop or state.step % config.checkpoint_every == 0
            if log or save:
                row = _finite_means(state, config, out)
            if log:
                row |= {"lr": state.scheduler.get_last_lr()[0], "seconds": round(time.monotonic() - began, 1)}
                if validate:
                    found = _search_all(config, state.average.module, data, scans.validation)
                    row["val_cpm"] = _evaluate(found, data, scans.validation, bootstraps=0).cpm
                bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}")
                metrics.add(state.step, row)
                state.sums.zero_()
                state.summed = 0
            if save and rank == 0:
                state.save(out / CHECKPOINT, config, scans.train)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {state.step} of {config.steps}; --resume continues it")
            stopwatch.start()
    forward.remove()


def _report(
    config: Config, state: State, data: LUNA16, scans: Scans, out: Path, stopwatch: Stopwatch
) -> froc.Froc | None:
    """Pictures and figures of a finished run."""
    first = _place()[0] == 0
    if first:
        report.draw_training(out / "training.png", out / METRICS)
        if summary := stopwatch.summary():
            _write_json(out / "timing.json", summary)
    if not scans.test:
        return None
    found = _search_all(config, state.average.module, data, scans.test)
    evaluation = _evaluate(found, data, scans.test)
    if first:
        froc.write_candidates(out / "candidates.csv", {uid: found[uid].candidates for uid in scans.test})
        _write_json(out / "evaluation.json", evaluation.to_dict())
        report.draw_froc(out / "froc.png", {"test scans": evaluation})
        report.draw_sheet(out / "sheet.png", _sheet(data, scans.test, found, evaluation))
    return evaluation


def _search_all(config: Config, model: nn.Module, data: LUNA16, series: Sequence[str]) -> dict[str, Detections]:
    """Detections of all scans, in every process; each searches its share."""
    rank, world = _place()
    own = series[rank::world]
    bar = tqdm(own, "detecting", unit="scan", leave=False, disable=rank > 0)
    found = {uid: search(config, model, data.volume(uid)) for uid in bar}
    if world > 1:
        shares: list[dict[str, Detections]] = [{}] * world
        dist.all_gather_object(shares, found)
        found = {uid: detections for share in shares for uid, detections in share.items()}
    return found


def _evaluate(
    found: Mapping[str, Detections], data: LUNA16, series: Sequence[str], *, bootstraps: int = 1000
) -> froc.Froc:
    candidates = {uid: detections.candidates for uid, detections in found.items()}
    nodules = {uid: data.nodules(uid) for uid in series}
    excluded = {uid: data.excluded(uid) for uid in series}
    return froc.evaluate(candidates, nodules, excluded, series, bootstraps=bootstraps)


def _sheet(
    data: LUNA16, series: Sequence[str], found: Mapping[str, Detections], evaluation: froc.Froc, *, columns: int = 4
) -> list[report.Panel]:
    """Slices through nodules of all sizes (two rows) and through the most probable false positives (one row)."""
    threshold = np.interp(1.0, evaluation.fps_per_scan, evaluation.thresholds)

    def panel(uid: str, z: float, title: str) -> report.Panel:
        volume, detections = data.volume(uid), found[uid]
        z = math.floor(z)
        true, boxes = volume.boxes(data.nodules(uid)), detections.boxes
        shown = (boxes[:, 0] <= z + 0.5) & (z + 0.5 < boxes[:, 3]) & (detections.probabilities >= threshold)
        predicted = np.column_stack([boxes[:, [1, 2, 4, 5]], detections.probabilities])[shown]
        true = true[(true[:, 0] <= z + 0.5) & (z + 0.5 < true[:, 3])][:, [1, 2, 4, 5]]
        return report.Panel(np.asarray(volume.voxels[z]), true, predicted, title)

    nodules = sorted(
        (float(diameter), uid, float(box[0] + box[3]) / 2)
        for uid in series
        for diameter, box in zip(data.nodules(uid)[:, 3], data.volume(uid).boxes(data.nodules(uid)), strict=True)
    )
    chosen = np.unique(np.linspace(0, len(nodules) - 1, 2 * columns).round().astype(int))
    panels = [panel(uid, z, f"nodule of {diameter:.0f} mm") for diameter, uid, z in (nodules[i] for i in chosen)]
    wrong = sorted(
        (
            (float(probability), uid, float(box[0] + box[3]) / 2)
            for uid in series
            for box, probability, point in zip(
                found[uid].boxes, found[uid].probabilities, found[uid].candidates[:, :3], strict=True
            )
            if not _on_finding(point, data.nodules(uid)) and not _on_finding(point, data.excluded(uid))
        ),
        reverse=True,
    )
    return panels + [panel(uid, z, f"false positive, {probability:.2f}") for probability, uid, z in wrong[:columns]]


def _on_finding(point: np.ndarray, findings: np.ndarray) -> bool:
    diameters = np.where(findings[:, 3] < 0, froc.UNKNOWN_DIAMETER, findings[:, 3])
    return bool((np.linalg.norm(findings[:, :3] - point, axis=1) < diameters / 2).any())


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that ``torchrun`` started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _place() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _sum_of_ranks(values: Tensor) -> Tensor:
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _any_process(flag: bool, device: torch.device) -> bool:
    return bool(_sum_of_ranks(torch.tensor(float(flag), device=device)))


def _claim(out: Path, config: Config, resume: bool) -> None:
    """Make the run's folder, or see that it holds this very run."""
    world = _place()[1]
    if config.batch_size % world:
        raise InputError(f"batch_size: expected a multiple of the {world} processes, got {config.batch_size}")
    out.mkdir(parents=True, exist_ok=True)
    stored = load_config(out)
    for option in fields(Config) if stored else ():
        was, asked = getattr(stored, option.name), getattr(config, option.name)
        if was != asked and not option.metadata["runtime"]:
            raise InputError(f"{out / CONFIG}: {option.name}: expected {was} as in the run it holds, got {asked}")
    if (out / CHECKPOINT).exists() and not resume:
        raise InputError(f"{out}: expected a new folder, or --resume to continue the run it holds")
    if not stored and _place()[0] == 0:
        _write_json(out / CONFIG, asdict(config))


def _open_data(config: Config, root: str | Path) -> tuple[LUNA16, Scans]:
    wanted = {
        "train": config.train_subsets,
        "validation": config.validation_subsets,
        "test": config.test_subsets,
    }
    data = LUNA16(root, spacing=config.spacing, subsets=[subset for part in wanted.values() for subset in part])
    parts = {part: [uid for uid in data.series if data.subset(uid) in subsets] for part, subsets in wanted.items()}
    for part, series in parts.items():
        if series and not any(len(data.nodules(uid)) for uid in series):
            raise InputError(f"{part}_subsets: expected at least one nodule in {root}, found none in {wanted[part]}")
    if config.labeled is not None:
        if config.labeled > len(parts["train"]):
            raise InputError(f"labeled: expected at most {len(parts['train'])} training scans, got {config.labeled}")
        drawn = np.random.default_rng(config.seed).permutation(len(parts["train"]))[: config.labeled]
        parts["train"] = [parts["train"][i] for i in sorted(drawn)]
    if _place()[0] == 0:
        data.prepare()
    if dist.is_initialized():
        dist.barrier()
    return data, Scans(**parts)


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = {"image": batch["image"].to(device, non_blocking=True)}
    for name in ("boxes", "ignore"):
        moved[name] = [boxes.to(device, non_blocking=True) for boxes in batch[name]]
    return moved


def _finite_means(state: State, config: Config, out: Path) -> dict[str, float]:
    """Mean losses of the joint batch since the last row."""
    means = Losses(*(_sum_of_ranks(state.sums) / max(state.summed, 1)).tolist())
    loss = means.classification + config.box_weight * means.box
    if not math.isfinite(loss):
        kept = "holds an earlier step" if (out / CHECKPOINT).exists() else "is not yet written"
        raise FloatingPointError(
            f"step {state.step}: the loss is {loss}; {out / CHECKPOINT} {kept}; try a lower learning_rate or clip"
        )
    return {"loss": loss, "loss_cls": means.classification, "loss_box": means.box, "positives": means.positives}


def _amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    if config.amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    dtype = _amp_dtype(config, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _config_of(values: Mapping[str, Any], path: Path) -> Config:
    names = {option.name for option in fields(Config)}
    if wrong := sorted(names ^ set(values)):
        raise InputError(f"{path}: {wrong[0]}: expected the fields of this version's configuration")
    try:
        return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: {error}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """A checkpoint; whatever is wrong with it becomes an InputError."""
    if not path.is_file():
        raise InputError(f"{path}: expected the checkpoint of a run, found no such file")
    try:
        yield torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (
        RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError
    ) as bad:  # fmt: skip
        raise InputError(f"{path}: expected a whole checkpoint of this version ({_first_line(bad)})") from None


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
