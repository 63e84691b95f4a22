"""Scan files: read as SimpleITK reads them, and every bad one refused in one line."""

import gzip
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.data import formats, metaimage
from fmkernels.focalmix.data.formats import (
    check_header,
    find_scans,
    load_volume,
    read_scan,
    scan_id,
)
from fmkernels.focalmix.errors import InputError, InputWarning
from tests.focalmix.data.test_volume import image_of, volume_of
from tests.focalmix.kinds import KINDS, write_dicom


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
    "no header": (
        lambda header: header.unlink(),
        r"scan\.mhd: expected a scan \(.*\), found no such file",
    ),
    "not a header": (
        lambda header: header.write_bytes(bytes(range(256)) * 999),
        r"scan\.mhd: expected a MetaImage header, got other data",
    ),
    "2D": (rewrite(np.zeros((4, 5), np.int16)), "NDims: expected 3, got 2"),
    "4D": (edit("NDims = 3", "NDims = 4"), "NDims: expected 3, got 4"),
    "RGB": (
        rewrite(np.zeros((3, 4, 5, 3), np.uint8), vector=True),
        "ElementNumberOfChannels: expected 1, got 3",
    ),
    "mask": (
        rewrite(np.zeros((3, 4, 5), np.uint8)),
        r"ElementType: expected a type of HU, which are signed .*, got MET_UCHAR",
    ),
    "HU + 1024": (
        rewrite(np.zeros((3, 4, 5), np.uint16)),
        r"ElementType: .*from HU \+ 1024 subtract 1024.*, got MET_USHORT",
    ),
    "a type of no image": (
        edit("MET_SHORT", "MET_STRING"),
        "ElementType: expected one of MET_SHORT, .*, got MET_STRING",
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
        r"ElementSpacing: expected 3 .* got 1e\+09 0\.5 2",
    ),
    "tiny spacing": (
        edit("ElementSpacing = 0.5", "ElementSpacing = 1e-300"),
        "ElementSpacing: expected 3 numbers",
    ),
    "a bomb": (
        edit("ElementSpacing = 0.5 0.5", "ElementSpacing = 900 900"),
        r"expected a spacing with at most 240000 voxels at .* mm, got \(16, 4500, 5400\)",
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
    "not compressed": (
        edit("CompressedData = False", "CompressedData = True"),
        r"scan\.raw: expected voxels compressed by zlib",
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
                metaimage.np, name, lambda *args, **kwargs: pytest.fail("allocated memory")
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
            match=r"expected a spacing with at most 32768000 voxels .*, got \(33, 999, 999\)",
        ):
            load_volume(header, (1.0, 1.0, 1.0))

    def test_a_raw_file_that_shrinks_while_it_is_read(self, header, monkeypatch):
        check = formats.check_header

        def check_and_truncate(path):
            checked = check(path)
            os.truncate(checked.files[1], 100)
            return checked

        monkeypatch.setattr(formats, "check_header", check_and_truncate)
        with pytest.raises(InputError, match=r"scan\.raw: expected a file that stays as it is"):
            read_scan(header)

    def test_a_header_that_is_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "scan.mhd")
        with pytest.raises(
            InputError, match=r"scan\.mhd: expected a scan \(.*\), found no such file"
        ):
            read_scan(tmp_path / "scan.mhd")

    @pytest.mark.parametrize("name", BAD_SCANS)
    def test_is_refused_in_one_line(self, header, name):
        change, message = BAD_SCANS[name]
        change(header)
        with pytest.raises(InputError, match=message) as error:
            load_volume(header, (1.0, 1.0, 1.0))
        assert str(header.parent) in str(error.value) and "\n" not in str(error.value)


UID = "1.2.826.0.1.3680043.2.1"


def oblique():
    """A scan whose voxels are 0 ... 239, of uneven spacing, tilted in space."""
    direction = np.linalg.qr(np.array([[9.0, 1, 2], [-1, 9, 1], [2, -1, 9]]))[0]
    voxels = np.arange(240).reshape(8, 5, 6) * 3 - 1000
    return image_of(volume_of(voxels, (2.0, 0.5, 0.75), (-170.25, 12.5, 900.0), direction))


