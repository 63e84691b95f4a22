"""Against the installed MONAI: boxes, MixUp, losses and targets of the detector, a pipeline."""

import contextlib
import copy
import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

monai = pytest.importorskip("monai")

from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector  # noqa: E402
from monai.apps.detection.transforms.box_ops import flip_boxes  # noqa: E402
from monai.apps.detection.transforms.dictionary import (  # noqa: E402
    RandCropBoxByPosNegLabeld,
    RandFlipBoxd,
)
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape  # noqa: E402
from monai.data import MetaTensor, box_utils  # noqa: E402
from monai.transforms import Compose, EnsureTyped, ScaleIntensityRanged  # noqa: E402
from monai.utils import optional_import  # noqa: E402

from fmkernels import (  # noqa: E402
    apply_symmetry,
    crop_and_resize3d,
    object_mixup3d,
    soft_target_focal_loss,
    undo_symmetry,
)
from fmkernels.integrations import monai as adapter  # noqa: E402
from fmkernels.integrations.monai import (  # noqa: E402
    MixUpBoxd,
    ObjectMixUpBoxd,
    SoftTargetRetinaNetDetector,
    from_monai_boxes,
    to_monai_boxes,
)
from fmkernels.nn import SoftTargetFocalLoss  # noqa: E402

sigmoid_focal_loss, _ = optional_import("torchvision.ops", name="sigmoid_focal_loss")
with_torchvision = pytest.mark.skipif(
    not optional_import("torchvision.models.detection._utils", name="Matcher")[1],
    reason="MONAI's detector needs a torchvision that loads with this torch",
)

MODES = ("xyzxyz", "xxyyzz", "xyxyzz", "xyzwhd", "cccwhd")
BOXES = torch.tensor([[2.0, 3, 4, 6, 8, 10], [1.0, 1, 1, 4, 5, 6]])


class Network(nn.Module):
    """Small, of two levels, flips with its input where ``symmetric``."""

    spatial_dims, num_classes, num_anchors, size_divisible = 3, 2, 2, 4
    cls_key, box_reg_key = "classification", "box_regression"

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 2, stride=2)
        self.cls = nn.Conv3d(4, self.num_anchors * self.num_classes, 1)
        self.reg = nn.Conv3d(4, self.num_anchors * 6, 1)

    def forward(self, images):
        fine = self.stem(images).relu()
        levels = [fine, F.avg_pool3d(fine, 2)]
        return {
            self.cls_key: [self.cls(x) for x in levels],
            self.box_reg_key: [0.1 * self.reg(x) for x in levels],
        }


def detector_of(kind):
    torch.manual_seed(0)
    detector = kind(Network(), AnchorGeneratorWithAnchorShape([1, 2], [[4, 4, 4], [6, 4, 4]]))
    detector.set_target_keys(box_key="box", label_key="label")
    detector.set_regular_matcher(fg_iou_thresh=0.3, bg_iou_thresh=0.2)
    return detector


def batch_of(size=3, side=16):
    generator = torch.Generator().manual_seed(1)
    items = []
    for index in range(size):
        corner = torch.randint(0, side // 2, (2, 3), generator=generator).float()
        box = torch.cat([corner, corner + torch.randint(3, 7, (2, 3), generator=generator)], 1)
        image = torch.rand(1, side, side, side, generator=generator)
        items.append(
            {"image": image, "box": box[: index + 1], "label": torch.tensor([0, 1])[: index + 1]}
        )
    return items


def images_of(batch):
    return [item["image"] for item in batch]


def head_outputs(detector, images):
    """What MONAI's forward gives to compute_loss."""
    maps = detector.network(torch.stack(list(images)))
    detector.generate_anchors(torch.stack(list(images)), maps)
    places = [level.shape[2:].numel() for level in maps[detector.cls_key]]
    return (
        {key: detector._reshape_maps(levels) for key, levels in maps.items()},
        detector.anchors,
        places,
    )


def hard_targets(detector, batch):
    """[B, anchors, classes] of MONAI's own matching."""
    outputs, anchors, places = head_outputs(detector, images_of(batch))
    matched = detector.compute_anchor_matched_idxs(anchors, batch, places)
    y = torch.zeros_like(outputs[detector.cls_key])
    for own, found, item in zip(y, matched, batch, strict=True):
        own[found >= 0, item["label"][found[found >= 0]]] = 1
        own[found == -2] = -1
    return y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.Tensor, MetaTensor, np.ndarray, torch.float16])
