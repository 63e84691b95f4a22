"""Step timing, metrics.csv and TensorBoard events, graceful stop on SIGINT and SIGTERM."""

import csv
import re
import signal
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from fmkernels.focalmix.distributed import rank_and_world_size
from fmkernels.focalmix.files import atomic_write

METRICS = "metrics.csv"
COLUMNS = ("step", "loss", "loss_cls", "loss_box", "positives", "lr", "val_cpm", "seconds")
_ROW = re.compile(rf"\d{{1,18}}(,(-?\d+(\.\d+)?(e[-+]\d+)?)?){{{len(COLUMNS) - 1}}}", re.ASCII)


class Stopwatch:
    """Seconds of each stage of each step.

    A GPU works asynchronously: its stages are told apart only if every lap synchronizes. Otherwise
    a lap is the time of the host, and only the wait for data and the total are meaningful.
    """

    def __init__(self, device: torch.device, synchronize: bool) -> None:
        self.device = device
        self.synchronize = synchronize and device.type == "cuda"
        self.steps: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.steps.append(defaultdict(float))
        self.last = time.perf_counter()

    def restart(self) -> None:
        """Forget all steps and begin one."""
        self.steps.clear()
        self.start()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to a stage."""
        if self.synchronize:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.steps[-1][stage] += now - self.last
        self.last = now

    def summary(self) -> dict[str, Any]:
        """Medians in milliseconds, and the fraction of time spent waiting for data."""
        steps = [step for step in self.steps if step]
        if not steps:
            return {}
        is_gpu = self.device.type == "cuda"
        stages = {
            stage: 1e3 * statistics.median(step[stage] for step in steps) for stage in steps[0]
        }
        totals = [sum(step.values()) for step in steps]
        return {
            "device": torch.cuda.get_device_name(self.device) if is_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "steps": len(steps),
            "synchronized": self.synchronize or not is_gpu,
            "milliseconds": stages | {"step": 1e3 * statistics.median(totals)},
            "data_wait_fraction": sum(step["data"] for step in steps) / sum(totals),
        }


class Metrics:
    """``metrics.csv`` and the TensorBoard events of a run, written by the first process.

    Rows after ``step``, which a stopped run has left, are dropped.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / METRICS
        self.events = None
        if rank_and_world_size()[0] > 0:
            return
        rows = []
        if step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            rows = [line.split(",") for line in lines if _ROW.fullmatch(line)]
            rows = [row for row in rows if int(row[0]) <= step]
        with (
            atomic_write(self.path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
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
    """The first SIGINT or SIGTERM only sets ``requested``; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.previous = {
                number: signal.signal(number, self._request)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        self.__exit__()
