"""Scan files: read as SimpleITK reads them, and every bad one refused in one line."""

import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.data import formats
from fmkernels.focalmix.data.formats import load_volume, read_scan
from fmkernels.focalmix.errors import InputError
from tests.focalmix.data.test_volume import image_of, volume_of


def edit(old: str, new: str):
    def change(header):
        text = header.read_text()
        assert old in text
        header.write_text(text.replace(old, new))

    return change


def rewrite(voxels, vector=False):
    def change(header):
        sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=vector), str(header))

    return change


def resize_raw(by: int):
    def change(header):
        raw = header.with_suffix(".raw")
        os.truncate(raw, raw.stat().st_size + by)

    return change


def move_raw(where: str):
    def change(header):
        target = (header.parent / where).resolve()
        target.parent.mkdir(exist_ok=True)
        shutil.move(header.with_suffix(".raw"), target)
        edit("ElementDataFile = scan.raw", f"ElementDataFile = {where}")(header)

    return change


BAD_SCANS = {
    "truncated": (
        resize_raw(-1),
        r"scan\.raw: expected 480 bytes \(DimSize 6 5 8 of MET_SHORT\), got 479",
    ),
    "too long": (resize_raw(2), r"scan\.raw: expected 480 bytes .* got 482"),
    "no raw": (
        lambda header: header.with_suffix(".raw").unlink(),
        r"ElementDataFile: expected scan\.raw beside",
    ),
    "no header": (lambda header: header.unlink(), r"scan\.mhd: expected a MetaImage header"),
    "not a header": (
        lambda header: header.write_bytes(bytes(range(256)) * 999),
        "NDims: expected 3, got nothing",
    ),
    "2D": (rewrite(np.zeros((4, 5), np.int16)), "NDims: expected 3, got 2"),
    "4D": (edit("NDims = 3", "NDims = 4"), "NDims: expected 3, got 4"),
    "RGB": (
        rewrite(np.zeros((3, 4, 5, 3), np.uint8), vector=True),
        "ElementNumberOfChannels: expected 1, got 3",
    ),
    "float": (
        rewrite(np.zeros((3, 4, 5), np.float32)),
        r"ElementType: expected MET_SHORT .*, got MET_FLOAT",
    ),
    "mask": (
        rewrite(np.zeros((3, 4, 5), np.uint8)),
        r"ElementType: expected MET_SHORT .*, got MET_UCHAR",
    ),
    "enormous": (
        edit("6 5 8", "60000 50000 40000"),
        "DimSize: .* at most 2147483648 voxels, got 60000",
    ),
    "a long axis": (
        edit("6 5 8", "2000000000 1 1"),
        "DimSize: .* each at most 32768, .* got 2000000000 1 1",
    ),
    "overflowing": (edit("6 5 8", f"{2**32} {2**32} 1"), "DimSize: expected 3 positive integers"),
    "negative": (edit("6 5 8", "6 -5 8"), "DimSize: expected 3 positive integers.* got 6 -5 8"),
    "flat": (edit("6 5 8", "6 0 8"), "DimSize: expected 3 positive integers"),
    "two sizes": (edit("6 5 8", "6 5"), "DimSize: expected 3 positive integers"),
    "zero spacing": (
        edit("ElementSpacing = 0.5", "ElementSpacing = 0"),
        "ElementSpacing: expected 3 numbers",
    ),
    "negative spacing": (
        edit("ElementSpacing = 0.5", "ElementSpacing = -0.5"),
        "ElementSpacing: expected 3 numbers",
    ),
    "huge spacing": (
        edit("ElementSpacing = 0.5", "ElementSpacing = 1e9"),
        r"ElementSpacing: expected 3 .* got 1e9",
    ),
    "tiny spacing": (
        edit("ElementSpacing = 0.5", "ElementSpacing = 1e-300"),
        "ElementSpacing: expected 3 numbers",
    ),
    "a bomb": (
        edit("ElementSpacing = 0.5 0.5", "ElementSpacing = 900 900"),
        r"ElementSpacing: expected at most 240000 voxels at .* mm, got \(16, 4500, 5400\)",
    ),
    "no spacing": (
        edit("ElementSpacing", "Spacing"),
        "ElementSpacing: expected 3 finite numbers, got nothing",
    ),
    "NaN offset": (
        edit("Offset = 0", "Offset = nan"),
        "Offset: expected 3 finite numbers, got nan 0 0",
    ),
    "words": (edit("Offset = 0", "Offset = zero"), "Offset: expected 3 finite numbers"),
    "shear": (
        edit("TransformMatrix = 1 0", "TransformMatrix = 1 0.3"),
        "TransformMatrix: expected an orthonormal",
    ),
    "compressed": (
        edit("CompressedData = False", "CompressedData = True"),
        "CompressedData: expected False, got True",
    ),
    "text": (
        edit("BinaryData = True", "BinaryData = False"),
        "BinaryData: expected True, got False",
    ),
    "parent folder": (
        move_raw("../scan.raw"),
        r"ElementDataFile: expected the name of a file in the same folder",
    ),
    "folder below": (
        move_raw("below/scan.raw"),
        r"ElementDataFile: .* same folder, got below/scan\.raw",
    ),
    "absolute": (
        edit("= scan.raw", "= /etc/passwd"),
        r"ElementDataFile: .* same folder, got /etc/passwd",
    ),
    "backslashes": (edit("= scan.raw", "= ..\\scan.raw"), r"ElementDataFile: .* same folder"),
    "the folder": (edit("= scan.raw", "= .."), r"ElementDataFile: .* same folder, got \.\."),
    "local": (edit("= scan.raw", "= LOCAL"), r"ElementDataFile: .* same folder, got LOCAL"),
    "pattern": (edit("= scan.raw", "= s%03d.raw 1 2 1"), r"ElementDataFile: .* same folder"),
    "an end inside": (
        edit("= scan.raw", "= scan.raw\0/../other.raw"),
        r"same folder, got scan\.raw\?/\.\./other",
    ),
    "escapes": (
        edit("= scan.raw", "= \x1b[2J\x85scan"),
        r"expected \?\[2J\?scan beside the header",
    ),
    "twice": (
        edit("DimSize", "DimSize = 400 400 400\nDimSize"),
        "DimSize: expected this field once, got it again",
    ),
    "byte order": (
        edit("ByteOrderMSB = False", "ByteOrderMSB = no"),
        "ByteOrderMSB: expected True or False, got no",
    ),
    "colon": (
        edit("ElementDataFile", "ElementDataFile : ../other.raw\nElementDataFile"),
        r"same folder, got \.\./other",
    ),
}


