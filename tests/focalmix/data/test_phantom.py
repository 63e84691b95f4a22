"""Synthetic chest CT: LUNA16's layout, the same bytes every time, findings as in the tables."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fmkernels.focalmix.data import phantom
from fmkernels.focalmix.data.phantom import SIZES, Scene, render, write_phantoms
from fmkernels.focalmix.errors import InputError

SCANS = 8
FIELDS = ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "tiny"
    write_phantoms(out, size="tiny", scans=SCANS, workers=1, progress=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Scenes, drawn but not rendered."""
    return [Scene("tiny", 0, index) for index in range(30)]


def test_layout_is_that_of_luna16(folder):
    uids = (folder / "seriesuids.csv").read_text().split()
    assert len(uids) == len(set(uids)) == SCANS
    for index, uid in enumerate(uids):
        assert re.fullmatch(r"2\.25\.57644333973914959500870776281786219965\.[1-9]\d*", uid)
        assert len(uid) <= 64
        header = folder / f"subset{index % 10}" / f"{uid}.mhd"
        fields = dict(line.split(" = ") for line in header.read_text().splitlines())
        assert fields["ElementType"] == "MET_SHORT" and fields["ElementDataFile"] == f"{uid}.raw"
        assert header.with_suffix(".raw").stat().st_size == 2 * np.prod(
            [int(n) for n in fields["DimSize"].split()]
        )
    for name in ("annotations", "annotations_excluded"):
        head, *rows = table(folder / f"{name}.csv")
        assert head == FIELDS and rows and {row[0] for row in rows} <= set(uids)
    files = set(contents(folder)) - {".lock"}
    assert files == {
        f"{name}.csv" for name in ("annotations", "annotations_excluded", "seriesuids")
    } | {
        f"subset{i % 10}/{uid}{suffix}" for i, uid in enumerate(uids) for suffix in (".mhd", ".raw")
    }


def test_bytes_do_not_depend_on_the_workers_and_a_set_begins_with_the_smaller_one(folder, tmp_path):
    write_phantoms(tmp_path / "set", size="tiny", scans=1, workers=1, progress=False)
    write_phantoms(tmp_path / "set", size="tiny", scans=4, workers=2, progress=False)
    small, large = contents(tmp_path / "set"), contents(folder)
    scans = {name for name in small if name.startswith("subset")}
    assert len(scans) == 8 and all(small[name] == large[name] for name in scans)
    for name in ("annotations", "annotations_excluded", "seriesuids"):
        assert large[f"{name}.csv"].startswith(small[f"{name}.csv"])


def test_scans_that_are_only_tested_are_new_ones_in_the_last_subset(folder, tmp_path):
    """They are the same whatever the number of the others, and leave these as they are."""
    out = tmp_path / "set"
    shutil.copytree(folder, out)
    write_phantoms(out, size="tiny", scans=SCANS, test_scans=2, workers=2, progress=False)
    before, after = contents(folder), contents(out)
    tables = {"annotations.csv", "annotations_excluded.csv", "seriesuids.csv"}
    assert all(after[name] == before[name] for name in set(before) - tables)
    uids = (out / "seriesuids.csv").read_text().split()
    assert uids[:SCANS] == (folder / "seriesuids.csv").read_text().split()
    added = set(after) - set(before)
    assert added == {f"subset9/{uid}{end}" for uid in uids[SCANS:] for end in (".mhd", ".raw")}
    assert len(uids) == SCANS + 2

    write_phantoms(tmp_path / "few", size="tiny", scans=1, test_scans=2, workers=1, progress=False)
    few = contents(tmp_path / "few")
    assert all(few[name] == after[name] for name in added)


def test_another_seed_gives_another_set(tmp_path, folder):
    write_phantoms(tmp_path, size="tiny", scans=1, seed=1, progress=False)
    assert (tmp_path / "seriesuids.csv").read_text().split()[0] not in (
        folder / "seriesuids.csv"
    ).read_text()


