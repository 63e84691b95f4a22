"""Detection in many scans: results as they come, bad scans passed over, a second call goes on."""

import hashlib
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.data.dataset import name_scans, scan_state
from fmkernels.focalmix.data.formats import (
    SUPPORTED,
    check_header,
    hu_problem,
    load_volume,
    read_scan,
    scan_id,
)
from fmkernels.focalmix.data.headers import Header
from fmkernels.focalmix.data.volume import Volume, boxes_on, index_to_box, reoriented
from fmkernels.focalmix.errors import InputError, InputWarning, first_line, is_out_of_memory
from fmkernels.focalmix.evaluation import figures
from fmkernels.focalmix.evaluation.froc import count
from fmkernels.focalmix.evaluation.results import (
    Finding,
    ScanFindings,
    Table,
    open_table,
    remove_slicer,
    slicer_path,
    write_json,
    write_slicer,
)
from fmkernels.focalmix.model.inference import Detections, detect
from fmkernels.focalmix.training.checkpoint import CHECKPOINT, load_run

FORMATS = ("csv", "json", "slicer")

SHEET_PANELS = 32
"""Maximum number of findings in the picture: the most probable."""


@dataclass
class Report:
    """What `detect_scans` has done."""

    table: Table
    failed: dict[Path, str]
    """Scans that could not be searched, and why."""
    searched: int = 0
    """Scans searched by this call; the others of the table are from earlier ones."""
    seconds: float = 0.0
    """Time that they took, reading included."""
    written: list[Path] = field(default_factory=list)
    """Files and folders of the results."""


