"""Patches: each a function of (seed, item), with boxes at the nodules, whoever loads them."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmkernels import apply_symmetry, undo_symmetry
from fmkernels.focalmix.data import patches
from fmkernels.focalmix.data.luna16 import LUNA16
from fmkernels.focalmix.data.patches import (
    LabeledPatches,
    UnlabeledPatches,
    collate,
    patch_loader,
)
from fmkernels.focalmix.data.volume import cut_patch
from fmkernels.focalmix.errors import InputWarning


@pytest.fixture
def data(luna_folder) -> LUNA16:
    return LUNA16(luna_folder, spacing=(1.5, 1.0, 1.0))


def dataset_of(data, series=None, **options) -> LabeledPatches:
    series = data.series if series is None else series
    return LabeledPatches(data, series, **{"length": 24, "seed": 7} | options)


def unlabeled_of(data, pseudo_boxes, **options) -> UnlabeledPatches:
    options = {"length": 24, "seed": 7, "patch_size": (8, 8, 8)} | options
    return UnlabeledPatches(data, data.series, pseudo_boxes, **options)


def assert_same(a, b) -> None:
    """Items or batches are alike in every entry."""
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], torch.Tensor):
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name])
        elif isinstance(a[name], list):
            assert len(a[name]) == len(b[name])
            assert all(
                torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                for x, y in zip(a[name], b[name], strict=True)
            )
        else:
            assert a[name] == b[name]


def unflipped(item) -> np.ndarray:
    image = item["image"].numpy()[0]
    return np.flip(image, [axis for axis in range(3) if int(item["flips"]) >> axis & 1])


class TestItem:
    @pytest.mark.parametrize("size", [(16, 16, 16), (12, 20, 17), (9, 90, 33)])
    def test_is_the_scan_at_its_corner_flipped_and_air_around(self, data, size):
        flips, seen = set(), set()
        for item in map(dataset_of(data, patch_size=size).__getitem__, range(24)):
            assert item["image"].dtype == torch.int16 and item["image"].shape == (1, *size)
            voxels, corner = data.volume(item["series"]).voxels, item["corner"].numpy()
            np.testing.assert_array_equal(unflipped(item), cut_patch(voxels, corner, size))
            inside = np.array(voxels.shape) - size
            assert ((np.minimum(inside, 0) <= corner) & (corner <= np.maximum(inside, 0))).all()
            seen.add((item["series"], *corner.tolist()))
            flips.add(int(item["flips"]))
        assert len(flips) > 4
        assert len(seen) > 20
        assert (size[1] == 90) == any(y < 0 for _, _, y, _ in seen)

    def test_without_flips(self, data):
        assert all(
            int(item["flips"]) == 0
            for item in map(dataset_of(data, flips=False).__getitem__, range(24))
        )

    def test_rotations_are_all_48_symmetries(self, luna_folder):
        data = LUNA16(luna_folder, spacing=(2.0, 2.0, 2.0))
        dataset = dataset_of(data, patch_size=(9, 9, 9), rotations=True, length=400)
        codes = set()
        for item in map(dataset.__getitem__, range(400)):
            code = int(item["flips"])
            assert item["image"].is_contiguous()
            voxels, corner = data.volume(item["series"]).voxels, item["corner"].numpy()
            np.testing.assert_array_equal(
                undo_symmetry(item["image"][0], code), cut_patch(voxels, corner, (9, 9, 9))
            )
            codes.add(code)
        assert codes == set(range(48))

    def test_rotated_boxes_have_the_same_voxel_in_their_center(self, make_luna):
        nodules = [(20, 18, 22, 4), (24, 23, 19, 6)]
        excluded = [(19, 24, 25, 5)]
        scan = {"shape": (44, 44, 44), "spacing": (1, 1, 1)}
        data = LUNA16(make_luna(scan | {"nodules": nodules, "excluded": excluded}))
        options = {"patch_size": (32, 32, 32), "positive_fraction": 1.0, "length": 200}
        plain, turned = (
            dataset_of(data, **options, **how) for how in ({"flips": False}, {"rotations": True})
        )
        number = torch.arange(32**3).reshape(32, 32, 32)  # of every voxel before
        compared = 0
        for before, after in ((plain[i], turned[i]) for i in range(200)):
            assert torch.equal(before["corner"], after["corner"])
            after["number"] = apply_symmetry(number, int(after["flips"]))
            for name in ("boxes", "ignore"):
                for old, new in zip(before[name], after[name], strict=True):
                    if (old[:3] > 0).all() and (old[3:] < 32).all():
                        old, new = (((box[:3] + box[3:]) / 2).long().tolist() for box in (old, new))
                        assert number[tuple(old)] == after["number"][tuple(new)]
                        assert before["image"][(0, *old)] == after["image"][(0, *new)]
                        compared += 1
        assert compared > 300

    def test_rotations_need_cubes(self, data, luna_folder):
        with pytest.raises(
            ValueError, match="LabeledPatches: spacing: expected three equal numbers"
        ):
            dataset_of(data, rotations=True)
        cubes = LUNA16(luna_folder, spacing=(2, 2, 2))
        with pytest.raises(ValueError, match="patch_size: expected three equal numbers with rot"):
            dataset_of(cubes, patch_size=(16, 16, 8), rotations=True)

    @given(seed=st.integers(0, 2**40), size=st.tuples(*[st.integers(14, 40)] * 3))
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_positive_patches_have_a_bright_ball_in_each_box(self, data, seed, size):
        dataset = dataset_of(data, patch_size=size, positive_fraction=1.0, seed=seed)
        for item in map(dataset.__getitem__, range(4)):
            image, boxes = item["image"][0].numpy(), item["boxes"].numpy()
            assert boxes.dtype == np.float32 and len(boxes) >= 1
            assert (boxes[:, :3] >= 0).all() and (boxes[:, 3:] <= size).all()
            assert (boxes[:, :3] < boxes[:, 3:]).all()
            for box in boxes:
                low, high = np.floor(box[:3]).astype(int), np.ceil(box[3:]).astype(int)
                region = image[tuple(map(slice, low, high))].astype(float) + 850
                centroid = np.average(
                    np.argwhere(region > -np.inf) + low + 0.5,
                    axis=0,
                    weights=region.clip(0).ravel(),
                )
                if (box[:3] > 0).all() and (box[3:] < size).all():
                    assert np.abs(centroid - (box[:3] + box[3:]) / 2).max() < 0.5
                assert region.max() > 800

    def test_cut_nodules_and_excluded_findings_are_ignored(self, make_luna):
        scan = {"shape": (20, 20, 20), "spacing": (1, 1, 1)}
        root = make_luna(scan | {"nodules": [(9.5, 9.5, 9.5, 4)], "excluded": [(9.5, 9.5, 2.5, 2)]})
        dataset = dataset_of(
            LUNA16(root), patch_size=(20, 20, 8), positive_fraction=0.0, flips=False, length=200
        )
        seen = set()
        for item in map(dataset.__getitem__, range(200)):
            x = int(item["corner"][2])
            cut = {"boxes": [], "ignore": []}
            if 1 <= x <= 11:
                name = "boxes" if x <= 10 < x + 8 else "ignore"
                cut[name].append([8, 8, max(8 - x, 0), 12, 12, min(12 - x, 8)])
            if x < 4:
                cut["ignore"].append([9, 9, max(2 - x, 0), 11, 11, 4 - x])
            for name, boxes in cut.items():
                assert item[name].tolist() == boxes
                assert item[name].shape == (len(boxes), 6)
            seen.add(x)
        assert seen >= set(range(1, 13))

    def test_a_nodule_larger_than_the_patch_fills_it(self, make_luna):
        root = make_luna(
            {"shape": (40, 40, 40), "spacing": (1, 1, 1), "nodules": [(20.4, 19, 20.2, 24)]}
        )
        for size in (1, 8, 20):
            dataset = dataset_of(LUNA16(root), patch_size=(size,) * 3, positive_fraction=1.0)
            for i in range(5):
                assert dataset[i]["boxes"].tolist() == [[0, 0, 0, size, size, size]]

    def test_the_nodule_may_be_anywhere_in_the_patch(self, make_luna):
        root = make_luna(
            {"shape": (60, 60, 60), "spacing": (1, 1, 1), "nodules": [(30, 30, 30, 4)]}
        )
        dataset = dataset_of(
            LUNA16(root), patch_size=(16, 16, 16), positive_fraction=1.0, flips=False, length=200
        )
        lows = torch.cat([dataset[i]["boxes"] for i in range(200)])[:, :3]
        assert (lows.amin(0) < 1.6).all() and (lows.amax(0) > 10.4).all()
        assert ((lows.mean(0) - 6).abs() < 0.9).all()

    def test_pseudo_boxes_place_patches_as_often_as_they_weigh(self, make_luna):
        scan = {"shape": (60, 60, 60), "spacing": (1, 1, 1), "nodules": [(5, 5, 5, 4)]}
        data = LUNA16(make_luna(scan, scan))
        boxes = [
            [8, 8, 8, 12, 12, 12, 0.3],
            [48, 48, 48, 52, 52, 52, 0.0],
            [28, 28, 28, 32, 32, 32, 0.1],
        ]
        pseudo_boxes = {data.series[1]: np.array(boxes)}
        dataset = unlabeled_of(data, pseudo_boxes, positive_fraction=1.0, flips=False, length=400)
        items = [dataset[i] for i in range(400)]
        assert {item["series"] for item in items} == {data.series[1]}
        corners = np.array([item["corner"].tolist() for item in items])
        first = ((corners <= 8) & (corners >= 4)).all(1)
        third = ((corners <= 28) & (corners >= 24)).all(1)
        assert (first | third).all() and 260 < first.sum() < 340
        for none in ({}, {data.series[0]: np.zeros((2, 7))}):
            background = unlabeled_of(data, none, positive_fraction=1.0)
            assert {background[i]["series"] for i in range(24)} == set(data.series)

    def test_unlabeled_patches_hold_no_labels_and_never_read_any(self, data, monkeypatch):
        pseudo_boxes = {data.series[0]: np.array([[4.0, 8, 8, 9, 13, 13, 1]])}
        expected = [unlabeled_of(data, pseudo_boxes)[i] for i in range(24)]
        labels = ("nodules", "excluded", "findings", "boxes")
        for name in labels:
            monkeypatch.setattr(LUNA16, name, lambda *args: pytest.fail("read labels"))
        for name in ("_nodules", "_excluded"):
            delattr(data, name)
        for i, item in enumerate(expected):
            assert set(item) == {"image", "series", "corner", "flips"}
            assert_same(unlabeled_of(data, pseudo_boxes)[i], item)
        assert any(item["series"] != data.series[0] for item in expected)

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_process_wide_defaults_change_nothing(self, data, dtype, workers):
        pseudo_boxes = {data.series[0]: np.array([[4.0, 8, 8, 9, 13, 13, 1]])}
        datasets = (dataset_of(data, patch_size=(16, 16, 16)), unlabeled_of(data, pseudo_boxes))

        def batches(workers):
            loaders = [patch_loader(dataset, batch_size=6, workers=workers) for dataset in datasets]
            return [batch for loader in loaders for batch in loader]

        expected = batches(0)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device("meta")
            loaded = batches(workers)
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        for a, b in zip(loaded, expected, strict=True):
            assert_same(a, b)
            assert a["image"].device.type == a["flips"].device.type == "cpu"

    def test_depends_on_seed_and_number_only(self, data):
        dataset, again = dataset_of(data, length=9), dataset_of(data, length=24)
        for i in (8, 3, 0, 5):
            assert_same(dataset[i], again[i])
        other = dataset_of(data, seed=8)
        assert any(not torch.equal(other[i]["image"], again[i]["image"]) for i in range(3))
        for i in (-1, 9):
            with pytest.raises(IndexError, match="expected an item of 0 to 8"):
                dataset[i]

    def test_keeps_few_scans_open_and_stays_the_same(self, data, monkeypatch):
        expected = [dataset_of(data)[i] for i in range(24)]
        monkeypatch.setattr(patches, "_MAX_OPEN", 2)
        dataset = dataset_of(data)
        for i, item in enumerate(expected):
            assert_same(dataset[i], item)
        assert len(dataset._open) == 2
        assert len(pickle.dumps(dataset)) < 20_000


class TestSampling:
    def test_fraction_of_positive_patches(self, make_luna):
        root = make_luna(
            {"shape": (60, 60, 60), "spacing": (1, 1, 1), "nodules": [(30, 30, 30, 4)]}
        )
        dataset = dataset_of(LUNA16(root), patch_size=(8, 8, 8), positive_fraction=0.7, length=300)
        assert 0.6 < np.mean([len(dataset[i]["boxes"]) for i in range(300)]) < 0.8

    def test_draws_every_nodule_equally_often(self, make_luna):
        nodules = [(5, 20, 20, 3), (15, 20, 20, 3), (25, 20, 20, 3)]
        root = make_luna(
            {"nodules": nodules, "shape": (40, 40, 40)},
            {},
            {"nodules": nodules[:1], "shape": (40, 40, 40)},
        )
        dataset = dataset_of(LUNA16(root), positive_fraction=1.0, patch_size=(4, 4, 4), length=400)
        drawn = [dataset[i]["series"] for i in range(400)]
        assert drawn.count("1.2.1") == 0
        assert drawn.count("1.2.0") / 400 == pytest.approx(0.75, abs=0.08)

    def test_background_comes_from_all_series_and_prefers_the_body(self, make_luna):
        roomy = {"shape": (30, 64, 64), "spacing": (1, 1, 1)}
        data = LUNA16(make_luna(roomy, roomy))
        for uid in data.series:
            voxels = np.full((30, 64, 64), -1000, np.int16)
            voxels[:, :20, :20] = 0
            data.path(uid).with_suffix(".raw").write_bytes(voxels.tobytes())
        dataset = dataset_of(data, positive_fraction=0.0, patch_size=(16, 16, 16), length=200)
        items = [dataset[i] for i in range(200)]
        assert {item["series"] for item in items} == set(data.series)
        body = np.mean([float((item["image"] > -950).float().mean()) > 0.1 for item in items])
        assert 0.25 < body < 0.9  # 0.12 of all positions

    def test_all_background_without_nodules(self, data, luna_scans):
        dataset = dataset_of(data, [luna_scans[3].uid], positive_fraction=1.0)
        assert all(len(dataset[i]["boxes"]) == 0 for i in range(24))


class TestArguments:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"patch_size": (8, 8)}, "patch_size: expected 3 positive integers"),
            ({"patch_size": (8, 8, 0)}, "patch_size: expected 3 positive integers"),
            ({"patch_size": (8, 8, 2.5)}, "patch_size: expected 3 positive integers"),
            ({"positive_fraction": 1.5}, "positive_fraction: expected a probability"),
            ({"positive_fraction": float("nan")}, "positive_fraction: expected a probability"),
            ({"length": 0}, "length: expected a positive number"),
            ({"seed": -1}, "seed: expected a non-negative integer"),
            ({"series": []}, "series: expected one or more"),
            ({"series": ["9.9"]}, r"series: expected series of .*, got '9\.9'"),
        ],
    )
    def test_of_the_dataset(self, data, options, message):
        with pytest.raises(ValueError, match=f"LabeledPatches: {message}"):
            dataset_of(data, **options)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"batch_size": 0}, "batch_size: expected a positive integer"),
            ({"rank": 2, "world_size": 2}, "rank: expected one below world_size 2, got 2"),
            ({"rank": -1}, "rank: expected"),
            ({"world_size": 0}, "rank: expected"),
            ({"start": 7}, "start: expected a step of 0 to 6, got 7"),
            ({"start": -1}, "start: expected a step"),
        ],
    )
    def test_of_the_loader(self, data, options, message):
        with pytest.raises(ValueError, match=f"patch_loader: {message}"):
            patch_loader(dataset_of(data), **{"batch_size": 4} | options)


class TestLoader:
    def test_batches_items_in_order(self, data):
        dataset = dataset_of(data, positive_fraction=0.6)
        batches = list(patch_loader(dataset, batch_size=5))
        assert len(batches) == 4
        for step, batch in enumerate(batches):
            assert (
                batch["image"].shape == (5, 1, 64, 64, 64) and batch["image"].dtype == torch.int16
            )
            assert batch["corner"].shape == (5, 3) and batch["flips"].shape == (5,)
            assert len(batch["boxes"]) == len(batch["ignore"]) == len(batch["series"]) == 5
            assert_same(batch, collate([dataset[i] for i in range(5 * step, 5 * step + 5)]))

    def test_resumes_where_it_stopped(self, data):
        dataset = dataset_of(data, patch_size=(16, 16, 16))
        whole = list(patch_loader(dataset, batch_size=4))
        assert len(whole) == 6
        for start in (1, 4):
            rest = list(patch_loader(dataset, batch_size=4, start=start))
            assert len(rest) == 6 - start
            for a, b in zip(rest, whole[start:], strict=True):
                assert_same(a, b)
        assert list(patch_loader(dataset, batch_size=4, start=6)) == []

    def test_ranks_see_together_what_one_process_sees(self, data):
        dataset = dataset_of(data, patch_size=(16, 16, 16))
        joint = list(patch_loader(dataset, batch_size=6, start=1))
        ranks = [
            list(patch_loader(dataset, batch_size=3, start=1, rank=rank, world_size=2))
            for rank in (0, 1)
        ]
        assert len(joint) == len(ranks[0]) == len(ranks[1]) == 3
        for one, *parts in zip(joint, *ranks, strict=True):
            assert torch.equal(one["image"], torch.cat([part["image"] for part in parts]))
            assert one["series"] == parts[0]["series"] + parts[1]["series"]
            assert all(map(torch.equal, one["boxes"], parts[0]["boxes"] + parts[1]["boxes"]))

    @pytest.mark.parametrize("workers, context", [(2, None), (1, "spawn")])
    def test_workers_change_nothing(self, data, workers, context):
        dataset = dataset_of(data, patch_size=(16, 16, 16))
        alone = list(patch_loader(dataset, batch_size=4, start=2))
        loader = patch_loader(dataset, batch_size=4, start=2, workers=workers)
        loader.multiprocessing_context = context
        for a, b in zip(loader, alone, strict=True):
            assert_same(a, b)

    def test_leaves_the_global_random_state_alone(self, data):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        for workers in (0, 1):
            next(
                iter(
                    patch_loader(
                        dataset_of(data, patch_size=(8, 8, 8)), batch_size=2, workers=workers
                    )
                )
            )
        assert torch.equal(torch.get_rng_state(), before)


def test_there_are_fewer_workers_where_shared_memory_is_small(luna_folder, monkeypatch, tmp_path):
    data = LUNA16(luna_folder, spacing=(2.5, 2.0, 2.0))
    dataset = LabeledPatches(data, data.series, patch_size=(16, 16, 16), length=8, seed=0)
    batch = 2 * 16**3 * 2
    expected = next(iter(patch_loader(dataset, batch_size=2)))
    monkeypatch.setattr(patches, "SHARED_MEMORY", tmp_path)
    for free, workers in ((7, 3), (6, 2), (5, 2), (2, 0), (0, 0)):
        usage = SimpleNamespace(free=free * batch)
        monkeypatch.setattr(patches.shutil, "disk_usage", lambda path, usage=usage: usage)
        if workers < 3:
            message = f"3 workers need .* going on with {workers}; see docker run --shm-size"
            with pytest.warns(InputWarning, match=message):
                loader = patch_loader(dataset, batch_size=2, workers=3)
        else:
            loader = patch_loader(dataset, batch_size=2, workers=3)
        assert loader.num_workers == workers
    assert torch.equal(next(iter(loader))["image"], expected["image"])