def test_boxes_of_every_mode_come_and_go(mode, kind):
    given = [BOXES, torch.empty(0, 6), BOXES[:1]]
    theirs = [box_utils.convert_box_mode(boxes, "xyzxyz", mode) for boxes in given]
    kinds = {
        torch.Tensor: lambda x: x,
        MetaTensor: MetaTensor,
        np.ndarray: np.asarray,
        torch.float16: torch.Tensor.half,
    }
    ours = from_monai_boxes([kinds[kind](boxes) for boxes in theirs], mode)
    assert type(ours) is torch.Tensor and ours.dtype == torch.float32
    expected = torch.cat([torch.tensor([[0.0], [0], [2]]), torch.cat(given)], 1)
    torch.testing.assert_close(ours, expected)
    for back, boxes in zip(to_monai_boxes(ours, 3, mode), theirs, strict=True):
        torch.testing.assert_close(back, boxes)


def test_axes_are_those_of_monai():
    """Boxes crop what MONAI's slices and flips say they do, and axis 0 is the first flip bit."""
    image = torch.rand(1, 12, 14, 16)
    x1, y1, z1, x2, y2, z2 = BOXES[0].int().tolist()
    expected = image[:, x1:x2, y1:y2, z1:z2]
    size = (x2 - x1, y2 - y1, z2 - z1)
    torch.testing.assert_close(
        crop_and_resize3d(image[None], from_monai_boxes([BOXES[:1]]), size)[0], expected
    )
    flipped = flip_boxes(BOXES[:1], image.shape[1:], flip_axes=0)
    crop = crop_and_resize3d(image.flip(1)[None], from_monai_boxes([flipped]), size)[0]
    torch.testing.assert_close(crop, expected.flip(1))


def test_boxes_that_are_none():
    assert from_monai_boxes([]).shape == (0, 7)
    assert from_monai_boxes([torch.empty(0), torch.empty(0, 6)], "cccwhd").shape == (0, 7)
    assert [boxes.shape for boxes in to_monai_boxes(torch.empty(0, 7), 2, "xxyyzz")] == [(0, 6)] * 2
    for wrong in (torch.zeros(1, 4), torch.zeros(6)):
        with pytest.raises(ValueError, match=r"\[n, 6\]"):
            from_monai_boxes([wrong])
    with pytest.raises(ValueError, match=r"\[K, 7\]"):
        to_monai_boxes(torch.zeros(2, 6), 1)
    with pytest.raises(ValueError, match="box mode"):
        from_monai_boxes([BOXES], "zyx")


def test_mixup_mixes_images_and_carries_boxes_labels_and_weights():
    batch = batch_of(5)
    batch[3]["box_weights"] = torch.tensor([0.5, 0.25])
    before = copy.deepcopy(batch)
    mixed = MixUpBoxd(eta=1.0).set_random_state(3)(batch)
    assert str(batch) == str(before)
    moved = 0
    for item, own in zip(mixed, batch, strict=True):
        count = len(own["box"])
        if len(item["box"]) == count:
            torch.testing.assert_close(item["image"], own["image"])
            continue
        moved += 1
        (other,) = [x for x in batch if torch.equal(x["box"], item["box"][count:])]
        own_weights, weights = own.get("box_weights", torch.ones(count)), item["box_weights"]
        lam = weights[0] / own_weights[0]
        assert 0.5 <= lam < 1
        torch.testing.assert_close(item["image"], lam * own["image"] + (1 - lam) * other["image"])
        torch.testing.assert_close(item["box"][:count], own["box"])
        torch.testing.assert_close(item["label"], torch.cat([own["label"], other["label"]]))
        others = other.get("box_weights", torch.ones(len(other["box"])))
        torch.testing.assert_close(weights, torch.cat([lam * own_weights, (1 - lam) * others]))
    assert moved >= 2


