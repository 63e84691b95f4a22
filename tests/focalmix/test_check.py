"""fmkernels check: what is wrong with a data set is named, what is right is not."""

import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.check import check
from fmkernels.focalmix.cli import main
from fmkernels.focalmix.data.dataset import DataSet
from fmkernels.focalmix.data.formats import hu_problem, read_scan
from fmkernels.focalmix.data.own import open_data
from fmkernels.focalmix.data.volume import reoriented
from fmkernels.focalmix.errors import InputError
from tests.focalmix.conftest import FLIPPED, Scan, write_scan
from tests.focalmix.data.test_volume import stored_as, volume_of

NODULES = [(8.3, 16.6, 15.2, 9.0), (15.5, 25.0, 30.4, 6.0), (12.0, 12.0, 20.0, 12.0)]


@pytest.fixture
def folder(tmp_path):
    """Three scans, one of them flipped, with three nodules each."""
    root = tmp_path / "own"
    rows = ["scan,x,y,z,diameter"]
    for k, direction in enumerate((Scan("", 0).direction, FLIPPED, Scan("", 0).direction)):
        scan = Scan("", 0, spacing=(2.5, 2.0, 2.1 + k / 10), direction=direction, nodules=NODULES)
        image = write_scan(root / f"s{k}.nii.gz", scan)
        for z, y, x, diameter in NODULES:
            point = image.TransformContinuousIndexToPhysicalPoint((x, y, z))
            rows.append(",".join(map(str, (f"s{k}", *point, diameter))))
    (root / "annotations.csv").write_text("\n".join(rows))
    return root


def edit(folder, row, change):
    """Change the numbers of a row, counted from 1 with the header."""
    table = folder / "annotations.csv"
    lines = table.read_text().splitlines()
    scan, *numbers = lines[row - 1].split(",")
    lines[row - 1] = ",".join([scan, *map(str, change(np.array(numbers, dtype=float)))])
    table.write_text("\n".join(lines))


def look(folder, **options):
    return check(folder, folder.parent / "check.png", workers=1, **options)


def problems(report):
    return {(problem.kind, problem.is_error) for problem in report.problems}


def test_a_right_data_set(folder):
    report = look(folder)
    assert report.problems == [] and not report.has_errors
    lines = str(report).splitlines()
    assert lines[0].endswith(
        "3 scans: 3 with 9 nodules of 6 to 12 mm, 0 without a nodule, 0 without labels"
    )
    assert lines[1] == "spacing: z 2.5 to 2.5, y 2 to 2, x 2.1 to 2.3 mm"
    assert lines[2] == "size: 24 x 40 x 44 voxels (z, y, x)"
    assert lines[3] == "axes: LPS (2), RAS (1)"
    assert lines[4] == "HU: lowest -2000, highest 40"
    assert lines[5].startswith("scans (nodules) by fold: ") and lines[5].count("(3)") >= 1
    assert lines[6:] == ["nothing suspicious found"]
    assert (folder.parent / "check.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.glob(".cache*"))


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda row: row * [-1, -1, 1, 1], "RAS"),
        (lambda row: row[[2, 1, 0, 3]], "z, y, x"),
        (lambda row: np.array([15.2, 16.6, 8.3, 9]), "voxels (x, y, z)"),
        (lambda row: np.array([8.3, 16.6, 15.2, 9]), "voxels (z, y, x)"),
    ],
)
def test_a_wrong_reading_of_coordinates_is_named(folder, change, fits):
    edit(folder, 2, change)
    (problem,) = look(folder).problems
    assert problem.kind == "nodules outside of their scan" and problem.is_error
    assert (
        problem.text == f"{folder}/annotations.csv, row 2: not in scan s0; it would fit as {fits}"
    )


def test_a_flipped_and_a_shifted_nodule(folder):
    """Inside of their scans, where only the voxels tell."""
    volume = read_scan(folder / "s0.nii.gz")

    def flip(row):
        (point,) = volume.from_world(row[:3])
        point[1] = 40 - point[1]
        return [*volume.to_world(point)[0], row[3]]

    edit(folder, 2, flip)
    edit(folder, 6, lambda row: row + np.array([16, 0, 0, 0]))
    report = look(folder)
    assert problems(report) == {("nodules where nothing like a nodule is", False)}
    first, second = sorted(report.problems, key=lambda problem: problem.text)
    assert first.text.endswith(
        "row 2: -850 HU in its middle; it would fit as flipped front to back"
    )
    assert second.text.startswith(f"{folder}/annotations.csv, row 6: -850 HU in its middle")


def test_a_whole_table_in_ras(folder):
    for row in range(2, 11):
        edit(folder, row, lambda numbers: numbers * [-1, -1, 1, 1])
    report = look(folder)
    assert ("coordinates", False) in problems(report)
    assert "9 of 9 nodules would fit as RAS; try --coordinates RAS" in str(report)
    assert look(folder, coordinates="RAS").problems == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v + 1024, r"s1\.nii\.gz: values look like HU \+ 1024 .air is 2\d, not -1000"),
        (lambda v: (v > -500) * 1, r"s1\.nii\.gz: values of 0 to 1 are no HU"),
        (lambda v: np.clip(v / 8 + 128, 0, 255), r"s1\.nii\.gz: values of 3 to 133 are no HU"),
        (lambda v: np.maximum(v, -300), r"expected air of about -1000 HU, got -300"),
    ],
)
def test_values_that_are_no_hu_are_named_and_not_trained_on(folder, change, message):
    path = folder / "s1.nii.gz"
    image = sitk.ReadImage(str(path))
    voxels = np.maximum(sitk.GetArrayFromImage(image), -1000)
    changed = sitk.GetImageFromArray(change(voxels).astype(np.int16))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))
    report = look(folder)
    assert report.has_errors and problems(report) == {("scans that cannot be used", True)}
    assert re.search(message, report.problems[0].text)
    with pytest.raises(InputError, match=message):
        open_data(folder).prepare(workers=0, progress=False)
    assert hu_problem(voxels) == ""


