"""Own data sets: scans as they come, one table, folds, scans without labels."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.data.annotations import read_annotations
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.own import OwnData, open_data
from fmkernels.focalmix.errors import InputError, InputWarning, SkippedWarning
from tests.focalmix.conftest import SCANS, Scan, write_scan
from tests.focalmix.kinds import KINDS, write_dicom

HEADER = "scan,x,y,z,diameter\n"


@pytest.fixture
def folder(tmp_path):
    """Three scans: patients/a/scan.nii.gz, patients/b/scan.nii.gz, c.mhd."""
    root = tmp_path / "own"
    for name in ("patients/a/scan.nii.gz", "patients/b/scan.nii.gz", "c.mhd"):
        write_scan(root / name, Scan("any", 0, nodules=[(8, 16, 15, 9.0)]))
    return root


def write(folder, rows, name="annotations.csv", header=HEADER):
    (folder / name).write_text(header + "".join(f"{row}\n" for row in rows))


INSIDE = "-158,-137,-280,9"


class TestScans:
    def test_are_found_and_named(self, folder):
        write(folder, [f"a,{INSIDE}", f"c,{INSIDE}", "b,,,,"])
        data = open_data(folder)
        assert isinstance(data, OwnData)
        assert sorted(data.series) == ["c", "patients/a/scan", "patients/b/scan"]
        assert data.unlabeled == []
        assert data.nodules("patients/a/scan").tolist() == [[-158, -137, -280, 9]]
        assert len(data.nodules("patients/b/scan")) == 0
        data.prepare(workers=0, progress=False)
        assert len(data.boxes("c")[0]) == 1

    def test_that_differ_in_the_ending_alone_are_refused(self, folder):
        write_scan(folder / "patients/a/scan.nrrd", Scan("any", 0, nodules=[]))
        write(folder, [f"a,{INSIDE}"])
        with pytest.raises(InputError, match=r"scan\.nrrd: expected a name of its own.*nii\.gz"):
            open_data(folder)

    @pytest.mark.parametrize(
        "name",
        [
            "patients/a/scan.nii.gz",
            "patients/a/scan",
            "patients\\a\\scan.nii.gz",
            "patients/a",
            "a",
            "./patients/a/scan.nii.gz",
            "old/disk/patients/a/scan.nii.gz",
        ],
    )
    def test_are_called_by_many_names(self, folder, name):
        write(folder, [f"{name},{INSIDE}"])
        assert open_data(folder).series == ["patients/a/scan"]

    def test_of_one_name_are_told_apart_by_the_message(self, folder):
        write(folder, [f"scan.nii.gz,{INSIDE}"])
        with pytest.raises(
            InputError,
            match=r"row 2: .* got 'scan\.nii\.gz', which is .*patients/a/scan\.nii\.gz and "
            r".*patients/b/scan\.nii\.gz; name it with its folder",
        ):
            open_data(folder)

    def test_in_the_root_is_called_by_its_whole_path(self, folder):
        """Beside scans of the same file name in folders."""
        write_scan(folder / "scan.nii.gz", Scan("any", 0, nodules=[(8, 16, 15, 9.0)]))
        for name in ("scan.nii.gz", "scan", "./scan.nii.gz"):
            write(folder, [f"{name},{INSIDE}", "patients/a/scan.nii.gz,,,,"])
            data = open_data(folder)
            assert sorted(data.series) == ["patients/a/scan", "scan"]
            assert len(data.nodules("scan")) == 1

    @pytest.mark.parametrize("other", ["x/c.mhd", "c.mhd"])
    def test_that_are_missing_do_not_give_their_rows_to_others(self, folder, other):
        write(folder, [f"{other},{INSIDE}", f"y/c.mhd,{INSIDE}"])
        with pytest.raises(
            InputError, match=rf"row 3: .* scan c, got 'y/c\.mhd' and, in row 2, '{other}'; are"
        ):
            open_data(folder)

    def test_of_a_list_that_are_none_are_named(self, folder):
        write(folder, [f"a,{INSIDE}"])
        (folder / "seriesuids.csv").write_text("c.mhd\npatients/d/scan\n")
        with pytest.warns(InputWarning, match=r"seriesuids\.csv, row 2: 'patients/d/scan' is no"):
            data = open_data(folder)
        assert data.unlabeled == ["patients/b/scan"]

    def test_of_dicom_are_called_by_series_id_or_folder(self, tmp_path):
        scan = SCANS[0]
        image = write_scan(tmp_path / "one.mhd", scan)
        root = tmp_path / "own"
        write_dicom(root / "p1" / "study" / "CT", image, "1.2.3")
        write_dicom(root / "p2" / "study" / "CT", image, "1.2.4")
        write(root, [f"1.2.3,{INSIDE}", f"p2/study,{INSIDE}"])
        data = open_data(root)
        assert sorted(data.series) == ["1.2.3", "1.2.4"]
        write(root, [f"CT,{INSIDE}"])
        with pytest.raises(InputError, match=r"got 'CT', which is .*p1/study/CT and .*p2/study/CT"):
            open_data(root)

    def test_the_layout_of_luna16_is_known(self, luna_folder):
        assert isinstance(open_data(luna_folder), LUNA16)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_layout_of_luna16_takes_any_format(self, luna_folder, luna_scans, kind):
        scan = luna_scans[0]
        source = luna_folder / "subset0" / f"{scan.uid}.mhd"
        image = sitk.ReadImage(str(source))
        for path in (source, source.with_suffix(".raw")):
            path.unlink()
        KINDS[kind](luna_folder / "subset0", image, scan.uid)
        data = open_data(luna_folder)
        assert set(data.series) == {scan.uid for scan in luna_scans}
        assert len(data.boxes(scan.uid)[0]) == 2

    def test_no_scans(self, tmp_path):
        with pytest.raises(InputError, match=r"expected scans \(\.mhd, .* DICOM series\) below"):
            open_data(tmp_path)


def write_map(path, like, kind=sitk.sitkUInt8):
    """A label map on the grid of a scan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.Cast(sitk.ReadImage(str(like)) > 0, kind), str(path))


