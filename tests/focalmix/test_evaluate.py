"""Candidates against data sets and against tables alone: what is counted, and what is doubted."""

import json
import re
from pathlib import Path

import pytest

from fmkernels.focalmix.cli import main
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluate import NO_TABLE, evaluate, read_truth
from tests.focalmix.conftest import SCANS, write_luna

IDS = ["007", "008", "009", "010"]
NODULES = {"007": [(1, 2, 3, 6)], "008": [(1, 2, 3, 9), (50, 2, 3, 20)], "010": [(1, 2, 3, -1)]}


@pytest.fixture
def tables(tmp_path) -> Path:
    """Four scans, one without a nodule, and candidates that hit the first nodule of each."""
    rows = [f"{uid},{x},{y},{z},{d}" for uid, found in NODULES.items() for x, y, z, d in found]
    write(tmp_path / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", *rows)
    write(
        tmp_path / "annotations_excluded.csv",
        "seriesuid,coordX,coordY,coordZ,diameter_mm",
        *(f"{uid},90,2,3,-1" for uid in IDS),
    )
    write(tmp_path / "seriesuids.csv", *IDS)
    write_candidates(tmp_path / "found.csv", IDS)
    return tmp_path


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def write_candidates(path: Path, ids) -> None:
    places = [(1, 2, 3, 0.9), (1, 2, 3.5, 0.8), (90, 2, 3, 0.7), (200, 2, 3, 0.1)]
    rows = [f"{uid},{x},{y},{z},{p}" for uid in ids for x, y, z, p in places]
    write(path, "seriesuid,coordX,coordY,coordZ,probability", *rows)


def test_tables_alone(tables):
    given = {
        "annotations": tables / "annotations.csv",
        "excluded": tables / "annotations_excluded.csv",
        "series": tables / "seriesuids.csv",
    }
    for truth in (read_truth(tables), read_truth(None, **given)):
        result = evaluate(tables / "found.csv", truth, bootstraps=0)
        details = result.froc.details
        assert (result.froc.n_scans, result.froc.n_nodules, details.n_candidates) == (4, 4, 16)
        # in 009 the candidates on the place of the others' nodules are false
        assert (details.n_true, details.n_false, details.n_ignored, details.n_repeated) == (
            3, 6, 4, 3,
        )  # fmt: skip
        assert [(miss.uid, miss.point, miss.diameter) for miss in details.misses] == [
            ("008", (50, 2, 3), 20)
        ]
        assert result.warnings == result.notes == result.without_candidates == []


def test_own_annotations_may_name_files(tables):
    write(tables / "own.csv", "scan,x,y,z,diameter", "007.nii.gz,-1,-2,3,6", "a/008.mhd,-1,-2,3,9")
    truth = read_truth(None, annotations=tables / "own.csv", series=tables / "seriesuids.csv",
                       excluded=NO_TABLE, coordinates="RAS")  # fmt: skip
    result = evaluate(tables / "found.csv", truth, bootstraps=0)
    assert result.froc.details.n_true == result.froc.n_nodules == 2 and not result.warnings


def test_ids_without_a_leading_zero_are_not_overlooked(tables):
    """Of some scans: of all of them is an error."""
    write_candidates(tables / "found.csv", ["7", "8", "009", "010"])
    result = evaluate(tables / "found.csv", read_truth(tables), bootstraps=0)
    first, second = result.warnings
    assert "evaluated: 8 candidates in 2 scans, the first of 7 (is it 007?)" in first
    assert "2 of the 4 scans, with 3 nodules: each counts as missed" in second
    assert result.without_candidates == ["007", "008"]
    write_candidates(tables / "found.csv", ["7", "8"])
    with pytest.raises(InputError, match=r"expected the scans to evaluate.*got 7 \(is it 007\?\)"):
        evaluate(tables / "found.csv", read_truth(tables))


def test_annotations_that_may_mean_a_scan_are_not_overlooked(tables):
    text = (tables / "annotations.csv").read_text().replace("\n007,", "\n7.mhd,")
    (tables / "annotations.csv").write_text(text)
    (warning,) = evaluate(tables / "found.csv", read_truth(tables), bootstraps=0).warnings
    assert "evaluated: 1 nodule in 1 scan, the first of 7.mhd (is it 007?)" in warning


@pytest.mark.parametrize("near", ["", "Annotations_Excluded (1).csv"])
def test_a_missing_table_of_excluded_findings_is_not_overlooked(tables, near):
    if near:
        (tables / "annotations_excluded.csv").rename(tables / near)
    else:
        (tables / "annotations_excluded.csv").unlink()
    (warning,) = read_truth(tables).warnings
    assert warning.startswith("no table of excluded findings") and "--excluded none" in warning
    assert near in warning and ("is it" in warning) == bool(near)
    assert read_truth(tables, excluded=NO_TABLE).warnings == []
    result = evaluate(tables / "found.csv", read_truth(tables, excluded=NO_TABLE), bootstraps=0)
    assert result.froc.details.n_false == 10


def test_excluded_findings_of_other_scans_alone_are_not_overlooked(tables):
    write(tables / "x.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", "1.2,90,2,3,-1")
    (warning,) = read_truth(tables, excluded=tables / "x.csv").warnings
    assert "no excluded finding is of a scan" in warning


def test_a_fold_beside_whole_tables_is_right(tables):
    write(tables / "seriesuids.csv", "007", "009")
    result = evaluate(tables / "found.csv", read_truth(tables), bootstraps=0)
    assert (result.froc.n_scans, result.froc.n_nodules, result.warnings) == (2, 1, [])
    assert "outside of the 2 scans evaluated: 3 nodules in 2 scans" in result.notes[0]
    assert "8 candidates in 2 scans, the first of 008" in result.notes[1]


def test_a_scan_that_was_searched_in_vain_has_a_row(tables):
    write_candidates(tables / "found.csv", IDS[:3])
    truth = read_truth(tables)
    assert "1 of the 4 scans" in evaluate(tables / "found.csv", truth, bootstraps=0).warnings[0]
    with open(tables / "found.csv", "a") as file:
        file.write("010,,,,\n")
    assert evaluate(tables / "found.csv", truth, bootstraps=0).warnings == []


def test_scans_with_a_list_or_other_tables(tmp_path):
    root = write_luna(tmp_path / "luna", SCANS)
    write(tmp_path / "list.csv", SCANS[0].uid, SCANS[4].uid)
    truth = read_truth(root, series=tmp_path / "list.csv")
    assert truth.series == [SCANS[0].uid, SCANS[4].uid] and set(truth.others) == {
        scan.uid for scan in SCANS[1:4]
    }
    assert len(read_truth(root, excluded=NO_TABLE).excluded) == 0
    other = read_truth(root, annotations=root / "annotations.csv", excluded=NO_TABLE)
    assert sorted(other.series) == sorted(scan.uid for scan in SCANS)
    (root / "seriesuids.csv").unlink()
    assert read_truth(root, annotations=root / "annotations.csv").series
    write(tmp_path / "list.csv", "1.2.3")
    with pytest.raises(InputError, match=r"list\.csv: expected scans of .*got 1\.2\.3"):
        read_truth(root, series=tmp_path / "list.csv")
    write(tmp_path / "list.csv")
    with pytest.raises(InputError, match=r"list\.csv: expected scans of .*got an empty list"):
        read_truth(root, series=tmp_path / "list.csv")


def test_findings_without_a_scan_are_in_the_warnings(tmp_path):
    root = write_luna(tmp_path / "luna", SCANS)
    (root / "seriesuids.csv").unlink()
    (root / "subset3").rmdir()
    for path in (root / "subset2").iterdir():
        path.unlink()
    with open(root / "annotations.csv", "a") as file:
        file.write("1.2.3,0,0,0,5\n")
    (warning,) = read_truth(root).warnings
    assert "1 findings are of 1 series without a scan" in warning


@pytest.mark.parametrize(
    ("remove", "options", "message"),
    [
        ("annotations.csv", {}, "--annotations: expected the table of nodules"),
        ("seriesuids.csv", {}, "--series: expected the list of all scans: false positives"),
        (None, {"subsets": [1]}, "--subsets: expected scans in subsets"),
        (None, {"excluded": Path("typo.csv")}, "typo.csv: expected a table of findings, found no"),
    ],
)
def test_what_is_missing_is_named(tables, remove, options, message):
    if remove:
        (tables / remove).unlink()
    with pytest.raises(InputError, match=re.escape(message)):
        read_truth(tables, **options)


def test_the_command(tables, capsys):
    (tables / "annotations_excluded.csv").unlink()
    found, plot = str(tables / "found.csv"), tables / "froc.png"
    assert main(["evaluate", found, str(tables), "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:2] == [
        "Nodules that no candidate hits (x, y, z, diameter in mm):",
        "  008  50.0, 2.0, 3.0, 20.0",
    ]
    assert "4 scans, 4 nodules" in lines and lines[-1].startswith("WARNING: no table of excluded")
    assert lines[-2].startswith("CPM 0.") and lines[-2].endswith("bootstraps) - with 1 WARNING:")
    assert err == f"fmkernels: wrote {plot}\n" and plot.stat().st_size > 1000

    assert main(["evaluate", found, str(tables), "--json"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert values["counts"]["n_true"] == 3 and len(values["warnings"]) == 1
    assert values["missed"] == [{"seriesuid": "008", "point": [50, 2, 3], "diameter": 20}]
    assert err == f"fmkernels: WARNING: {values['warnings'][0]}\n"

    assert main(["evaluate", found]) == 2
    assert "expected DATA, or --annotations and --series" in capsys.readouterr().err
    assert main(["evaluate", found, str(tables / "nope")]) == 2
    assert "nope: expected a folder with scans or tables" in capsys.readouterr().err


def test_long_lists_are_cut(tables, capsys):
    ids = [f"{number:03}" for number in range(40)]
    write(tables / "seriesuids.csv", *ids)
    rows = [f"{uid},300,2,3,5" for uid in ids]
    write(tables / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", *rows)
    assert main(["evaluate", str(tables / "found.csv"), str(tables)]) == 0
    out = capsys.readouterr().out
    assert "  ... and 20 more; --json lists all\n" in out  # of 40 nodules
    assert "  ... and 26 more; --json lists all\n" in out  # of 36 scans


PATHS = ["a/scan", "b/scan", "c"]


@pytest.fixture
def paths(tmp_path) -> Path:
    """A list of scans by their paths, two of one file name, and candidates on 1, 2, 3 mm."""
    write(tmp_path / "seriesuids.csv", *PATHS)
    write_candidates(tmp_path / "found.csv", PATHS)
    return tmp_path


def paths_truth(folder: Path, *rows: str):
    write(folder / "own.csv", "scan,x,y,z,diameter", *rows)
    return read_truth(
        None,
        annotations=folder / "own.csv",
        excluded=NO_TABLE,
        series=folder / "seriesuids.csv",
    )


@pytest.mark.parametrize("before", ["", "./", "/old/disk/"])
def test_scans_of_one_file_name_stay_apart(paths, before):
    truth = paths_truth(
        paths, f"{before}a/scan.nii.gz,1,2,3,6", f"{before}b/scan.nii.gz,5,5,5,6", "c,,,,"
    )
    assert {uid: len(rows) for uid, rows in truth.nodules.items()} == {
        "a/scan": 1, "b/scan": 1, "c": 0,
    }  # fmt: skip
    result = evaluate(paths / "found.csv", truth, bootstraps=0)
    assert [miss.uid for miss in result.froc.details.misses] == ["b/scan"]
    assert result.warnings == result.notes == []
    write(paths / "excluded.csv", "scan,x,y,z,diameter", "b/scan.nii.gz,90,2,3,6")
    truth = read_truth(None, annotations=paths / "own.csv", series=paths / "seriesuids.csv",
                       excluded=paths / "excluded.csv")  # fmt: skip
    assert len(truth.excluded["b/scan"]) == 1 and "a/scan" not in truth.excluded


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["scan.nii.gz,1,2,3,6"],
            r"own\.csv, row 2: .* one scan, got 'scan\.nii\.gz', which is a/scan and b/scan",
        ),
        (
            ["x/c.mhd,1,2,3,6", "y/c.mhd,1,2,3,6"],
            r"own\.csv, row 3: expected one path for the scan c, got 'y/c\.mhd' and, in row 2, "
            r"'x/c\.mhd'; are these two scans\?",
        ),
        (["c,1,2,3,6", "x/c.mhd,1,2,3,6"], r"row 3: expected one path for the scan c"),
        (["d/scan2,1,2,3,6"], r"the first of d/scan2; expected scans such as a/scan"),
    ],
)
def test_a_name_of_two_scans_is_refused(paths, rows, message):
    with pytest.raises(InputError, match=message):
        paths_truth(paths, *rows)


def test_rows_of_unknown_scans_are_not_overlooked(paths):
    truth = paths_truth(paths, "a/scan,1,2,3,6", "d/scan.mhd,1,2,3,6", "d/scan.mhd,1,2,3,6")
    (warning,) = evaluate(paths / "found.csv", truth, bootstraps=0).warnings
    assert "evaluated: 2 nodules in 1 scan, the first of d/scan.mhd (is it b/scan?)" in warning


def test_rows_of_no_scan_of_the_data_are_not_overlooked(tmp_path):
    root = write_luna(tmp_path / "luna", SCANS)
    header = "seriesuid,coordX,coordY,coordZ,diameter_mm"
    write(tmp_path / "own.csv", header, f"subset0/{SCANS[0].uid}.mhd,1,2,3,4", "1.2.3,1,2,3,4")
    truth = read_truth(root, annotations=tmp_path / "own.csv", excluded=tmp_path / "own.csv")
    assert len(truth.nodules[SCANS[0].uid]) == 1 and len(truth.warnings) == 2
    assert all("own.csv: not counted, outside of the 5" in line for line in truth.warnings)
    write(tmp_path / "list.csv", f"subset9/{SCANS[4].uid}.mhd", "1.2.3")
    truth = read_truth(root, series=tmp_path / "list.csv", excluded=NO_TABLE)
    assert truth.series == [SCANS[4].uid]
    assert "list.csv: '1.2.3' is no scan; such rows: 1" in truth.warnings[0]


def test_hints_keep_the_folder(paths):
    write_candidates(paths / "found.csv", ["A/scan", "B/scan", "c"])
    truth = paths_truth(paths, "b/scan,1,2,3,6")
    write_candidates(paths / "found.csv", ["a/scan", "x/B/scan.mhd", "c"])
    first, _ = evaluate(paths / "found.csv", truth, bootstraps=0).warnings
    assert "the first of x/B/scan.mhd (is it b/scan?)" in first
