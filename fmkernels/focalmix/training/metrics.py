"""What a run shows of itself while it goes on, and how it is asked to stop."""

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

from fmkernels.focalmix.distributed import place
from fmkernels.focalmix.files import atomic_write

METRICS = "metrics.csv"
COLUMNS = ("step", "loss", "loss_cls", "loss_box", "positives", "lr", "val_cpm", "seconds")
_ROW = re.compile(rf"\d{{1,18}}(,(-?\d+(\.\d+)?(e[-+]\d+)?)?){{{len(COLUMNS) - 1}}}", re.ASCII)


class Stopwatch:
    """Seconds of each stage of each step.

    On a GPU the stages run behind the host; only with ``wait`` does each lap wait for them. Without, a lap there says
    how long the host took, and only the wait for data and the sum of all mean something.
    """

    def __init__(self, device: torch.device, wait: bool) -> None:
        self.device = device
        self.wait = wait and device.type == "cuda"
        self.steps: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.steps.append(defaultdict(float))
        self.last = time.perf_counter()

    def forget(self) -> None:
        """Drop the steps before the present one: those that follow are of another kind."""
        del self.steps[:-1]

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
        stages = {
            stage: 1e3 * statistics.median(step[stage] for step in steps) for stage in steps[0]
        }
        totals = [sum(step.values()) for step in steps]
        return {
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "cpu",
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
        if place()[0] > 0:
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
    """While active, the first Ctrl-C or SIGTERM only sets ``requested``; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.usual = {
                number: signal.signal(number, self._request)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        self.__exit__()