def test_rows_diameters_and_duplicates(folder):
    edit(folder, 3, lambda row: row * [1, 1, 1, 0.001])
    edit(folder, 4, lambda row: row * [1, 1, 1, -1])
    lines = (folder / "annotations.csv").read_text().splitlines()
    (folder / "annotations.csv").write_text("\n".join([*lines, lines[5], "s9,1,2,3,4"]))
    (folder / "my_excluded.csv").write_text(lines[0])
    shutil.copy(folder / "s2.nii.gz", folder / "again.nii.gz")
    report = look(folder)
    assert problems(report) == {
        ("rows or files that are not used", False),
        ("unusual diameters", False),
        ("unknown diameters", False),
        ("nodules that are there twice", False),
        ("scans that are there twice", False),
        ("tables", False),
    }
    text = str(report)
    for part in (
        "row 12: 's9' is no scan",
        "row 3: 0.006 mm; are the units right?",
        "row 4: -12 counts as 10 mm",
        "row 11: as ",
        "again.nii.gz has the voxels of ",
        "my_excluded.csv is not read; name it annotations_excluded.csv",
        "1 without labels",
    ):
        assert part in text, part


def test_units_of_scans(folder):
    path = folder / "s1.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetSpacing((0.02, 0.02, 0.025))
    sitk.WriteImage(image, str(path))
    assert "s1.nii.gz: 0.025 x 0.02 x 0.02 mm; are the units right?" in str(look(folder))
    image.SetSpacing((0.5, 0.5, 0.5))
    sitk.WriteImage(image, str(path))
    assert "s1.nii.gz: 12 x 20 x 22 mm; are the units right?" in str(look(folder))


def test_long_lists_are_cut(folder):
    for row in range(2, 11):
        edit(folder, row, lambda numbers: numbers * [1, 1, 1, -1])
    text = str(look(folder))
    assert "warning: unknown diameters: 9\n" in text and "  ... and 4 more" in text


def test_luna16_without_the_excluded_findings(luna_folder):
    report = look(luna_folder)
    assert "tables" not in {problem.kind for problem in report.problems}
    (luna_folder / "annotations_excluded.csv").rename(luna_folder / "annotations_exclude.csv")
    assert "annotations_exclude.csv is not read; name it" in str(look(luna_folder))
    (luna_folder / "annotations_exclude.csv").unlink()
    assert "no annotations_excluded.csv; findings that are no nodules count as" in str(
        look(luna_folder)
    )


def test_scans_without_labels_are_drawn_and_are_an_error(folder):
    (folder / "annotations.csv").unlink()
    report = look(folder)
    assert report.picture is not None and report.picture.exists()
    assert report.has_errors and "own: expected scans with labels, found no table" in str(report)
    (folder / "annotations.csv").write_text("scan,x,y,z,diameter\n")
    report = look(folder)
    assert report.has_errors and "annotations.csv: expected a row for each scan" in str(report)


def test_folds_that_are_not_trained_on_are_an_error(folder, capsys):
    table = folder / "annotations.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},fold", *(f"{row},8" for row in rows)]))
    report = look(folder)
    assert problems(report) == {("labels", True)}
    assert "scans with labels are in [8]; choose others, or give a column fold" in str(report)
    argv = ["check", str(folder), "--out", str(folder / "check.png"), "--workers=1"]
    assert main(argv) == 1
    assert main([*argv, "--train-subsets=8", "--test-subsets=9"]) == 0
    table.write_text("\n".join([f"{header},fold", f"{rows[0]},0", "s1,,,,,8"]))
    assert "test_subsets: expected at least one nodule in" in str(look(folder))


def test_the_command(folder, tmp_path, capsys):
    argv = ["check", str(folder), "--out", str(tmp_path / "seen.png"), "--workers=1"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "nothing suspicious found" in out and f"wrote {tmp_path / 'seen.png'}" in err
    (folder / "s0.nii.gz").write_bytes(b"\x1f\x8b")
    assert main([*argv, "--unlabeled-data", str(folder / "nowhere")]) == 2
    assert main(argv) == 1
    assert "error: scans that cannot be used: 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["check.xyz", "nowhere/check.png"])
def test_the_picture_is_checked_before_scans_are_read(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("fmkernels.focalmix.check.open_data", None)
    with pytest.raises(InputError, match=r"check\.(xyz|png): expected a"):
        check(folder, tmp_path / name)


def test_where_annotations_are_is_read_only_when_needed(luna_folder, monkeypatch):
    monkeypatch.setattr(DataSet, "where", lambda *_: pytest.fail("read the table again"))
    report = look(luna_folder)
    assert len(report.summary) == 6


@pytest.mark.parametrize("code", ["LPS", "RAS", "LSA", "SAR", "PIR"])
def test_reoriented_scans_are_the_same_in_the_world(code):
    rng = np.random.default_rng(0)
    volume = volume_of(rng.integers(-1000, 1000, (3, 4, 5)), (2.0, 0.5, 0.75), (1.0, -2.0, 3.0))
    seen = reoriented(stored_as(volume, code))
    np.testing.assert_array_equal(seen.voxels, volume.voxels)
    np.testing.assert_allclose(seen.origin, volume.origin, atol=1e-9)
    assert seen.spacing == volume.spacing
    np.testing.assert_allclose(seen.direction, np.eye(3), atol=1e-9)