def test_mixup_mixes_targets_of_anchors():
    batch = batch_of(2)
    batch[1] |= {"anchor_targets": torch.rand(7, 2), "image_weight": 4.0}
    mixup = MixUpBoxd(eta=1.0)
    mixed = next(
        m
        for m in (mixup.set_random_state(seed)(batch) for seed in range(20))
        if len(m[0]["box"]) == 3
    )
    own, other = mixed[1]["box_weights"][0], mixed[0]["box_weights"][1]
    torch.testing.assert_close(mixed[1]["anchor_targets"], own * batch[1]["anchor_targets"])
    torch.testing.assert_close(mixed[0]["anchor_targets"], other * batch[1]["anchor_targets"])
    assert "image_weight" not in mixed[0] and mixed[1]["image_weight"] == 4.0


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
def test_draws_come_from_the_random_state(kind):
    batch = batch_of(4)
    first, second, third = (kind(eta=1.0).set_random_state(seed)(batch) for seed in (0, 0, 1))
    first, second, third = (torch.stack(images_of(mixed)) for mixed in (first, second, third))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
def test_metatensors_arrays_and_hu(kind):
    batch = batch_of(3)
    for index, item in enumerate(batch):
        hu = (item["image"] * 1800 - 1200).to(torch.int16)
        item["image"] = MetaTensor(hu, meta={"name": index}) if index else hu.numpy()
        item["box"], item["label"] = MetaTensor(item["box"]), MetaTensor(item["label"])
    transform = Compose([EnsureTyped(keys="image"), kind(window=(-1200, 600))]).set_random_state(5)
    mixed = transform(batch)
    for item in mixed[1:]:
        assert isinstance(item["image"], MetaTensor) and item["image"].dtype == torch.float32
        assert item["image"].min() >= 0 and item["image"].max() <= 1
    assert [item["image"].meta["name"] for item in mixed[1:]] == [1, 2]
    (alone,) = kind(window=(-1200, 600))(batch[:1])
    assert isinstance(alone["image"], np.ndarray) and alone["image"].dtype == np.float32


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
def test_batches_that_cannot_be_mixed(kind):
    assert kind()([]) == []
    with pytest.raises(ValueError, match="one shape"):
        kind()([*batch_of(1), *batch_of(1, side=8)])
    bad = batch_of(2)
    bad[0]["box"] = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"\[n, 6\]"):
        [kind().set_random_state(seed)(bad) for seed in range(20)]


