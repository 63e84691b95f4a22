"""Training: supervised burn-in, detection in the unlabeled scans, FocalMix steps, evaluation.

Runs on the CPU, on one GPU, and on several GPUs under ``torchrun``. A run on the CPU that is
stopped at any step and resumed ends with the same weights and metrics, bit for bit.
"""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fmkernels.focalmix.config import CONFIG, Config, load_config
from fmkernels.focalmix.data.dataset import DataSet
from fmkernels.focalmix.data.patches import (
    LabeledPatches,
    PatchDataset,
    UnlabeledPatches,
    collate,
    patch_loader,
)
from fmkernels.focalmix.data.tables import write_candidates
from fmkernels.focalmix.distributed import (
    any_process,
    choose_device,
    keep_freed_memory,
    process_group,
    rank_and_world_size,
    sum_of_ranks,
)
from fmkernels.focalmix.errors import InputError, first_line
from fmkernels.focalmix.evaluation import figures, froc
from fmkernels.focalmix.files import lock_folder, write_text
from fmkernels.focalmix.model.detector import autocast
from fmkernels.focalmix.model.inference import Detections, detect
from fmkernels.focalmix.roles import (
    DATA,
    Scans,
    check_data,
    choose_scans,
    digests,
    keep_data,
    open_scans,
)
from fmkernels.focalmix.training.augment import augmented
from fmkernels.focalmix.training.checkpoint import (
    BURN_IN,
    CHECKPOINT,
    PSEUDO_BOXES,
    State,
    load_pseudo_boxes,
    load_run,
    save_pseudo_boxes,
    save_tensors,
)
from fmkernels.focalmix.training.metrics import METRICS, Interrupt, Metrics, Stopwatch
from fmkernels.focalmix.training.step import Losses, focalmix_loss, sample_draws, supervised_loss

CANDIDATES, EVALUATION, BAD_BATCH = "candidates.csv", "evaluation.json", "bad_batch.pt"
TIMING = "timing.json"
MAX_PSEUDO_BOXES = 5
"""Maximum number of pseudo-boxes of an unlabeled scan."""
PSEUDO_BOX_POWER = 4
"""Patches are placed around a pseudo-box with this power of its probability."""


@dataclass(frozen=True)
class _Run:
    config: Config
    data: DataSet
    scans: Scans
    out: Path
    state: State
    stopwatch: Stopwatch


