"""What a careful colleague looks at in a data set before training: counts, grids, HU, coordinates.

Nothing is written but one picture. Whether a coordinate is right is judged by what lies there: a
nodule is denser than lung, and has lung beside it.
"""

import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np
import scipy.ndimage
from tqdm import tqdm

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.data.dataset import DataSet
from fmkernels.focalmix.data.formats import hu_problem, read_scan
from fmkernels.focalmix.data.own import OwnData, open_data
from fmkernels.focalmix.data.tables import UNKNOWN_DIAMETER, diameters
from fmkernels.focalmix.data.volume import Volume, index_to_box, reoriented
from fmkernels.focalmix.data.workers import process_map
from fmkernels.focalmix.errors import InputError, InputWarning, first_line
from fmkernels.focalmix.evaluation import figures
from fmkernels.focalmix.roles import choose_scans

PANELS = 12
"""Maximum number of slices in the picture."""

_LUNG, _NODULE = -600, -700  # HU: more of air is lung; less may be a nodule
_LEAST_LUNG = 0.03  # fraction of the surroundings of a nodule
_CLEAR = 300  # HU by which a nodule stands out that coordinates read otherwise would hit
_CLEAR_LUNG = 0.4  # and the fraction of lung around it
_OUTER_AIR = -930  # HU: air around the body is of less, lungs are of more
_SIZES = (2.0, 100.0)  # mm: diameters of nodules
_EXTENTS = (50.0, 1000.0)  # mm: of scans
_STEPS = (0.2, 6.0)  # mm: spacings of scans
_SHOWN = 5  # messages of a kind


class Problem(NamedTuple):
    """Something to look at."""

    kind: str
    text: str
    is_error: bool = False
    """Whether `train` refuses it."""


class Evidence(NamedTuple):
    """What lies at the place of a nodule."""

    is_plausible: bool
    density: float | None
    """Mean HU in the middle of the nodule; None outside of the scan."""
    fits: str
    """How the coordinates would have to be read to hit something like a nodule; empty: no way."""


class _Place(NamedTuple):
    """What lies in a ball and around it."""

    density: float
    """Mean HU in the middle."""
    lung: float
    """Fraction of lung around."""
    contrast: float
    """HU by which the ball is denser than half of what is around."""


class Look(NamedTuple):
    """What was seen in a scan."""

    uid: str
    error: str
    warnings: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    lowest: int = 0
    highest: int = 0
    checksum: int = 0
    evidence: tuple[Evidence, ...] = ()