def test_weights_are_one_for_each_box():
    bad = batch_of(2)
    bad[0]["box_weights"] = torch.ones(3)
    with pytest.raises(ValueError, match="box_weights"):
        [MixUpBoxd().set_random_state(seed)(bad) for seed in range(20)]


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
def test_labels_are_integers_one_for_each_box(kind):
    for wrong in (torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        bad = batch_of(2)
        bad[0]["label"] = wrong
        with pytest.raises(ValueError, match=f"{kind.__name__}: label must be one for each of 1"):
            kind()(bad)
    bad = [{**item, "class": item["label"].float()} for item in batch_of(2)]
    with pytest.raises(TypeError, match=f"{kind.__name__}: class must be integers, got float32"):
        kind(label_key="class")(bad)


def test_labels_of_any_integer_dtype_are_mixed():
    batch = batch_of(4)
    for item, dtype in zip(batch, (np.uint8, np.int32, np.int64, np.int16), strict=True):
        item["label"] = item["label"].numpy().astype(dtype)
    mixed = MixUpBoxd(eta=1.0).set_random_state(3)(batch)
    moved = [m for m, b in zip(mixed, batch, strict=True) if len(m["box"]) > len(b["box"])]
    assert moved and all(item["label"].dtype == torch.int64 for item in moved)
    assert all(len(item["label"]) == len(item["box"]) for item in mixed)


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
def test_a_collated_batch_gets_one_clear_error(kind):
    collated = {key: [item[key] for item in batch_of(2)] for key in ("image", "box", "label")}
    expected = f"{kind.__name__}: batch must be a list of dictionaries, .* not collated"
    for batch, got in (
        (collated, "got dict"),
        ([batch_of(2), batch_of(2)], "got a list of 2 in it"),
        (torch.zeros(2, 1, 4, 4, 4), "got a tensor"),
    ):
        with pytest.raises(TypeError, match=f"{expected} .*{got}"):
            kind()(batch)
    without = batch_of(2)
    del without[1]["label"]
    with pytest.raises(ValueError, match=f"{kind.__name__}: batch must hold 'label' in each"):
        kind()(without)


def test_objects_that_are_collated_are_refused():
    with pytest.raises(TypeError, match="ObjectMixUpBoxd: objects must be a list of dictionaries"):
        ObjectMixUpBoxd()(batch_of(2), objects={"image": 1})


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
def test_arguments_are_checked_at_construction(kind):
    for error, words, arguments in (
        (ValueError, "eta must be > 0, got 0", {"eta": 0}),
        (TypeError, "eta must be a number, got str", {"eta": "0.2"}),
        (ValueError, "eta must be finite", {"eta": float("nan")}),
        (TypeError, "window must be a pair", {"window": 3}),
        (ValueError, "window must have lo < hi", {"window": (1, 0)}),
    ):
        with pytest.raises(error, match=f"{kind.__name__}: {words}"):
            kind(**arguments)
    with pytest.raises(ValueError, match="box mode"):
        ObjectMixUpBoxd(mode="zyx")


@pytest.mark.parametrize("kind", [MixUpBoxd, ObjectMixUpBoxd])
@pytest.mark.parametrize("arrays", [False, True])
def test_defaults_of_the_process_change_nothing(kind, arrays):
    """Neither torch.set_default_dtype nor torch.set_default_device."""
    batch = batch_of(4)
    if arrays:
        batch = [{key: value.numpy() for key, value in item.items()} for item in batch]
    expected = kind(eta=1.0).set_random_state(3)(batch)
    boxes = from_monai_boxes([item["box"] for item in batch])
    torch.set_default_dtype(torch.float64)
    try:
        # with another default device, MONAI itself cannot convert arrays
        with contextlib.nullcontext() if arrays else torch.device("meta"):
            result = kind(eta=1.0).set_random_state(3)(batch)
            again = from_monai_boxes([item["box"] for item in batch])
            none = from_monai_boxes([])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, boxes) and again.dtype == none.dtype == torch.float32
    assert none.device.type == "cpu"
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype and (ours[key] == value).all()


def test_a_metatensor_that_overlaps_is_noticed():
    """It is a subclass of torch.Tensor that has memory."""
    base = torch.rand(3, 1, 8, 8, 8)
    boxes = from_monai_boxes([BOXES[1:], BOXES[1:]])
    arguments = boxes, boxes.flip(0), torch.full((2,), 0.75)
    expected = object_mixup3d(base[:2], *arguments)
    meta = MetaTensor(base.clone())
    object_mixup3d(meta[:2], *arguments, out=meta[:2])
    assert torch.equal(meta[:2].as_tensor(), expected)
    with pytest.raises(ValueError, match="out may be volumes itself but must not overlap it"):
        object_mixup3d(meta[:2], *arguments, out=meta[1:])