def train(
    config: Config,
    root: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    profile: bool = False,
) -> froc.Froc | None:
    """Train a detector and evaluate it on the test scans.

    Writes to ``out``: ``config.json``, ``data.json`` (digests of the data), ``checkpoint.pt``,
    ``burn_in.pt`` (the checkpoint after the burn-in) and ``pseudo_boxes.pt`` (what it has detected
    in the unlabeled scans), ``metrics.csv``, TensorBoard events, ``timing.json``, ``training.png``.
    With test subsets also ``candidates.csv``, ``evaluation.json``, ``froc.png`` and ``sheet.png``.

    Args:
        config: see :class:`Config`.
        root: the folder of a data set; see `own.open_data`.
        out: the folder of the run.
        resume: continue from the checkpoint in ``out`` if there is one.
        profile: synchronize after each stage of a step, so that ``timing.json`` has their times on
            a GPU too.

    Returns:
        The evaluation on the test scans; None without test subsets.

    Raises:
        InputError: bad data; a damaged checkpoint; ``out`` holds a run with another configuration
            or other data, or any run without ``resume``; another process is using ``out``.
        FloatingPointError: the loss or its gradient is not finite; the last good checkpoint is
            kept, and ``bad_batch.pt`` holds the batch of the first such step.
        ChildProcessError: a data-loading process died.
        KeyboardInterrupt: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    out, device = Path(out), choose_device(config.device)
    keep_freed_memory(device)
    with process_group(device), _lock(out), _fastest_convolutions():
        _claim(out, config, resume)
        data, scans = _prepare(config, root)
        begun = (out / CHECKPOINT).exists()
        run = _Run(config, data, scans, out, State(config, device), Stopwatch(device, profile))
        if begun:
            run.state.load(out / CHECKPOINT, scans.train)
        found = check_data(out, data, scans) if begun else digests(data, scans)
        if rank_and_world_size()[0] == 0:
            keep_data(out, found)
            counts = zip(scans._fields, scans, strict=True)
            roles = ", ".join(f"{role} {len(series)}" for role, series in counts if series)
            tqdm.write(f"{data.summary()}\nin this run: {roles}", file=sys.stderr)
        try:
            with Interrupt() as interrupt, contextlib.closing(_Trainer(run, interrupt)) as trainer:
                trainer.fit()
        except RuntimeError as error:
            shared_memory = any(text in str(error) for text in ("shared memory", "Bus error"))
            if not str(error).startswith("DataLoader worker") and not shared_memory:
                raise
            problem = (
                "a data-loading worker found /dev/shm full (docker run --shm-size, or --workers 0);"
                if shared_memory
                else first_line(error)
            )
            raise ChildProcessError(f"{out}: {problem} --resume continues the run") from error
        return _report(run)


def _lock(out: Path) -> contextlib.AbstractContextManager[None]:
    return lock_folder(out) if rank_and_world_size()[0] == 0 else contextlib.nullcontext()


def _fastest_convolutions() -> contextlib.AbstractContextManager[None]:
    """cuDNN tries its algorithms once for each shape: a run has few shapes."""
    cudnn = torch.backends.cudnn
    kept = {name: getattr(cudnn, name) for name in ("enabled", "deterministic", "allow_tf32")}
    return cudnn.flags(benchmark=True, **kept)


def _compile(network: nn.Module, *, graph: bool) -> None:
    """Compile the forward pass in place, for each shape that it meets; hooks stay outside."""
    mode = "reduce-overhead" if graph else None
    network.forward = torch.compile(network.forward, mode=mode, dynamic=False)


class _Trainer:
    """The steps of a run."""

    def __init__(self, run: _Run, interrupt: Interrupt) -> None:
        self.run, self.interrupt = run, interrupt
        self.rank, self.world_size = rank_and_world_size()
        model, stopwatch = run.state.model, run.stopwatch
        if run.config.compile != "off":
            for network in (model, run.state.ema.module):
                _compile(network, graph=run.config.compile == "graph")
        if self.world_size > 1 and stopwatch.device.type == "cuda":  # PyTorch has none for the CPU
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = DistributedDataParallel(model) if self.world_size > 1 else model
        self.hook = model.register_forward_hook(lambda *_: stopwatch.lap("forward"))
        self.metrics = Metrics(run.out, run.state.step)
        self.bar = tqdm(
            desc="training",
            total=run.config.steps,
            initial=run.state.step,
            unit="step",
            disable=self.rank > 0,
        )
        self.began = time.monotonic() - run.state.seconds
        self.pseudo_boxes = torch.empty(0, 8, dtype=torch.float32, device="cpu")
        self.burn_in_model: nn.Module | None = None
        self.health: list[torch.Tensor] = []
        """Loss and gradient norm of each step since they were last checked."""

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        self.hook.remove()

    def fit(self) -> None:
        """Burn-in, detection in the unlabeled scans, FocalMix steps."""
        config, state, stopwatch = self.run.config, self.run.state, self.run.stopwatch
        labeled = self._batches(_labeled_patches(self.run), state.step)
        stopwatch.start()

        for patches in itertools.islice(labeled, max(0, config.burn_in_steps - state.step)):
            self._step(patches)
        if config.method == "focalmix":
            self.pseudo_boxes = self._find_pseudo_boxes()
            if config.teacher == "fixed":
                self.burn_in_model = self._load_burn_in()
        if config.student == "fresh" and state.step == config.burn_in_steps:
            state.start_anew(config)
        if config.method == "supervised":
            for patches in labeled:
                self._step(patches)
            return

        stopwatch.restart()
        unlabeled = self._batches(_unlabeled_patches(self.run, self.pseudo_boxes), state.step)
        for patches, unlabeled_patches in zip(labeled, unlabeled, strict=True):
            self._step(patches, unlabeled_patches)

    def _batches(self, patches: PatchDataset, first: int) -> Iterator[dict[str, Any]]:
        """The patches of this process, from a step on."""
        loader = patch_loader(
            patches,
            batch_size=len(patches) // self.run.config.steps // self.world_size,
            start=first,
            workers=self.run.config.workers,
            rank=self.rank,
            world_size=self.world_size,
        )
        return iter(loader)

    def _find_pseudo_boxes(self) -> torch.Tensor:
        """Run the burn-in model over the unlabeled scans, once: the boxes are kept in a file.

        Returns:
            float32 [n, 8]: index of the series, box in voxels, sampling weight.
        """
        config, state, series = self.run.config, self.run.state, self.run.scans.unlabeled
        if not config.unlabeled_positive_fraction:
            return self.pseudo_boxes
        path = self.run.out / PSEUDO_BOXES
        if path.exists() or state.step > config.burn_in_steps:
            return load_pseudo_boxes(path, series)
        detections = _detect_all(config, state.ema.module, self.run.data, series, "unlabeled")
        boxes = _pseudo_boxes(detections, series)
        if self.rank == 0:
            save_pseudo_boxes(path, boxes, series)
        return boxes

    def _load_burn_in(self) -> nn.Module:
        """The averaged weights at the end of the burn-in."""
        if self.world_size > 1:
            dist.barrier()  # the first process has written them
        _, model = load_run(self.run.out, self.run.stopwatch.device, BURN_IN)
        if self.run.config.compile != "off":
            _compile(model, graph=self.run.config.compile == "graph")
        return model

    def _step(self, labeled: Mapping[str, Any], unlabeled: Mapping[str, Any] | None = None) -> None:
        """One step of the optimizer, and what is due after it."""
        config, state, stopwatch = self.run.config, self.run.state, self.run.stopwatch
        device = stopwatch.device
        labeled = _to_device(labeled, device)
        images = None if unlabeled is None else unlabeled["image"].to(device, non_blocking=True)
        stopwatch.lap("data")

        with autocast(config, device):
            losses = self._losses(labeled, images)
        loss = losses.classification + config.box_weight * losses.box
        stopwatch.lap("loss")

        # DistributedDataParallel averages the gradients of the processes
        state.scaler.scale(loss * self.world_size).backward()
        stopwatch.lap("backward")

        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
        # a scaler skips steps whose gradient is not finite
        checked_norm = torch.zeros_like(norm) if state.scaler.is_enabled() else norm
        self.health.append(torch.stack([loss.detach(), checked_norm]))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        rate = float(state.scheduler.get_last_lr()[0])
        state.scheduler.step()
        state.ema.update_parameters(state.model)
        state.loss_sums += torch.stack(losses).detach()
        state.loss_steps += 1
        state.step += 1
        stopwatch.lap("optimizer")

        self._after_step(rate)
        self.bar.update()
        stopwatch.start()

    def _losses(self, labeled: Mapping[str, Any], unlabeled: torch.Tensor | None) -> Losses:
        config, step = self.run.config, self.run.state.step
        model = augmented(self.model, config, (config.seed, step, self.rank))
        if unlabeled is None and not config.supervised_mixup:
            return supervised_loss(model, labeled, config)
        device = labeled["image"].device
        only_labeled = unlabeled is None
        draws = sample_draws(config, step, self.rank, self.world_size, only_labeled=only_labeled)
        draws = draws.to(device)
        if unlabeled is None:
            return supervised_loss(model, labeled, config, draws)
        return focalmix_loss(model, self._teacher(), labeled, unlabeled, config, draws)

    def _teacher(self) -> nn.Module:
        """The weights that predict the pseudo-targets of this step."""
        config, state = self.run.config, self.run.state
        if config.teacher == "current":
            return state.model
        follows = config.follow_after is not None and (
            state.step - config.burn_in_steps >= config.follow_after
        )
        if config.teacher == "ema" or follows:
            return state.ema.module
        assert self.burn_in_model is not None
        return self.burn_in_model

    def _after_step(self, rate: float) -> None:
        """Log, validate, save and stop where it is due."""
        config, state, scans, out = self.run.config, self.run.state, self.run.scans, self.run.out
        last = state.step == config.steps
        burned_in = state.step == config.burn_in_steps
        validate = bool(scans.validation) and (last or state.step % config.validate_every == 0)
        log = last or validate or state.step % config.log_every == 0
        stop = self.interrupt.requested
        if self.world_size > 1:  # agree, but not in every step
            stop = log and any_process(stop, self.run.stopwatch.device)
        save = last or stop or burned_in or state.step % config.checkpoint_every == 0
        if log or save:
            self._check_finite()
            state.seconds = time.monotonic() - self.began
        if log:
            row = self._mean_losses() | {"lr": rate, "seconds": round(state.seconds, 1)}
            if validate:
                row["val_cpm"] = self._validate()
            self.bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}")
            self.metrics.add(state.step, row)
            state.loss_sums.zero_()
            state.loss_steps = 0
        if self.rank == 0:
            for due, name in ((burned_in, BURN_IN), (save, CHECKPOINT)):
                if due:
                    state.save(out / name, config, scans.train)
        if stop and not last:
            raise KeyboardInterrupt(
                f"stopped after step {state.step} of {config.steps}; --resume continues it"
            )

    def _mean_losses(self) -> dict[str, float]:
        """Mean losses of the joint batch since the last row of the metrics."""
        state = self.run.state
        means = sum_of_ranks(state.loss_sums) / max(state.loss_steps, 1)
        classification, box, positives = means.tolist()
        loss = classification + self.run.config.box_weight * box
        return {"loss": loss, "loss_cls": classification, "loss_box": box, "positives": positives}

    def _validate(self) -> float:
        run = self.run
        scans = run.scans.validation
        detections = _detect_all(run.config, run.state.ema.module, run.data, scans, "validation")
        return _evaluate(run.data, detections, scans, bootstraps=0).cpm

    def _check_finite(self) -> None:
        """Stop if a loss or gradient was not finite, and save the joint batch of the first one."""
        state, out = self.run.state, self.run.out
        first = state.step - len(self.health)
        if state.scaler.is_enabled() and state.scaler.get_scale() < 1:
            self.health[-1][1] = math.inf  # all of the last steps were skipped
        values = sum_of_ranks(torch.stack(self.health)).tolist()
        self.health.clear()
        for step, (loss, norm) in enumerate(values, start=first):
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            if self.rank == 0:
                save_tensors(
                    {"step": step + 1, **_joint_batch(self.run, step, self.pseudo_boxes)},
                    out / BAD_BATCH,
                )
            problem = (
                f"the norm of the gradient is {norm}"
                if math.isfinite(loss)
                else f"the loss is {loss}"
            )
            kept = "holds an earlier step" if (out / CHECKPOINT).exists() else "is not yet written"
            raise FloatingPointError(
                f"step {step + 1}: {problem}; {out / BAD_BATCH} holds its batch, "
                f"{out / CHECKPOINT} {kept}; try a lower learning_rate or max_grad_norm "
                "in a new folder"
            )


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = {"image": batch["image"].to(device, non_blocking=True)}
    for name in ("boxes", "ignore"):
        moved[name] = [boxes.to(device, non_blocking=True) for boxes in batch[name]]
    return moved


def _labeled_patches(run: _Run) -> LabeledPatches:
    """The labeled patches of all steps."""
    return LabeledPatches(
        run.data,
        run.scans.train,
        patch_size=run.config.patch_size,
        positive_fraction=run.config.positive_fraction,
        rotations=run.config.rotations,
        length=run.config.steps * run.config.batch_size,
        seed=run.config.seed,
    )


def _unlabeled_patches(run: _Run, pseudo_boxes: torch.Tensor) -> UnlabeledPatches:
    """The unlabeled patches of all steps, placed around the pseudo-boxes."""
    least = run.config.pseudo_box_probability**PSEUDO_BOX_POWER
    rows = pseudo_boxes.numpy()
    rows = rows[rows[:, 7] >= least]
    return UnlabeledPatches(
        run.data,
        run.scans.unlabeled,
        {uid: rows[rows[:, 0] == i, 1:] for i, uid in enumerate(run.scans.unlabeled)},
        patch_size=run.config.patch_size,
        positive_fraction=run.config.unlabeled_positive_fraction,
        rotations=run.config.rotations,
        length=run.config.steps * run.config.unlabeled_batch_size,
        seed=run.config.seed + 2**62,
    )


def _joint_batch(run: _Run, step: int, pseudo_boxes: torch.Tensor) -> dict[str, Any]:
    """The patches of all processes in a step."""
    patches: dict[str, tuple[PatchDataset, int]] = {
        "labeled": (_labeled_patches(run), run.config.batch_size)
    }
    if run.config.method == "focalmix" and step >= run.config.burn_in_steps:
        unlabeled = _unlabeled_patches(run, pseudo_boxes)
        patches["unlabeled"] = (unlabeled, run.config.unlabeled_batch_size)
    return {
        name: collate([dataset[i] for i in range(step * size, (step + 1) * size)])
        for name, (dataset, size) in patches.items()
    }


def _pseudo_boxes(detections: Mapping[str, Detections], series: Sequence[str]) -> torch.Tensor:
    """float32 [n, 8]: index of the series, box, sampling weight, for the best of each scan."""
    rows = [
        np.column_stack(
            [
                np.full(len(found.boxes), i),
                found.boxes,
                found.probabilities**PSEUDO_BOX_POWER,
            ]
        )[:MAX_PSEUDO_BOXES]
        for i, found in enumerate(detections[uid] for uid in series)
    ]
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))


def _detect_all(
    config: Config, model: nn.Module, data: DataSet, series: Sequence[str], role: str
) -> dict[str, Detections]:
    """Detections of all scans; the work is divided among the processes, the result is in each."""
    rank, world_size = rank_and_world_size()
    title = f"detecting in {role} scans"
    bar = tqdm(series[rank::world_size], title, unit="scan", leave=False, disable=rank > 0)
    detections = {uid: detect(config, model, data.volume(uid)) for uid in bar}
    if world_size > 1:
        parts: list[dict[str, Detections]] = [{}] * world_size
        dist.all_gather_object(parts, detections)
        detections = {uid: found for part in parts for uid, found in part.items()}
    return detections


def _candidates(detections: Mapping[str, Detections]) -> dict[str, np.ndarray]:
    return {uid: found.candidates for uid, found in detections.items()}


def _evaluate(
    data: DataSet,
    detections: Mapping[str, Detections],
    series: Sequence[str],
    bootstraps: int = 1000,
) -> froc.Froc:
    candidates, findings = _candidates(detections), data.findings(series)
    return froc.evaluate(candidates, *findings, series, bootstraps=bootstraps)


def _report(run: _Run) -> froc.Froc | None:
    """Evaluate on the test scans, and write the results and figures of a finished run."""
    data, series, out = run.data, run.scans.test, run.out
    is_first = rank_and_world_size()[0] == 0
    if is_first:
        figures.draw_training(out / "training.png", out / METRICS)
        if summary := run.stopwatch.summary():
            _write_json(out / TIMING, summary)
    if not series:
        return None
    detections = _detect_all(run.config, run.state.ema.module, data, series, "test")
    evaluation = _evaluate(data, detections, series)
    if is_first:
        write_candidates(out / CANDIDATES, _candidates(detections))
        figures.draw_froc(out / "froc.png", {"test scans": evaluation})
        figures.draw_examples(out / "sheet.png", _sheet(data, series, detections, evaluation))
        # written last: its presence marks a finished run
        _write_json(out / EVALUATION, evaluation.to_dict())
    return evaluation


def _sheet(
    data: DataSet,
    series: Sequence[str],
    found: Mapping[str, Detections],
    evaluation: froc.Froc,
    *,
    columns: int = 4,
) -> list[figures.Panel]:
    """Slices through nodules of all sizes (two rows) and through false positives (one row)."""
    threshold = (
        np.interp(1.0, evaluation.fps_per_scan, evaluation.thresholds)
        if len(evaluation.thresholds)
        else 1.0
    )

    def panel(uid: str, box: Sequence[float], title: str) -> figures.Panel:
        detections = found[uid]
        shown = detections.probabilities >= threshold
        return figures.slice_panel(
            data.volume(uid),
            np.array(box),
            data.nodules(uid),
            detections.boxes[shown],
            detections.candidates[shown],
            title,
        )

    nodules = sorted(
        (float(diameter), uid, tuple(map(float, box)))
        for uid in series
        for diameter, box in zip(
            data.nodules(uid)[:, 3], data.volume(uid).boxes(data.nodules(uid)), strict=True
        )
    )
    chosen = np.unique(np.linspace(0, len(nodules) - 1, 2 * columns).round().astype(int))
    panels = [
        panel(uid, box, f"nodule of {diameter:.0f} mm")
        for diameter, uid, box in (nodules[i] for i in chosen)
    ]
    wrong = sorted(
        (
            (float(probability), uid, tuple(map(float, box)))
            for uid in series
            for box, probability, point in zip(
                found[uid].boxes,
                found[uid].probabilities,
                found[uid].candidates[:, :3],
                strict=True,
            )
            if not froc.hits(point[None], data.nodules(uid)).any()
            and not froc.hits(point[None], data.excluded(uid)).any()
        ),
        reverse=True,
    )
    return panels + [
        panel(uid, box, f"false positive, {probability:.2f}")
        for probability, uid, box in wrong[:columns]
    ]


def _claim(out: Path, config: Config, resume: bool) -> None:
    """Make the folder of the run, or check that it holds this very run."""
    rank, world_size = rank_and_world_size()
    names = ["batch_size"]
    if config.method == "focalmix":
        names += ["unlabeled_batch_size"]
    if config.method == "focalmix" or config.supervised_mixup:
        names += ["groups"]
    for name in names:
        if (value := getattr(config, name)) % world_size:
            raise InputError(
                f"{name}: expected a multiple of the {world_size} processes, got {value}"
            )
    out.mkdir(parents=True, exist_ok=True)
    begun = (out / CHECKPOINT).exists()
    if begun and not resume:
        raise InputError(f"{out}: expected a new folder, or --resume to continue the run it holds")
    stored = check_options(out, config)
    if rank > 0:
        return
    if resume and not begun:
        tqdm.write(f"{out}: no checkpoint to resume from, starting a new run", file=sys.stderr)
    if not begun:
        for name in (PSEUDO_BOXES, DATA):  # of a run that was here before
            (out / name).unlink(missing_ok=True)
    if not stored:
        _write_json(out / CONFIG, asdict(config))


def check_options(out: Path, config: Config) -> Config | None:
    """The options of the run in a folder, None if there is none.

    Raises:
        InputError: the run has other options that affect its result.
    """
    stored = load_config(out) if (out / CHECKPOINT).exists() else None
    for name, was in stored.result.items() if stored else ():
        if was != (asked := config.result[name]):
            raise InputError(
                f"{out / CONFIG}: {name}: expected {was} as in the run it holds, got {asked}"
            )
    return stored


def _prepare(config: Config, root: str | Path) -> tuple[DataSet, Scans]:
    unlabeled = config.unlabeled_data if config.method == "focalmix" else ()
    data = open_scans(config, root, unlabeled)
    scans = choose_scans(config, data)
    if rank_and_world_size()[0] == 0:
        data.prepare([uid for role in scans for uid in role])
    if dist.is_initialized():
        dist.barrier()
    return data, scans


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
