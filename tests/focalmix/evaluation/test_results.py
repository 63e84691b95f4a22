"""Findings in files: on the grid of the stored scan, where 3D Slicer shows them, scan by scan."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.data.formats import check_header, load_volume
from fmkernels.focalmix.data.headers import Header
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.detect import to_findings
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.results import (
    COLUMNS,
    Finding,
    ScanFindings,
    open_table,
    remove_slicer,
    slicer_path,
    write_json,
    write_slicer,
)
from fmkernels.focalmix.model.inference import Detections
from tests.focalmix.conftest import FLIPPED, IDENTITY, Scan, write_scan

ANGLE = math.radians(20)
OBLIQUE = (
    *(math.cos(ANGLE), -math.sin(ANGLE), 0.0),
    *(math.sin(ANGLE), math.cos(ANGLE), 0.0),
    *(0.0, 0.0, 1.0),
)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0)
MIRRORED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
BOXES = np.array([[8.5, 20, 14, 14.25, 26, 20], [2, 3, 4, 5, 6, 7], [30, 1, 1, 32, 3, 3]])


def detected(volume, probabilities=(0.9, 0.5, 0.1)) -> Detections:
    boxes, scores = BOXES.astype(np.float32), np.array(probabilities, np.float32)
    world = volume.to_world(boxes.astype(float).reshape(-1, 2, 3).mean(1))
    return Detections(boxes, scores, np.column_stack([world, scores]))


@pytest.fixture(params=[IDENTITY, FLIPPED, OBLIQUE, CORONAL, MIRRORED])
def scan(request, tmp_path):
    """A stored scan: its path, and what SimpleITK makes of it."""
    path = tmp_path / "scan.mhd"
    write_scan(path, Scan("scan", 0, direction=request.param))
    return path, sitk.ReadImage(str(path))


def corners(roi: dict) -> np.ndarray:
    """World corners [8, 3] of a region of interest, as 3D Slicer computes them."""
    axes = np.reshape(roi["orientation"], (3, 3))
    signs = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij"), -1).reshape(-1, 3)
    return roi["center"] + (signs * roi["size"]) @ axes.T


def test_findings_lie_on_the_stored_grid(scan):
    path, image = scan
    volume = load_volume(path, (2.0, 1.0, 1.0))
    findings = to_findings(detected(volume), volume, check_header(path), 0.5)
    assert [finding.probability for finding in findings] == [np.float32(0.9), 0.5]
    for finding, box in zip(findings, BOXES, strict=False):
        assert finding.diameter == pytest.approx(
            np.prod((box[3:] - box[:3]) * (2, 1, 1)) ** (1 / 3), abs=1e-3
        )
        low, high = np.reshape(finding.box, (2, 3))
        center = image.TransformPhysicalPointToContinuousIndex(finding.point)
        np.testing.assert_allclose((low + high) / 2 - 0.5, center, atol=2e-3)
        np.testing.assert_allclose(
            (high - low) * image.GetSpacing(), ((box[3:] - box[:3]) * (2, 1, 1))[::-1], atol=3e-3
        )
        assert finding.slice == round(center[2])


def test_the_slice_of_a_box_that_ends_outside_is_the_nearest(tmp_path):
    write_scan(tmp_path / "scan.mhd", Scan("scan", 0))  # 24 slices of 2.5 mm, 60 of 1 mm
    volume = load_volume(tmp_path / "scan.mhd", (1.0, 1.0, 1.0))
    boxes = np.array([[59.5, 1, 1, 62.9, 4, 4]], np.float32)
    found = Detections(boxes, np.ones(1, np.float32), np.ones((1, 4)))
    assert to_findings(found, volume, check_header(tmp_path / "scan.mhd"), 0)[0].slice == 23


def test_slicer_s_boxes_are_read_back_onto_the_scan(scan):
    path, image = scan
    header = check_header(path)
    volume = load_volume(path, (2.0, 1.0, 1.0))
    findings = to_findings(detected(volume), volume, header, 0.0)
    write_slicer(path.with_suffix(".mrk.json"), ScanFindings("scan", "", "", findings), header)
    content = json.loads(path.with_suffix(".mrk.json").read_text())
    assert "markups-schema-v1.0.3" in content["@schema"] and len(content["markups"]) == 3
    for roi, finding in zip(content["markups"], findings, strict=True):
        assert (roi["type"], roi["roiType"], roi["coordinateSystem"], roi["coordinateUnits"]) == (
            "ROI",
            "Box",
            "LPS",
            "mm",
        )
        assert np.linalg.det(np.reshape(roi["orientation"], (3, 3))) == pytest.approx(1)
        index = [
            image.TransformPhysicalPointToContinuousIndex(corner)
            for corner in corners(roi).tolist()
        ]
        low, high = np.min(index, 0) + 0.5, np.max(index, 0) + 0.5
        np.testing.assert_allclose([*low, *high], finding.box, atol=2e-3)
        assert roi["controlPoints"][0]["position"] == roi["center"] == list(finding.point)


def finding(probability: float) -> Finding:
    return Finding((1.25, -2.0, 1 / 3), probability, 6.5, 7, (1.0, 2.0, 3.0, 4.0, 5.0, 6.5))


SCANS = [
    ScanFindings("1.2.3", "a, b.mhd", "s1", [finding(0.75), finding(0.1)]),
    ScanFindings("nothing", "n.mhd", "s2", []),
    ScanFindings("last", 'quo"te.mhd', "s3", [finding(0.5)] * 3),
]


def write(path: Path, scans=SCANS, model="m", threshold=0.1) -> None:
    with open_table(path, model, threshold) as table:
        for scan in scans:
            table.add(scan)


def finished(path: Path, **options) -> list[ScanFindings]:
    with open_table(path, **{"model": "m", "threshold": 0.1} | options) as table:
        return list(table.finished.values())


def test_a_table_is_read_back_and_is_a_submission(tmp_path):
    path = tmp_path / "found.csv"
    write(path)
    assert finished(path) == SCANS
    lines = path.read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS) and len(lines) == 7
    candidates = read_candidates(path)
    assert {uid: len(rows) for uid, rows in candidates.items()} == {
        "nothing": 0, "1.2.3": 2, "last": 3,
    }  # fmt: skip
    assert candidates["1.2.3"].tolist() == [[1.25, -2.0, 1 / 3, 0.75], [1.25, -2.0, 1 / 3, 0.1]]


def test_a_table_cut_anywhere_is_continued(tmp_path):
    """Whole scans stay; the one that was being written is taken back."""
    path = tmp_path / "found.csv"
    write(path)
    whole = path.read_bytes()
    ends = [0, whole.index(b"\n") + 1]
    for scan in SCANS:
        rows = max(1, len(scan.findings))
        end = ends[-1]
        for _ in range(rows):
            end = whole.index(b"\n", end) + 1
        ends.append(end)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = max(0, sum(end <= cut for end in ends) - 2)
        assert finished(path) == SCANS[:kept], cut
        write(path, SCANS[kept:])
        assert path.read_bytes() == whole, cut


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("my thesis", "got the columns my thesis; choose another --out"),
        ("seriesuid,x\n1,2\n", "got the columns seriesuid,x; choose"),
        (f"{','.join(COLUMNS)}\n1,2\n", "got a row of 2 fields"),
        (b"\xff\xfe\n", "got "),
    ],
)
def test_another_file_is_refused_and_stays(tmp_path, content, message):
    path = tmp_path / "found.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"found\.csv: expected a table of fmkernels detect"
    ) as error:
        finished(path)
    assert message in str(error.value) and path.read_bytes() == before


@pytest.mark.parametrize("options", [{"model": "other"}, {"threshold": 0.2}])
def test_findings_of_another_model_are_refused(tmp_path, options):
    write(tmp_path / "found.csv")
    with pytest.raises(InputError, match="got findings of another model or threshold"):
        finished(tmp_path / "found.csv", **options)


@pytest.mark.skipif(os.name == "nt", reason="needs a device of POSIX")
def test_a_device_gets_the_rows():
    write(Path("/dev/null"))
    assert finished(Path("/dev/null")) == []


def test_json_holds_all_scans(tmp_path):
    with open_table(tmp_path / "found.csv", "m", 0.1) as table:
        for scan in SCANS:
            table.add(scan)
        write_json(tmp_path / "found.json", table)
    content = json.loads((tmp_path / "found.json").read_text())
    assert (content["model"], content["threshold"]) == ("m", 0.1)
    assert [scan["seriesuid"] for scan in content["scans"]] == ["1.2.3", "nothing", "last"]
    assert [len(scan["findings"]) for scan in content["scans"]] == [2, 0, 3]
    first = content["scans"][0]["findings"][0]
    assert list(first) == list(COLUMNS[1:13])
    assert list(first.values()) == [1.25, -2.0, 1 / 3, 0.75, 6.5, 7, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5]


def test_ids_become_file_names_inside_of_the_folder(tmp_path):
    assert slicer_path(tmp_path, "1.2.3").name == "1.2.3.mrk.json"
    assert slicer_path(tmp_path, "../a b").parent == tmp_path
    names = {slicer_path(tmp_path, uid) for uid in ("a/b", "a_b", "a%2Fb", "a b")}
    assert len(names) == 4


def test_scans_can_be_taken_out_of_a_table(tmp_path):
    path = tmp_path / "found.csv"
    write(path)
    with open_table(path, "m", 0.1) as table:
        table.drop({"1.2.3"})
        assert list(table.finished.values()) == SCANS[1:]
        assert path.read_text().splitlines()[1].startswith("nothing,")
        table.add(SCANS[0])
    assert finished(path) == [*SCANS[1:], SCANS[0]]


def test_files_of_earlier_results_are_removed(tmp_path):
    header = Header((), (1, 1, 1), (1, 1, 1), (0, 0, 0), tuple(map(tuple, np.eye(3))), None)
    for uid in ("old", "new", "edited"):
        write_slicer(slicer_path(tmp_path, uid), SCANS[0], header)
    edited = slicer_path(tmp_path, "edited")
    edited.write_text(json.dumps(json.loads(edited.read_text()), indent=4))
    (tmp_path / "other.mrk.json").write_text("{}")
    remove_slicer(tmp_path, [slicer_path(tmp_path, "new")])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"new.mrk.json", "edited.mrk.json", "other.mrk.json"}