def test_objects_are_mixed_with_others_of_their_label():
    corners = [[0.0, 0, 0], [8, 8, 8], [0, 0, 0], [8, 8, 8]]
    boxes = [torch.tensor([[*corner, *(c + 4 for c in corner)]]) for corner in corners]
    values, labels = (1.0, 2.0, 4.0, 8.0), (0, 0, 1, 2)
    batch = [
        {"image": torch.full((1, 12, 12, 12), value), "box": box, "label": torch.tensor([label])}
        for value, box, label in zip(values, boxes, labels, strict=True)
    ]
    mixed = ObjectMixUpBoxd(eta=1.0).set_random_state(0)(batch)
    for item, own, partner in zip(mixed, batch, (2.0, 1.0, None, None), strict=True):
        changed = item["image"] != own["image"]
        if partner is None:  # no other object of the label
            assert not changed.any()
            continue
        x1, y1, z1, x2, y2, z2 = own["box"][0].int().tolist()
        assert changed[:, x1:x2, y1:y2, z1:z2].all() and changed.sum() == 64
        value = item["image"][changed]
        torch.testing.assert_close(value, value[:1].expand(64))
        assert min(own["image"].min(), partner) < value[0] < max(own["image"].min(), partner)
        assert item["box"] is own["box"] and item["label"] is own["label"]


def test_objects_of_the_batch_before_and_their_mode():
    boxes = [torch.tensor([[0.0, 0, 0, 4, 5, 6]]), torch.tensor([[6.0, 4, 2, 12, 8, 4]])]
    before = [
        {"image": torch.full((1, 12, 12, 12), value), "box": box, "label": torch.tensor([0])}
        for value, box in zip((2.0, 4.0), boxes, strict=True)
    ]
    mixed = [
        item | {"image": torch.zeros(1, 12, 12, 12), "box": torch.cat(boxes)} for item in before
    ]
    centered = [
        item | {"box": box_utils.convert_box_mode(item["box"], "xyzxyz", "cccwhd")}
        for item in before
    ]
    result = ObjectMixUpBoxd(eta=1.0).set_random_state(4)(mixed, objects=before)
    again = ObjectMixUpBoxd(eta=1.0, mode="cccwhd").set_random_state(4)(mixed, objects=centered)
    for item, same, own, donor in zip(result, again, before, (4.0, 2.0), strict=True):
        x1, y1, z1, x2, y2, z2 = own["box"][0].int().tolist()
        inside = item["image"][:, x1:x2, y1:y2, z1:z2]
        assert 0 < inside.min() <= inside.max() <= donor / 2
        assert item["image"].count_nonzero() == inside.numel()
        assert torch.equal(item["image"], same["image"]) and len(item["box"]) == 2
    with pytest.raises(ValueError, match="objects"):
        ObjectMixUpBoxd()(mixed, objects=before[:1])


@with_torchvision
def test_hard_targets_give_the_losses_of_monai():
    batch, alpha = batch_of(3), 0.25

    class Focal(nn.Module):
        def forward(self, logits, targets):
            return sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=2, reduction="sum")

    theirs, ours = detector_of(RetinaNetDetector), detector_of(SoftTargetRetinaNetDetector)
    theirs.set_cls_loss(Focal())
    ours.set_cls_loss(SoftTargetFocalLoss(alpha0=1 - alpha, alpha1=alpha))
    expected = theirs(images_of(batch), copy.deepcopy(batch))
    losses = ours(images_of(batch), batch)
    positives = (hard_targets(ours, batch) == 1).sum()
    assert positives > 3
    torch.testing.assert_close(losses["classification"], expected["classification"] / positives)
    torch.testing.assert_close(losses["box_regression"], expected["box_regression"])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in ours.network.parameters())