@dataclass
class Report:
    """What `check` found."""

    summary: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    picture: Path | None = None
    """The picture, where there was something to draw."""

    @property
    def has_errors(self) -> bool:
        return any(problem.is_error for problem in self.problems)

    def __str__(self) -> str:
        lines = list(self.summary)
        by_kind: dict[str, list[Problem]] = {}
        for problem in sorted(self.problems, key=lambda problem: not problem.is_error):
            by_kind.setdefault(problem.kind, []).append(problem)
        for kind, problems in by_kind.items():
            level = "error" if problems[0].is_error else "warning"
            lines.append(f"{level}: {kind}: {len(problems)}")
            lines += [f"  {problem.text}" for problem in problems[:_SHOWN]]
            lines += [f"  ... and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        return "\n".join(lines if by_kind else [*lines, "nothing suspicious found"])


def check(
    root: str | Path,
    picture: str | Path,
    *,
    coordinates: str = "LPS",
    unlabeled: Iterable[str | Path] = (),
    config: Config | None = None,
    workers: int | None = None,
) -> Report:
    """Look at a data set and draw slices with the annotated boxes on one page.

    Args:
        root: the folder, as for `train`.
        picture: the figure to write.
        coordinates: "LPS" or "RAS": those of the tables.
        unlabeled: folders of more scans, without labels.
        config: the options of `train`, of which the subsets matter; default: those of the demo.
        workers: processes that read scans; default: one per core, at most 8.

    Raises:
        InputError: there is no data set in the folder, a table cannot be read, or the picture
            cannot be written.
    """
    figures.picture_format(picture)
    if not (parent := Path(picture).parent).is_dir():
        raise InputError(f"{picture}: expected a file in an existing folder, found no {parent}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        data = open_data(root, coordinates=coordinates, unlabeled=unlabeled)
    report = Report()
    report.problems += [
        Problem("rows or files that are not used", str(warning.message))
        for warning in caught
        if issubclass(warning.category, InputWarning)
    ]
    series = [*data.series, *data.unlabeled]
    found = {
        look.uid: look
        for look in _look_at_all(data, series, workers or min(os.cpu_count() or 1, 8))
    }
    readable = [look for look in found.values() if not look.error]
    report.summary += _summary(data, readable)
    report.problems += [
        *_scan_problems(data, found),
        *_finding_problems(data, found),
        *_table_problems(data),
        *_role_problems(data, config or Config()),
    ]
    if panels := _panels(data, found):
        figures.draw_check(picture, panels, report.summary[0])
        report.picture = Path(picture)
    return report


def _look_at_all(data: DataSet, series: Sequence[str], workers: int) -> Iterable[Look]:
    work = [(uid, data.path(uid), data.nodules(uid)) for uid in series]
    with process_map(_look, work, workers) as looks:
        yield from tqdm(looks, "checking", total=len(work), unit="scan")


def _look(scan: tuple[str, Path, np.ndarray]) -> Look:
    """Read a scan."""
    uid, path, nodules = scan
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", InputWarning)
            volume = read_scan(path)
    except (InputError, OSError) as error:
        return Look(uid, first_line(error))
    problem = hu_problem(volume.voxels)
    evidence = _evidence(reoriented(volume), nodules) if not problem else ()
    return Look(
        uid,
        f"{path}: {problem}" if problem else "",
        tuple(str(warning.message) for warning in caught),
        volume.voxels.shape,
        volume.spacing,
        _orientation(volume),
        int(volume.voxels.min()),
        int(volume.voxels.max()),
        zlib.crc32(volume.voxels.tobytes()),
        tuple(evidence),
    )


def _orientation(volume: Volume) -> str:
    """The directions in which the axes x, y, z of the grid run, such as LPS."""
    direction = np.array(volume.direction)
    letters = []
    for axis in direction.T:
        world = int(np.argmax(np.abs(axis)))
        letters.append(("LR", "PA", "SI")[world][int(axis[world] < 0)])
    oblique = np.abs(direction).max(axis=0).min() < 0.999
    return "".join(letters) + " oblique" * bool(oblique)


def _evidence(volume: Volume, nodules: np.ndarray) -> Iterable[Evidence]:
    for point, diameter in zip(nodules[:, :3], diameters(nodules), strict=True):
        here = _place(volume, volume.from_world(point)[0], diameter)
        is_plausible = _is_nodule(here)
        fits, best = "", float(_CLEAR)
        for name, center in _other_readings(volume, point).items() if not is_plausible else ():
            there = _place(volume, center, diameter)
            if there is not None and there.lung > _CLEAR_LUNG and there.contrast > best:
                fits, best = name, there.contrast
        yield Evidence(is_plausible, None if here is None else here.density, fits)


def _is_nodule(place: _Place | None) -> TypeGuard[_Place]:
    return place is not None and place.density > _NODULE and place.lung >= _LEAST_LUNG


def _other_readings(volume: Volume, point: np.ndarray) -> dict[str, np.ndarray]:
    """Mistakes that are often made with coordinates -> the box coordinates that they stand for."""
    x, y, z = point
    here = volume.from_world(point)[0]
    readings = {
        "RAS": volume.from_world(np.array([-x, -y, z]))[0],
        "z, y, x": volume.from_world(point[::-1])[0],
        "voxels (x, y, z)": index_to_box(point[::-1]),
        "voxels (z, y, x)": index_to_box(point),
    }
    for axis, name in enumerate(("head to foot", "front to back", "left to right")):
        flipped = here.copy()
        flipped[axis] = volume.voxels.shape[axis] - here[axis]
        readings[f"flipped {name}"] = flipped
    return readings


def _place(volume: Volume, center: np.ndarray, diameter: float) -> _Place | None:
    """What lies in a ball and around it; None if its center is outside of the scan."""
    shape, spacing = np.array(volume.voxels.shape), np.array(volume.spacing)
    if not ((center >= 0) & (center < shape)).all():
        return None
    reach = diameter / 2 + 8
    low = np.maximum(np.floor(center - reach / spacing), 0).astype(int)
    high = np.minimum(np.ceil(center + reach / spacing), shape).astype(int)
    voxels = volume.voxels[tuple(map(slice, low, high))].astype(np.float32)
    axes = [
        (index_to_box(np.arange(a, b)) - c) * step
        for a, b, c, step in zip(low, high, center, spacing, strict=True)
    ]
    z, y, x = np.ix_(*axes)
    distance = np.sqrt(z**2 + y**2 + x**2)
    middle = distance <= max(diameter / 4, distance.min())
    ball = distance <= max(0.4 * diameter, distance.min())
    around = (distance > diameter / 2 + 1) & (distance < reach)
    if not around.any():
        return None
    slice_ = tuple(map(slice, low[1:], high[1:]))
    is_lung = (voxels < _LUNG) & _lungs(volume.voxels[int(center[0])])[slice_]
    return _Place(
        float(voxels[middle].mean()),
        float(is_lung[around].mean()),
        float(voxels[ball].mean() - np.median(voxels[around])),
    )


def _lungs(image: np.ndarray) -> np.ndarray:
    """The pixels of an axial slice that are not of the air around the body."""
    regions, count = scipy.ndimage.label(image < _LUNG)
    border = np.unique(np.concatenate([regions[[0, -1]].ravel(), regions[:, [0, -1]].ravel()]))
    means = scipy.ndimage.mean(image, regions, range(count + 1))
    outer = [region for region in border if region and means[region] < _OUTER_AIR]
    return ~np.isin(regions, outer)


def _summary(data: DataSet, looks: Sequence[Look]) -> list[str]:
    lines = [data.summary()]
    if looks:
        spacings = np.array([look.spacing for look in looks])
        shapes = np.array([look.shape for look in looks])
        ranges = [
            f"{axis} {low:.3g} to {high:.3g}"
            for axis, low, high in zip("zyx", spacings.min(0), spacings.max(0), strict=True)
        ]
        sizes = " x ".join(
            f"{low}-{high}" if low < high else f"{low}"
            for low, high in zip(shapes.min(0), shapes.max(0), strict=True)
        )
        orientations = Counter(look.orientation for look in looks).most_common()
        lines += [
            f"spacing: {', '.join(ranges)} mm",
            f"size: {sizes} voxels (z, y, x)",
            f"axes: {', '.join(f'{name} ({count})' for name, count in orientations)}",
            f"HU: lowest {min(look.lowest for look in looks)}, "
            f"highest {max(look.highest for look in looks)}",
        ]
    counts = Counter(data.subset(uid) for uid in data.series)
    nodules: Counter[int] = Counter()
    for uid in data.series:
        nodules[data.subset(uid)] += len(data.nodules(uid))
    folds = ", ".join(f"{fold}: {counts[fold]} ({nodules[fold]})" for fold in sorted(counts))
    return [*lines, f"scans (nodules) by fold: {folds or 'none'}"]


def _scan_problems(data: DataSet, found: Mapping[str, Look]) -> Iterable[Problem]:
    seen: dict[int, str] = {}
    for uid, look in found.items():
        if look.error:
            yield Problem("scans that cannot be used", look.error, is_error=True)
        for warning in look.warnings:
            yield Problem("scans to look at", warning)
        if not look.shape:
            continue
        path = data.path(uid)
        other = seen.setdefault(look.checksum, uid)
        if other != uid:
            text = f"{path} has the voxels of {data.path(other)}"
            yield Problem("scans that are there twice", text)
        extents = np.multiply(look.shape, look.spacing)
        low, high = _STEPS
        if not all(low <= step <= high for step in look.spacing):
            steps = " x ".join(f"{step:.3g}" for step in look.spacing)
            yield Problem("unusual spacings", f"{path}: {steps} mm; are the units right?")
        elif not all(_EXTENTS[0] <= extent <= _EXTENTS[1] for extent in extents):
            size = " x ".join(f"{extent:.0f}" for extent in extents)
            yield Problem("unusual sizes", f"{path}: {size} mm; are the units right?")


def _finding_problems(data: DataSet, found: Mapping[str, Look]) -> Iterable[Problem]:
    missed, fits = 0, Counter[str]()
    for uid, look in found.items():
        nodules = data.nodules(uid)
        for k, finding in enumerate(nodules):
            where = partial(data.where, uid, k)
            diameter = finding[3]
            if 0 < diameter < _SIZES[0] or diameter > _SIZES[1]:
                text = f"{where()}: {diameter:g} mm; are the units right?"
                yield Problem("unusual diameters", text)
            elif diameter < 0:
                text = f"{where()}: {diameter:g} counts as {UNKNOWN_DIAMETER:g} mm"
                yield Problem("unknown diameters", text)
            apart = np.linalg.norm(nodules[:k, :3] - finding[:3], axis=1)
            if len(apart) and apart.min() < 1:
                text = f"{where()}: as {data.where(uid, int(np.argmin(apart)))}"
                yield Problem("nodules that are there twice", text)
        for k, evidence in enumerate(look.evidence):
            hint = f"; it would fit as {evidence.fits}" if evidence.fits else ""
            if evidence.density is None:
                text = f"{data.where(uid, k)}: not in scan {uid}{hint}"
                yield Problem("nodules outside of their scan", text, is_error=True)
            elif not evidence.is_plausible:
                text = f"{data.where(uid, k)}: {evidence.density:.0f} HU in its middle{hint}"
                yield Problem("nodules where nothing like a nodule is", text)
            missed += not evidence.is_plausible
            fits[evidence.fits] += not evidence.is_plausible
    total = sum(len(look.evidence) for look in found.values())
    fits.pop("", None)
    if fits and missed > total / 2:
        reading, count = fits.most_common(1)[0]
        if count > missed / 2:
            advice = "; try --coordinates RAS" if reading == "RAS" else ""
            text = f"{count} of {total} nodules would fit as {reading}{advice}"
            yield Problem("coordinates", text)


def _role_problems(data: DataSet, config: Config) -> Iterable[Problem]:
    """Why there is nothing to train or to evaluate on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            choose_scans(config, data)
    except InputError as error:
        yield Problem("labels", str(error), is_error=True)


def _table_problems(data: DataSet) -> Iterable[Problem]:
    if data.excluded_table is None:
        others = [path for path in sorted(data.root.rglob("*.csv")) if "exclu" in path.name.lower()]
        if others:
            yield Problem("tables", f"{others[0]} is not read; name it annotations_excluded.csv")
        elif not isinstance(data, OwnData):
            yield Problem(
                "tables",
                f"{data.root}: no annotations_excluded.csv; findings that are no nodules count as "
                "false positives",
            )


def _panels(data: DataSet, found: Mapping[str, Look]) -> list[figures.CheckPanel]:
    """Slices through nodules: the suspicious ones, then others of all diameters."""
    nodules = [
        (evidence.is_plausible, float(data.nodules(uid)[k, 3]), uid, k)
        for uid, look in found.items()
        for k, evidence in enumerate(look.evidence)
    ]
    wrong = [entry for entry in nodules if not entry[0]][:PANELS]
    right = sorted(entry for entry in nodules if entry[0])
    spread = np.linspace(0, len(right) - 1, max(0, min(PANELS - len(wrong), len(right))))
    chosen = [*wrong, *(right[i] for i in spread.round().astype(int))]
    if not chosen:
        return [
            _panel(data, uid, None, "")
            for uid in [uid for uid, look in found.items() if look.shape][:PANELS]
        ]
    panels = []
    for is_plausible, _, uid, k in chosen:
        evidence, problem = found[uid].evidence[k], ""
        if not is_plausible:
            density = evidence.density
            problem = "outside" if density is None else f"{density:.0f} HU here"
            problem += f"; fits as {evidence.fits}" if evidence.fits else ""
        panels.append(_panel(data, uid, k, problem))
    return panels


def _panel(data: DataSet, uid: str, k: int | None, problem: str) -> figures.CheckPanel:
    """The slice through a nodule, or through the middle of a scan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        volume = reoriented(read_scan(data.path(uid)))
    depth = volume.voxels.shape[0]
    boxes = volume.boxes(data.nodules(uid)[k : k + 1] if k is not None else np.empty((0, 4)))
    z = (boxes[0, 0] + boxes[0, 3]) / 2 if len(boxes) else depth / 2
    index = int(np.clip(np.floor(z), 0, depth - 1))
    title = data.where(uid, k).rpartition(", ")[2] if k is not None else ""
    return figures.CheckPanel(
        volume.voxels[index],
        volume.spacing[1:],
        boxes[:, [1, 2, 4, 5]],
        f"{uid[-24:]} {title}".strip(),
        problem,
    )
