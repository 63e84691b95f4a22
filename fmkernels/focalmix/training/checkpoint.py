"""The state of training, and the checkpoint files that hold it."""

import contextlib
import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmkernels.focalmix.config import Config, config_from_dict
from fmkernels.focalmix.errors import InputError, first_line
from fmkernels.focalmix.files import atomic_write
from fmkernels.focalmix.model.detector import amp_dtype, build_model, channels_last
from fmkernels.focalmix.training.seeds import derive_seed

CHECKPOINT, BURN_IN, PSEUDO_BOXES = "checkpoint.pt", "burn_in.pt", "pseudo_boxes.pt"

LOSSES = 3
"""Number of scalars that are logged: classification loss, box loss, positive anchors."""


class State:
    """Everything that changes from step to step."""

    _PARTS = ("model", "ema", "optimizer", "scheduler", "scaler")

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(device)
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, config)
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=amp_dtype(config, device) == torch.float16
        )
        self.step, self.last_step = 0, config.steps
        self.loss_sums = torch.zeros(LOSSES, dtype=torch.float32, device=device)
        """Sums of the losses since the last row of the metrics."""
        self.loss_steps = 0
        """Number of steps in the sums."""
        self.seconds = 0.0
        """Training time so far, over all sessions."""

    def start_anew(self, config: Config) -> None:
        """Draw fresh weights, and forget average and optimizer; step and schedule go on."""
        torch.manual_seed(derive_seed(config.seed, self.step))
        self.model.load_state_dict(build_model(config).state_dict())
        self.ema.n_averaged.zero_()  # the next update copies the weights
        self.optimizer.state.clear()

    def save(self, path: Path, config: Config, series: Sequence[str]) -> None:
        checkpoint = {
            "config": asdict(config),
            "series": list(series),
            "step": self.step,
            "loss_sums": self.loss_sums,
            "loss_steps": self.loss_steps,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            **{name: getattr(self, name).state_dict() for name in self._PARTS},
        }
        save_tensors(checkpoint, path)

    def load(self, path: Path, series: Sequence[str]) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: the file is damaged, or was trained on other scans.
        """
        with _reading(path) as checkpoint:
            _check_series(path, checkpoint["series"], series, "training scans of the run")
            step = int(checkpoint["step"])
            if not 0 <= step <= self.last_step:
                raise ValueError(f"step {step} of {self.last_step}")
            for name in self._PARTS:
                getattr(self, name).load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
            self.loss_sums.copy_(checkpoint["loss_sums"])
            self.loss_steps, self.step = int(checkpoint["loss_steps"]), step
            self.seconds = float(checkpoint["seconds"])


def save_pseudo_boxes(path: Path, boxes: torch.Tensor, series: Sequence[str]) -> None:
    """Keep what the burn-in model has detected in the unlabeled scans.

    Args:
        path: the file.
        boxes: float32 ``[n, 8]``: index of the series, box in voxels of the scan, sampling weight.
        series: the unlabeled scans.
    """
    save_tensors({"series": list(series), "boxes": boxes}, path)


def load_pseudo_boxes(path: Path, series: Sequence[str]) -> torch.Tensor:
    """Read the boxes of :func:`save_pseudo_boxes`.

    Raises:
        InputError: the file is missing or damaged, or of other scans.
    """
    with _reading(path) as found:
        _check_series(path, found["series"], series, "unlabeled scans of the run")
        boxes = found["boxes"]
        if boxes.dtype != torch.float32 or boxes.shape[1:] != (8,) or not boxes.isfinite().all():
            raise ValueError(f"boxes of {boxes.dtype} {tuple(boxes.shape)}")
        return boxes


def _check_series(path: Path, stored: Any, series: Sequence[str], name: str) -> None:
    if stored != list(series):
        raise InputError(
            f"{path}: series: expected the {len(stored)} {name}, got {len(series)}, not the same"
        )


def load_run(
    run: str | Path, device: torch.device | str = "cpu", name: str = CHECKPOINT
) -> tuple[Config, nn.Module]:
    """Read the configuration of a run, and its averaged weights onto the device.

    Args:
        run: the folder of the run.
        device: where the weights go.
        name: the checkpoint: its last one, or `BURN_IN`.

    Raises:
        InputError: there is no run, or its checkpoint is damaged.
    """
    path = Path(run) / name
    if not path.parent.is_dir():
        raise InputError(f"{run}: expected the folder of a run, found no such folder")
    with _reading(path) as checkpoint:
        config = config_from_dict(checkpoint["config"], path)
        if sum(config.blocks) > len(checkpoint["ema"]):  # would take long to build
            raise ValueError(f"{len(checkpoint['ema'])} tensors for {config.blocks} blocks")
        ema = AveragedModel(build_model(config, "meta"))
        ema.load_state_dict(checkpoint["ema"], assign=True)
    return config, channels_last(ema.module.to(device, torch.float32)).eval()


def learning_rate_factor(step: int, config: Config) -> float:
    """The learning rate of a step relative to the peak: linear warm-up times the schedule."""
    first, last = 0, config.steps
    if config.schedule == "restart":
        turn = min(config.burn_in_steps, config.steps)
        first, last = (0, turn) if step < turn or turn == config.steps else (turn, config.steps)
    warmup = min(1.0, (step - first + 1) / (config.warmup + 1))
    progress = (step - first) / (last - first)
    if config.schedule in ("cosine", "restart"):
        return warmup * 0.5 * (1 + math.cos(math.pi * progress))
    return warmup * (1.0 if progress < 0.6 else 0.1 if progress < 0.85 else 0.01)


def save_tensors(values: dict[str, Any], path: Path) -> None:
    """``torch.save`` that replaces the file atomically."""
    buffer = io.BytesIO()  # torch.save to a file hides a full disk behind a RuntimeError
    torch.save(values, buffer)
    with atomic_write(path) as temporary:
        # not getbuffer(): a view of it in an error's frames crashes Python 3.12's collector
        temporary.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """The contents of a checkpoint; whatever is wrong with it becomes an InputError."""
    if not path.is_file():
        raise InputError(f"{path}: expected the checkpoint of a run, found no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not verify the checksums
                raise ValueError(f"a wrong checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are not checkpoints
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"{type(checkpoint).__name__} instead of dict")
        yield checkpoint
    except InputError:
        raise
    except (
        RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError,
        AttributeError, OverflowError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: expected a whole checkpoint of this version, got {first_line(error)}"
        ) from error