class TestLabelMaps:
    @pytest.mark.parametrize("kind", [sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkUInt16])
    @pytest.mark.parametrize(
        "name",
        [
            "patients/a/scan_seg.nii.gz",
            "labelsTr/scan.nii.gz",
            "c-mask.mha",
            "patients/a/left.nrrd",
        ],
    )
    def test_are_no_scans(self, folder, name, kind):
        write_map(folder / name, folder / "patients/a/scan.nii.gz", kind)
        write(folder, [f"a,{INSIDE}"])
        with pytest.warns(SkippedWarning, match=f"{name}: a label map, not read as a scan; 1 such"):
            data = open_data(folder)
        assert data.series == ["patients/a/scan"]
        assert set(data.unlabeled) == {"patients/b/scan", "c"}

    def test_do_not_hide_a_series(self, tmp_path):
        root = tmp_path / "own"
        image = write_scan(tmp_path / "one.mhd", SCANS[0])
        write_dicom(root / "p1", image, "1.2.3")
        write_map(root / "p1" / "seg.nii.gz", tmp_path / "one.mhd")
        write(root, [f"p1,{INSIDE}"])
        with pytest.warns(SkippedWarning, match=r"p1/seg\.nii\.gz: a label map"):
            assert open_data(root).series == ["1.2.3"]

    def test_are_refused_where_the_table_names_them(self, folder):
        write_map(folder / "c_seg.nii.gz", folder / "c.mhd")
        write(folder, [f"c_seg,{INSIDE}"])
        data = open_data(folder)
        with pytest.raises(InputError, match=r"c_seg\.nii\.gz: expected a type of HU"):
            data.prepare(workers=0, progress=False)

    def test_scans_of_such_names_are_read(self, folder):
        (folder / "patients").rename(folder / "labels")
        (folder / "c.mhd").rename(folder / "c_mask.mhd")
        write(folder, [f"c_mask,{INSIDE}"])
        assert len(open_data(folder)) == 3

    def test_alone_are_refused(self, tmp_path, folder):
        for k in range(2):
            write_map(tmp_path / "maps" / f"{k}_seg.nii.gz", folder / "c.mhd")
        data = open_data(tmp_path / "maps")
        assert len(data.unlabeled) == 2
        with pytest.raises(InputError, match="expected a type of HU"):
            data.prepare(workers=0, progress=False)


