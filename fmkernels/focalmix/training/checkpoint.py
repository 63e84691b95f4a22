"""All that changes from step to step, and the checkpoint that holds it."""

import contextlib
import io
import math
import os
import pickle
import pickletools
import reprlib
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmkernels.focalmix.config import Config, config_of
from fmkernels.focalmix.errors import InputError, first_line
from fmkernels.focalmix.files import atomic_write
from fmkernels.focalmix.model.detector import Detector
from fmkernels.focalmix.training.step import Losses

CHECKPOINT, BURN_IN = "checkpoint.pt", "burn_in.pt"

_DTYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _DTYPES),
}
"""All that the pickle of a checkpoint may name: others that ``weights_only`` lets pass take memory at will."""


class State:
    """All that changes from step to step, and its checkpoint."""

    _PARTS = ("model", "average", "optimizer", "scheduler", "scaler")

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(device)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, config)
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=_amp_dtype(config, device) == torch.float16
        )
        self.step, self.last = 0, config.steps
        self.found = torch.empty(0, 8)
        """FocalMix: what the detector found in the unlabelled scans: scan, box in its voxels, weight."""
        self.sums = torch.zeros(len(Losses._fields), device=device)
        """Of the losses since the last row of the metrics."""
        self.summed = 0
        """The number of steps they are of."""
        self.seconds = 0.0
        """That the run has taken, over all its sessions."""

    def save(self, path: Path, config: Config, series: Sequence[str]) -> None:
        checkpoint = {
            "config": asdict(config),
            "series": list(series),
            "step": self.step,
            "found": self.found,
            "sums": self.sums,
            "summed": self.summed,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            **{name: getattr(self, name).state_dict() for name in self._PARTS},
        }
        buffer = io.BytesIO()  # torch.save to a file hides a full disk behind a RuntimeError
        torch.save(checkpoint, buffer)
        with atomic_write(path) as temporary:
            # not getbuffer(): a view of it in an error's frames crashes Python 3.12's collector
            temporary.write_bytes(buffer.getvalue())

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
            step, found = int(checkpoint["step"]), checkpoint["found"]
            if not 0 <= step <= self.last:
                raise ValueError(f"step {step} of {self.last}")
            if (
                found.dtype != torch.float32
                or found.shape[1:] != (8,)
                or not found.isfinite().all()
            ):
                raise ValueError(f"boxes of {found.dtype} {tuple(found.shape)} in unlabelled scans")
            for name in self._PARTS:
                getattr(self, name).load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
            self.sums.copy_(checkpoint["sums"])
            self.summed, self.step = int(checkpoint["summed"]), step
            self.seconds, self.found = float(checkpoint["seconds"]), found


def build_model(config: Config) -> Detector:
    """The detector of a configuration, on the CPU, in the memory format that is fast on CPU and GPU."""
    model = Detector(
        config.strides,
        config.anchors.per_place,
        widths=config.widths,
        blocks=config.blocks,
        channels=config.channels,
    )
    return _channels_last(model)


def _channels_last(model: nn.Module) -> Any:
    return model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[Config, nn.Module]:
    """Configuration and averaged weights of a run, the latter on the device.

    Raises:
        InputError: there is no run, or its checkpoint is broken.
    """
    path = Path(run) / CHECKPOINT
    with _reading(path) as checkpoint:
        config = config_of(checkpoint["config"], path)
        with torch.device("meta"):  # no memory but that of the file
            average = AveragedModel(build_model(config))
        average.load_state_dict(checkpoint["average"], assign=True)
    return config, _channels_last(average.module.to(device, torch.float32))


def learning_rate_factor(step: int, config: Config) -> float:
    """Share of ``config.learning_rate`` at a step: a linear rise over ``warmup`` steps times the schedule."""
    first, last = 0, config.steps
    if config.schedule == "restart":
        turn = min(config.burn_in, config.steps)
        first, last = (0, turn) if step < turn or turn == config.steps else (turn, config.steps)
    rise = min(1.0, (step - first + 1) / (config.warmup + 1))
    done = (step - first) / (last - first)
    if config.schedule in ("cosine", "restart"):
        return rise * 0.5 * (1 + math.cos(math.pi * done))
    return rise * (1.0 if done < 0.6 else 0.1 if done < 0.85 else 0.01)


def _amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    if config.amp == "auto":
        if device.type != "cuda":
            return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else None
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The precision in which a run computes on a device."""
    dtype = _amp_dtype(config, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """A checkpoint, in a small multiple of its file's size; whatever is wrong with it becomes an InputError."""
    if not path.is_file():
        raise InputError(f"{path}: expected the checkpoint of a run, found no such file")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is no checkpoint at all
            size = os.fstat(file.fileno()).st_size
            checkpoint = torch.load(_examined(file, size), map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError("no dict")
        if (taken := sum(tensor.nbytes for tensor in _tensors(checkpoint, set()))) > size:
            raise ValueError(f"{size} bytes that become tensors of {taken}")
        yield checkpoint
    except InputError:
        raise
    except (
        RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError,
        OverflowError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: expected a whole checkpoint of this version, got {first_line(error)}"
        ) from error


def _examined(file: BinaryIO, size: int) -> BinaryIO:
    """The archive once more, as it was checked: nothing packed, damaged or dangerous is in it.

    Raises:
        zipfile.BadZipFile, ValueError: something is.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(checked, "w") as copy:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed data")
        if (unpacked := sum(entry.file_size for entry in entries)) > size:
            raise ValueError(f"{size} bytes that unpack to {unpacked}")
        for entry in entries:
            content = archive.read(entry)  # and its checksum
            if entry.filename.lower().endswith("data.pkl"):  # torch reads names so
                for opcode, name, _ in pickletools.genops(content):
                    if "GLOBAL" in opcode.name and name not in _NAMES:
                        raise ValueError(f"a call of {reprlib.repr(name)}")
            copy.writestr(entry.filename, content)
    checked.seek(0)
    return checked


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in dicts, lists and tuples, once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part, seen)