def test_findings_lie_where_the_tables_say(folder):
    """The center of every nodule is denser than the lungs, in flipped scans too."""
    checked = set()
    for name in ("annotations", "annotations_excluded"):
        for uid, *values in table(folder / f"{name}.csv")[1:]:
            *point, diameter = map(float, values)
            image = sitk.ReadImage(str(next(folder.glob(f"subset*/{uid}.mhd"))))
            voxels = sitk.GetArrayViewFromImage(image)
            x, y, z = image.TransformPhysicalPointToIndex(point)
            assert all(0 <= i < n for i, n in zip((z, y, x), voxels.shape, strict=True))
            if name == "annotations":
                lung = np.median(voxels[(voxels > -970) & (voxels < -650)])
                assert 6 <= diameter <= 30 and voxels[z, y, x] > lung + 200
                checked.add(image.GetDirection()[0])
            else:
                assert diameter == -1 or 2 < diameter < 12
    assert checked == {1.0, -1.0}


def test_the_volume_is_that_of_the_annotated_sphere(scenes):
    """The volume is measured as the fraction of a cube's points in the lesion."""
    lesions = [lesion for scene in scenes[:6] for lesion in scene.lesions]
    axis = np.linspace(-1, 1, 60)
    x, y, z = (a * np.ones((60, 60, 60)) for a in (axis, axis[:, None], axis[:, None, None]))
    length = np.sqrt(x * x + y * y + z * z)
    assert len(lesions) > 10
    for lesion in lesions:
        side = 3 * lesion.diameter
        radius = lesion.radius(x / length, y / length, z / length)
        volume = np.mean(length * side / 2 < radius) * side**3
        assert np.cbrt(6 / np.pi * volume) == pytest.approx(lesion.diameter, rel=0.02)


