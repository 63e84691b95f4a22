"""The pictures of the docs: each op applied to slices of two phantoms."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyArrowPatch, Rectangle
from torch import Tensor

import fmkernels
from fmkernels.focalmix.data.phantom import Scene, render

WINDOW = (-1200, 600)
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito's colours
STYLE = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
DEPTH = 24  # slices of each scan
OWN, OTHER = 11, 0


class Scan(NamedTuple):
    volumes: Tensor  # [1, 1, D, H, W], int16 HU
    box: Tensor  # [1, 7], around the largest nodule, in the middle slice


@cache
def scan(index: int) -> Scan:
    """Some slices of scan ``index`` of ``fmkernels phantom --size luna16``."""
    scene = Scene("luna16", 0, index)
    x, y, z, diameter = scene.nodules[scene.nodules[:, 3].argmax()]
    first = round((z - scene.z[0]) / scene.slice) - DEPTH // 2
    scene.z = scene.z[first : first + DEPTH]
    center = np.array([(at - axis[0]) for at, axis in ((z, scene.z), (y, scene.y), (x, scene.x))])
    spacing = np.array([scene.slice, scene.pixel, scene.pixel])
    start, end = (
        np.floor((center - 0.6 * diameter) / spacing),
        np.ceil((center + 0.6 * diameter) / spacing),
    )
    start[0], end[0] = max(start[0], 0), min(end[0], DEPTH)
    box = torch.tensor([[0, *start, *end]], dtype=torch.float32)
    return Scan(torch.from_numpy(render(scene))[None, None], box)


@contextmanager
def figure(path: Path, width: float, height: float, *, ink: str = "black") -> Iterator[Figure]:
    """A figure to draw on. With an ink its ground is transparent: for light and dark pages."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.style.context(["default", STYLE, dict.fromkeys(names, ink)]):
        drawn = Figure(figsize=(width, height))
        yield drawn
        drawn.savefig(path, metadata={"Software": None}, transparent=ink != "black")


def show(
    axes: Axes, image: Tensor, title: str, limits: tuple[float, float] = WINDOW, cmap: str = "gray"
) -> None:
    axes.imshow(image.float(), cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def outline(axes: Axes, box: Tensor, color: str) -> None:
    y1, x1, y2, x2 = (box[0, [2, 3, 5, 6]] - 0.5).tolist()
    axes.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8)
    )


def around(box: Tensor, margin: int = 24) -> tuple[slice, slice]:
    """Rows and columns of the middle of a box with what lies around it."""
    y1, x1, y2, x2 = box[0, [2, 3, 5, 6]].int().tolist()
    return slice(y1 - margin, y2 + margin), slice(x1 - margin, x2 + margin)


def soft_target_focal_loss(path: Path) -> None:
    p = torch.linspace(0.001, 0.999, 999)
    logits = torch.logit(p)
    with figure(path, 8, 3.4) as drawn:
        left, right = drawn.subplots(1, 2)
        for y, color in zip((0.0, 0.3, 0.7, 1.0), (BLUE, GREEN, ORANGE, PURPLE), strict=True):
            loss = fmkernels.soft_target_focal_loss(
                logits, torch.full_like(p, y), alpha0=1, alpha1=1, reduction="none"
            )
            left.plot(p, loss, color=color, label=f"y = {y:g}")
            left.plot(p[loss.argmin()], loss.min(), "o", color=color, clip_on=False)
        left.set(
            title="Each minimum lies at p = y",
            xlabel="p",
            ylabel="loss",
            xlim=(0, 1),
            ylim=(0, 1.2),
        )
        left.legend(loc="upper center")
        y = torch.full_like(p, 0.7)
        ours = fmkernels.soft_target_focal_loss(logits, y, alpha0=1, alpha1=1, reduction="none")
        p_t = p * y + (1 - p) * (1 - y)
        usual = (1 - p_t) ** 2 * -(y * p.log() + (1 - y) * (1 - p).log())
        for loss, color, name in ((ours, ORANGE, "SFL"), (usual, "0.4", "usual formula")):
            right.plot(p, loss / loss[p == 0.5], color=color, label=name)
            right.plot(
                p[loss.argmin()], loss.min() / loss[p == 0.5], "o", color=color, clip_on=False
            )
        right.axvline(0.7, color="0.6", linewidth=0.8, linestyle="--")
        right.set(title="y = 0.7, loss at p = 0.5 taken as 1", xlabel="p", xlim=(0, 1), ylim=(0, 3))
        right.legend(loc="lower left")