def detect_scans(
    run: str | Path,
    scans: Iterable[str | Path],
    out: str | Path,
    *,
    threshold: float = 0.0,
    formats: Iterable[str] = ("csv",),
    sheet: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Search scans for nodules, one after another.

    Each finished scan is in the table before the next one begins. Scans that the table already
    holds are passed over, unless their files have changed. So are scans that cannot be read or do
    not fit into memory; the report lists them.

    Args:
        run: the folder of a run.
        scans: scan files, folders of a DICOM series, or folders with such inside, at any depth.
        out: the table (CSV), which is continued if it exists.
        threshold: minimum probability of a finding; at most 100 findings of a scan are kept.
        formats: of `FORMATS`; csv is always written. json is a file beside the table, slicer a
            folder beside it with markups for 3D Slicer, one file per scan with findings.
        sheet: a picture of the most probable findings of the table, at most `SHEET_PANELS`.
        device: the device to search on.

    Raises:
        InputError: there is no run; a scan is missing or given twice; ``out`` is no file or holds
            something else.
        FloatingPointError: the output of the detector is not finite.
    """
    run, out, device, formats = Path(run), Path(out), torch.device(device), set(formats)
    config, model = load_run(run, device)
    digest = hashlib.sha256((run / CHECKPOINT).read_bytes()).hexdigest()[:12]
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"{out}: expected a file name in an existing folder")
    beside = out.with_suffix(".json"), out.with_name(f"{out.stem}-slicer")
    if len(formats) > 1 and (out in beside or (out.exists() and not out.is_file())):
        raise InputError(f"{out}: expected the name of a CSV file, others are written beside it")
    if sheet is not None:
        figures.picture_format(sheet)
    paths, failed = list_scans(scans)
    with open_table(out, digest, threshold) as table:
        report = Report(table, failed, written=[out])
        new = {uid for uid, path in paths.items() if not _is_finished(table, uid, path)}
        table.drop(new & table.finished.keys())  # their files have changed
        if "slicer" in formats:
            beside[1].mkdir(exist_ok=True)
            report.written.append(beside[1])
        for uid, path in (bar := tqdm(paths.items(), "detecting", unit="scan")):
            if uid not in new and "slicer" not in formats:
                continue
            began = time.monotonic()
            try:
                state, header = scan_state(path), check_header(path)
                if uid in new:
                    found = _search(config, model, path, header, threshold)
                    scan = ScanFindings(uid, str(path.absolute()), state, found)
            except KeyboardInterrupt:
                finished = count(len(table.finished), "scan")
                raise KeyboardInterrupt(
                    f"stopped; {out} holds {finished}, the same command goes on"
                ) from None
            except (InputError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                failed[path] = first_line(error)
                continue
            if uid in new:
                table.add(scan)
                seconds = time.monotonic() - began
                report.searched, report.seconds = report.searched + 1, report.seconds + seconds
                findings, peak = count(len(scan.findings), "finding"), peak_memory(device)
                bar.write(f"{uid}: {findings}, {seconds:.1f} s, {peak}", file=sys.stderr)
            if "slicer" in formats and table.finished[uid].findings:
                write_slicer(slicer_path(beside[1], uid), table.finished[uid], header)
        if "slicer" in formats:
            with_findings = [uid for uid, scan in table.finished.items() if scan.findings]
            remove_slicer(beside[1], [slicer_path(beside[1], uid) for uid in with_findings])
        if "json" in formats:
            write_json(beside[0], table)
            report.written.append(beside[0])
        if sheet is not None and (panels := _panels(table)):
            figures.draw_examples(sheet, panels)
            report.written.append(Path(sheet))
    return report


def list_scans(given: Iterable[str | Path]) -> tuple[dict[str, Path], dict[Path, str]]:
    """The scans in files and folders by their ids, and those without an id with the reason.

    Raises:
        InputError: a path does not exist or is a folder without a scan; two scans have one id.
    """
    paths: dict[str, Path] = {}
    failed: dict[Path, str] = {}
    for path in map(Path, given):
        if not path.exists():
            raise InputError(f"{path}: expected a scan ({SUPPORTED}), found no such file or folder")
        before = len(failed)
        found = name_scans(path, failed) if path.is_dir() else {scan_id(path): path}
        if not found and len(failed) == before:
            raise InputError(f"{path}: expected scans ({SUPPORTED}) in this folder, found none")
        for uid, scan in found.items():
            if paths.setdefault(uid, scan).absolute() != scan.absolute():
                raise InputError(
                    f"{scan}: expected each scan once, got {paths[uid]} with the same id {uid}; "
                    "give the folder that holds both"
                )
    return paths, failed


def _is_finished(table: Table, uid: str, path: Path) -> bool:
    if uid not in table.finished:
        return False
    if (file := table.finished[uid].file) != str(path.absolute()):
        raise InputError(
            f"{table.path}: expected no other scan with the id {uid} of {path}, got {file}; "
            "choose another --out"
        )
    return table.finished[uid].state == scan_state(path)


def _search(
    config: Config,
    model: torch.nn.Module,
    path: Path,
    header: Header,
    threshold: float,
) -> list[Finding]:
    volume = load_volume(path, config.spacing)
    if problem := hu_problem(volume.voxels):
        raise InputError(f"{path}: {problem}")
    return to_findings(detect(config, model, volume), volume, header, threshold)


def to_findings(
    found: Detections, volume: Volume, header: Header, threshold: float
) -> list[Finding]:
    """The detections of at least a probability, on the grid of the stored scan.

    Args:
        found: the detections in the resampled scan.
        volume: the resampled scan.
        header: the stored scan; both grids begin at the same corner and have the same axes.
        threshold: minimum probability.
    """
    chosen = found.probabilities >= threshold
    boxes = found.boxes[chosen].astype(np.float64).reshape(-1, 2, 3)
    sides = (boxes[:, 1] - boxes[:, 0]) * volume.spacing  # mm
    stored = boxes * (np.array(volume.spacing) / header.spacing)
    slices = np.floor(stored[:, :, 0].mean(axis=1)).clip(0, header.shape[0] - 1).astype(int)
    return [
        Finding((x, y, z), probability, round(diameter, 3), index, tuple(box))
        for (x, y, z, probability), diameter, index, box in zip(
            found.candidates[chosen].tolist(),
            np.cbrt(sides.prod(axis=1)).tolist(),
            slices.tolist(),
            stored[:, :, ::-1].reshape(-1, 6).round(3).tolist(),
            strict=True,
        )
    ]


def _panels(table: Table) -> list[figures.Panel]:
    """Slices through the most probable findings of a table, from the stored scans."""
    gone = {
        uid
        for uid, scan in table.finished.items()
        if scan.findings and scan_state(Path(scan.file)) != scan.state
    }
    for uid in gone:
        warnings.warn(
            f"{table.finished[uid].file}: expected the scan that was searched, found it moved or "
            "changed: its findings are not drawn",
            InputWarning,
            stacklevel=2,
        )
    ranked = sorted(
        (-finding.probability, uid, number)
        for uid, scan in table.finished.items()
        for number, finding in enumerate(scan.findings if uid not in gone else ())
    )[:SHEET_PANELS]
    panels: dict[tuple[str, int], figures.Panel] = {}
    for uid in dict.fromkeys(uid for _, uid, _ in ranked):  # reads each scan once
        scan = table.finished[uid]
        volume = read_scan(scan.file)
        for _, other, number in ranked:
            if other == uid:
                panels[uid, number] = finding_panel(volume, scan, number)
    return [panels[uid, number] for _, uid, number in ranked]


def finding_panel(
    volume: Volume, scan: ScanFindings, number: int, *, side: float = 100.0
) -> figures.Panel:
    """A square of ``side`` mm around a finding in its axial slice, with all findings there.

    It is drawn as radiologists see it, however the scan is stored. The title has the number of the
    stored slice if that is axial.

    Args:
        volume: the stored scan.
        scan: its findings.
        number: index of the finding.
        side: length of the square in mm; it is cut at the edges of the scan.
    """
    finding, shown = scan.findings[number], reoriented(volume)
    stored = np.array([finding.box for finding in scan.findings])[:, [2, 1, 0, 5, 4, 3]]
    middle = stored[number].reshape(2, 3).mean(0)
    middle[0] = index_to_box(finding.slice)
    (center,) = shown.from_world(volume.to_world(middle))
    index = int(np.clip(np.floor(center[0]), 0, len(shown.voxels) - 1))
    boxes = boxes_on(shown, stored, volume)
    half = side / 2 / np.array(shown.spacing)
    low = np.floor(center - half).clip(0).astype(int)[1:]
    high = np.ceil(center + half).astype(int)[1:]
    image = shown.voxels[index, low[0] : high[0], low[1] : high[1]]
    cut = (boxes[:, 0] < index + 1) & (index < boxes[:, 3])
    plane = boxes[:, [1, 2, 4, 5]] - [*low, *low]
    seen = (plane[:, 2:] > 0).all(axis=1) & (plane[:, :2] < image.shape).all(axis=1)
    scores = [finding.probability for finding in scan.findings]
    is_axial = np.abs(np.array(volume.direction)[:, 2]).argmax() == 2
    return figures.Panel(
        image,
        predicted=np.column_stack([plane, scores])[cut & seen],
        title=scan.uid[-16:] + (f", slice {finding.slice}" if is_axial else ""),
        aspect=shown.spacing[1] / shown.spacing[2],
        subject=plane[number],
    )


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, for people."""
    text = f"peak memory {_peak_bytes() / 1e9:.2f} GB"
    if device.type == "cuda":
        text += f", of the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    return text


def _peak_bytes() -> int:
    try:  # getrusage counts what the process was before exec, too
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