class TestLabels:
    def test_scans_without_rows_have_no_labels(self, folder):
        write(folder, [f"a,{INSIDE}", "b,,,,"])
        data = open_data(folder)
        assert set(data.series) == {"patients/a/scan", "patients/b/scan"}
        assert data.unlabeled == ["c"] and len(data) == 3
        (folder / "seriesuids.csv").write_text("c\n")
        data = open_data(folder)
        assert data.unlabeled == [] and len(data.nodules("c")) == 0

    def test_no_table_means_no_labels(self, folder):
        data = open_data(folder)
        assert data.series == [] and len(data.unlabeled) == 3

    def test_the_only_table_may_have_any_name(self, folder):
        write(folder, [f"a,{INSIDE}"], "nodules of 2024.csv")
        assert open_data(folder).series == ["patients/a/scan"]
        write(folder, [f"c,{INSIDE}"], "more.tsv")
        with pytest.raises(InputError, match=r"one table of .* got more\.tsv and nodules of 2024"):
            open_data(folder)
        write(folder, [f"c,{INSIDE}"])
        assert open_data(folder).series == ["c"]

    @pytest.mark.parametrize("name", ["annotations.xlsx", "nodules.XLS", "annotations.ods"])
    def test_a_spreadsheet_is_refused(self, folder, name):
        (folder / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(InputError, match=rf"{name}: .* a spreadsheet; save it as CSV"):
            open_data(folder)
        write(folder, [f"a,{INSIDE}"])
        assert len(open_data(folder).series) == 1
        (folder / "annotations_excluded.xlsx").touch()
        with pytest.raises(InputError, match=r"excluded\.xlsx: expected a table in text"):
            open_data(folder)

    def test_tables_may_be_named_in_any_case(self, folder):
        write(folder, [f"a,{INSIDE}"], "Annotations.CSV")
        write(folder, [f"a,{INSIDE}"], "ANNOTATIONS_EXCLUDED.csv")
        data = open_data(folder)
        assert len(data.series) == 1 and len(data.excluded("patients/a/scan")) == 1

    def test_excluded_findings(self, folder):
        write(folder, [f"a,{INSIDE}"])
        write(folder, [f"a,{INSIDE}", f"a,{INSIDE}"], "annotations_excluded.csv")
        assert len(open_data(folder).excluded("patients/a/scan")) == 2

    def test_a_row_without_a_scan_is_named_with_the_nearest_one(self, folder):
        write(folder, [f"a,{INSIDE}", f"patients/d/scan.nii.gz,{INSIDE}"])
        with pytest.warns(
            InputWarning,
            match=r"row 3: 'patients/d/scan\.nii\.gz' is no scan \(is it patients/a/scan\?",
        ):
            open_data(folder)
        for name, near in (("d", "$"), ("A", r" \(is it a\?\)")):
            write(folder, [f"{name},{INSIDE}"])
            message = rf"annotations\.csv, row 2: expected a scan, got '{name}'{near}"
            with pytest.raises(InputError, match=message):
                open_data(folder)

    def test_a_point_outside_of_its_scan_names_the_row(self, folder):
        write(folder, [f"a,{INSIDE}", "b,,,,", "a,0,0,900,5"])
        data = open_data(folder)
        with pytest.raises(InputError, match=r"annotations\.csv, row 4: .* inside of scan patient"):
            data.prepare(workers=0, progress=False)

    def test_ras(self, folder):
        write(folder, ["a,158,137,-280,9"])
        data = open_data(folder, coordinates="RAS")
        assert data.nodules("patients/a/scan").tolist() == [[-158, -137, -280, 9]]

    def test_other_coordinates_are_refused(self, folder, luna_folder):
        for root in (folder, luna_folder):
            with pytest.raises(ValueError, match=r"coordinates: expected LPS or RAS, got 'ras'"):
                open_data(root, coordinates="ras")

    def test_ras_in_luna16s_layout(self, luna_folder):
        plain, flipped = open_data(luna_folder), open_data(luna_folder, coordinates="RAS")
        for uid in plain.series:
            for ours, theirs in zip(flipped.findings([uid]), plain.findings([uid]), strict=True):
                np.testing.assert_array_equal(ours[uid], theirs[uid] * [-1, -1, 1, 1])


class TestFolds:
    def test_a_hash_does_not_depend_on_the_other_scans(self, folder):
        write(folder, [f"c,{INSIDE}", f"a,{INSIDE}"])
        data = open_data(folder)
        # SHA-256 of the id, modulo 10: the same in every version and on every machine
        expected = {"c": 0, "patients/a/scan": 2}
        assert {uid: data.subset(uid) for uid in data.series} == expected
        write_scan(folder / "new" / "d.mha", Scan("any", 0))
        write(folder, [f"d,{INSIDE}", f"a,{INSIDE}", f"c,{INSIDE}"])
        data = open_data(folder)
        assert {uid: data.subset(uid) for uid in data.series} == expected | {"d": 9}

    def test_a_column(self, folder):
        header = HEADER.replace("\n", ",fold\n")
        write(folder, [f"a,{INSIDE},3", "b,,,,,0", f"c,{INSIDE},9", f"c,{INSIDE},"], header=header)
        data = open_data(folder)
        assert data.series == ["patients/b/scan", "patients/a/scan", "c"]
        assert [data.subset(uid) for uid in data.series] == [0, 3, 9]
        assert open_data(folder, subsets=[9, 3]).series == ["patients/a/scan", "c"]

    @pytest.mark.parametrize("fold", ["10", "-1", "2.5", "train"])
    def test_a_bad_one(self, folder, fold):
        write(folder, [f"a,{INSIDE},{fold}"], header=HEADER.replace("\n", ",fold\n"))
        with pytest.raises(InputError, match=rf"row 2: fold: .* 0 to 9, got '{fold}'"):
            open_data(folder)

    def test_two_of_one_scan(self, folder):
        write(folder, [f"a,{INSIDE},1", f"a,{INSIDE},2"], header=HEADER.replace("\n", ",fold\n"))
        with pytest.raises(InputError, match=r"row 3: fold: expected 1 as in .*row 2, got 2"):
            open_data(folder)


class TestTable:
    @pytest.mark.parametrize(
        "text",
        [
            "scan,x,y,z,diameter\ns,1,2,3,4\ns,,,,\n",
            "SeriesUID;CoordX;CoordY;CoordZ;Diameter_mm;note\ns;1,0;2;3;4;big\ns;;;;;none\n",
            "scan,x1,y1,z1,x2,y2,z2\ns,-1,0,1,3,4,5\ns,,,,,,\n",
            'Scan,X,Y,Z,DIAMETER\ns,"1,0","2,",3,4\ns,,,,\n,,,,\n',
            "x_max,y_max,z_max,x_min,y_min,z_min,scan\n3,4,5,-1,0,1,s\n,,,,,,s\n",
        ],
    )
    def test_kinds(self, tmp_path, text):
        path = tmp_path / "t.csv"
        path.write_text(text)
        found = read_annotations(path)
        assert [(row.scan, row.finding) for row in found] == [("s", (1, 2, 3, 4)), ("s", None)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("scan,x,y,z\ns,1,2,3", r"expected the columns scan, x, y, z, .* got scan,x,y,z"),
            ("x,y,z,diameter\n1,2,3,4", "expected the columns scan"),
            ("scan,x,x,y,z,diameter\n", "expected one column x"),
            ("scan,seriesuid,x,y,z,diameter\n", "expected one column scan"),
            (HEADER + ",1,2,3,4", "row 2: scan: expected a scan, got nothing"),
            (HEADER + "s,1,,3,4", "row 2: y: expected a finite number, got ''"),
            (HEADER + "s,1,nan,3,4", "row 2: y: expected a finite number, got 'nan'"),
            (HEADER + "s,1,2,3,0", "row 2: diameter: expected one other than zero"),
            (
                "scan,x1,y1,z1,x2,y2,z2\ns,1,2,3,4,1,6",
                r"row 2: expected a box from its lower to its upper corner, got \[1\. 2\. 3\.\]",
            ),
        ],
    )
    def test_a_bad_one(self, tmp_path, text, message):
        path = tmp_path / "t.csv"
        path.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            read_annotations(path)
        assert "\n" not in str(error.value) and "t.csv" in str(error.value)


