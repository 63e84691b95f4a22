"""Train the detector: the loss of a step, one straight loop, and the report on the test scans at its end.

Runs on the CPU, on one GPU, and on several under ``torchrun``. Stopped at any step and resumed, a run on the CPU ends
with the same weights and the same metrics, bit for bit, as one that was never stopped.
"""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fmkernels.focalmix.config import CONFIG, Config, load_config
from fmkernels.focalmix.data.luna16 import LUNA16
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
    place,
    process_group,
    sum_of_ranks,
)
from fmkernels.focalmix.errors import InputError, first_line
from fmkernels.focalmix.evaluation import figures, froc
from fmkernels.focalmix.files import atomic_write, lock_folder
from fmkernels.focalmix.model.inference import Detections, search
from fmkernels.focalmix.training.checkpoint import BURN_IN, CHECKPOINT, State, autocast
from fmkernels.focalmix.training.metrics import METRICS, Interrupt, Metrics, Stopwatch
from fmkernels.focalmix.training.step import draw, focalmix_loss, supervised_loss

CANDIDATES, EVALUATION, BAD_BATCH = "candidates.csv", "evaluation.json", "bad_batch.pt"
PLACES = 5
"""FocalMix: the most places of an unlabelled scan that patches are placed on."""


class Scans(NamedTuple):
    """Series ids by their part in a run."""

    train: list[str]
    unlabeled: list[str]
    validation: list[str]
    test: list[str]


