"""Figures of a run: FROC curves, training curves, and slices with true and predicted boxes.

No function depends on the matplotlib settings of the caller. Each replaces its file once the new
one is complete. The suffix of the path selects the format (png, svg, pdf, ...; png without one).
"""

import csv
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fmkernels.focalmix.data.volume import Volume, boxes_on, index_to_box, reoriented
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.froc import (
    BAND_RATES,
    OPERATING_POINTS,
    RATE_NAMES,
    Froc,
    hits,
    interpolate,
)
from fmkernels.focalmix.files import atomic_write

LUNG_WINDOW = (-1200.0, 600.0)
"""HU that are shown as black and as white."""

_STYLE = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.title_fontsize": "small",
}
# the colors of Okabe and Ito
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^Dv*X"
_TRUE, _PREDICTED, _MISSED = "#2ee66b", "#ffa126", "#ff4d4d"


@dataclass(frozen=True, eq=False)
class Panel:
    """A slice with boxes, in pixels of ``image``: pixel i covers [i, i + 1)."""

    image: np.ndarray
    """[H, W], HU."""
    true: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))
    """[n, 4]: y1, x1, y2, x2 of the nodules."""
    detected: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))
    """bool [n]: the nodules that a detection hits."""
    predicted: np.ndarray = field(default_factory=lambda: np.empty((0, 5)))
    """[m, 5]: y1, x1, y2, x2, score of the detections."""
    title: str = ""
    """About 30 characters fit."""
    aspect: float = 1.0
    """Height of a pixel divided by its width."""
    subject: np.ndarray | None = None
    """[4]: the box to magnify; by default the first nodule, or the most probable detection."""


@dataclass(frozen=True, eq=False)
class CheckPanel:
    """A slice with an annotated box, in pixels of ``image``."""

    image: np.ndarray
    """[H, W], HU."""
    spacing: tuple[float, ...]
    """Millimeters between pixels along y, x."""
    boxes: np.ndarray
    """[n, 4]: y1, x1, y2, x2; one or none."""
    title: str
    problem: str
    """What is suspicious; empty if nothing is."""


def slice_panel(
    volume: Volume,
    subject: np.ndarray,
    nodules: np.ndarray,
    boxes: np.ndarray,
    candidates: np.ndarray,
    title: str,
) -> Panel:
    """An axial slice through the middle of a box, as radiologists see it, with the boxes it cuts.

    Args:
        volume: the resampled scan.
        subject: [6]: the box, in voxels of the scan; it is magnified.
        nodules: [n, 4]: world x, y, z, diameter, in mm.
        boxes: [m, 6]: the detections, in voxels of the scan.
        candidates: [m, 4]: world x, y, z of the detections, probability.
        title: title of the panel.
    """
    seen = reoriented(volume)
    (subject,), boxes = (boxes_on(seen, given, volume) for given in (subject, boxes))
    index = math.floor((subject[0] + subject[3]) / 2)

    def cuts(boxes: np.ndarray) -> np.ndarray:
        center = index_to_box(index)
        return (boxes[:, 0] <= center) & (center < boxes[:, 3])

    true, plane = seen.boxes(nodules), [1, 2, 4, 5]
    detected = np.any(hits(candidates[:, :3], nodules), axis=0)
    predicted = np.column_stack([boxes[:, plane], candidates[:, 3]])
    return Panel(
        np.asarray(seen.voxels[index]),
        true[cuts(true)][:, plane],
        detected[cuts(true)],
        predicted[cuts(boxes)],
        title,
        aspect=seen.spacing[1] / seen.spacing[2],
        subject=subject[plane],
    )


