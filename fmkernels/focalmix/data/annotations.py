"""Annotations of own data sets: a table with a row per nodule, or MONAI's JSON list of boxes."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmkernels.focalmix.data.tables import number, read_text, records
from fmkernels.focalmix.errors import InputError, first_line

FOLDS = range(10)
"""Folds of a data set, as the subsets of LUNA16."""

_SCAN = ("scan", "seriesuid")
_POINT = (("x", "coordx"), ("y", "coordy"), ("z", "coordz"), ("diameter", "diameter_mm"))
_BOX = tuple(
    (f"{axis}{end}", f"{axis}_{word}") for end, word in ((1, "min"), (2, "max")) for axis in "xyz"
)
_LISTS = {"training": 0, "validation": 7, "testing": 8, "test": 8}  # name -> fold
_BOX_MODES = ("cccwhd", "xyzxyz")


class Annotation(NamedTuple):
    """A row of a table."""

    scan: str
    """The scan as the table names it."""
    where: str
    """File and row, for messages."""
    finding: tuple[float, ...] | None
    """World x, y, z, diameter in mm, LPS; None: the scan was read, and nothing was found in it."""
    fold: int | None


def read_annotations(path: Path, coordinates: str = "LPS") -> list[Annotation]:
    """Read the annotations of a data set.

    A table has the column ``scan`` (or ``seriesuid``) and either ``x``, ``y``, ``z``, ``diameter``
    (or ``coordX``, ``coordY``, ``coordZ``, ``diameter_mm``) or ``x1``, ``y1``, ``z1``, ``x2``,
    ``y2``, ``z2`` (or ``x_min`` ...), in world mm, and optionally ``fold``, 0 ... 9. A row whose
    numbers are empty says that its scan has no nodule. Names of columns may be in any case.

    A JSON file is MONAI's: lists ``training``, ``validation``, ``testing`` of ``{"image": file,
    "box": [...]}`` with boxes of world mm, center and size (cccwhd, as for LUNA16), or corners
    where the file says ``"box_mode": "xyzxyz"``. An empty ``box`` says that the scan has no nodule;
    without ``box``, it has no labels. ``fold`` is optional here too. Without it, the scans of
    several lists are in the folds 0 (training), 7 (validation) and 8 (testing).

    A box becomes the ball of its center whose diameter is the mean of its sides.

    Args:
        path: the table, or a ``.json`` file.
        coordinates: "LPS", as DICOM and LUNA16 have, or "RAS", as NIfTI and 3D Slicer show.

    Raises:
        ValueError: ``coordinates`` is something else.
        InputError: names file, row and field.
    """
    check_coordinates("read_annotations", coordinates)
    found = _read_json(path) if path.suffix.lower() == ".json" else _read_table(path)
    if coordinates == "LPS":
        return list(found)
    return [
        row
        if row.finding is None
        else row._replace(finding=tuple(negated(np.array([row.finding]))[0].tolist()))
        for row in found
    ]


def check_coordinates(name: str, coordinates: str) -> None:
    """Raise a ValueError that begins with ``name`` unless the world coordinates are known ones."""
    if coordinates not in ("LPS", "RAS"):
        raise ValueError(f"{name}: coordinates: expected LPS or RAS, got {coordinates!r}")


def negated(findings: np.ndarray) -> np.ndarray:
    """Findings [n, 4] in RAS as LPS, or the reverse: x and y change their signs."""
    return findings * np.array([-1.0, -1.0, 1.0, 1.0])


def _read_table(path: Path) -> Iterator[Annotation]:
    rows = records(path)
    header = [name.lower() for name in next(rows)[1]]

    def column(names: Sequence[str]) -> int | None:
        found = [name for name in names if name in header]
        if len(found) > 1 or header.count("".join(found)) > 1:
            raise InputError(
                f"{path}: expected one column {names[0]}, got the columns {','.join(header)}"
            )
        return header.index(found[0]) if found else None

    scan, fold = column(_SCAN), column(("fold",))
    groups = [[column(names) for names in group] for group in (_POINT, _BOX)]
    group = next((group for group in groups if None not in group), None)
    if scan is None or group is None:
        raise InputError(
            f"{path}: expected the columns scan, x, y, z, diameter (or x1, y1, z1, x2, y2, z2), "
            f"got {','.join(header)}"
        )
    for row, fields in rows:
        where = f"{path}, row {row}"
        if not fields[scan]:
            raise InputError(f"{where}: {header[scan]}: expected a scan, got nothing")
        texts = {header[k]: fields[k] for k in group if k is not None}
        finding = None
        if any(texts.values()):
            finding = _finding(where, texts, is_box=len(texts) == len(_BOX))
        of_fold = None if fold is None or not fields[fold] else _fold(where, fields[fold])
        yield Annotation(fields[scan], where, finding, of_fold)


def _finding(where: str, values: Mapping[str, Any], is_box: bool) -> tuple[float, ...]:
    numbers = [_number(value) for value in values.values()]
    for parsed, (name, value) in zip(numbers, values.items(), strict=True):
        if not math.isfinite(parsed):
            raise InputError(f"{where}: {name}: expected a finite number, got {value!r}")
    if not is_box:
        if numbers[3] == 0:
            raise InputError(f"{where}: diameter: expected one other than zero, got 0")
        return tuple(numbers)
    low, high = np.array(numbers).reshape(2, 3)
    if not (low < high).all():
        raise InputError(
            f"{where}: expected a box from its lower to its upper corner, got {low} to {high}"
        )
    return (*((low + high) / 2).tolist(), float((high - low).mean()))


def _fold(where: str, value: Any) -> int:
    if (fold := _number(value)) not in FOLDS:
        raise InputError(f"{where}: fold: expected an integer of 0 to 9, got {value!r}")
    return int(fold)


def _number(value: Any) -> float:
    """A value of a table or of JSON as a number; NaN if it is none."""
    try:
        return number(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _read_json(path: Path) -> Iterator[Annotation]:
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {first_line(error)}") from None
    lists = (
        {name: content[name] for name in _LISTS if name in content}
        if isinstance(content, dict)
        else {}
    )
    if not lists or not all(isinstance(rows, list) for rows in lists.values()):
        raise InputError(
            f"{path}: expected MONAI's lists of scans ({', '.join(_LISTS)}), found none"
        )
    mode = content.get("box_mode", _BOX_MODES[0])
    if mode not in _BOX_MODES:
        raise InputError(f"{path}: box_mode: expected {' or '.join(_BOX_MODES)}, got {mode!r}")
    for name, rows in lists.items():
        for index, row in enumerate(rows):
            where = f"{path}, {name}[{index}]"
            if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                raise InputError(f'{where}: image: expected {{"image": a file, "box": a list}}')
            if "box" not in row:
                continue
            fold = _LISTS[name] if len(lists) > 1 else None
            if "fold" in row:
                fold = _fold(where, row["fold"])
            boxes = row["box"]
            if not isinstance(boxes, list) or not all(
                isinstance(box, list) and len(box) == 6 for box in boxes
            ):
                raise InputError(f"{where}: box: expected a list of lists of 6 numbers")
            if not boxes:
                yield Annotation(row["image"], where, None, fold)
            for k, box in enumerate(boxes):
                corners = _corners(f"{where}, box {k}", box, mode)
                finding = _finding(f"{where}, box {k}", corners, is_box=True)
                yield Annotation(row["image"], where, finding, fold)


def _corners(where: str, box: Sequence[Any], mode: str) -> dict[str, Any]:
    names = [name for name, _ in _BOX]
    if mode == "xyzxyz":
        return dict(zip(names, box, strict=True))
    center, size = np.array([_number(value) for value in box]).reshape(2, 3)
    if np.isnan([center, size]).any():
        raise InputError(f"{where}: expected 6 numbers, got {box}")
    if not (size > 0).all():
        raise InputError(
            f"{where}: expected center and size, got the size {size.tolist()}; "
            'for corners, add "box_mode": "xyzxyz" to the file'
        )
    return dict(zip(names, [*(center - size / 2), *(center + size / 2)], strict=True))
