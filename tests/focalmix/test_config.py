"""Options: values that are refused, values that mean the same, the file, and devices."""

import json
import math
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

from fmkernels.focalmix.config import PRESETS, Config, load_config
from fmkernels.focalmix.distributed import choose_device
from fmkernels.focalmix.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spacing", (1.0, 1.0)),
        ("spacing", (1.0, 0.0, 1.0)),
        ("window", (600.0, -1200.0)),
        ("patch_size", (60, 32, 32)),
        ("strides", (2, 3, 4)),
        ("diameters", (5.0, 10.0)),
        ("diameters", (5.0, -10.0, 20.0)),
        ("widths", (16, 30, 48)),
        ("blocks", (1, 1)),
        ("channels", 6),
        ("batch_size", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("positive_fraction", 1.5),
        ("gamma", -1.0),
        ("unlabeled", 0),
        ("unlabeled_positive_fraction", 1.5),
        ("labeled", 0),
        ("overlap", 96),
        ("train_subsets", ()),
        ("test_subsets", (0,)),
        ("train_subsets", (0, 11)),
        ("seed", 2**63),
        ("steps", 2.5),
        ("steps", "5"),
        ("steps", True),
        ("spacing", 1.0),
        ("spacing", "1,1,1"),
        ("blocks", (1, -1, 1)),
        ("device", 3),
        ("views", 9),
        ("temperature", 0.0),
        ("eta", 0.0),
        ("image_mixup", 1),
        ("window", (-math.inf, math.inf)),
        ("window", (math.nan, 600.0)),
        ("patch_size", (64.0, 64, 64)),
        ("widths", ()),
        ("diameters", (5.0, 10.0, math.inf)),
        ("steps", 10**400),
        ("gamma", 10**400),
        ("warmup", math.inf),
        ("seed", -(2**70)),
        ("cache", "a\0b"),
        ("cache", "\ud800"),
        ("contrast", 1.5),
        ("noise", -1.0),
        ("blur", 5.0),
        ("pseudo_box_probability", 1.1),
        ("ignored_targets", (0.6, 0.1)),
        ("ignored_targets", (0.1,)),
        ("follow_after", 5),
    ],
)
def test_bad_configurations(field, value):
    with pytest.raises(InputError, match=f"^{field}: expected .*got"):
        replace(Config(), **{field: value})


def test_rotations_need_cubes_and_allow_more_views():
    assert Config(rotations=True, views=48).views == 48
    with pytest.raises(InputError, match=r"^views: expected 1 to 48, got 49"):
        Config(rotations=True, views=49)
    for field, value in (("patch_size", (32, 32, 16)), ("spacing", (2.0, 1.0, 1.0))):
        assert getattr(Config(**{field: value}), field) == value
        with pytest.raises(InputError, match=f"^{field}: expected three equal numbers with rot"):
            Config(rotations=True, **{field: value})


def test_configurations_take_what_means_the_same():
    given = Config(
        seed=np.int64(3),
        gamma=np.float32(2),
        train_subsets=range(7),
        spacing=[2, 2, 2],
        steps=np.int32(9),
    )
    assert given == Config(seed=3, steps=9) and all(type(v) is float for v in given.spacing)
    json.dumps(asdict(given))


def test_group_norms_are_not_searched_in_larger_windows():
    with pytest.raises(InputError, match="roi_size: expected at most patch_size with the norm"):
        Config(norm="group")
    assert Config(norm="group", roi_size=(24, 24, 16)).norm == "group"


def test_fixed_choices_are_checked():
    for option in fields(Config):
        for choice in option.metadata["choices"]:
            replace(Config(labeled=1, roi_size=(24, 24, 24)), **{option.name: choice})
        if option.metadata["choices"]:
            with pytest.raises(InputError, match=f"^{option.name}: expected .* or .*, got magic"):
                replace(Config(), **{option.name: "magic"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"burn_in": 3000}, "burn_in: expected less than the 3000 steps, got 3000"),
        ({"burn_in": 0, "teacher": "fixed"}, "burn_in: expected more than 0, so that a fixed"),
        ({"groups": 3}, "batch_size: expected a multiple of the 3 groups, got 16"),
        (
            {"groups": 4, "unlabeled_batch_size": 6},
            "unlabeled_batch_size: expected a multiple of the 4 groups, got 6",
        ),
    ],
)
def test_rules_of_focalmix_bind_focalmix_only(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Config(method="focalmix", **changes)
    Config(**changes)


def test_nothing_is_mixed_without_a_kind_of_mixup():
    with pytest.raises(InputError, match="supervised_mixup: expected image_mixup or object_mixup"):
        Config(supervised_mixup=True, image_mixup=False, object_mixup=False)
    Config(supervised_mixup=True, image_mixup=False)


def test_the_burn_in_is_a_number_of_steps_or_a_fraction():
    def steps(burn_in, steps):
        return Config(burn_in=burn_in, steps=steps, method="focalmix", labeled=1).burn_in_steps

    assert [steps(0.6, n) for n in (1, 2, 50, 3000)] == [0, 1, 30, 1800]
    assert [steps(n, 50) for n in (0, 0.999, 1, 49)] == [0, 49, 1, 49]
    assert Config(burn_in=1800).result == Config(burn_in=0.6).result
    assert Config(burn_in=1799).result != Config(burn_in=0.6).result
    for burn_in in (1.5, -0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="burn_in: expected a number of steps, or a fraction"):
            Config(burn_in=burn_in)


def test_limits_of_hardware_are_not_ours():
    """Whoever has the memory may train it."""
    large = Config(widths=(4096,) * 3, channels=4096, batch_size=2**20, max_objects=2**20)
    assert replace(large, patch_size=(2048,) * 3, blocks=(99,) * 3, workers=2**12).groups == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON, got maximum recursion depth"),
        ("\ud800", "expected JSON"),
        ('{"steps": 1' + "0" * 5000 + "}", "expected JSON, got Exceeds the limit"),
        ("null", "expected the fields of a configuration, got NoneType"),
        ('{"steps": 4, "leaps": 1}', "expected options of this version, got leaps"),
        (json.dumps(asdict(Config()) | {"steps": 0}), "steps: expected at least 1, got 0"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_file_holds_the_configuration(tmp_path, preset):
    assert load_config(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(asdict(preset)))
    assert load_config(tmp_path) == preset


def test_a_file_of_an_earlier_version_lacks_options(tmp_path):
    """A run made before an option existed is a run with the default of that option."""
    values = asdict(Config(steps=4))
    for name in ("rotations", "blur", "follow_after"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path).result == Config(steps=4).result


def test_a_file_without_norm_is_of_another_detector(tmp_path):
    for values in ({}, {"steps": 4}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match="norm: expected batch or group, found none"):
            load_config(tmp_path)


def test_bad_devices():
    with pytest.raises(InputError, match="device: expected auto, cpu or cuda"):
        choose_device("meta")
    with pytest.raises(InputError, match="device: expected"):
        choose_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="found none"):
            choose_device("cuda")
