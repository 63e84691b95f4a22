"""Tables: read whatever wrote them, written to be read bit for bit, bad ones named by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels.focalmix.data.tables import (
    find_row,
    read_candidates,
    read_findings,
    read_series,
    read_text,
    write_candidates,
)
from fmkernels.focalmix.errors import InputError


@pytest.mark.parametrize(
    "content",
    [
        "seriesuid,coordX,coordY,coordZ,diameter_mm\na,1,-2.5,3e1,4\nb,5,6,7,-1\na,8,9,10,11\n",
        "\ufeffseriesuid,coordX,coordY,coordZ,diameter_mm\r\n"
        "a,1,-2.5,3e1,4\r\nb,5,6,7,-1\r\na,8,9,10,11\r\n",
        "note,diameter_mm,coordZ,coordY,coordX,seriesuid\n,4,30,-2.5,1,a\nhm,-1,7,6,5,b\n,11,10,9,8,a",
        "seriesuid, coordX, coordY, coordZ, diameter_mm\n"
        ' a , 1 , -2.5, 30, 4\n\n"b",5,6,7,-1\na,8,9,10,11\n\n',
        "seriesuid;coordX;coordY;coordZ;diameter_mm\na;1;-2,5;3e1;4\nb;5;6;7;-1\na;8;9,0;10;11",
        "sep=;\r\nseriesuid;coordX;coordY;coordZ;diameter_mm\r\n"
        "a;1;-2,5;3e1;4,0\r\nb;5;6;7;-1\r\na;8;9;10;11",
        'SeriesUID,CoordX,COORDY,coordz,Diameter_mm\na,1,"-2,5","3e1","4,0"\nb,5,6,7,-1\n,,,,\n'
        "a,8,9,10,11\n,,,,\n, ,\n",
        "seriesuid\tcoordX\tcoordY\tcoordZ\tdiameter_mm\na\t1\t-2,5\t30\t4\nb\t5\t6\t7\t-1\n"
        "a\t8\t9\t10\t11",
        "seriesuid\tcoordX\tcoordY\tcoordZ\tdiameter_mm\r\na\t1\t-2.5\t30\t4\r\n"
        "b\t5\t6\t7\t-1\r\na\t8\t9\t10\t11".encode("utf-16").decode("latin-1"),
    ],
    ids=[
        "plain",
        "BOM and CRLF",
        "other columns and order",
        "blanks and quotes",
        "semicolons",
        "a hint of the separator",
        "quoted decimal commas, other cases, empty rows",
        "tabs",
        "UTF-16",
    ],
)
def test_findings_are_read_whatever_wrote_them(tmp_path, content):
    path = tmp_path / "annotations.csv"
    is_utf16 = content.startswith("\xff\xfe")
    path.write_bytes(content.encode("latin-1" if is_utf16 else "utf-8"))
    findings = read_findings(path)
    assert list(findings) == ["a", "b"]
    assert findings["a"].dtype == np.float64
    np.testing.assert_array_equal(findings["a"], [[1, -2.5, 30, 4], [8, 9, 10, 11]])
    np.testing.assert_array_equal(findings["b"], [[5, 6, 7, -1]])
    row = find_row(path, "a", 1)
    assert read_text(path).splitlines()[row - 1].replace("\t", ",").replace(";", ",")[:3] in (
        "a,8",
        ",11",
    )


def test_ids_keep_their_commas(tmp_path):
    path = tmp_path / "candidates.csv"
    path.write_text("seriesuid;coordX;coordY;coordZ;probability\n1,5;1,5;2;3;0,5\n")
    assert {uid: rows.tolist() for uid, rows in read_candidates(path).items()} == {
        "1,5": [[1.5, 2, 3, 0.5]]
    }


def test_empty_rows_of_a_list_are_left_out(tmp_path):
    (tmp_path / "seriesuids.csv").write_text("a\n,,\n;\nb\n")
    assert read_series(tmp_path / "seriesuids.csv") == {"a": 1, "b": 4}


def test_a_header_alone_is_an_empty_table(tmp_path):
    path = tmp_path / "annotations_excluded.csv"
    path.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    assert read_findings(path) == {}


def test_candidates_with_a_class_column_are_read(tmp_path):
    path = tmp_path / "candidates.csv"
    path.write_text("seriesuid,coordX,coordY,coordZ,class,probability\na,1,2,3,0,0.25\n")
    np.testing.assert_array_equal(read_candidates(path)["a"], [[1, 2, 3, 0.25]])


HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["empty file"]),
        ("\n\n", ["empty file"]),
        (
            "seriesuid,coordX,coordY,diameter_mm\na,1,2,3\n",
            ["column coordZ", "seriesuid,coordX,coordY,diameter_mm"],
        ),
        ("seriesuid|coordX|coordY|coordZ|diameter_mm\n", ["column seriesuid"]),
        (
            HEADER + "a,1,5,2,5,3,5,4,5\n",
            ["row 2", "5 fields", "got 9", "decimal commas need quotes"],
        ),
        (HEADER.replace(",", ";") + "a;1;2,5,1;3;4\n", ["row 2", "coordY", "'2,5,1'"]),
        (HEADER.encode("utf-16-le"), ["row 1", "0x00", "save it as CSV UTF-8"]),
        (HEADER.encode() + "\nä,1,2,3,4".encode("latin-1"), ["row 3", "UTF-8", "0xe4"]),
        ("seriesuid,coordX,coordX,coordY,coordZ,diameter_mm\n", ["one column coordX"]),
        (HEADER + "a,1,2,3,4\na,1,two,3,4\n", ["row 3", "coordY", "'two'"]),
        (HEADER + "\na,1,2,,4\n", ["row 3", "coordZ", "''"]),
        (HEADER + "a,nan,2,3,4\n", ["row 2", "coordX", "'nan'"]),
        (HEADER + "a,1,2,3,4\n\na,1,2,-inf,4\n", ["row 4", "coordZ", "'-inf'"]),
        (HEADER + "a,1,2,3,NaN\n", ["row 2", "diameter_mm", "'nan'"]),
        (HEADER + "a,1,2,3,4\nb,1,2,3,0\n", ["row 3", "diameter_mm", "zero"]),
        (HEADER + "a,1,2,3\n", ["row 2", "5 fields", "got 4"]),
        (HEADER + "a,1,2,3,4,5\n", ["row 2", "5 fields", "got 6"]),
        (HEADER + " ,1,2,3,4\n", ["row 2", "seriesuid"]),
        (HEADER + 'a,1,2,3,"4\n', ["row 2", "comma-separated"]),
        (b"\x89PNG\r\n\x1a\n", ["UTF-8", "0x89"]),
        (b"PK\x03\x04 and so on", ["got a spreadsheet; save it as CSV UTF-8"]),
    ],
)
def test_bad_findings_are_named_in_one_line(tmp_path, content, parts):
    path = tmp_path / "annotations.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_findings(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


@pytest.mark.parametrize(
    ("row", "part"),
    [("a,1,2,3,nan", "probability"), ("a,1,2,3,inf", "probability"), ("a,1,2,x,0.5", "coordZ")],
)
def test_bad_candidates_are_named(tmp_path, row, part):
    path = tmp_path / "submission.csv"
    path.write_text(f"seriesuid,coordX,coordY,coordZ,probability\na,1,2,3,0\n{row}\n")
    with pytest.raises(
        InputError, match=f"submission.csv, row 3: {part}: expected a finite number, got '"
    ):
        read_candidates(path)


def test_a_missing_file_stays_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_findings(tmp_path / "annotations.csv")


def test_candidates_are_written_by_series_then_falling_probability(tmp_path):
    path = tmp_path / "submission.csv"
    three = [[1, 2, 3, 0.1], [4, 5, 6, 0.3], [7, 8, 9, 0.3]]
    write_candidates(path, {"b": three, "c": np.empty((0, 4)), "a": [[0.1, 0, 0, 1]]})
    assert path.read_text().splitlines() == [
        "seriesuid,coordX,coordY,coordZ,probability",
        "a,0.1,0.0,0.0,1.0",
        "b,4.0,5.0,6.0,0.3",
        "b,7.0,8.0,9.0,0.3",
        "b,1.0,2.0,3.0,0.1",
    ]


finite = st.floats(allow_nan=False, allow_infinity=False)
submissions = st.dictionaries(
    st.text("abc1. ,\"'é", min_size=1).filter(lambda uid: uid == uid.strip()),
    st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=5),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(submission=submissions)
def test_what_is_written_is_read_bit_for_bit(tmp_path_factory, submission):
    path = tmp_path_factory.mktemp("round") / "submission.csv"
    write_candidates(path, submission)
    read = read_candidates(path)
    assert list(read) == sorted(submission)
    for uid, rows in submission.items():
        expected = np.array(sorted(rows, key=lambda row: -row[3]))
        assert read[uid].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("uid", "value", "error"), [("a", np.nan, InputError), ("\ud800", 0.5, UnicodeEncodeError)]
)
def test_a_failed_write_keeps_the_old_file(tmp_path, uid, value, error):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(error):
        write_candidates(path, {"A": [[1, 2, 3, 0.5]], uid: [[1, 2, 3, value]]})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