def train(
    config: Config,
    root: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    profile: bool = False,
) -> froc.Froc | None:
    """Train a detector and report on the test scans.

    Writes into ``out``: ``config.json``, ``checkpoint.pt`` (after the burn-in also ``burn_in.pt``), ``metrics.csv``,
    TensorBoard events, ``timing.json``, ``training.png``; where there are test subsets also ``candidates.csv``,
    ``evaluation.json``, ``froc.png`` and ``sheet.png``.

    Args:
        config: see :class:`Config`.
        root: a folder in LUNA16's layout.
        out: the run's folder.
        resume: go on from the checkpoint in ``out`` where there is one.
        profile: wait for the GPU after every stage of a step, so that ``timing.json`` tells the stages apart there too.

    Returns:
        The evaluation on the test scans; None without test subsets.

    Raises:
        InputError: bad data; a broken checkpoint; ``out`` holds another configuration, or any run without ``resume``;
            another process is at work in ``out``.
        FloatingPointError: the loss or its gradient is no longer finite; the last good checkpoint stays, and the batch
            of the first such step is in ``bad_batch.pt``.
        ChildProcessError: a process that reads patches died.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    out, device = Path(out), choose_device(config.device)
    with process_group(device), lock_folder(out) if place()[0] == 0 else contextlib.nullcontext():
        _claim(out, config, resume)
        data, scans = _open_data(config, root)
        state = State(config, device)
        if (out / CHECKPOINT).exists():
            state.load(out / CHECKPOINT, scans.train)
        stopwatch = Stopwatch(device, profile)
        try:
            with Interrupt() as interrupt:
                _fit(config, state, data, scans, out, interrupt, stopwatch)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ChildProcessError(
                f"{out}: {first_line(error)} --resume continues the run"
            ) from error
        return _report(config, state, data, scans, out, stopwatch)


def _fit(
    config: Config,
    state: State,
    data: LUNA16,
    scans: Scans,
    out: Path,
    interrupt: Interrupt,
    stopwatch: Stopwatch,
) -> None:
    """The training loop."""
    (rank, world), device = place(), stopwatch.device
    model = DistributedDataParallel(state.model) if world > 1 else state.model
    forward = state.model.register_forward_hook(lambda *_: stopwatch.lap("forward"))
    metrics = Metrics(out, state.step)
    batches = _batches(config, data, scans, state, stopwatch)
    health: list[torch.Tensor] = []  # of each step since the last check: loss, norm of the gradient
    bar = tqdm(batches, "training", config.steps, initial=state.step, unit="step", disable=rank > 0)
    began = time.monotonic() - state.seconds
    with contextlib.closing(metrics), contextlib.closing(batches), contextlib.closing(bar):
        stopwatch.start()
        for labeled, unlabeled in bar:
            labeled = _to_device(labeled, device)
            unlabeled = (
                None if unlabeled is None else unlabeled["image"].to(device, non_blocking=True)
            )
            stopwatch.lap("data")

            with autocast(config, device):
                if unlabeled is None:
                    losses = supervised_loss(model, labeled, config)
                else:
                    teacher = state.average.module if config.teacher == "ema" else state.model
                    drawn = draw(config, state.step, rank, world).to(device)
                    losses = focalmix_loss(model, teacher, labeled, unlabeled, config, drawn)
            loss = losses.classification + config.box_weight * losses.box
            stopwatch.lap("loss")

            state.scaler.scale(
                loss * world
            ).backward()  # DistributedDataParallel takes the mean over the processes
            stopwatch.lap("backward")

            state.scaler.unscale_(state.optimizer)
            norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
            # a scaler itself leaves out the steps of which the gradient is not finite
            health.append(
                torch.stack(
                    [loss.detach(), torch.zeros_like(norm) if state.scaler.is_enabled() else norm]
                )
            )
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad()
            rate = float(state.scheduler.get_last_lr()[0])
            state.scheduler.step()
            state.average.update_parameters(state.model)
            state.sums += torch.stack(losses).detach()
            state.summed += 1
            state.step += 1
            stopwatch.lap("optimizer")

            last = state.step == config.steps
            validate = bool(scans.validation) and (last or state.step % config.validate_every == 0)
            log = last or validate or state.step % config.log_every == 0
            stop = (
                interrupt.requested
                if world == 1
                else log and any_process(interrupt.requested, device)
            )
            save = last or stop or state.step % config.checkpoint_every == 0
            if log or save or state.step == config.burn_in:
                _check_finite(health, config, state, data, scans, out)
                health.clear()
                state.seconds = time.monotonic() - began
            if log:
                row = _means(state, config) | {"lr": rate, "seconds": round(state.seconds, 1)}
                if validate:
                    found = _search_all(config, state.average.module, data, scans.validation)
                    row["val_cpm"] = froc.evaluate(
                        _candidates(found),
                        *data.findings(scans.validation),
                        scans.validation,
                        bootstraps=0,
                    ).cpm
                bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}")
                metrics.add(state.step, row)
                state.sums.zero_()
                state.summed = 0
            if state.step == config.burn_in and rank == 0:
                state.save(out / BURN_IN, config, scans.train)
            if save and rank == 0:
                state.save(out / CHECKPOINT, config, scans.train)
            if stop and not last:
                raise KeyboardInterrupt(
                    f"stopped after step {state.step} of {config.steps}; --resume continues it"
                )
            stopwatch.start()
    forward.remove()


def _batches(
    config: Config, data: LUNA16, scans: Scans, state: State, stopwatch: Stopwatch
) -> Generator[tuple[dict[str, Any], dict[str, Any] | None], None, None]:
    """Labelled and unlabelled patches of every step from the state's on; of the latter None until they come in."""
    (rank, world), start = place(), state.step

    def loader(patches: PatchDataset, first: int) -> Iterator[dict[str, Any]]:
        share = {
            "batch_size": len(patches) // config.steps // world,
            "rank": rank,
            "world_size": world,
        }
        return iter(patch_loader(patches, start=first, workers=config.workers, **share))

    labeled = loader(_labeled(config, data, scans), start)
    if config.method == "supervised":
        yield from zip(labeled, itertools.repeat(None))
        return
    yield from zip(
        itertools.islice(labeled, max(0, config.burn_in - start)), itertools.repeat(None)
    )
    first = max(start, config.burn_in)
    if config.unlabeled_positive and first == config.burn_in:
        state.found = _rows(
            _search_all(config, state.average.module, data, scans.unlabeled), scans.unlabeled
        )
        stopwatch.lap("search")
    stopwatch.forget()
    yield from zip(
        labeled, loader(_unlabeled(config, data, scans, state.found), first), strict=True
    )


def _labeled(config: Config, data: LUNA16, scans: Scans) -> LabeledPatches:
    """The labelled patches of all steps."""
    return LabeledPatches(
        data,
        scans.train,
        patch_size=config.patch_size,
        positive_fraction=config.positive,
        length=config.steps * config.batch_size,
        seed=config.seed,
    )


def _unlabeled(config: Config, data: LUNA16, scans: Scans, found: torch.Tensor) -> UnlabeledPatches:
    """The unlabelled patches of all steps, around what was found."""
    rows = found.numpy()
    return UnlabeledPatches(
        data,
        scans.unlabeled,
        {uid: rows[rows[:, 0] == i, 1:] for i, uid in enumerate(scans.unlabeled)},
        patch_size=config.patch_size,
        positive_fraction=config.unlabeled_positive,
        length=config.steps * config.unlabeled_batch_size,
        seed=config.seed + 2**62,
    )


