"""LUNA16 folders: geometry against SimpleITK, resampling, the cache, and every kind of bad input."""

import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels.focalmix.data import luna16
from fmkernels.focalmix.data.luna16 import AIR, LUNA16, load_volume, read_scan, resample
from fmkernels.focalmix.errors import InputError


def image_of(voxels, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None) -> sitk.Image:
    image = sitk.GetImageFromArray(np.asarray(voxels, dtype=np.int16))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(np.asarray(direction, dtype=float).ravel().tolist())
    return image


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


spacings = st.tuples(*[st.floats(0.4, 3.0)] * 3)


@st.composite
def images(draw) -> sitk.Image:
    """Images of noise with any spacing, origin and orthonormal direction, mirrored ones included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    direction = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    voxels = rng.integers(-1000, 1000, size=rng.integers(1, 9, size=3))
    return image_of(voxels, draw(spacings), rng.uniform(-500, 500, 3).tolist(), direction)


class TestGeometry:
    @given(images(), spacings)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_points_map_as_in_simpleitk_and_back(self, image, spacing):
        volume = resample(image, spacing)
        grid = image_of(volume.voxels, spacing, volume.origin, image.GetDirection())
        index = np.random.default_rng(0).uniform(-5, 20, size=(4, 3))
        world = np.array(
            [grid.TransformContinuousIndexToPhysicalPoint(point[::-1].tolist()) for point in index]
        )
        np.testing.assert_allclose(volume.to_world(index), world, atol=1e-9)
        np.testing.assert_allclose(volume.to_index(world), index, atol=1e-9)

    @given(images(), spacings)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_grid_begins_at_the_outer_corner_and_covers_the_scan(self, image, spacing):
        volume = resample(image, spacing)
        size = np.array(image.GetSize())
        corners = [
            image.TransformContinuousIndexToPhysicalPoint(c.tolist())
            for c in (-0.5 * np.ones(3), size - 0.5)
        ]
        low, high = volume.to_index(np.array(corners)) + 0.5
        np.testing.assert_allclose(low, 0, atol=1e-9)
        beyond = volume.voxels.shape - high
        assert (beyond > -1e-5).all()
        assert ((beyond < 1) | (np.array(volume.voxels.shape) == 1)).all()

    def test_boxes_are_cubes_of_the_diameter_in_voxels(self):
        volume = resample(
            image_of(np.zeros((10, 10, 10)), (2.0, 1.0, 1.0), (5.0, 6.0, 7.0)), (2.0, 1.0, 1.0)
        )
        boxes = volume.boxes(np.array([[8.0, 8.0, 11.0, 4.0], [8.0, 8.0, 11.0, -1.0]]))
        assert boxes.dtype == np.float32
        assert boxes[0].tolist() == [1.5, 0.5, 1.5, 3.5, 4.5, 5.5]
        assert boxes[1].tolist() == [0.0, -2.5, -1.5, 5.0, 7.5, 8.5]
        assert volume.boxes(np.empty((0, 4))).shape == (0, 6)


class TestResample:
    def test_same_spacing_keeps_every_voxel(self):
        voxels = np.random.default_rng(0).integers(-1000, 2000, size=(5, 6, 7))
        volume = resample(image_of(voxels, (2.5, 0.7, 0.8)), (2.5, 0.7, 0.8))
        np.testing.assert_array_equal(volume.voxels, voxels)
        assert volume.voxels.dtype == np.int16

    @given(images(), st.tuples(*[st.floats(0.3, 1.0)] * 3))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_finer_spacing_is_simpleitk_linear_interpolation(self, image, fractions):
        spacing = tuple(
            step * part for step, part in zip(image.GetSpacing()[::-1], fractions, strict=True)
        )
        volume = resample(image, spacing)
        expected = sitk.Resample(
            sitk.Cast(sitk.ZeroFluxNeumannPad(image, (1, 1, 1), (1, 1, 1)), sitk.sitkFloat64),
            volume.voxels.shape[::-1],
            sitk.Transform(),
            sitk.sitkLinear,
            volume.origin,
            spacing[::-1],
            image.GetDirection(),
            math.nan,
        )
        np.testing.assert_allclose(volume.voxels, sitk.GetArrayViewFromImage(expected), atol=0.51)

    def test_coarser_spacing_averages_what_it_cannot_show(self):
        stripes = np.where(np.arange(48) % 2, 900, -900) + np.zeros((48, 48, 1))
        for axes in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            volume = resample(image_of(stripes.transpose(axes)), (4.3, 4.3, 4.3))
            inside = volume.voxels[
                tuple(slice(1, -1) if length > 1 else slice(None) for length in volume.voxels.shape)
            ]
            assert np.abs(inside).max() < 60

    def test_coarser_spacing_keeps_constants_and_slopes(self):
        ramp = np.arange(60)[:, None, None] * 30 - 900 + np.zeros((60, 4, 4))
        volume = resample(image_of(ramp), (2.5, 2.0, 2.0))
        centres = volume.to_world(np.array([[i, 0, 0] for i in range(24)]))[:, 2]
        np.testing.assert_allclose(volume.voxels[2:-2, 0, 0], centres[2:-2] * 30 - 900, atol=6)
        assert (resample(image_of(np.full((9, 9, 9), 77)), (2.3, 1.7, 4.0)).voxels == 77).all()

    def test_padding_below_air_becomes_air_before_it_is_mixed(self):
        voxels = np.full((4, 4, 4), -3000)
        voxels[:, :, 2:] = 0
        volume = resample(image_of(voxels), (1.0, 1.0, 0.5))
        assert volume.voxels.min() == AIR
        assert volume.voxels[0, 0].tolist() == [AIR, AIR, AIR, -768, -256, 0, 0, 0]


class TestFolder:
    def test_lists_series_by_subset_and_reads_the_tables(self, luna_folder, luna_scans):
        data = LUNA16(luna_folder)
        assert len(data) == 5
        assert data.series == [scan.uid for scan in luna_scans]
        for scan in luna_scans:
            assert data.subset(scan.uid) == scan.subset
            assert data.path(scan.uid) == luna_folder / f"subset{scan.subset}" / f"{scan.uid}.mhd"
            assert data.nodules(scan.uid).shape == (len(scan.nodules), 4)
            assert data.excluded(scan.uid)[:, 3].tolist() == [
                finding[3] for finding in scan.excluded
            ]

    def test_subsets_select_scans_and_leave_other_annotations_aside(self, luna_folder, luna_scans):
        data = LUNA16(luna_folder, subsets=(9, 1))
        assert data.series == [luna_scans[2].uid, luna_scans[4].uid]
        with pytest.raises(InputError, match=r"expected a series of the data set, got '1\.3"):
            data.nodules(luna_scans[0].uid)

    @pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (0.9, 0.5, 1.3)])
    def test_nodules_lie_where_their_boxes_say(self, luna_folder, luna_scans, spacing):
        data = LUNA16(luna_folder, spacing=spacing)
        found = 0
        for uid in data.series:
            volume = data.volume(uid)
            assert volume.spacing == spacing
            for box in volume.boxes(data.nodules(uid)):
                low, high = np.floor(box[:3]).astype(int), np.ceil(box[3:]).astype(int)
                region = volume.voxels[tuple(map(slice, low, high))].astype(float) + 850
                points = np.argwhere(region > -np.inf) + low + 0.5
                centroid = np.average(points, axis=0, weights=region.clip(0).ravel())
                assert np.abs((centroid - (box[:3] + box[3:]) / 2) * spacing).max() < 0.5
                found += 1
        assert found == sum(len(scan.nodules) for scan in luna_scans)

    def test_unpacked_one_folder_deeper_and_tables_as_downloaded(self, luna_folder):
        (luna_folder / "subset0").rename(luna_folder / "inner")
        (luna_folder / "subset0").mkdir()
        (luna_folder / "inner").rename(luna_folder / "subset0" / "subset0")
        (luna_folder / "subset1" / "._1.2.3.mhd").write_bytes(b"a resource fork")
        tables = luna_folder / "evaluationScript" / "annotations"
        tables.mkdir(parents=True)
        for name in ("annotations.csv", "annotations_excluded.csv", "seriesuids.csv"):
            (luna_folder / name).rename(tables / name)
        data = LUNA16(luna_folder)
        assert len(data) == 5
        assert len(data.nodules(data.series[0])) == 2
        assert len(data.excluded(data.series[0])) == 1
        assert data.volume(data.series[0]).voxels.ndim == 3

    def test_does_without_the_optional_tables_and_the_other_subsets(self, luna_folder, luna_scans):
        shutil.rmtree(luna_folder / "subset9")
        assert len(LUNA16(luna_folder)) == 4
        (luna_folder / "annotations_excluded.csv").unlink()
        (luna_folder / "seriesuids.csv").unlink()
        data = LUNA16(luna_folder)
        assert data.series == [scan.uid for scan in luna_scans[:4]]
        assert data.excluded(data.series[0]).shape == (0, 4)

    def test_a_pickled_copy_reads_the_same(self, luna_folder):
        data = LUNA16(luna_folder)
        copy = pickle.loads(pickle.dumps(data))
        np.testing.assert_array_equal(
            copy.volume(copy.series[2]).voxels, data.volume(data.series[2]).voxels
        )


class TestBadFolder:
    @pytest.mark.parametrize(
        "spacing", [(1, 1), (1, 1, 0), (1, 1, math.inf), (1, 1, math.nan), (1, 1, -2)]
    )
    def test_spacing(self, luna_folder, spacing):
        with pytest.raises(ValueError, match="LUNA16: spacing: expected 3 positive numbers"):
            LUNA16(luna_folder, spacing=spacing)

    def test_subset_number(self, luna_folder):
        with pytest.raises(ValueError, match="LUNA16: subsets: expected numbers of 0 to 9"):
            LUNA16(luna_folder, subsets=[10])

    def test_no_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"nowhere: expected a folder in LUNA16's layout"):
            LUNA16(tmp_path / "nowhere")

    def test_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"expected scans subset0/<seriesuid>\.mhd"):
            LUNA16(tmp_path)

    def test_missing_subset(self, luna_folder):
        (luna_folder / "subset5").rmdir()
        with pytest.raises(InputError, match="expected a folder subset5"):
            LUNA16(luna_folder, subsets=[1, 5])

    def test_missing_annotations(self, luna_folder):
        (luna_folder / "annotations.csv").unlink()
        with pytest.raises(InputError, match=r"annotations\.csv: expected the table of nodules"):
            LUNA16(luna_folder)

    def test_series_in_two_subsets(self, luna_folder, luna_scans):
        for path in (luna_folder / "subset0").glob(f"{luna_scans[0].uid}.*"):
            shutil.copy(path, luna_folder / "subset4")
        with pytest.raises(
            InputError, match=r"subset4.*expected each series once, got it in .*subset0"
        ):
            LUNA16(luna_folder)

    @pytest.mark.parametrize("with_list", [True, False])
    def test_annotation_of_unknown_series(self, luna_folder, with_list):
        with open(luna_folder / "annotations.csv", "a") as file:
            file.write("9.9.9,1.0,2.0,3.0,4.0\n")
        if not with_list:
            (luna_folder / "seriesuids.csv").unlink()
        with pytest.raises(
            InputError,
            match=r"annotations\.csv, row 7: seriesuid: expected a series .* got '9\.9\.9'",
        ):
            LUNA16(luna_folder)

    @pytest.mark.parametrize("uid", ["../../outside", "/etc/passwd", "..", "C:\\outside"])
    def test_series_ids_that_are_paths_lead_nowhere(self, luna_folder, luna_scans, uid):
        for name in ("outside.mhd", "outside.raw"):
            suffix = name.split(".")[1]
            shutil.copy(
                luna_folder / "subset0" / f"{luna_scans[0].uid}.{suffix}", luna_folder.parent / name
            )
        before = sorted(path.name for path in luna_folder.parent.iterdir())
        with open(luna_folder / "annotations.csv", "a") as file:
            file.write(f"{uid},1.0,2.0,3.0,4.0\n")
        with pytest.raises(
            InputError, match=r"annotations\.csv, row 7: seriesuid: expected a series"
        ):
            LUNA16(luna_folder)
        with open(luna_folder / "seriesuids.csv", "a") as file:
            file.write(f"{uid}\n")
        with pytest.raises(
            InputError, match=r"seriesuids\.csv, row 6: expected a series with a scan"
        ):
            LUNA16(luna_folder)
        (luna_folder / "subset7").rmdir()  # now the scan could be in what is not there
        data = LUNA16(luna_folder)
        data.prepare(workers=0, progress=False)
        assert uid not in data.series and len(list(data.cache.iterdir())) == 5
        for ask in (data.path, data.volume, data.nodules):
            with pytest.raises(InputError, match="expected a series of the data set"):
                ask(uid)
        assert sorted(path.name for path in luna_folder.parent.iterdir()) == before

    def test_listed_series_without_scan_and_scan_that_is_not_listed(self, luna_folder, luna_scans):
        listed = (luna_folder / "seriesuids.csv").read_text()
        (luna_folder / "seriesuids.csv").write_text(listed + "9.9.9\n")
        with pytest.raises(
            InputError,
            match=r"seriesuids\.csv, row 6: expected a series with a scan, got '9\.9\.9'",
        ):
            LUNA16(luna_folder)
        (luna_folder / "subset7").rmdir()
        assert len(LUNA16(luna_folder)) == 5
        (luna_folder / "seriesuids.csv").write_text(listed.split("\n", 1)[1])
        with pytest.raises(
            InputError, match=rf"{luna_scans[0].uid}\.mhd: expected a series of .*seriesuids\.csv"
        ):
            LUNA16(luna_folder)

    def test_annotation_outside_its_scan_names_the_row(self, luna_folder, luna_scans):
        lines = (luna_folder / "annotations.csv").read_text().splitlines()
        uid = luna_scans[0].uid
        lines[2] = f"{uid},-170.2,-150.5,-240.0,5"
        (luna_folder / "annotations.csv").write_text("\n".join(lines))
        data = LUNA16(luna_folder)
        for call in (lambda: data.volume(uid), lambda: data.prepare(workers=0, progress=False)):
            with pytest.raises(
                InputError, match=r"annotations\.csv, row 3: expected a point inside of .*-240\) mm"
            ):
                call()


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
        r"ElementSpacing: expected at most 240000 voxels at \(1\.0, 1\.0, 1\.0\) mm, got \(16, 4500, 5400\)",
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


class TestBadScan:
    @pytest.fixture
    def header(self, tmp_path):
        path = tmp_path / "scans" / "scan.mhd"
        path.parent.mkdir()
        sitk.WriteImage(image_of(np.arange(240).reshape(8, 5, 6), (2.0, 0.5, 0.5)), str(path))
        return path

    def test_the_good_one(self, header):
        assert sitk.GetArrayFromImage(read_scan(header)).ravel().tolist() == list(range(240))
        assert load_volume(header, (1.0, 1.0, 1.0)).voxels.shape == (16, 3, 3)

    def test_a_header_before_the_data(self, header):
        raw = header.with_suffix(".raw")
        raw.write_bytes(b"12345678" + raw.read_bytes())
        edit("ElementType", "HeaderSize = 8\nElementType")(header)
        assert sitk.GetArrayFromImage(read_scan(header)).ravel().tolist() == list(range(240))

    @pytest.mark.parametrize("big_endian", [False, True])
    def test_reads_what_simpleitk_reads(self, header, big_endian):
        rng = np.random.default_rng(0)
        direction = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        voxels = rng.integers(-2000, 3000, size=(3, 4, 5))
        sitk.WriteImage(
            image_of(voxels, (2.5, 0.7, 0.8), (-170.2, 12.5, 900.1), direction), str(header)
        )
        if big_endian:
            header.with_suffix(".raw").write_bytes(voxels.astype(">i2").tobytes())
            edit("ByteOrderMSB = False", "ByteOrderMSB = True")(header)
        ours, theirs = read_scan(header), sitk.ReadImage(str(header))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), voxels)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs), voxels)
        for place in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(ours, place)() == getattr(theirs, place)()

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
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(header))).max() == 77  # what this is about
        try:
            assert sitk.GetArrayFromImage(read_scan(header)).ravel().tolist() == list(range(240))
        except InputError as error:
            assert "ElementDataFile: expected the name of a file in the same folder" in str(error)

    def test_memory_is_not_taken_for_what_is_refused(self, header, monkeypatch):
        """Hollow files as large as their header says, and a few voxels that would become many."""
        for name in ("fromfile", "empty"):
            monkeypatch.setattr(luna16.np, name, lambda *args, **kwargs: pytest.fail("took memory"))
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
        checked = luna16.check_header

        def check_and_lose(path):
            found = checked(path)
            os.truncate(found.raw, 100)
            return found

        monkeypatch.setattr(luna16, "check_header", check_and_lose)
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
        assert str(header.parent) in one_line(error)

    def test_is_refused_without_leaving_a_cache(self, luna_folder, luna_scans):
        os.truncate(luna_folder / "subset0" / f"{luna_scans[1].uid}.raw", 100)
        with pytest.raises(InputError, match=rf"{luna_scans[1].uid}\.raw: expected \d+ bytes"):
            LUNA16(luna_folder).prepare(workers=0, progress=False)
        assert not list(luna_folder.glob(f".cache*/*{luna_scans[1].uid}*"))


class TestCache:
    def test_is_a_memory_map_that_is_made_once(self, luna_folder):
        data = LUNA16(luna_folder, spacing=(2, 1.5, 1.5))
        uid = data.series[2]
        first = data.volume(uid)
        assert isinstance(first.voxels, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            first.voxels[0, 0, 0] = 1
        (file,) = (luna_folder / ".cache-2x1.5x1.5").iterdir()
        before = file.stat()
        again, direct = data.volume(uid), load_volume(data.path(uid), data.spacing)
        assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_ino == before.st_ino
        for volume in (again, direct):
            np.testing.assert_array_equal(volume.voxels, first.voxels)
            assert (volume.spacing, volume.origin, volume.direction) == (
                first.spacing,
                first.origin,
                first.direction,
            )

    @pytest.mark.parametrize("suffix", [".raw", ".mhd"])
    def test_is_made_again_when_the_source_changes(self, luna_folder, suffix):
        data = LUNA16(luna_folder)
        uid = data.series[0]
        old = data.volume(uid)
        source = data.path(uid).with_suffix(suffix)
        if suffix == ".raw":
            source.write_bytes(source.read_bytes()[::-1])
        else:
            edit("Offset = -170.", "Offset = -171.")(source)
        os.utime(source, ns=(0, 12345))
        new = data.volume(uid)
        if suffix == ".raw":
            assert not np.array_equal(new.voxels, old.voxels)
        else:
            assert new.origin[0] == pytest.approx(old.origin[0] - 1)

    @pytest.mark.parametrize(
        "breakage",
        [
            lambda content: content[: len(content) // 2],
            lambda content: content[:-1],
            lambda content: b"",
            lambda content: b"noise" * 1000,
            lambda content: content.replace(b"<i2", b"<u2"),
            lambda content: content + b"more",
            lambda content: (
                content[: content.rindex(b'{"source"')] + json.dumps({"source": {}}).encode()
            ),
        ],
    )
    def test_is_made_again_when_it_is_broken(self, luna_folder, breakage):
        data = LUNA16(luna_folder)
        uid = data.series[0]
        expected = np.array(data.volume(uid).voxels)
        (file,) = data.cache.iterdir()
        file.write_bytes(breakage(file.read_bytes()))
        np.testing.assert_array_equal(data.volume(uid).voxels, expected)

    def test_goes_to_another_folder(self, luna_folder, tmp_path):
        data = LUNA16(luna_folder, cache=tmp_path / "fast" / "disk")
        data.prepare(workers=0, progress=False)
        assert len(list((tmp_path / "fast" / "disk" / ".cache-1x1x1").iterdir())) == 5
        assert not list(luna_folder.glob(".cache*"))

    def test_says_when_it_cannot_be_written(self, luna_folder, tmp_path):
        (tmp_path / "file").touch()
        data = LUNA16(luna_folder, cache=tmp_path / "file")
        with pytest.raises(
            InputError, match=r"file/\.cache-1x1x1: cannot write .* see --cache"
        ) as error:
            data.volume(data.series[0])
        one_line(error)

    def test_a_full_disk_leaves_nothing_half_written(self, luna_folder, monkeypatch):
        def full(file, array):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        data = LUNA16(luna_folder)
        monkeypatch.setattr(luna16.np, "save", full)
        with pytest.raises(InputError, match="No space left on device"):
            data.prepare(workers=0, progress=False)
        assert list(data.cache.iterdir()) == []

    def test_worker_processes_write_the_same(self, luna_folder, tmp_path, capfd):
        alone, together = (
            LUNA16(luna_folder, cache=tmp_path / "a"),
            LUNA16(luna_folder, cache=tmp_path / "b"),
        )
        alone.prepare(workers=1, progress=False)
        assert capfd.readouterr().err == ""
        together.prepare(workers=2)
        assert "resampling: 100%" in capfd.readouterr().err
        names = sorted(path.name for path in alone.cache.iterdir())
        assert names == [f"{uid}.npy" for uid in sorted(alone.series)]
        for name in names:
            assert (alone.cache / name).read_bytes() == (together.cache / name).read_bytes()