class TestJson:
    @staticmethod
    def read(tmp_path, content):
        path = tmp_path / "dataset.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_annotations(path)

    def test_monais(self, tmp_path):
        rows = self.read(
            tmp_path,
            {
                "training": [
                    {"image": "a.nii.gz", "box": [[1, 2, 3, 4, 5, 6]], "label": [0]},
                    {"image": "b.nii.gz", "box": [], "label": [], "fold": 4},
                    {"image": "c.nii.gz"},
                ],
                "validation": [
                    {"image": "d.nii.gz", "box": [[1, 2, 3, 4, 4, 4], [0] * 3 + [9] * 3]}
                ],
            },
        )
        assert [(row.scan, row.finding, row.fold) for row in rows] == [
            ("a.nii.gz", (1, 2, 3, 5), 0),
            ("b.nii.gz", None, 4),
            ("d.nii.gz", (1, 2, 3, 4), 7),
            ("d.nii.gz", (0, 0, 0, 9), 7),
        ]

    def test_corners_and_one_list(self, tmp_path):
        content = {"box_mode": "xyzxyz", "training": [{"image": "a", "box": [[-1, 0, 1, 3, 4, 5]]}]}
        (row,) = self.read(tmp_path, content)
        assert row.finding == (1, 2, 3, 4) and row.fold is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "expected JSON"),
            ([], "expected MONAI's lists of scans"),
            ({"images": []}, "expected MONAI's lists of scans"),
            ({"training": [{"img": "a"}]}, r"training\[0\]: image: expected"),
            ({"training": [{"image": "a", "box": [[1, 2]]}]}, r"training\[0\]: box: expected"),
            (
                {"training": [{"image": "a", "box": [[1, 2, 3, 4, "x", 6]]}]},
                r"box 0: expected 6 numbers",
            ),
            (
                {"training": [{"image": "a", "box": [[1, 2, 3, 4, 10**400, 6]]}]},
                r"box 0: expected 6 numbers",
            ),
            (
                {"training": [{"image": "a", "box": [], "fold": 10**400}]},
                "fold: expected an integer of 0 to 9",
            ),
            (
                {"training": [{"image": "a", "box": [[10, 20, 30, -4, 5, 6]]}]},
                r'for corners, add "box_mode": "xyzxyz"',
            ),
            ({"box_mode": "zyx", "training": []}, "box_mode: expected cccwhd or xyzxyz, got 'zyx'"),
        ],
    )
    def test_a_bad_one(self, tmp_path, content, message):
        with pytest.raises(InputError, match=message) as error:
            self.read(tmp_path, content)
        assert "\n" not in str(error.value) and "dataset.json" in str(error.value)