def _rows(found: Mapping[str, Detections], series: Sequence[str]) -> torch.Tensor:
    """float32 [n, 8]: number of the series, box in voxels, weight p^4; the most probable of each, p = probability."""
    rows = [
        np.column_stack(
            [np.full(len(found[uid].boxes), i), found[uid].boxes, found[uid].probabilities ** 4]
        )[:PLACES]
        for i, uid in enumerate(series)
    ]
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))


def _report(
    config: Config, state: State, data: LUNA16, scans: Scans, out: Path, stopwatch: Stopwatch
) -> froc.Froc | None:
    """Pictures and figures of a finished run."""
    first = place()[0] == 0
    if first:
        figures.draw_training(out / "training.png", out / METRICS)
        if summary := stopwatch.summary():
            _write_json(out / "timing.json", summary)
    if not scans.test:
        return None
    found = _search_all(config, state.average.module, data, scans.test)
    evaluation = froc.evaluate(_candidates(found), *data.findings(scans.test), scans.test)
    if first:
        write_candidates(out / CANDIDATES, _candidates(found))
        figures.draw_froc(out / "froc.png", {"test scans": evaluation})
        figures.draw_examples(out / "sheet.png", _sheet(data, scans.test, found, evaluation))
        _write_json(out / EVALUATION, evaluation.to_dict())  # the last: what has it is finished
    return evaluation


def _search_all(
    config: Config, model: nn.Module, data: LUNA16, series: Sequence[str]
) -> dict[str, Detections]:
    """Detections of all scans, in every process; each searches its share."""
    rank, world = place()
    own = series[rank::world]
    bar = tqdm(own, "detecting", unit="scan", leave=False, disable=rank > 0)
    found = {uid: search(config, model, data.volume(uid)) for uid in bar}
    if world > 1:
        shares: list[dict[str, Detections]] = [{}] * world
        dist.all_gather_object(shares, found)
        found = {uid: detections for share in shares for uid, detections in share.items()}
    return found


def _candidates(found: Mapping[str, Detections]) -> dict[str, np.ndarray]:
    return {uid: detections.candidates for uid, detections in found.items()}