@pytest.fixture
def header(tmp_path):
    """A scan whose voxels are 0 ... 239."""
    path = tmp_path / "scans" / "scan.mhd"
    path.parent.mkdir()
    volume = volume_of(np.arange(240).reshape(8, 5, 6), (2.0, 0.5, 0.5))
    sitk.WriteImage(image_of(volume), str(path))
    return path


class TestScan:
    def test_a_valid_one(self, header):
        assert read_scan(header).voxels.ravel().tolist() == list(range(240))
        assert load_volume(header, (1.0, 1.0, 1.0)).voxels.shape == (16, 3, 3)

    def test_a_header_before_the_data(self, header):
        raw = header.with_suffix(".raw")
        raw.write_bytes(b"12345678" + raw.read_bytes())
        edit("ElementType", "HeaderSize = 8\nElementType")(header)
        assert read_scan(header).voxels.ravel().tolist() == list(range(240))

    @pytest.mark.parametrize("big_endian", [False, True])
    def test_reads_what_simpleitk_reads(self, header, big_endian):
        rng = np.random.default_rng(0)
        direction = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        voxels = rng.integers(-2000, 3000, size=(3, 4, 5))
        volume = volume_of(voxels, (2.5, 0.7, 0.8), (-170.2, 12.5, 900.1), direction)
        sitk.WriteImage(image_of(volume), str(header))
        if big_endian:
            header.with_suffix(".raw").write_bytes(voxels.astype(">i2").tobytes())
            edit("ByteOrderMSB = False", "ByteOrderMSB = True")(header)
        ours, theirs = read_scan(header), sitk.ReadImage(str(header))
        np.testing.assert_array_equal(ours.voxels, voxels)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs), voxels)
        assert ours.spacing[::-1] == theirs.GetSpacing() and ours.origin == theirs.GetOrigin()
        assert tuple(np.ravel(ours.direction).tolist()) == theirs.GetDirection()

    @pytest.mark.parametrize(
        "lines",
        [
            "ElementDataFile\0x = ../other.raw\nElementDataFile = scan.raw\n",
            "\xa0ElementDataFile = scan.raw\nElementDataFile = ../other.raw\n",
            "ElementDataFile\x1c = scan.raw\nElementDataFile = ../other.raw\n",
        ],
    )
    def test_no_second_reader_finds_another_file_in_the_header(self, header, lines):
        (header.parent.parent / "other.raw").write_bytes(np.full(240, 77, np.int16).tobytes())
        text = header.read_text().replace("ElementDataFile = scan.raw\n", lines)
        header.write_text(text, encoding="latin-1")
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(header))).max() == 77  # the attack works
        try:
            assert read_scan(header).voxels.ravel().tolist() == list(range(240))
        except InputError as error:
            assert "ElementDataFile: expected the name of a file in the same folder" in str(error)

    def test_a_refused_scan_allocates_no_memory(self, header, monkeypatch):
        """A sparse file of the size in its header, and few voxels that would become many."""
        for name in ("fromfile", "empty"):
            monkeypatch.setattr(
                formats.np, name, lambda *args, **kwargs: pytest.fail("allocated memory")
            )
        long = 2**31 // 2**15
        edit("6 5 8", f"{long} {2**15} 2")(header)
        os.truncate(header.with_suffix(".raw"), 2**33)
        with pytest.raises(InputError, match="DimSize"):
            load_volume(header, (1.0, 1.0, 1.0))
        edit(f"{long} {2**15} 2", f"1 1 {2**15}")(header)
        edit("ElementSpacing = 0.5 0.5 2", "ElementSpacing = 999 999 0.001")(header)
        os.truncate(header.with_suffix(".raw"), 2**16)
        with pytest.raises(
            InputError,
            match=r"ElementSpacing: expected at most 32768000 voxels .*, got \(33, 999, 999\)",
        ):
            load_volume(header, (1.0, 1.0, 1.0))

    def test_a_raw_file_that_shrinks_while_it_is_read(self, header, monkeypatch):
        check = formats.check_header

        def check_and_truncate(path):
            checked = check(path)
            os.truncate(checked.raw, 100)
            return checked

        monkeypatch.setattr(formats, "check_header", check_and_truncate)
        with pytest.raises(InputError, match=r"scan\.raw: expected a file that stays as it is"):
            read_scan(header)

    def test_a_header_that_is_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "scan.mhd")
        with pytest.raises(InputError, match=r"scan\.mhd: expected a MetaImage header"):
            read_scan(tmp_path / "scan.mhd")

    @pytest.mark.parametrize("name", BAD_SCANS)
    def test_is_refused_in_one_line(self, header, name):
        change, message = BAD_SCANS[name]
        change(header)
        with pytest.raises(InputError, match=message) as error:
            load_volume(header, (1.0, 1.0, 1.0))
        assert str(header.parent) in str(error.value) and "\n" not in str(error.value)