@with_torchvision
@pytest.mark.parametrize("matcher", ["regular", "atss"])
def test_mixed_images_have_the_mixed_targets_of_their_parts(matcher):
    """The loss of what MixUpBoxd made is that of the unmixed targets, mixed by the loss itself."""
    detector, batch = detector_of(SoftTargetRetinaNetDetector), batch_of(4)
    if matcher == "atss":
        detector.set_atss_matcher(num_candidates=4)
    y = hard_targets(detector, batch)
    batch[3] |= {
        "anchor_targets": torch.rand_like(y[3]) * 0.9,
        "box_weights": torch.zeros(2),
        "image_weight": 4.0,
    }
    y[3] = batch[3]["anchor_targets"]
    mixed = MixUpBoxd(eta=1.0).set_random_state(3)(batch)
    lam, index = torch.ones(4), torch.arange(4)
    for b, (item, own) in enumerate(zip(mixed, batch, strict=True)):
        if len(item["box"]) > len(own["box"]):
            index[b] = next(
                i
                for i, x in enumerate(batch)
                if torch.equal(x["box"], item["box"][len(own["box"]) :])
            )
            own_weight = item["box_weights"][0]
            lam[b] = own_weight if b < 3 else 1 - item["box_weights"][-1]
    assert (index != torch.arange(4)).sum() >= 2
    outputs, anchors, places = head_outputs(detector, images_of(mixed))
    expected = soft_target_focal_loss(
        outputs["classification"],
        y,
        weight=torch.tensor([1.0, 1, 1, 4])[:, None, None],
        normalizer=(y[:3] == 1).sum(),
        mix=(lam, index),
    )
    losses = detector.compute_loss(outputs, mixed, anchors, places)
    torch.testing.assert_close(losses["classification"], expected)
    regressed = detector.compute_loss(outputs, [*batch[:3], batch[3]], anchors, places)[
        "box_regression"
    ]
    torch.testing.assert_close(
        losses["box_regression"], regressed
    )  # of the own boxes, whatever is mixed in


@with_torchvision
@pytest.mark.parametrize(
    "box", [torch.empty(0, 6), torch.tensor([[0.0, 0, 0, 16, 16, 1]])], ids=["none", "unmatched"]
)
@pytest.mark.filterwarnings("ignore:No anchor is matched")
def test_images_without_boxes_train_and_reach_every_parameter(box):
    detector = detector_of(SoftTargetRetinaNetDetector)
    detector.set_regular_matcher(0.9, 0.2, allow_low_quality_matches=False)
    image, label = MetaTensor(torch.rand(1, 16, 16, 16)), torch.zeros(len(box), dtype=torch.long)
    batch = [{"image": image, "box": box, "label": label}]
    losses = detector(torch.stack(images_of(batch)), batch)
    assert type(losses["classification"]) is torch.Tensor and losses["box_regression"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.network.parameters())


@with_torchvision
def test_what_the_detector_refuses():
    detector, batch = detector_of(SoftTargetRetinaNetDetector), batch_of(2)
    batch[0]["anchor_targets"] = torch.zeros(5, 2)
    with pytest.raises(
        ValueError, match=r"anchor_targets must have the shape .* \(1152, 2\), got \(5, 2\)"
    ):
        detector(images_of(batch), batch)
    detector.set_hard_negative_sampler(batch_size_per_image=8, positive_fraction=0.5)
    with pytest.raises(ValueError, match="all anchors"):
        detector(images_of(batch), batch)
    flat = Network()
    flat.spatial_dims = 2
    with pytest.raises(ValueError, match="spatial_dims must be 3"):
        SoftTargetRetinaNetDetector(flat, AnchorGeneratorWithAnchorShape([1, 2], [[4, 4], [6, 4]]))
    with pytest.raises(ValueError, match="begin with 0"):
        detector.predict_targets(torch.stack(images_of(batch)), (1, 2))
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], got 80"):
        detector.predict_targets(torch.stack(images_of(batch)), confidence=80)


def groups_of(labels, boxes=BOXES):
    """What the detector makes of the labels of an image, without torchvision."""
    detector = SimpleNamespace(target_box_key="box", target_label_key="class")
    target = {"box": boxes, "class": labels}
    return list(SoftTargetRetinaNetDetector._groups(detector, target, torch.zeros(5, 2)))


def test_the_detector_checks_labels():
    expected = torch.tensor([1, 0])
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        ((weight, group),) = groups_of(expected.to(dtype))
        assert weight == 1 and group["class"].dtype == torch.int64
        assert torch.equal(group["class"], expected)
    for value in (-1, 2, 255):
        with pytest.raises(ValueError, match=rf"class must be in \[0, 2\), got {value}"):
            groups_of(torch.tensor([0, value]))
    with pytest.raises(TypeError, match="class must be integers, got float32"):
        groups_of(torch.zeros(2))
    with pytest.raises(TypeError, match="class must be integers, got bool"):
        groups_of(torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="class must be one for each of 2 boxes, got 3"):
        groups_of(torch.zeros(3, dtype=torch.long))