def _sheet(
    data: LUNA16,
    series: Sequence[str],
    found: Mapping[str, Detections],
    evaluation: froc.Froc,
    *,
    columns: int = 4,
) -> list[figures.Panel]:
    """Slices through nodules of all sizes (two rows) and through the most probable false positives (one row)."""
    threshold = (
        np.interp(1.0, evaluation.fps_per_scan, evaluation.thresholds)
        if len(evaluation.thresholds)
        else 1.0
    )

    def panel(uid: str, z: float, title: str) -> figures.Panel:
        detections = found[uid]
        shown = detections.probabilities >= threshold
        return figures.slice_panel(
            data.volume(uid),
            z,
            data.nodules(uid),
            detections.boxes[shown],
            detections.candidates[shown],
            title,
        )

    nodules = sorted(
        (float(diameter), uid, float(box[0] + box[3]) / 2)
        for uid in series
        for diameter, box in zip(
            data.nodules(uid)[:, 3], data.volume(uid).boxes(data.nodules(uid)), strict=True
        )
    )
    chosen = np.unique(np.linspace(0, len(nodules) - 1, 2 * columns).round().astype(int))
    panels = [
        panel(uid, z, f"nodule of {diameter:.0f} mm")
        for diameter, uid, z in (nodules[i] for i in chosen)
    ]
    wrong = sorted(
        (
            (float(probability), uid, float(box[0] + box[3]) / 2)
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
        panel(uid, z, f"false positive, {probability:.2f}")
        for probability, uid, z in wrong[:columns]
    ]


def _claim(out: Path, config: Config, resume: bool) -> None:
    """Make the run's folder, or see that it holds this very run."""
    world = place()[1]
    for name in (
        ("batch_size", "unlabeled_batch_size", "groups")
        if config.method == "focalmix"
        else ("batch_size",)
    ):
        if (value := getattr(config, name)) % world:
            raise InputError(f"{name}: expected a multiple of the {world} processes, got {value}")
    out.mkdir(parents=True, exist_ok=True)
    begun = (out / CHECKPOINT).exists()
    stored = load_config(out) if begun else None
    for name, was in stored.result.items() if stored else ():
        if was != (asked := config.result[name]):
            raise InputError(
                f"{out / CONFIG}: {name}: expected {was} as in the run it holds, got {asked}"
            )
    if resume and not begun and place()[0] == 0:
        tqdm.write(f"{out}: nothing to resume, a new run begins", file=sys.stderr)
    if begun and not resume:
        raise InputError(f"{out}: expected a new folder, or --resume to continue the run it holds")
    if not stored and place()[0] == 0:
        _write_json(out / CONFIG, asdict(config))


def _open_data(config: Config, root: str | Path) -> tuple[LUNA16, Scans]:
    subsets = [*config.train_subsets, *config.validation_subsets, *config.test_subsets]
    data = LUNA16(root, spacing=config.spacing, subsets=subsets, cache=config.cache)
    scans = draw_scans(config, data)
    if place()[0] == 0:
        data.prepare()
    if dist.is_initialized():
        dist.barrier()
    return data, scans


def draw_scans(config: Config, data: LUNA16) -> Scans:
    """The scans of a run by their part in it; InputError where there are too few, or none of a part has a nodule."""
    wanted = {
        "train": config.train_subsets,
        "validation": config.validation_subsets,
        "test": config.test_subsets,
    }
    parts = {
        part: [uid for uid in data.series if data.subset(uid) in subsets]
        for part, subsets in wanted.items()
    }
    if config.labeled is not None:
        if config.labeled > len(parts["train"]):
            raise InputError(
                f"labeled: expected at most {len(parts['train'])} training scans, got {config.labeled}"
            )
        order = np.random.default_rng(config.seed).permutation(len(parts["train"]))
        last = None if config.unlabeled is None else config.labeled + config.unlabeled
        drawn = {"train": order[: config.labeled], "unlabeled": order[config.labeled : last]}
        parts |= {
            part: [parts["train"][i] for i in sorted(chosen)] for part, chosen in drawn.items()
        }
        if (rest := len(parts["unlabeled"])) < (config.unlabeled or 0):
            raise InputError(
                f"unlabeled: expected at most the {rest} other training scans, got {config.unlabeled}"
            )
    if config.method == "focalmix" and not parts.get("unlabeled"):
        raise InputError(
            f"labeled: expected fewer than the {len(parts['train'])} training scans, got {config.labeled}"
        )
    for part, series in ((part, parts[part]) for part in wanted):
        if series and not any(len(data.nodules(uid)) for uid in series):
            by_seed = part == "train" and config.labeled is not None
            where = f"the scans that seed {config.seed} draws" if by_seed else wanted[part]
            raise InputError(
                f"{part}_subsets: expected at least one nodule in {data.root}, found none in {where}"
            )
    return Scans(**{"unlabeled": [], **parts})


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = {"image": batch["image"].to(device, non_blocking=True)}
    for name in ("boxes", "ignore"):
        moved[name] = [boxes.to(device, non_blocking=True) for boxes in batch[name]]
    return moved


def _means(state: State, config: Config) -> dict[str, float]:
    """Mean losses of the joint batch since the last row."""
    classification, box, positives = (sum_of_ranks(state.sums) / max(state.summed, 1)).tolist()
    loss = classification + config.box_weight * box
    return {"loss": loss, "loss_cls": classification, "loss_box": box, "positives": positives}


def _check_finite(
    health: Sequence[torch.Tensor],
    config: Config,
    state: State,
    data: LUNA16,
    scans: Scans,
    out: Path,
) -> None:
    """Stop where a loss or a gradient was not finite, and keep the joint batch of the first such step."""
    first = state.step - len(health)
    if (
        state.scaler.is_enabled() and state.scaler.get_scale() < 1
    ):  # it has left out all of the last steps
        health[-1][1] = math.inf
    for step, (loss, norm) in enumerate(
        sum_of_ranks(torch.stack(list(health))).tolist(), start=first
    ):
        if math.isfinite(loss) and math.isfinite(norm):
            continue
        if place()[0] == 0:
            patches: dict[str, tuple[PatchDataset, int]] = {
                "labeled": (_labeled(config, data, scans), config.batch_size)
            }
            if config.method == "focalmix" and step >= config.burn_in:
                patches["unlabeled"] = (
                    _unlabeled(config, data, scans, state.found),
                    config.unlabeled_batch_size,
                )
            batch = {
                name: collate([dataset[i] for i in range(step * size, (step + 1) * size)])
                for name, (dataset, size) in patches.items()
            }
            with atomic_write(out / BAD_BATCH) as temporary:
                torch.save({"step": step + 1, **batch}, temporary)
        what = (
            f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        )
        kept = "holds an earlier step" if (out / CHECKPOINT).exists() else "is not yet written"
        raise FloatingPointError(
            f"step {step + 1}: {what}; {out / BAD_BATCH} holds its batch, {out / CHECKPOINT} {kept}; "
            "try a lower learning_rate or clip in a new folder"
        )


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
