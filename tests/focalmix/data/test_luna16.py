"""LUNA16 folders: layout, tables, cache, and bad folders."""

import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest

from fmkernels.focalmix.data import dataset
from fmkernels.focalmix.data.formats import load_volume
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.errors import InputError, InputWarning


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
            nodules, excluded = data.boxes(uid)
            np.testing.assert_array_equal(excluded, volume.boxes(data.excluded(uid)))
            for box in nodules:
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

    @pytest.mark.parametrize("table", ["annotations", "annotations_excluded", "seriesuids"])
    def test_a_spreadsheet_in_place_of_a_table(self, luna_folder, table):
        (luna_folder / "CSVFILES").mkdir()
        (luna_folder / f"{table}.csv").rename(luna_folder / "CSVFILES" / f"{table}.xls")
        with pytest.raises(InputError, match=rf"{table}\.xls: expected a table in text"):
            LUNA16(luna_folder)

    def test_subset_number(self, luna_folder):
        with pytest.raises(ValueError, match="LUNA16: subsets: expected numbers of 0 to 9"):
            LUNA16(luna_folder, subsets=[10])

    def test_no_folder(self, tmp_path):
        with pytest.raises(
            InputError, match=r"nowhere: expected a folder with scans, found no such folder"
        ):
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

    def test_findings_of_missing_subsets_are_counted(self, luna_folder, luna_scans):
        """They may belong to scans that were not downloaded, or to misspelled ids."""
        (luna_folder / "seriesuids.csv").unlink()
        shutil.rmtree(luna_folder / "subset9")
        with pytest.warns(
            InputWarning,
            match=rf"annotations\.csv: 1 findings are of 1 series without .* row 6 of "
            rf"{luna_scans[4].uid}$",
        ):
            LUNA16(luna_folder)
        table = luna_folder / "annotations.csv"
        table.write_text(table.read_text().replace("1.3.6", "01.3.6"))
        with pytest.raises(InputError, match=r"annotations\.csv, row 2: seriesuid: .* '01\.3\.6"):
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
        for call in (lambda: data.boxes(uid), lambda: data.prepare(workers=0, progress=False)):
            with pytest.raises(
                InputError, match=r"annotations\.csv, row 3: expected a point inside of .*-240\) mm"
            ):
                call()

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
        assert file.stat().st_ino == before.st_ino
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
            source.write_text(source.read_text().replace("Offset = -170.", "Offset = -171."))
        os.utime(source, ns=(0, 12345))
        new = data.volume(uid)
        if suffix == ".raw":
            assert not np.array_equal(new.voxels, old.voxels)
        else:
            assert new.origin[0] == pytest.approx(old.origin[0] - 1)

    def test_is_made_again_when_other_voxels_have_the_same_times(self, luna_folder):
        """A broken archive is unpacked, then the right one, with its times."""
        data = LUNA16(luna_folder)
        uid = data.series[0]
        old = np.array(data.volume(uid).voxels)
        raw = data.path(uid).with_suffix(".raw")
        times = raw.stat()
        raw.write_bytes(raw.read_bytes()[::-1])
        os.utime(raw, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert not np.array_equal(data.volume(uid).voxels, old)

    def test_is_kept_when_the_same_voxels_come_again(self, luna_folder, monkeypatch):
        data = LUNA16(luna_folder)
        uid = data.series[0]
        data.volume(uid)
        raw = data.path(uid).with_suffix(".raw")
        copied = raw.with_suffix(".copy")
        shutil.copy(raw, copied)
        copied.replace(raw)
        monkeypatch.setattr(dataset, "load_volume", lambda *_: pytest.fail("resampled"))
        data.volume(uid)
        (file,) = data.cache.iterdir()
        os.utime(file, ns=(0, raw.stat().st_ctime_ns + 2 * 10**9))
        monkeypatch.setattr(dataset, "_checksums", lambda *_: pytest.fail("read the source"))
        data.volume(uid)

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
        assert "\n" not in str(error.value)

    def test_a_full_disk_leaves_nothing_half_written(self, luna_folder, monkeypatch):
        def full(file, array):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        data = LUNA16(luna_folder)
        monkeypatch.setattr(dataset.np, "save", full)
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