@with_torchvision
def test_labels_of_uint8_are_no_mask():
    detector, batch = detector_of(SoftTargetRetinaNetDetector), batch_of(3)
    expected = detector(images_of(batch), batch)
    narrow = [{**item, "label": item["label"].byte()} for item in batch]
    losses = detector(images_of(batch), narrow)
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    narrow[2]["label"] = torch.tensor([0, -1])
    with pytest.raises(ValueError, match=r"label must be in \[0, 2\), got -1"):
        detector(images_of(batch), narrow)


@with_torchvision
def test_inference_is_that_of_monai():
    theirs, ours = (
        detector_of(kind).eval() for kind in (RetinaNetDetector, SoftTargetRetinaNetDetector)
    )
    with torch.no_grad():
        for a, b in zip(theirs(images_of(batch_of(2))), ours(images_of(batch_of(2))), strict=True):
            assert len(a["box"]) and all(torch.equal(a[key], b[key]) for key in a)


@with_torchvision
def test_rotated_views_need_cubic_anchors_and_images():
    detector, flips = detector_of(SoftTargetRetinaNetDetector), (0, 13, 47)
    images = torch.rand(2, 1, 16, 16, 16)
    with pytest.raises(
        ValueError, match=r"in \[0, 8\) where anchors are not cubes, got \(0, 13, 47"
    ):
        detector.predict_targets(images, flips)
    detector.anchor_generator = AnchorGeneratorWithAnchorShape([1, 2], [[4] * 3, [6] * 3])
    with pytest.raises(ValueError, match="three equal sizes for code 13"):
        detector.predict_targets(images[:, :, :8], flips)
    found = detector.predict_targets(images, flips, temperature=1)
    with torch.no_grad():
        views = [detector.network(apply_symmetry(images, code)) for code in flips]
    mean = [
        torch.stack(list(map(undo_symmetry, level, flips))).sigmoid().mean(0)
        for level in zip(*(view["classification"] for view in views), strict=True)
    ]
    for own, y in zip(found, detector._reshape_maps(mean), strict=True):
        torch.testing.assert_close(own["anchor_targets"], y)


@with_torchvision
@pytest.mark.parametrize("side", [16, 14], ids=["whole", "padded"])
def test_targets_are_the_sharpened_mean_of_the_views(side):
    detector, flips = detector_of(SoftTargetRetinaNetDetector), (0, 1, 6)
    detector.set_box_selector_parameters(score_thresh=0.5, nms_thresh=0.1, detections_per_img=5)
    images = torch.rand(2, 1, side, 16, 16)
    given = images_of([{"image": MetaTensor(image)} for image in images])
    found = detector.predict_targets(given, flips, temperature=0.5, confidence=0.5)
    padded = F.pad(images, (0, 0, 0, 0, 0, 16 - side))
    levels = [[], []]
    with torch.no_grad():
        for flip in flips:
            axes = [axis + 2 for axis in range(3) if flip >> axis & 1]
            for level, logits in zip(
                levels, detector.network(padded.flip(axes))["classification"], strict=True
            ):
                level.append(logits.flip(axes).sigmoid())
    mean = detector._reshape_maps([torch.stack(level).mean(0) for level in levels])
    expected = mean**2 / (mean**2 + (1 - mean) ** 2)
    for own, y in zip(found, expected, strict=True):
        assert type(own["anchor_targets"]) is torch.Tensor
        torch.testing.assert_close(own["anchor_targets"], y)
        assert own["box"].shape == (len(own["label"]), 6) and len(own["label"]) <= 5
        assert torch.equal(own["box_weights"], torch.zeros(len(own["box"])))
        assert (len(own["box"]) > 0) == bool((y > 0.5).any())


