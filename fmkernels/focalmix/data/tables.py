"""CSV tables in LUNA16's format: findings (nodules, excluded findings), candidates, series ids.

Columns may be separated by commas, semicolons or tabs, and have names in any case. Numbers may have
decimal commas, in quotes where commas are separators. The text is UTF-8 or UTF-16. Spreadsheets
write all of these.

Findings and candidates are float64 arrays [n, 4] per series: world x, y, z in mm (LPS), then a
diameter in mm or a probability.
"""

import codecs
import contextlib
import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.files import atomic_write

UNKNOWN_DIAMETER = 10.0
"""Millimeters; replaces the negative diameter (-1) that LUNA16 writes if it is unknown."""

CANDIDATE_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability")
FINDING_COLUMNS = (*CANDIDATE_COLUMNS[:4], "diameter_mm")

SPREADSHEETS = (".xlsx", ".xls", ".ods")
_SPREADSHEET_BYTES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, .xls
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?|[+-]?\d+,")


def diameters(findings: np.ndarray) -> np.ndarray:
    """Diameters [n] of findings [n, 4] in mm, `UNKNOWN_DIAMETER` where the table is negative."""
    return np.where(findings[:, 3] < 0, UNKNOWN_DIAMETER, findings[:, 3])


def read_findings(path: str | Path) -> dict[str, np.ndarray]:
    """Read ``annotations.csv`` or ``annotations_excluded.csv``.

    Columns ``seriesuid, coordX, coordY, coordZ, diameter_mm`` in any order; others are ignored. A
    header without rows means no findings.

    Returns:
        Series -> float64 [n, 4]: x, y, z (mm), diameter (mm, negative if unknown), in the order of
        the file.

    Raises:
        InputError: names file, row and field: a column is missing, a row has another number of
            fields, a value is not a finite number, a diameter is zero.
    """
    uids, values, rows = _read_table(path, FINDING_COLUMNS)
    if (zero := np.flatnonzero(values[:, 3] == 0)).size:
        raise InputError(
            f"{path}, row {rows[zero[0]]}: diameter_mm: expected a diameter other than zero, got 0"
        )
    return _by_series(uids, values)


def read_candidates(path: str | Path) -> dict[str, np.ndarray]:
    """Read a submission.

    Columns ``seriesuid, coordX, coordY, coordZ, probability`` in any order; others are ignored. Any
    finite score may stand for the probability: only the order matters. A row with nothing but the
    series says that the scan was searched and nothing found.

    Returns:
        Series -> float64 [n, 4]: x, y, z (mm), probability, in the order of the file.

    Raises:
        InputError: names file, row and field: a column is missing, a row has another number of
            fields, a value is not a finite number.
    """
    without: set[str] = set()
    uids, values, _ = _read_table(path, CANDIDATE_COLUMNS, without)
    return dict.fromkeys(sorted(without), np.empty((0, 4))) | _by_series(uids, values)


def read_series(path: str | Path) -> dict[str, int]:
    """Read ``seriesuids.csv``: series ids and their rows in the file, counted from 1."""
    lines = read_text(path).splitlines()
    return {line.strip(): row for row, line in enumerate(lines, start=1) if line.strip(" ,;\t")}


def first_column(path: str | Path) -> set[str]:
    """The first field of every row of any table, the header included."""
    with open(path, encoding="utf-8", newline="", errors="replace") as file:
        return {row[0] for row in csv.reader(file) if row}


def find_row(path: str | Path, uid: str, k: int) -> int:
    """The row of the k-th finding of a series in its file; the header is row 1."""
    table = records(path)
    column = [name.lower() for name in next(table)[1]].index(FINDING_COLUMNS[0])
    return [row for row, fields in table if fields[column] == uid][k]


def refuse_spreadsheet(path: str | Path) -> NoReturn:
    """Say how to save a spreadsheet as a table."""
    raise InputError(f"{path}: expected a table in text, got a spreadsheet; save it as CSV UTF-8")


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8 or UTF-16.

    Raises:
        InputError: names the row that is neither, and how to save a table.
    """
    data = Path(path).read_bytes()
    if data.startswith(_SPREADSHEET_BYTES):
        refuse_spreadsheet(path)
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        found = f"the byte {data[error.start]:#04x}"
        raise InputError(
            f"{path}, row {row}: expected text in UTF-8, got {found}; save it as CSV UTF-8"
        ) from None
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{path}, row {row}: expected text in UTF-8, got the byte 0x00; save it as CSV UTF-8"
        )
    return text


def records(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, its header first, each with its number in the file, counted from 1.

    Blanks around fields and rows without any text are left out.

    Raises:
        InputError: names file and row: the file is empty, is not text, or a row has another number
            of fields than the header.
    """
    lines = list(io.StringIO(read_text(path), newline=""))
    first = lines[0].strip() if lines else ""
    skipped = int(bool(re.fullmatch(r"sep=.", first)))  # a hint that spreadsheets write
    top = lines[skipped] if len(lines) > skipped else ""
    delimiter = max(",;\t", key=top.count)
    reader = csv.reader(lines[skipped:], strict=True, delimiter=delimiter)
    columns = 0
    try:
        for fields in reader:
            row = reader.line_num + skipped
            if not any(map(str.strip, fields)):  # spreadsheets write their empty rows, too
                if not columns:
                    break
                continue
            if columns and len(fields) != columns:
                hint = "; decimal commas need quotes, or semicolons between columns"
                hint *= len(fields) > columns
                raise InputError(
                    f"{path}, row {row}: expected {columns} fields, got {len(fields)}{hint}"
                )
            columns = columns or len(fields)
            yield row, [field.strip() for field in fields]
    except csv.Error as error:
        raise InputError(
            f"{path}, row {reader.line_num + skipped}: expected comma-separated values: {error}"
        ) from None
    if not columns:
        raise InputError(f"{path}: expected a table with a header, got an empty file")