def points_of_values(volume):
    """Where in the world each value of a scan is, by rising values."""
    order = np.argsort(volume.voxels, axis=None)
    index = np.stack(np.unravel_index(order, volume.voxels.shape), axis=1)
    return volume.voxels.ravel()[order], volume.to_world(index + 0.5)


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_holds_the_same_values_at_the_same_places(self, tmp_path, kind):
        image = oblique()
        path = KINDS[kind](tmp_path, image, UID)
        assert find_scans(tmp_path) == [path] and scan_id(path) == UID
        values, points = points_of_values(read_scan(path))
        np.testing.assert_array_equal(values, np.arange(240) * 3 - 1000)
        expected = [
            image.TransformIndexToPhysicalPoint(tuple(map(int, index)))
            for index in np.stack(np.unravel_index(np.arange(240), (8, 5, 6)), 1)[:, ::-1]
        ]
        np.testing.assert_allclose(points, expected, atol=1e-3)
        volume = load_volume(path, (1.0, 1.0, 1.0))
        assert volume.voxels.dtype == np.int16 and volume.spacing == (1.0, 1.0, 1.0)

    def test_a_series_is_read_as_by_simpleitk(self, tmp_path):
        write_dicom(tmp_path, oblique(), UID)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
        theirs, ours = reader.Execute(), read_scan(tmp_path)
        np.testing.assert_array_equal(ours.voxels, sitk.GetArrayFromImage(theirs))
        np.testing.assert_allclose(ours.spacing[::-1], theirs.GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(ours.origin, theirs.GetOrigin(), atol=1e-6)
        np.testing.assert_allclose(np.ravel(ours.direction), theirs.GetDirection(), atol=1e-6)

    def test_floats_are_rounded_and_large_values_clipped_with_a_word(self, tmp_path):
        values = np.array([-1e5, -1000.6, -0.4, 0.6, 1000.4, 4e4]).reshape(1, 2, 3)
        path = tmp_path / "scan.nii"
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
        with pytest.warns(InputWarning, match=r"scan\.nii: 2 voxels outside of -32768 .* clipped"):
            voxels = read_scan(path).voxels
        assert voxels.ravel().tolist() == [-32768, -1001, 0, 1, 1000, 32767]
        path = tmp_path / "scan.mha"
        sitk.WriteImage(sitk.GetImageFromArray(values * np.nan), str(path))
        with pytest.raises(InputError, match=r"scan\.mha: expected finite HU, got NaN"):
            read_scan(path)

    def test_a_scale_in_the_header_applies(self, tmp_path):
        """As dcm2niix writes unsigned values and the intercept -1024."""
        path = tmp_path / "scan.nii"
        sitk.WriteImage(sitk.GetImageFromArray(np.full((3, 4, 5), 2024, np.uint16)), str(path))
        data = bytearray(path.read_bytes())
        data[112:120] = np.array([1, -1024], "<f4").tobytes()  # scl_slope, scl_inter
        path.write_bytes(data)
        assert np.unique(read_scan(path).voxels).tolist() == [1000]

    def test_nested_folders_and_hidden_files(self, tmp_path):
        image = oblique()
        first = KINDS["NIfTI"](tmp_path / "patients" / "b", image, "scan")
        second = KINDS["MetaImage"](tmp_path / "patients" / "a", image, "scan")
        third = write_dicom(tmp_path / "a" / "series", image, UID)
        KINDS["NIfTI"](tmp_path / ".cache-1x1x1", image, "scan")
        (tmp_path / "a" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
        (tmp_path / "patients" / "._scan.nii").write_bytes(b"a resource fork")
        (tmp_path / "notes.txt").write_text("none")
        assert find_scans(tmp_path) == [third, second, first]


def replace_file(content: bytes, name: str = ""):
    def change(path):
        target = path.with_name(name) if name else path
        target.write_bytes(content)

    return change


def cut(end: int):
    return lambda path: path.write_bytes(path.read_bytes()[:end])


def poke(at: int, value: bytes):
    def change(path):
        data = bytearray(path.read_bytes())
        data[at : at + len(value)] = value
        path.write_bytes(data)

    return change


def pack(change):
    """Change what is inside of a .nii.gz."""

    def changed(path):
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))

    return changed


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
BAD_FILES = {
    "a pointer": (".nii.gz", replace_file(LFS), r"got a Git LFS pointer.*run git lfs pull"),
    "a pointer as nrrd": (".nrrd", replace_file(LFS), "expected an NRRD file, got a Git LFS"),
    "a pointer as mhd": (".mhd", replace_file(LFS), "expected a MetaImage header, got a Git LFS"),
    "a pointer for raw": (
        ".mhd",
        replace_file(LFS, "scan.raw"),
        r"scan\.raw: expected voxels, got a Git LFS pointer",
    ),
    "empty": (".nii", replace_file(b""), "expected a NIfTI file, got an empty file"),
    "text": (".nii", replace_file(b"hello"), "expected a NIfTI file, got text"),
    "a page": (".nrrd", replace_file(b"<html>"), "expected an NRRD file, got a web page"),
    "DICOM": (
        ".mhd",
        replace_file(bytes(128) + b"DICM"),
        "got a DICOM file; give the folder of its series",
    ),
    "NIfTI as mhd": (
        ".mhd",
        replace_file(bytes(344) + b"n+1\0"),
        r"got a NIfTI file; name it \.nii",
    ),
    "a pair": (".nii", poke(344, b"ni1\0"), "got the header of a NIfTI pair"),
    "not packed": (".nii.gz", replace_file(b"hello"), "in a gzip archive, got text"),
    "no place of voxels": (
        ".nii",
        poke(108, np.float32(np.nan).tobytes()),
        "vox_offset: expected a finite number, got nan",
    ),
    "half a file": (".nii", cut(-60), r"expected at least 832 bytes, got 772; is the copy"),
    "half an archive": (".nii.gz", cut(-60), "expected a complete gzip archive"),
    "no checksum": (".nii.gz", cut(-6), "expected a complete gzip archive"),
    "a wrong checksum": (
        ".nii.gz",
        poke(-8, b"oops"),
        "expected a complete gzip archive: CRC|not recognized",
    ),
    "short inside": (
        ".nii.gz",
        pack(lambda data: data[:-2]),
        "expected 832 bytes in the archive, got 830",
    ),
    "long inside": (
        ".nii.gz",
        pack(lambda data: data + bytes(2**25)),
        "expected 832 bytes in the archive, got many more",
    ),
    "a bomb": (
        ".nii.gz",
        pack(lambda data: data[:42] + np.array([2000, 2000, 100], "<i2").tobytes() + data[48:]),
        "expected at most 200 bytes of voxels per compressed byte, got 800000352",
    ),
    "a long axis": (
        ".nrrd",
        lambda path: path.write_bytes(path.read_bytes().replace(b"6 5 8", b"6 5 99999")),
        "size: expected 3 positive integers, each at most 32768, .* got 6 5 99999",
    ),
    "half an nrrd": (".nrrd", cut(-60), "cannot be read: .*fread got only"),
    "another file": (
        ".nrrd",
        lambda path: path.write_bytes(
            path.read_bytes().replace(b"encoding", b"data file: ../other.raw\nencoding")
        ),
        "data file: expected voxels in the file itself",
    ),
    "a line that crashes ITK": (
        ".nrrd",
        lambda path: path.write_bytes(path.read_bytes().replace(b"kinds:", b"[" * 5000 + b":")),
        "expected lines of at most 1000 bytes in the header, got 50",
    ),
    "2D": (".nii", None, "expected 3 dimensions, got 2"),
    "a mask": (".nii.gz", None, r"expected a type of HU, .*label maps.*got 8-bit unsigned integer"),
    "RGB": (".nrrd", None, "expected 1 channel, got 3"),
    "half an mha": (".mha", cut(-2), "expected .* bytes .DimSize 6 5 8 of MET_SHORT., got"),
    "a png": (".png", replace_file(b"\x89PNG"), r"expected a scan \(\.mhd, .* got other data"),
    "raw": (".raw", replace_file(bytes(480)), r"expected a scan .* got other data"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_says_what_it_is(tmp_path, name):
    suffix, change, message = BAD_FILES[name]
    path = tmp_path / f"scan{suffix}"
    if change is None:
        arrays = {
            "2D": np.zeros((4, 5), np.int16),
            "a mask": np.zeros((3, 4, 5), np.uint8),
            "RGB": np.zeros((3, 4, 5, 3), np.int16),
        }
        image = sitk.GetImageFromArray(arrays[name], isVector=name == "RGB")
        sitk.WriteImage(image, str(path))
    else:
        if suffix in (".nii", ".nii.gz", ".nrrd", ".mhd", ".mha"):
            sitk.WriteImage(oblique(), str(path))
        change(path)
    with pytest.raises(InputError, match=message) as error:
        read_scan(path)
    assert str(tmp_path / "scan") in str(error.value) and "\n" not in str(error.value)


def a_slice_away(folder):
    (folder / "IM0021").unlink()


BAD_SERIES = {
    "a gap": ({}, a_slice_away, r"IM0028: expected evenly .*, got one 4 mm after IM0014 .* 2 mm"),
    "twice": (
        {"t0020_0032": lambda k, value: value if k != 3 else "-170.25\\12.5\\900.0"},
        None,
        r"IM0021: expected slices at different places, got the place of IM0000 again",
    ),
    "a tilt": (
        {"t0020_0037": lambda k, value: "1\\0\\0\\0\\0.966\\0.259"},
        None,
        r"expected slices above one another, .*gantry tilt of \d+\.\d degrees",
    ),
    "two series": (
        {"t0020_000e": lambda k, value: value if k < 5 else f"{value}9"},
        None,
        rf"expected one DICOM series, got 2: IM00\d\d is of {UID}9?, IM00\d\d of {UID}9?; move",
    ),
    "no CT": ({"t0008_0060": lambda k, value: "MR"}, None, "Modality: expected CT, got MR"),
    "turned": (
        {"t0020_0037": lambda k, value: value if k != 2 else "1\\0\\0\\0\\-1\\0"},
        None,
        r"ImageOrientationPatient: expected .* as in IM00\d\d, got",
    ),
}


@pytest.mark.filterwarnings("ignore::fmkernels.focalmix.errors.InputWarning")
@pytest.mark.parametrize("name", BAD_SERIES)
def test_a_bad_series_is_refused_by_the_name_of_a_slice(tmp_path, name):
    changes, change, message = BAD_SERIES[name]
    folder = write_dicom(tmp_path / "series", image_of(volume_of(np.zeros((8, 5, 6)))), UID)
    image = image_of(volume_of(np.zeros((8, 5, 6)), (2.0, 0.5, 0.5), (-170.25, 12.5, 900.0)))
    write_dicom(folder, image, UID, **changes)
    if change is not None:
        change(folder)
    with pytest.raises(InputError, match=message) as error:
        read_scan(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_slightly_uneven_slices_are_read_with_a_warning(tmp_path):
    image = image_of(volume_of(np.zeros((8, 5, 6)), (2.0, 0.5, 0.5)))
    moved = {"t0020_0032": lambda k, value: value if k != 3 else "0\\0\\6.3"}
    folder = write_dicom(tmp_path / "series", image, UID, **moved)
    with pytest.warns(InputWarning, match=r"IM0021: the slice lies 2\.3 mm after IM0014 .* 2 mm"):
        read_scan(folder)
    assert check_header(write_dicom(tmp_path / "even", image, UID)).warnings == ()


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_header_that_admits_uneven_slices(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    image = image_of(volume_of(np.zeros((8, 5, 6)), (2.0, 0.5, 0.5)))
    for deviation, expected in ((0.1, None), (0.3, InputWarning), (1.1, InputError)):
        image.SetMetaData("ITK_non_uniform_sampling_deviation", str(deviation))
        sitk.WriteImage(image, str(path))
        if expected is None:
            assert check_header(path).warnings == ()
        elif expected is InputWarning:
            with pytest.warns(InputWarning, match=r"up to 0\.3 mm beside their places \(2 mm"):
                read_scan(path)
        else:
            with pytest.raises(InputError, match=r"got some missing: slices lie up to 1\.1 mm"):
                read_scan(path)


def test_a_header_without_an_orientation_is_read_with_a_warning(tmp_path):
    path = tmp_path / "scan.nii"
    sitk.WriteImage(oblique(), str(path))
    poke(252, bytes(4))(path)
    with pytest.warns(InputWarning, match="does not say how the scan lies .qform and sform"):
        read_scan(path)