def draw_froc(path: str | Path, curves: Mapping[str, Froc]) -> None:
    """Draw FROC curves from 1/8 to 8 false positives per scan, with marks at the operating points.

    The legend shows the CPM of each curve and its 95% interval; bootstrap bands are shaded.

    Args:
        path: the figure to write.
        curves: name for the legend -> curve, at least one.
    """
    if not curves:
        raise ValueError("draw_froc: curves: expected at least one, got none")
    with _figure(path, (6.4, 4.6 + 0.2 * len(curves))) as figure:
        axes = figure.add_subplot()
        for number, (name, froc) in enumerate(curves.items()):
            color = _COLORS[number % len(_COLORS)]
            label = f"{name}: CPM {froc.cpm:.3f}"
            if froc.interval is not None and froc.band is not None:
                label += f" [{froc.interval[0]:.3f}, {froc.interval[1]:.3f}]"
                axes.fill_between(
                    BAND_RATES, *(100 * froc.band), color=color, alpha=0.15, linewidth=0
                )
            sensitivity = interpolate(BAND_RATES, froc.fps_per_scan, froc.sensitivities)
            marks: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markevery": 10}
            axes.plot(
                BAND_RATES,
                100 * sensitivity,
                color=color,
                label=label,
                clip_on=False,
                zorder=3,
                **marks,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(OPERATING_POINTS, RATE_NAMES)
        axes.set(
            xlim=OPERATING_POINTS[:: len(OPERATING_POINTS) - 1],
            xlabel="False positives per scan",
            ylabel="Sensitivity (%)",
        )
        _fit_to_data(axes, most=100)
        sizes = {(froc.n_scans, froc.n_nodules) for froc in curves.values()}
        counts = " (scans: {:,}, nodules: {:,})".format(*sizes.pop()) if len(sizes) == 1 else ""
        axes.set_title(f"Free-response ROC{counts}")
        shaded = any(froc.band is not None for froc in curves.values())
        figure.legend(
            loc="outside lower center",
            title="CPM: mean of the seven points [95% bootstrap interval, shaded]"
            if shaded
            else None,
        )


def _fit_to_data(axes: Axes, most: float = 1) -> None:
    """From 0 to what is drawn, at most ``most``."""
    axes.set_ylim(0, min(most, axes.get_ylim()[1]))


def draw_comparison(
    path: str | Path, points: Mapping[str, Sequence[tuple[float, float, float, float]]]
) -> None:
    """Draw the CPM of methods over the number of labeled scans.

    Args:
        path: the figure to write.
        points: name for the legend -> for each point the number of labeled scans, the CPM, and the
            ends of its 95% interval.
    """
    with _figure(path, (6.4, 4.6 + 0.2 * len(points))) as figure:
        axes = figure.add_subplot()
        for number, (name, rows) in enumerate(points.items()):
            labeled, cpm, lower, upper = np.array(rows, dtype=float).T
            shifted = labeled * 2 ** (0.03 * (number - (len(points) - 1) / 2))  # side by side
            errors = np.array([cpm - lower, upper - cpm]).clip(0)
            marker, color = _MARKERS[number % len(_MARKERS)], _COLORS[number % len(_COLORS)]
            axes.errorbar(shifted, cpm, errors, label=name, capsize=3, marker=marker, color=color)
        ticks = sorted({row[0] for rows in points.values() for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(xlabel="Labeled scans", ylabel="CPM", title="CPM on the test scans")
        _fit_to_data(axes)
        figure.legend(
            loc="outside lower center",
            ncols=3,
            title="bars: 95% interval over scans and seeds",
        )


def draw_seeds(path: str | Path, cpms: Mapping[str, Sequence[float]]) -> None:
    """Draw the CPM of two methods for each seed, and their means.

    Args:
        path: the figure to write.
        cpms: name for the axis -> the CPM of each seed, in the same order for both.
    """
    (first, low), (second, high) = cpms.items()
    seeds = np.arange(len(low))
    with _figure(path, (6.4, 4.2)) as figure:
        axes = figure.add_subplot()
        axes.vlines(seeds, low, high, color="0.7", zorder=1)
        for name, values, marker, color in zip(
            (first, second), (low, high), _MARKERS, _COLORS, strict=False
        ):
            axes.scatter(seeds, values, label=name, marker=marker, color=color)
            axes.axhline(float(np.mean(values)), linestyle="--", linewidth=1, color=color)
        axes.set_xticks(seeds)
        axes.set(xlabel="Seed", ylabel="CPM", title="CPM on the test scans, seed by seed")
        figure.legend(loc="outside lower center", ncols=2, title="dashed: mean over the seeds")


def draw_training(path: str | Path, metrics_csv: str | Path) -> None:
    """Draw the losses, the learning rate and, if measured, the validation CPM over the steps.

    Args:
        path: the figure to write.
        metrics_csv: a table with the columns ``step`` and ``lr``, any number of columns that begin
            with ``loss``, and optionally ``val_cpm``. An empty or non-finite field is a gap.

    Raises:
        InputError: names file, row and field: a column is missing, there are no rows, a field is
            not a number.
    """
    metrics = _read_metrics(metrics_csv)
    step = metrics["step"]
    names = {"loss": "total", "loss_cls": "classification", "loss_box": "box regression"}
    losses = {
        names.get(name, name): values for name, values in metrics.items() if name.startswith("loss")
    }
    cpm = metrics.get("val_cpm", np.full_like(step, np.nan))
    window = max(1, len(step) // 40)
    with _figure(path, (6.4, 6.0 if np.isfinite(cpm).any() else 4.9)) as figure:
        heights = [3, 1, 1] if np.isfinite(cpm).any() else [3, 1]
        panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
        top = panels[0]
        for color, (name, values) in zip(_COLORS, losses.items(), strict=False):
            top.plot(step, values, color=color, linewidth=0.8, alpha=0.25)
            top.plot(step, _running_mean(values, window), color=color, linewidth=1.8, label=name)
        top.set_yscale("log", nonpositive="mask")
        top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter(NullFormatter())
        top.set(title=f"Training, steps {step[0]:,.0f} to {step[-1]:,.0f}", ylabel="Loss")
        smoothed = f"loss (thick: running mean of {window} points)" if window > 1 else "loss"
        figure.legend(loc="outside lower center", ncols=len(losses), title=smoothed)
        panels[1].plot(step, metrics["lr"], color="0.3")
        panels[1].set(ylabel="Learning rate", ylim=(0, 1.1 * metrics["lr"].max() or 1))
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        if len(panels) == 3:
            measured = np.isfinite(cpm)
            panels[2].plot(
                step[measured],
                cpm[measured],
                color=_COLORS[0],
                marker="o",
                markersize=4,
                clip_on=False,
            )
            panels[2].set(ylabel="Validation\nCPM", ylim=(0, 1))
        panels[-1].set(xlabel="Step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels()


def draw_examples(path: str | Path, panels: Sequence[Panel]) -> None:
    """Draw slices in the lung window with true and predicted boxes, four per row.

    The box that a slice is about is magnified.

    Args:
        path: the figure to write.
        panels: at least one; their sizes may differ.
    """
    if not panels:
        raise ValueError("draw_examples: panels: expected at least one, got none")
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    tallest = max(panel.aspect * panel.image.shape[0] / panel.image.shape[1] for panel in panels)
    side = max(2.0, 5.6 / columns)
    with _figure(path, (side * columns, (side * tallest + 0.25) * rows + 0.55)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel)
        missed: dict[str, Any] = {"edgecolor": _MISSED, "linestyle": "--", "linewidth": 1.8}
        handles = [
            Patch(fill=False, edgecolor=_TRUE, linewidth=1.8, label="nodule, found"),
            Patch(fill=False, **missed, label="nodule, missed"),
            Patch(
                fill=False,
                edgecolor=_PREDICTED,
                linewidth=0.9,
                label="finding of the detector, its probability",
            ),
        ]
        if not any(len(panel.true) for panel in panels):
            handles = handles[2:]
        _explain(figure, handles, "axial slices, lung window")


def draw_check(path: str | Path, panels: Sequence[CheckPanel], title: str) -> None:
    """Draw annotated slices, four per row, each with its box magnified.

    Suspicious ones have red frames and say why. A wrong coordinate is a box beside its nodule.

    Args:
        path: the figure to write.
        panels: at least one; their sizes may differ.
        title: a line above all.
    """
    if not panels:
        raise ValueError("draw_check: panels: expected at least one, got none")
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    side = max(2.4, 6.0 / columns)
    with _figure(path, (side * columns, (side + 0.45) * rows + 0.7)) as figure:
        figure.suptitle(textwrap.fill(title, 28 * columns), fontsize="small")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_checked(axes, panel)
        handles = [
            Patch(fill=False, edgecolor=_TRUE, linewidth=1.8, label="annotated box"),
            Patch(
                fill=False, edgecolor=_MISSED, linewidth=1.8, label="nothing like a nodule there"
            ),
        ]
        _explain(figure, handles, "axial slices as radiologists show them")


def _explain(figure: Figure, handles: Sequence[Patch], slices: str) -> None:
    """The legend of a sheet: its boxes, and how its slices are shown."""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        title="{}, {:g} to {:g} HU".format(slices, *LUNG_WINDOW),
    )


def _draw_checked(axes: Axes, panel: CheckPanel) -> None:
    lower, upper = LUNG_WINDOW
    size = np.array(panel.image.shape) * panel.spacing
    color = _MISSED if panel.problem else _TRUE
    lines = [panel.title, panel.problem] if panel.problem else [panel.title]
    axes.set_title("\n".join(lines), fontsize="small", color=_MISSED if panel.problem else "black")
    zoomed = [axes]
    if len(panel.boxes):
        reach = max(25.0, float((panel.boxes[0, 2:] - panel.boxes[0, :2]).max()) * panel.spacing[0])
        box = panel.boxes[0] * np.tile(panel.spacing, 2)
        zoomed.append(_magnifier(axes, box, size, (reach, reach)))
    for view in zoomed:
        view.imshow(
            panel.image,
            cmap="gray",
            vmin=lower,
            vmax=upper,
            extent=(0, size[1], size[0], 0),
            interpolation="nearest",
        )
        view.set(xticks=[], yticks=[])
        view.grid(False)
        for side in view.spines.values():
            side.set(
                visible=True, color=color, linewidth=1.5 if panel.problem or view != axes else 0
            )
        for y1, x1, y2, x2 in panel.boxes * np.tile(panel.spacing, 2):
            view.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.2)
            )
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0))