def number(text: str) -> float:
    """A number of a table, which may have a decimal comma.

    Raises:
        ValueError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        if not _DECIMAL_COMMA.fullmatch(text):
            raise
        return float(text.replace(",", "."))


def write_candidates(path: str | Path, candidates: Mapping[str, ArrayLike]) -> None:
    """Write a submission that `read_candidates` reads back bit for bit.

    Rows are sorted by series, then by descending probability.

    Args:
        path: the file; it is replaced once the new one is complete.
        candidates: series -> [n, 4]: x, y, z (mm), probability. A series without candidates has no
            row.
    """
    checked = {uid: as_rows("candidates", uid, candidates[uid]) for uid in sorted(candidates)}
    sorted_rows = {
        uid: table[np.argsort(-table[:, 3], kind="stable")] for uid, table in checked.items()
    }
    _write_table(path, [CANDIDATE_COLUMNS, *_joined(sorted_rows)])


def write_findings(path: str | Path, findings: Mapping[str, np.ndarray]) -> None:
    """Write a table of findings [n, 4] per series, in the order of the mapping."""
    _write_table(path, [FINDING_COLUMNS, *_joined(findings)])


def write_series(path: str | Path, uids: Iterable[str]) -> None:
    """Write ``seriesuids.csv``."""
    _write_table(path, [(uid,) for uid in uids])


def as_rows(name: str, uid: str, rows: ArrayLike) -> np.ndarray:
    """The findings or candidates of a series as finite float64 [n, 4], or an InputError."""
    table = np.asarray(rows, dtype=np.float64)
    if table.shape == (0,):
        return table.reshape(0, 4)
    if table.ndim != 2 or table.shape[1] != 4:
        raise InputError(
            f"{name} of series {uid}: expected an array [n, 4], got {list(table.shape)}"
        )
    if not np.isfinite(table).all():
        raise InputError(
            f"{name} of series {uid}: expected finite numbers, got {table[~np.isfinite(table)][0]}"
        )
    return table


def _read_table(
    path: str | Path, columns: Sequence[str], without: set[str] | None = None
) -> tuple[list[str], np.ndarray, list[int]]:
    """Series ids, the other columns [n, 4], and the row of each in the file (the header is 1).

    ``without``, if given, gets the series of rows whose other columns are empty.
    """
    uids: list[str] = []
    values: list[tuple[float, ...]] = []
    rows: list[int] = []
    table_rows = records(path)
    _, header = next(table_rows)
    lower = [name.lower() for name in header]
    for name in columns:
        if lower.count(name.lower()) != 1:
            raise InputError(
                f"{path}: expected one column {name}, got the columns {','.join(header)}"
            )
    uid_of, *_ = places = [lower.index(name.lower()) for name in columns]
    numbers_of = itemgetter(*places[1:])
    for row, fields in table_rows:
        if not (uid := fields[uid_of]):
            raise InputError(f"{path}, row {row}: {columns[0]}: expected a series id, got nothing")
        if without is not None and not any(numbers_of(fields)):
            without.add(uid)
            continue
        try:
            values.append(tuple(map(number, numbers_of(fields))))
        except ValueError:
            problem = _first_problem(columns[1:], numbers_of(fields))
            raise InputError(f"{path}, row {row}: {problem}") from None
        uids.append(uid)
        rows.append(row)
    table = np.array(values, dtype=np.float64).reshape(-1, 4)
    if (bad := np.argwhere(~np.isfinite(table))).size:
        row = bad[0, 0]
        raise InputError(f"{path}, row {rows[row]}: {_first_problem(columns[1:], table[row])}")
    return uids, table, rows


def _first_problem(names: Sequence[str], values: Iterable[str | float]) -> str:
    """Describe the first value that is not a finite number."""
    for name, value in zip(names, values, strict=True):
        with contextlib.suppress(ValueError):
            if math.isfinite(number(str(value))):
                continue
        return f"{name}: expected a finite number, got {str(value)!r}"
    raise AssertionError("every value is a finite number")


def _by_series(uids: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """Split the rows by series; series and rows keep their order."""
    members: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        members.setdefault(uid, []).append(row)
    return {uid: values[rows] for uid, rows in members.items()}


def _joined(tables: Mapping[str, np.ndarray]) -> Iterable[list]:
    """The inverse of `_by_series`: rows that begin with the series id."""
    return ([uid, *row] for uid, table in tables.items() for row in table.tolist())


def _write_table(path: str | Path, rows: Iterable[Sequence]) -> None:
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(rows)
