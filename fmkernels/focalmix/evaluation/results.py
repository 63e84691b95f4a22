"""The findings of `fmkernels detect` in files: a CSV table, JSON, and markups for 3D Slicer.

The table begins with the columns of LUNA16's submissions. It grows scan by scan, so that what is
finished survives whatever stops the process, and says which scans are finished.
"""

import contextlib
import csv
import io
import json
import os
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fmkernels.focalmix.data.headers import Header
from fmkernels.focalmix.data.tables import CANDIDATE_COLUMNS
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.files import atomic_write, lock_file, naming, open_stream, write_text

_BOX = ("x1", "y1", "z1", "x2", "y2", "z2")
COLUMNS = (
    *CANDIDATE_COLUMNS, "diameter_mm", "slice", *_BOX, "finding", "findings", "threshold", "model",
    "file", "state",
)  # fmt: skip
"""The columns of the table; see docs/detect.md."""

SLICER_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/"
    "Schema/markups-schema-v1.0.3.json#"
)


class Finding(NamedTuple):
    """A detection in a scan."""

    point: tuple[float, float, float]
    """World x, y, z of the center in mm (LPS)."""
    probability: float
    diameter: float
    """Diameter in mm of the sphere whose bounding box has the volume of the box."""
    slice: int
    """Index of the stored slice through the center, from 0."""
    box: tuple[float, ...]
    """x1, y1, z1, x2, y2, z2 in stored voxels: voxel i covers [i, i + 1)."""


@dataclass(frozen=True)
class ScanFindings:
    """What was found in a scan, most probable first."""

    uid: str
    file: str
    state: str
    """What changes with the file; see `dataset.scan_state`."""
    findings: Sequence[Finding]


class Table:
    """The CSV table of `open_table`."""

    def __init__(
        self, path: Path, stream: BinaryIO | io.FileIO, model: str, threshold: float
    ) -> None:
        self.path, self.model, self.threshold = path, model, threshold
        self.finished: dict[str, ScanFindings] = {}
        """The scans in the table, by their ids."""
        self._stream, self._is_file = stream, isinstance(stream, io.FileIO)

    def add(self, scan: ScanFindings) -> None:
        """Write the rows of a scan; they are on the disk when this returns."""
        self._write(self._rows(scan))
        self.finished[scan.uid] = scan

    def drop(self, uids: Collection[str]) -> None:
        """Take the rows of some scans out; the others are in the file at every moment."""
        if not uids:
            return
        for uid in uids:
            del self.finished[uid]
        rows = [COLUMNS, *(row for scan in self.finished.values() for row in self._rows(scan))]
        self._stream.close()
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(_as_csv(rows))
        self._stream = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        lock_file(self._stream)
        self._stream.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._stream.close()

    def _rows(self, scan: ScanFindings) -> Iterator[list[Any]]:
        end = [len(scan.findings), self.threshold, self.model, scan.file, scan.state]
        if not scan.findings:
            yield [scan.uid, *[""] * (len(COLUMNS) - 1 - len(end)), *end]
        for number, finding in enumerate(scan.findings, start=1):
            point, *rest, box = finding
            yield [scan.uid, *point, *rest, *box, number, *end]

    def _write(self, rows: Iterable[Sequence[Any]]) -> None:
        content = _as_csv(rows)
        with naming(self.path):
            while content:
                content = content[self._stream.write(content) :]
            self._stream.flush()
            if self._is_file:
                os.fsync(self._stream.fileno())

    def _read(self) -> None:
        """Read the finished scans, and cut off one whose rows are not complete."""
        content = self._stream.read()
        end = kept = 0

        def lines() -> Iterator[str]:
            nonlocal end
            whole = content[: content.rfind(b"\n") + 1].decode()
            for line in io.StringIO(whole, newline=""):
                end += len(line.encode())
                yield line

        rows: list[list[str]] = []
        try:
            reader = csv.reader(lines(), strict=True)
            header = next(reader, None)
            begun = header is None and ",".join(COLUMNS).encode().startswith(content)
            if header != list(COLUMNS) and not begun:
                got = content.decode().splitlines()[0] if header is None else ",".join(header)
                raise ValueError(f"the columns {got}")
            kept = end
            for row in reader:
                rows.append(row)
                scan = self._scan(rows)
                if scan is not None:
                    self.finished[scan.uid] = scan
                    rows, kept = [], end
        except (ValueError, csv.Error) as error:
            raise InputError(
                f"{self.path}: expected a table of fmkernels detect to continue, got {error}; "
                "choose another --out"
            ) from None
        self._stream.truncate(kept)
        self._stream.seek(kept)
        if not kept:
            self._write([COLUMNS])

    def _scan(self, rows: list[list[str]]) -> ScanFindings | None:
        """The scan of some rows; None if there are more to come."""
        row = rows[-1]
        if len(row) != len(COLUMNS):
            raise ValueError(f"a row of {len(row)} fields")
        fields = dict(zip(COLUMNS, row, strict=True))
        if (fields["model"], float(fields["threshold"])) != (self.model, self.threshold):
            raise ValueError("findings of another model or threshold")
        if len(rows) < int(fields["findings"]):
            return None
        findings = [] if fields["findings"] == "0" else [_finding(row) for row in rows]
        return ScanFindings(fields["seriesuid"], fields["file"], fields["state"], findings)