@with_torchvision
def test_another_network_predicts():
    detector = detector_of(SoftTargetRetinaNetDetector)
    teacher = copy.deepcopy(detector.network)
    nn.init.constant_(teacher.cls.bias, 3.0)
    images = torch.rand(1, 1, 16, 16, 16)
    (student,), (mean,) = (
        detector.predict_targets(images),
        detector.predict_targets(images, network=teacher),
    )
    assert mean["anchor_targets"].mean() > student["anchor_targets"].mean() and len(mean["box"])


@with_torchvision
def test_objects_are_what_is_predicted_with_confidence():
    """Whatever the box selector would let pass."""
    detector = detector_of(SoftTargetRetinaNetDetector)
    detector.set_box_selector_parameters(score_thresh=0.0, nms_thresh=1.0)
    nn.init.normal_(detector.network.cls.weight, std=20.0)
    images, counts = torch.rand(2, 1, 8, 8, 8), []
    for confidence in (0.0, 0.5, 0.8, 1.0):
        found = detector.predict_targets(images, confidence=confidence)
        counts.append(sum(len(own["box"]) for own in found))
        confident = sum(
            (own["anchor_targets"] >= max(confidence, 1e-6)).sum().item() for own in found
        )
        assert counts[-1] == confident or not confidence
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert sum(len(own["box"]) for own in detector.predict_targets(images)) == counts[2]


class Broken(nn.Module):
    def forward(self, images):
        raise ArithmeticError


@with_torchvision
@pytest.mark.parametrize("own", [True, False])
def test_predicting_leaves_the_network_as_it_was(own):
    """The network evaluates; afterwards each module is in its mode again, also after an error."""
    detector = detector_of(SoftTargetRetinaNetDetector)
    network = detector.network if own else copy.deepcopy(detector.network)
    network.stem = nn.Sequential(
        network.stem, nn.BatchNorm3d(4), nn.Dropout(0.5), nn.BatchNorm3d(4)
    )
    network.train().stem[3].eval()
    modes = [module.training for module in network.modules()]
    state, images = copy.deepcopy(network.state_dict()), torch.rand(2, 1, 16, 16, 16)
    (first, _), (second, _), (expected, _) = (
        detector.predict_targets(images, network=of)
        for of in (network, network, copy.deepcopy(network).eval())
    )
    for key in first:
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], expected[key])
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    network.cls = Broken()
    with pytest.raises(ArithmeticError):
        detector.predict_targets(images, network=None if own else network)
    assert [module.training for module in network.modules()] == modes


@with_torchvision
def test_a_pipeline_of_monai_trains():
    detector = detector_of(SoftTargetRetinaNetDetector)
    optimizer = torch.optim.Adam(detector.network.parameters(), lr=0.02)
    scan = {
        "image": torch.full((1, 40, 40, 40), -900.0),
        "box": torch.tensor([[10.0, 10, 10, 15, 15, 15]]),
    }
    scan["image"][:, 10:15, 10:15, 10:15] = 100
    scan["label"] = torch.zeros(1, dtype=torch.long)
    keys = {"image_keys": ["image"], "box_keys": ["box"], "box_ref_image_keys": ["image"]}
    pipeline = Compose(
        [
            EnsureTyped(keys=["image", "box"], dtype=torch.float32),
            ScaleIntensityRanged(
                keys=["image"], a_min=-1024, a_max=300, b_min=0, b_max=1, clip=True
            ),
            RandCropBoxByPosNegLabeld(
                ["image"], "box", "label", [16] * 3, whole_box=True, num_samples=4, pos=1, neg=0
            ),
            RandFlipBoxd(**keys, prob=0.5, spatial_axis=0),
            MixUpBoxd(),
            ObjectMixUpBoxd(),
        ]
    ).set_random_state(0)
    losses = []
    for _ in range(15):
        batch = pipeline(scan)
        assert len(batch) == 4 and all(isinstance(item["image"], MetaTensor) for item in batch)
        loss = sum(detector(images_of(batch), batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_examples_in_docstrings():
    results = doctest.testmod(adapter)
    assert results.failed == 0 and results.attempted == 2