def _magnifier(axes: Axes, box: np.ndarray, size: np.ndarray, reach: tuple[float, float]) -> Axes:
    """Axes around a box, with that reach along y and x, in the corner that is farthest from it."""
    y, x = (box[:2] + box[2:4]) / 2
    right, below = x < size[1] / 2, y < size[0] / 2
    inset = axes.inset_axes((0.58 * right, 0.58 * (not below), 0.42, 0.42))
    inset.set(xlim=(x - reach[1], x + reach[1]), ylim=(y + reach[0], y - reach[0]))
    inset.set_autoscale_on(False)
    return inset


def _draw_panel(axes: Axes, panel: Panel) -> None:
    height, width = panel.image.shape
    lower, upper = LUNG_WINDOW
    axes.set_title(panel.title, fontsize="small")
    views = [axes]
    subject = panel.subject
    if subject is None:
        boxes = panel.predicted[np.argsort(-panel.predicted[:, 4])]
        subject = next(iter([*panel.true, *boxes]), None)
    if subject is not None:
        reach = max(0.11 * width, *(subject[2:4] - subject[:2]))
        size = np.array(panel.image.shape)
        views.append(_magnifier(axes, subject, size, (reach / panel.aspect, reach)))
        views[1].set(xticks=[], yticks=[])
        views[1].grid(False)
        views[1].spines[:].set(visible=True, color="white")
    for view in views:
        view.imshow(
            panel.image,
            cmap="gray",
            vmin=lower,
            vmax=upper,
            extent=(0, width, height, 0),
            aspect=panel.aspect,
        )
        told = view == axes  # the magnified boxes have no texts
        for box, detected in zip(panel.true, panel.detected, strict=True):
            if detected:
                _draw_box(view, box, _TRUE, linewidth=1.8)
            else:
                text = "missed" * told
                _draw_box(view, box, _MISSED, linewidth=1.8, style="--", text=text, above=False)
        for *box, score in panel.predicted:
            _draw_box(view, box, _PREDICTED, linewidth=0.9, text=f"{score:.2f}" * told, above=True)