def test_looks_like_a_chest(folder):
    for path in sorted(folder.glob("subset*/*.mhd"))[:4]:
        image = sitk.ReadImage(str(path))
        voxels = sitk.GetArrayViewFromImage(image)
        assert voxels.dtype == np.int16 and image.GetDimension() == 3
        middle = voxels[len(voxels) // 2]
        fraction = {
            "lung": np.mean((middle > -970) & (middle < -650)),
            "tissue": np.mean((middle > -150) & (middle < 150)),
            "bone": np.mean(middle > 250),
        }
        assert (
            0.08 < fraction["lung"] < 0.5
            and 0.15 < fraction["tissue"] < 0.75
            and 0.001 < fraction["bone"] < 0.1
        ), fraction


def test_scans_differ_in_geometry(folder):
    images = [sitk.ReadImage(str(path)) for path in folder.glob("subset*/*.mhd")]
    assert len({image.GetSpacing() for image in images}) > SCANS // 2
    assert all(image.GetSpacing()[0] != image.GetSpacing()[2] for image in images)
    assert all(any(abs(c) > 1 for c in image.GetOrigin()) for image in images)


def test_some_scans_are_flipped_and_some_hold_no_nodule(scenes):
    assert 2 <= sum(scene.flipped for scene in scenes) <= 10
    assert 0.15 <= np.mean([len(scene.nodules) == 0 for scene in scenes]) <= 0.55
    assert np.mean([len(scene.excluded) > 0 for scene in scenes]) > 0.5


@pytest.mark.parametrize(("size", "smallest", "typical"), [("demo", 6, 10.4), ("luna16", 3, 7)])
def test_nodules_are_of_three_voxels_or_more_and_small_ones_are_more_frequent(
    size, smallest, typical
):
    """At the voxel size of the presets: 2 mm of the demo, 1 mm of luna16."""
    scenes = [Scene(size, 0, index) for index in range(25)]
    diameters = np.concatenate([scene.nodules[:, 3] for scene in scenes])
    assert len(diameters) > 25 and diameters.min() >= smallest and diameters.max() <= 30
    assert np.median(diameters) == pytest.approx(typical, abs=1.8)
    assert np.mean(diameters < 3 * smallest) > 0.6 and (diameters > 3 * smallest).any()


def test_nodules_of_a_scan_do_not_overlap(scenes):
    for scene in scenes:
        points, radii = scene.nodules[:, :3], scene.nodules[:, 3] / 2
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(
            np.full(len(points), np.inf)
        )
        assert (distance > radii[:, None] + radii[None]).all()


def test_the_scene_is_the_same_kind_of_anatomy_at_every_size():
    for size in SIZES:
        scene = Scene(size, 0, 0)
        assert 300 < scene.pixel * len(scene.x) < 400 and 200 < scene.slice * len(scene.z) < 420


def test_a_stopped_run_is_finished_with_the_same_bytes(folder, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(folder, out)
    first, second, third = sorted(out.glob("subset*/*.mhd"))[:3]
    first.with_suffix(".raw").write_bytes(b"cut short")
    second.unlink()
    (second.parent / f".{second.stem}.partial").mkdir()
    (out / "annotations.csv").unlink()
    before = third.with_suffix(".raw").stat().st_mtime_ns
    write_phantoms(out, size="tiny", scans=SCANS, workers=1, progress=False)
    assert contents(out) == contents(folder)
    assert third.with_suffix(".raw").stat().st_mtime_ns == before, "a whole scan was written again"


@pytest.mark.parametrize("other", [{"seed": 1}, {"scans": SCANS - 1}])
def test_a_folder_with_another_set_is_refused(folder, other):
    before = contents(folder)
    with pytest.raises(InputError, match="choose an empty folder"):
        write_phantoms(folder, **({"size": "tiny", "scans": SCANS, "progress": False} | other))
    assert contents(folder) == before


def test_a_folder_with_other_tables_is_refused(tmp_path):
    (tmp_path / "annotations.csv").write_text(
        "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,0,0,0,4\n"
    )
    with pytest.raises(InputError, match=r"annotations\.csv: names 1\.2\.3, not one of"):
        write_phantoms(tmp_path, size="tiny", scans=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["annotations.csv"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": "huge"}, "size"),
        ({"scans": 0}, "scans"),
        ({"scans": 10**6 + 1}, "scans"),
        ({"test_scans": -1}, "test_scans"),
        ({"seed": -1}, "seed"),
        ({"workers": 0}, "workers"),
    ],
)
def test_bad_arguments(tmp_path, arguments, words):
    with pytest.raises(InputError, match=f"^{words}: expected"):
        write_phantoms(tmp_path / "out", **({"size": "tiny"} | arguments))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(s for s in (Scene("tiny", 0, i) for i in range(30)) if s.table and len(s.strands))


def test_tubes_painted_together_are_those_painted_one_after_another(scene, monkeypatch):
    """Tubes overlap, so that their order counts."""
    monkeypatch.setattr(phantom, "CHUNK", 3000)
    tubes = np.concatenate((scene.vessels[::20], scene.anatomy.bones()[::20], scene.strands))
    for brighten in (False, True):
        together, single = (
            phantom.Canvas(
                np.full((len(scene.z), len(scene.y), len(scene.x)), -800, np.float32),
                scene.z,
                scene.y,
                scene.x,
                scene.pixel,
                scene.slice,
            )
            for _ in range(2)
        )
        together.tubes(tubes, 40.0, brighten)
        for k in range(len(tubes)):
            single.tubes(tubes[k : k + 1], 40.0, brighten)
        assert (together.hu > -800).sum() > 5000
        np.testing.assert_array_equal(together.hu, single.hu)


def test_voxels_do_not_depend_on_the_blocks_that_are_painted(scene, monkeypatch):
    expected = render(scene)
    monkeypatch.setattr(phantom, "BLOCK", (7, 1000))
    np.testing.assert_array_equal(render(scene), expected)


def test_branches_of_a_tree_are_joined_and_reach_every_tip():
    rng = np.random.default_rng(0)
    root, tips = np.zeros(3), rng.uniform(20, 90, (200, 3))
    tubes = phantom.grow_tree(rng, root, tips, 8.0)
    assert tubes.shape == (399, 8) and (tubes[0, :3] == root).all() and tubes[0, 6] == 8
    starts, ends = ({tuple(row) for row in rows} for rows in (tubes[1:, :3], tubes[:, 3:6]))
    assert starts <= ends and len(ends - starts) == len(tips)
    leaves = np.array([row for row in tubes[:, 3:6] if tuple(row) not in starts])
    assert np.abs(leaves[:, None] - tips).sum(axis=2).min(axis=0).max() < 1e-9
    flow = {tuple(row[3:6]): row[7] ** 3 for row in tubes}  # Murray's law
    for start in starts:
        branches = tubes[(tubes[:, :3] == start).all(axis=1) & (tubes[:, 7] < 8)]
        assert (branches[:, 7] ** 3).sum() == pytest.approx(flow[start])