def _as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _finding(row: Sequence[str]) -> Finding:
    x, y, z, probability, diameter, index, *box = row[1:13]
    point = float(x), float(y), float(z)
    return Finding(point, float(probability), float(diameter), int(index), tuple(map(float, box)))


@contextmanager
def open_table(path: Path, model: str, threshold: float) -> Iterator[Table]:
    """Open a table of findings, to continue it if it exists.

    Args:
        path: the file; a device, a pipe or ``/dev/stdout`` gets the rows as they come.
        model: a digest of the detector.
        threshold: minimum probability of the findings.

    Raises:
        InputError: the file holds something else, or findings of another model or threshold;
            another process is writing it.
    """
    stream = open_stream(path)
    if stream is not None:
        with stream:
            table = Table(path, stream, model, threshold)
            table._write([COLUMNS])
            yield table
        return
    with naming(path):
        path.touch()
    # without a buffer, which closing the file would try to write again
    file = open(path, "r+b", buffering=0)  # noqa: SIM115
    with contextlib.closing(Table(path, file, model, threshold)) as table:
        if not lock_file(file):
            raise InputError(f"{path}: expected an unused file, another process is writing it")
        table._read()
        yield table


def write_json(path: Path, table: Table) -> None:
    """Write the findings of all scans of a table as JSON, with the names of its columns."""
    scans = [
        {
            "seriesuid": scan.uid,
            "file": scan.file,
            "findings": [
                dict(zip(COLUMNS[1:13], [*point, *rest, *box], strict=True))
                for point, *rest, box in scan.findings
            ],
        }
        for scan in table.finished.values()
    ]
    values = {"model": table.model, "threshold": table.threshold, "scans": scans}
    write_text(path, json.dumps(values, indent=1) + "\n")


def write_slicer(path: Path, scan: ScanFindings, header: Header) -> None:
    """Write the findings of a scan as regions of interest that 3D Slicer shows as boxes.

    Each is a markups node of type ROI in LPS with the orientation of the scan. Slicer opens all of
    them from the one file, beside the scan.
    """
    markups = [
        _roi(f"{number}: {finding.probability:.2f}, {finding.diameter:.1f} mm", finding, header)
        for number, finding in enumerate(scan.findings, start=1)
    ]
    write_text(path, _slicer_text(markups))


def _slicer_text(markups: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps({"@schema": SLICER_SCHEMA, "markups": markups}, indent=1) + "\n"


def _roi(name: str, finding: Finding, header: Header) -> Mapping[str, Any]:
    low, high = np.reshape(finding.box, (2, 3))
    axes = np.array(header.direction)  # columns: axes x, y, z of the scan
    axes[:, 2] *= np.sign(np.linalg.det(axes))  # right-handed; the box is the same
    return {
        "type": "ROI",
        "name": name,
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": True,
        "roiType": "Box",
        "center": list(finding.point),
        "orientation": axes.ravel().tolist(),
        "size": ((high - low) * header.spacing[::-1]).tolist(),
        "insideOut": False,
        "controlPoints": [
            {"id": "1", "label": name, "position": list(finding.point), "locked": True}
        ],
        "display": {"color": [1.0, 0.63, 0.15], "selectedColor": [1.0, 0.63, 0.15], "opacity": 1.0},
    }


def slicer_path(folder: Path, uid: str) -> Path:
    """The markups file of a scan in a folder."""
    return folder / f"{urllib.parse.quote(uid, safe=' ')}.mrk.json"


def remove_slicer(folder: Path, keep: Iterable[Path]) -> None:
    """Remove what `write_slicer` wrote to a folder but for some files. Other files stay."""
    head = _slicer_text([])[: -len("[]\n}\n")]
    for path in set(folder.glob("*.mrk.json")) - set(keep):
        with open(path, "rb") as file:
            is_ours = file.read(len(head)) == head.encode()
        if is_ours:
            path.unlink()