class TestUnlabeled:
    def test_scans_from_elsewhere(self, folder, tmp_path):
        write(folder, [f"a,{INSIDE}"])
        other = tmp_path / "other"
        write_scan(other / "deep" / "x.nrrd", Scan("any", 0))
        write_scan(other / "y.mha", Scan("any", 0))
        data = open_data(folder, unlabeled=[other])
        assert set(data.unlabeled) == {"c", "patients/b/scan", "x", "y"}
        data.prepare(["x"], workers=0, progress=False)
        assert [file.name for file in (other / ".cache-1x1x1").iterdir()] == ["x.npy"]
        together = open_data(folder, unlabeled=[other], cache=tmp_path / "cache")
        together.prepare(workers=0, progress=False)
        assert sorted(file.name for file in (tmp_path / "cache" / ".cache-1x1x1").iterdir()) == [
            "c.npy",
            "patients%2Fa%2Fscan.npy",
            "patients%2Fb%2Fscan.npy",
            "x.npy",
            "y.npy",
        ]

    def test_a_scan_of_the_data_set_is_refused(self, luna_folder, luna_scans, tmp_path):
        """Its targets would leak into the test."""
        other = tmp_path / "other"
        write_scan(other / f"{luna_scans[4].uid}.nii.gz", luna_scans[4])
        with pytest.raises(InputError, match=r"not in the data set, got that of .*subset9"):
            open_data(luna_folder, unlabeled=[other])

    def test_other_scans_of_the_same_names_are_told_apart(self, folder, tmp_path):
        write(folder, [f"a,{INSIDE}"])
        for x, other in ((20, "x/old"), (21, "y/old")):
            for name in ("patients/a/scan.nii.gz", "patients/b/scan.nii.gz", "c.mhd"):
                write_scan(tmp_path / other / name, Scan("any", 0, nodules=[(9, 15, x, 9)]))
        data = open_data(folder, unlabeled=[tmp_path / "x/old", tmp_path / "y/old"])
        assert data.series == ["patients/a/scan"] and set(data.unlabeled) == {
            *("c", "patients/b/scan"),
            *("old/c", "old/patients/a/scan", "old/patients/b/scan"),
            *("y/old/c", "y/old/patients/a/scan", "y/old/patients/b/scan"),
        }
        assert data.path("old/c") == tmp_path / "x/old/c.mhd"
        data.prepare(workers=0, progress=False)
        with pytest.raises(InputError, match=r"c\.mhd: .* not in the data set, got that of"):
            open_data(folder, unlabeled=[folder])

    def test_an_empty_folder_is_refused(self, luna_folder, tmp_path):
        (tmp_path / "other").mkdir()
        with pytest.raises(InputError, match="expected scans below this folder, found none"):
            open_data(luna_folder, unlabeled=[tmp_path / "other"])