def _draw_box(
    axes: Axes,
    box: Sequence[float],
    color: str,
    *,
    linewidth: float,
    style: str = "-",
    text: str = "",
    above: bool = True,
) -> None:
    """Draw a box with a text above or below it, on the other side if the slice ends there."""
    y1, x1, y2, x2 = box
    size = x2 - x1, y2 - y1
    axes.add_patch(
        Rectangle(
            (x1, y1), *size, fill=False, edgecolor=color, linewidth=linewidth, linestyle=style
        )
    )
    _, width = sorted(axes.get_xlim())
    _, height = sorted(axes.get_ylim())
    above = y1 > 0.1 * height if above else y2 > 0.9 * height
    side = "left" if x1 < 0.1 * width else "right" if x2 > 0.9 * width else "center"
    axes.annotate(
        text,
        ({"left": x1, "center": (x1 + x2) / 2, "right": x2}[side], y1 if above else y2),
        xytext=(0, 2 if above else -2),
        textcoords="offset points",
        horizontalalignment=side,
        verticalalignment="bottom" if above else "top",
        color=color,
        fontsize="x-small",
        path_effects=[withStroke(linewidth=1.5, foreground="black")],
    )


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a centered window, cut at the ends; NaN if there are none."""
    kernel = np.ones(window)
    finite = np.isfinite(values)
    count = np.convolve(finite, kernel, "same")
    total = np.convolve(np.where(finite, values, 0), kernel, "same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)


def _read_metrics(path: str | Path) -> dict[str, np.ndarray]:
    """Read a CSV table of numbers by columns. Empty fields are NaN; ``step``, ``lr`` have none."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="")
        columns: dict[str, list[float]] = {name: [] for name in reader.fieldnames or ()}
        for name in ("step", "lr", "loss"):
            if name not in columns:
                got = ",".join(columns) or "none"
                raise InputError(f"{path}: expected a column {name}, got the columns {got}")
        for row in reader:
            for name, values in columns.items():
                try:
                    value = float(row[name] or "nan")
                    if name in ("step", "lr") and not math.isfinite(value):
                        raise ValueError
                except ValueError:
                    where = f"{path}, row {reader.line_num}: {name}"
                    raise InputError(f"{where}: expected a number, got {row[name]!r}") from None
                values.append(value)
    if not columns["step"]:
        raise InputError(f"{path}: expected at least one row below the header, got none")
    return {name: np.array(values) for name, values in columns.items()}


def picture_format(path: str | Path) -> str:
    """The format that the suffix of a path selects.

    Raises:
        InputError: it is no format of pictures.
    """
    suffix = Path(path).suffix[1:].lower() or "png"
    if suffix not in (supported := FigureCanvasAgg.get_supported_filetypes()):
        raise InputError(
            f"{path}: expected a picture format ({', '.join(sorted(supported))}), got .{suffix}"
        )
    return suffix


@contextmanager
def _figure(path: str | Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure of this size (inches), then save it to ``path``."""
    suffix = picture_format(path)
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=suffix)
