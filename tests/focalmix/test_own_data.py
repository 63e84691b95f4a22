"""The page "Your own data": its tables are read, and its worked example runs as it is printed."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.cli import main
from fmkernels.focalmix.data.annotations import read_annotations
from fmkernels.focalmix.data.formats import scan_id
from fmkernels.focalmix.data.own import open_data
from fmkernels.focalmix.data.tables import read_candidates
from tests.focalmix.conftest import FLIPPED, Scan, write_scan
from tests.focalmix.kinds import KINDS, write_dicom
from tests.focalmix.test_cli import SETTINGS

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")
NODULES = [(8.3, 16.6, 15.2, 9.0), (15.5, 25.0, 30.4, 6.0), (12.0, 12.0, 20.0, 12.0)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def scans(count: int) -> list[Scan]:
    return [
        Scan(
            f"p{k:02}",
            0,
            spacing=(2.5, 2.0, 2.0 + k / 10),
            direction=FLIPPED if k % 3 == 1 else Scan("", 0).direction,
            nodules=NODULES[k % 3 : k % 3 + 2],
        )
        for k in range(count)
    ]


def rows_of(image: sitk.Image, scan: Scan, name: str, fold: int) -> list[list]:
    """The rows of a table."""
    points = [
        [*image.TransformContinuousIndexToPhysicalPoint((x, y, z)), diameter]
        for z, y, x, diameter in scan.nodules
    ]
    return [[name, *point, fold] for point in points]


def write_rows(folder: Path, rows: list[list]) -> None:
    with open(folder / "annotations.csv", "w", newline="") as file:
        csv.writer(file).writerows([["scan", "x", "y", "z", "diameter", "fold"], *rows])


def test_the_table_and_the_json_of_the_page_are_read(tmp_path):
    (table,) = (block for block in blocks("text") if block.startswith("scan,"))
    (tmp_path / "annotations.csv").write_text(table)
    rows = read_annotations(tmp_path / "annotations.csv")
    assert [row.fold for row in rows] == [0, 0, 8, 1] and rows[3].finding is None
    (content,) = blocks("json")
    (tmp_path / "annotations.json").write_text(content)
    first, second = read_annotations(tmp_path / "annotations.json")
    assert first.finding == (-68, -121, -240, 8) and second == ("p03.nii.gz", second.where, None, 7)


@pytest.mark.filterwarnings("ignore::fmkernels.focalmix.errors.InputWarning")
def test_the_worked_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = []
    for k, scan in enumerate(scans(5)):
        image = write_scan(tmp_path / "any.mha", scan)
        write_dicom(tmp_path / "hospital" / "patients" / scan.uid / "CT", image, f"1.2.3.{k}")
        rows += rows_of(image, scan, scan.uid, (0, 1, 7, 8, 9)[k])
    write_rows(tmp_path / "hospital", rows)
    image = write_scan(tmp_path / "any.mha", scans(6)[5])
    write_dicom(tmp_path / "archive" / "q00", image, "1.2.4.0")
    (example,) = (block for block in blocks("sh") if "hospital" in block)
    commands = [shlex.split(line) for line in example.replace("\\\n", " ").splitlines()]
    assert [command[1] for command in commands] == ["check", "train", "train", "evaluate", "detect"]
    for _, *argv in commands:
        if argv[0] == "train":  # the page's own subsets, not those of the settings
            argv += [option for option in SETTINGS if "subsets" not in option]
        if argv[0] == "detect":
            argv += ["--device=cpu"]
        assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "nothing suspicious found" in out and "CPM" in out
    assert Path("check.png").exists() and Path("froc.png").exists()
    assert set(read_candidates("findings.csv")) == {"1.2.4.0"}
    assert set(read_candidates("runs/focalmix/candidates.csv")) <= {"1.2.3.3", "1.2.3.4"}


@pytest.mark.parametrize("kind", KINDS)
def test_ten_kinds_of_input_give_the_same_boxes(tmp_path, kind, capsys):
    """Through check and 30 steps of training, to a tenth of a millimeter."""
    rows, expected, root = [], {}, tmp_path / "own"
    for k, scan in enumerate(scans(3)):
        image = write_scan(tmp_path / "any.mha", scan)
        uid = f"1.2.3.{k}"
        path = KINDS[kind](root, image, uid)
        assert scan_id(path) == uid
        rows += rows_of(image, scan, uid, k)
        expected[uid] = np.array([row[1:5] for row in rows if row[0] == uid])
    write_rows(root, rows)
    assert main(["check", str(root), "--workers=1", "--out", str(tmp_path / "check.png")]) == 0
    assert "nothing suspicious found" in capsys.readouterr().out
    options = [option for option in SETTINGS if "subsets" not in option and "steps" not in option]
    options += ["--steps=30", "--train-subsets=0,1", "--validation-subsets=", "--test-subsets=2"]
    assert main(["train", str(root), "--out", str(tmp_path / "run"), *options]) == 0
    data = open_data(root, spacing=(2.5, 2.0, 2.0))
    for uid, nodules in expected.items():
        volume, (boxes, _) = data.volume(uid), data.boxes(uid)
        corners = np.stack([volume.to_world(boxes[:, :3]), volume.to_world(boxes[:, 3:])])
        centers, sizes = corners.mean(axis=0), np.ptp(corners, axis=0)
        np.testing.assert_allclose(centers, nodules[:, :3], atol=0.1)
        np.testing.assert_allclose(sizes, nodules[:, [3, 3, 3]], atol=0.1)