def apply_symmetry(path: Path) -> None:
    volumes, box = scan(OWN)
    center = (box[:, 2:4] + box[:, 5:7]) / 2
    around_it = torch.cat(
        [box[:, :1], torch.zeros(1, 1), center - 22, box[:, :1] + DEPTH, center + 22], 1
    )
    cube = fmkernels.crop_and_resize3d(volumes, around_it, (48, 48, 48))[0, 0]
    names = {
        0: "0: DHW",
        2: "2: flip H",
        8: "8: DWH",
        24: "24: HWD",
        40: "40: WHD",
        44: "44: WHD, flip W",
    }
    with figure(path, 8, 1.6) as drawn:
        for axes, (code, name) in zip(drawn.subplots(1, 6), names.items(), strict=True):
            show(axes, fmkernels.apply_symmetry(cube, code)[20], name)


def predict_targets(path: Path) -> None:
    volumes, box = scan(OWN)
    height, width = volumes.shape[3:]
    y, x = (torch.arange(size, dtype=torch.float32) for size in (height // 16, width // 16))
    center = (box[0, 2:4] + box[0, 5:7]) / 32 - 0.5
    bump = torch.exp(-((y[:, None] - center[0]) ** 2 + (x - center[1]) ** 2) / 3)
    noise = torch.randn(4, *bump.shape, generator=torch.Generator().manual_seed(3))
    flips = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    seen = torch.stack(
        [
            view.flip([axis for axis in range(2) if mask >> axis + 1 & 1])
            for view, mask in zip(5.5 * bump - 3 + 0.8 * noise, flips.tolist(), strict=True)
        ]
    )
    views = seen[:, None, None, None]  # [K, B, A, D, H, W]
    unit = (0, 1)
    with figure(path, 8, 4.3) as drawn:
        panels = drawn.subplots(2, 4)
        names = ("no flip", "flip H", "flip W", "flip H and W")
        for axes, logits, name in zip(panels[0], seen, names, strict=True):
            show(axes, logits.sigmoid(), name, unit, "viridis")
        show(panels[1, 0], volumes[0, 0, DEPTH // 2], "the slice")
        for axes, temperature in zip(panels[1, 1:], (1.0, 0.7, 0.3), strict=True):
            targets = fmkernels.predict_targets(views, flips, temperature=temperature)
            show(axes, targets[0, 0, 0], f"targets, T = {temperature:g}", unit, "viridis")


def sample_mixup(path: Path) -> None:
    with figure(path, 6, 3) as drawn:
        axes = drawn.subplots()
        for eta, color in ((0.2, BLUE), (0.5, GREEN), (1.0, ORANGE)):
            lam, _ = fmkernels.sample_mixup(
                200_000, eta=eta, generator=torch.Generator().manual_seed(0)
            )
            axes.hist(
                lam,
                bins=50,
                range=(0.5, 1),
                density=True,
                histtype="step",
                color=color,
                label=f"eta = {eta:g}",
            )
        axes.set(xlabel="lam", ylabel="density", xlim=(0.5, 1), yscale="log")
        axes.legend(loc="upper left")


def sample_donors(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(12, 3, generator=generator) * 14
    end = start + 3 + 3 * torch.rand(12, 3, generator=generator)
    volume = torch.arange(12).float()[:, None] // 4
    boxes, labels = torch.cat([volume, start, end], 1), torch.arange(12) % 2
    donors = fmkernels.sample_donors(boxes, labels=labels, generator=generator)
    with figure(path, 8, 3) as drawn:
        panels = drawn.subplots(1, 3)
        for index, axes in enumerate(panels):
            axes.set(title=f"volume {index}", xlim=(0, 20), ylim=(20, 0), aspect="equal")
        for box, donor, label in zip(boxes, donors, labels.tolist(), strict=True):
            color = (GREEN, ORANGE)[label]
            (b, _, y1, x1, _, y2, x2), (c, _, v1, u1, _, v2, u2) = box.tolist(), donor.tolist()
            outline(panels[int(b)], box[None], color)
            arrow = ConnectionPatch(
                ((u1 + u2) / 2, (v1 + v2) / 2),
                ((x1 + x2) / 2, (y1 + y2) / 2),
                "data",
                "data",
                axesA=panels[int(c)],
                axesB=panels[int(b)],
                arrowstyle="->",
                color=color,
                alpha=0.6,
            )
            drawn.add_artist(arrow)


def mixup3d(path: Path) -> None:
    volumes = torch.cat([scan(OWN).volumes, scan(OTHER).volumes])
    lam, index = torch.tensor([0.7, 0.7]), torch.tensor([1, 0])
    flips = torch.tensor([0, 4], dtype=torch.uint8)
    mixed = fmkernels.mixup3d(volumes, lam, index, flips=flips, window=WINDOW)
    middle = DEPTH // 2
    with figure(path, 8, 3) as drawn:
        first, second, third = drawn.subplots(1, 3)
        show(first, volumes[0, 0, middle], "volumes[0], int16 HU")
        show(second, volumes[1, 0, middle], "volumes[1], flips[1] = 4 (W)")
        show(third, mixed[0, 0, middle], "out[0], lam = 0.7", (0, 1))


def crop_and_resize3d(path: Path) -> None:
    volumes, box = scan(OWN)
    size = (16, 64, 64)
    half = torch.cat(
        [box[:, :1], box[:, 1:4] + 0.25 * (box[:, 4:] - box[:, 1:4]), box[:, 4:]], dim=1
    )
    with figure(path, 8, 2.25) as drawn:
        first, second, third, fourth = drawn.subplots(1, 4)
        show(first, volumes[0, 0, DEPTH // 2], "volumes")
        outline(first, box, GREEN)
        outline(first, half, ORANGE)
        crops = fmkernels.crop_and_resize3d(volumes, torch.cat([box, half]), size, window=WINDOW)
        show(second, crops[0, 0, 8], "green box, 64 x 64", (0, 1))
        show(third, crops[1, 0, 8], "orange box, 64 x 64", (0, 1))
        mirrored = half[:, [0, 1, 2, 6, 4, 5, 3]]
        crop = fmkernels.crop_and_resize3d(volumes, mirrored, size, clamp="volume", window=WINDOW)
        show(fourth, crop[0, 0, 8], "x1 and x2 exchanged", (0, 1))


def group_norm3d(path: Path) -> None:
    volumes = scan(OWN).volumes.float() + 50_000
    middle = DEPTH // 2
    right = (volumes.double() - volumes.double().mean()) / volumes.double().std(correction=0)
    naive = (volumes - volumes.mean()) * (volumes.square().mean() - volumes.mean() ** 2).rsqrt()
    with figure(path, 8, 3) as drawn:
        first, second, third = drawn.subplots(1, 3)
        show(first, volumes[0, 0, middle] - 50_000, "HU, plus 50,000")
        for axes, result, name in (
            (second, naive, "mean of squares"),
            (third, fmkernels.group_norm3d(volumes, 1), "group_norm3d"),
        ):
            error = (result - right)[0, 0, middle].abs()
            show(axes, error, f"{name}: error {error.max():.0e}", (0, 0.01), "viridis")


def object_mixup3d(path: Path) -> None:
    (own, target), (donors, source) = scan(OWN), scan(OTHER)
    share = torch.tensor([0.5])
    mixed = fmkernels.object_mixup3d(own, target, source, share, donors=donors)
    middle, rows_columns = DEPTH // 2, around(target)
    edges = target.clone()
    edges[0, [2, 5]] -= rows_columns[0].start
    edges[0, [3, 6]] -= rows_columns[1].start
    with figure(path, 8, 2.25) as drawn:
        panels = drawn.subplots(1, 4)
        show(panels[0], own[0, 0, middle][rows_columns], "volumes, target box")
        show(panels[1], donors[0, 0, middle], "donors, donor box")
        outline(panels[1], source, ORANGE)
        lone = fmkernels.object_mixup3d(own, target, source, torch.zeros(1), donors=donors)
        show(panels[2], lone[0, 0, middle][rows_columns], "lam = 0")
        show(panels[3], mixed[0, 0, middle][rows_columns], "lam = 0.5")
        for axes in panels[[0, 2, 3]]:
            outline(axes, edges, GREEN)


def minimum(path: Path, *, dark: bool) -> None:
    """The loss of one target here and in other libraries, at alpha 0.25 and gamma 2."""
    p = torch.linspace(0.02, 0.999, 999)
    y = torch.full_like(p, 0.7)
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log())
    p_t = p * y + (1 - p) * (1 - y)
    losses = {
        "fmkernels": fmkernels.soft_target_focal_loss(
            torch.logit(p), y, alpha0=0.75, alpha1=0.25, reduction="none"
        ),
        "torchvision, fvcore, optax": (1 - p_t) ** 2 * cross_entropy,
        "kornia": -(y / 4 * (1 - p) ** 2 * p.log() + (1 - y) * 3 / 4 * p**2 * (1 - p).log()),
        "MONAI": torch.sigmoid((1 - 2 * y) * torch.logit(p)) ** 2 * cross_entropy,
    }
    ink = "#e6edf3" if dark else "#1f2328"
    colors = ("#56B4E9" if dark else BLUE, ORANGE, GREEN, PURPLE)
    with figure(path, 4.6, 3.2, ink=ink) as drawn:
        axes = drawn.subplots()
        axes.grid(False)
        axes.axvline(0.7, color="0.5", linewidth=0.8, linestyle="--")
        for (name, loss), color in zip(losses.items(), colors, strict=True):
            loss = loss / loss[p >= 0.2][0]
            width = 2.5 if name == "fmkernels" else 1.2
            axes.plot(p, loss, color=color, label=name, linewidth=width)
            axes.plot(p[loss.argmin()], loss.min(), "o", color=color, clip_on=False)
        axes.set(xlim=(0.2, 1), ylim=(0, 1.05), xlabel="predicted probability", yticks=[])
        axes.set(ylabel="loss", title="Focal losses of a target of 0.7")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2, fontsize=9)


def step(path: Path, *, dark: bool) -> None:
    """A FocalMix step on slices of two phantoms, each arrow with the name of its op."""
    ink, accent = ("#e6edf3", "#56B4E9") if dark else ("#1f2328", BLUE)
    scans = [scan(OWN), scan(OTHER)]
    side, middle = 88, DEPTH // 2
    patches, boxes = [], []
    for volumes, box in scans:
        corner = ((box[0, 2:4] + box[0, 5:7]) / 2 - side / 2).round().int()
        corner = corner.clamp(min=0)
        y, x = corner.tolist()
        patches.append(volumes[..., y : y + side, x : x + side])
        boxes.append(box - torch.tensor([[0, 0, y, x, 0, y, x]]))
    images = torch.cat(patches)
    boxes[1][:, 0] = 1
    lam, index = torch.tensor([0.75, 0.75]), torch.tensor([1, 0])
    mixed = fmkernels.mixup3d(images, lam, index, window=WINDOW)
    objects = fmkernels.object_mixup3d(
        mixed,
        torch.cat(boxes),
        torch.cat(boxes[::-1]),
        torch.tensor([0.6, 0.6]),
        donors=images,
        window=WINDOW,
    )
    flips = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    views = fmkernels.mixup3d(
        images[[1] * 4], torch.ones(4), torch.arange(4), flips=flips, window=WINDOW
    )
    cell = torch.arange(side // 8, dtype=torch.float32)
    center = (boxes[1][0, 2:4] + boxes[1][0, 5:7]) / 16 - 0.5
    bump = torch.exp(-((cell[:, None] - center[0]) ** 2 + (cell - center[1]) ** 2) / 2.5)
    noise = torch.randn(4, *bump.shape, generator=torch.Generator().manual_seed(3))
    seen = [
        view.flip([axis for axis in range(2) if mask >> axis + 1 & 1])
        for view, mask in zip(5.5 * bump - 3 + 0.8 * noise, flips.tolist(), strict=True)
    ]
    targets = fmkernels.predict_targets(torch.stack(seen)[:, None, None, None], flips)

    with figure(path, 10, 4.3, ink=ink) as drawn:
        drawn.set_layout_engine("none")
        width, height = 0.135, 0.135 * 10 / 4.3

        def panel(x: float, y: float, image: Tensor, title: str, cmap: str = "gray") -> Axes:
            axes = drawn.add_axes((x, y, width, height))
            show(axes, image, title, WINDOW if image.dtype == torch.int16 else (0, 1), cmap)
            axes.title.set_fontsize(9)
            return axes

        def arrow(start: tuple[float, float], end: tuple[float, float], name: str = "") -> None:
            drawn.add_artist(
                FancyArrowPatch(
                    start,
                    end,
                    transform=drawn.transFigure,
                    arrowstyle="-|>",
                    mutation_scale=12,
                    color=accent,
                    linewidth=1.5,
                )
            )
            if name:
                x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
                drawn.text(
                    x, y + 0.025, name, ha="center", color=accent, family="monospace", fontsize=8.5
                )

        top, bottom = 0.58, 0.08
        for axes, box, color in (
            (panel(0.005, top, images[0, 0, middle], "labeled patch, HU"), boxes[0], GREEN),
            (panel(0.005, bottom, images[1, 0, middle], "unlabeled patch, HU"), None, ORANGE),
            (panel(0.31, top, mixed[0, 0, middle], "images mixed"), boxes[0], GREEN),
            (panel(0.615, top, objects[0, 0, middle], "nodules mixed"), boxes[0], GREEN),
        ):
            if box is not None:
                outline(axes, box, color)
        small = width / 2.1
        for k in range(4):
            x = 0.31 + (k % 2) * (width - small)
            y = bottom + (1 - k // 2) * (height - small * 10 / 4.3)
            axes = drawn.add_axes((x, y, small, small * 10 / 4.3))
            show(axes, views[k, 0, middle], "", (0, 1))
        drawn.text(0.31 + width / 2, bottom + height + 0.03, "K flipped views", ha="center", size=9)
        panel(0.615, bottom, targets[0, 0, 0], "soft targets", "viridis")
        middle_top, middle_bottom = top + height / 2, bottom + height / 2
        arrow((0.15, middle_top), (0.3, middle_top), "mixup3d")
        arrow((0.455, middle_top), (0.605, middle_top), "object_mixup3d")
        arrow((0.15, middle_bottom), (0.3, middle_bottom), "mixup3d")
        arrow((0.455, middle_bottom), (0.605, middle_bottom), "predict_targets")
        drawn.text(0.53, middle_bottom - 0.06, "teacher", ha="center", size=8.5)
        arrow((0.15, bottom + height - 0.04), (0.3, middle_top - 0.08))
        axes = drawn.add_axes((0.865, 0.36, width * 0.95, height * 0.9))
        p = torch.linspace(0.001, 0.999, 300)
        for y, color in ((0.1, PURPLE), (0.4, GREEN), (0.75, ORANGE)):
            loss = fmkernels.soft_target_focal_loss(
                torch.logit(p), torch.full_like(p, y), alpha0=1, alpha1=1, reduction="none"
            )
            axes.plot(p, loss, color=color, linewidth=1.5)
            axes.plot(p[loss.argmin()], loss.min(), "o", color=color, markersize=4)
        axes.grid(False)
        axes.set(xlim=(0, 1), ylim=(-0.02, 0.6), xticks=[], yticks=[])
        axes.set_title("loss and gradient", size=9)
        arrow((0.76, middle_top), (0.86, 0.62))
        arrow((0.76, middle_bottom), (0.86, 0.42))
        drawn.text(0.795, middle_top, "student", ha="left", size=8.5)
        drawn.text(
            0.865 + width / 2,
            0.27,
            "soft_target_\nfocal_loss",
            ha="center",
            color=accent,
            family="monospace",
            fontsize=8.5,
        )


PICTURES: Sequence[Callable[[Path], None]] = (
    soft_target_focal_loss,
    apply_symmetry,
    predict_targets,
    sample_mixup,
    sample_donors,
    mixup3d,
    crop_and_resize3d,
    group_norm3d,
    object_mixup3d,
)


def draw(folder: Path) -> None:
    """Draw every picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        picture(folder / f"{picture.__name__}.png")


if __name__ == "__main__":  # the pictures of the README
    for draw_one in (minimum, step):
        for theme in ("light", "dark"):
            target = Path(__file__).parent / "images" / f"{draw_one.__name__}-{theme}.png"
            draw_one(target, dark=theme == "dark")
