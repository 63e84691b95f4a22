"""MONAI's 3D detection with soft targets: its RetinaNet detector, MixUp, and its boxes.

Needs MONAI and torchvision, which the extra ``fmkernels[monai]`` installs.

A batch is a list of dictionaries, one per image, as MONAI's detection pipelines make them. Besides
the image, its boxes [n, 6] and their labels [n], a dictionary may hold these entries, which the
classes of this module read and write:

- ``box_weights``: float32 [n] in [0, 1], the soft target of the anchors matched with each box; 1 if
  absent. A box of weight 0 is an object for :class:`ObjectMixUpBoxd`, but no target.
- ``anchor_targets``: float32 [anchors, classes] in [0, 1], added to the targets from the boxes.
- ``image_weight``: float or 0-d tensor, the weight of the image in the classification loss; 1 if
  absent.

MONAI calls the spatial axes of an image x, y, z in the order of the tensor; fmkernels calls the
same axes z, y, x. So the numbers of a box stay in the order of the axes. In both libraries, as
MONAI flips and crops boxes, voxel i covers [i, i + 1).
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.utils.detector_utils import preprocess_images
from monai.apps.detection.utils.predict_utils import ensure_dict_value_to_list_
from monai.data.box_utils import BoxMode, StandardMode, convert_box_mode, get_boxmode
from monai.transforms import Randomizable, Transform
from monai.transforms.traits import ReduceTrait
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor, nn

from fmkernels import functional
from fmkernels.integrations.norms import use_fused_norms
from fmkernels.nn import SoftTargetFocalLoss
from fmkernels.ops.checks import check_number, check_window, describe

__all__ = [
    "MixUpBoxd",
    "ObjectMixUpBoxd",
    "SoftTargetRetinaNetDetector",
    "from_monai_boxes",
    "to_monai_boxes",
    "use_fused_norms",
]

Item = dict[Any, Any]
Mode: TypeAlias = "str | BoxMode | type[BoxMode]"

_BOX_WEIGHTS = "box_weights"
_ANCHOR_TARGETS = "anchor_targets"
_IMAGE_WEIGHT = "image_weight"
_MAX_SEED = 2**31


def from_monai_boxes(boxes: Iterable[Any], mode: Mode = StandardMode) -> Tensor:
    """Convert MONAI's boxes of a batch to boxes of fmkernels.

    Args:
        boxes: for each image, [n, 6] in MONAI's ``mode``, in voxels; tensors, metatensors or arrays
            of any real dtype.
        mode: one of MONAI's 3D box modes, as a name such as "cccwhd" or a class.

    Returns:
        float32 [K, 7]: (batch index, z1, y1, x1, z2, y2, x2), where z is the first spatial axis of
        the image, as :func:`fmkernels.crop_and_resize3d` and :func:`fmkernels.object_mixup3d` take
        them.

    Raises:
        ValueError: boxes are not [n, 6], or MONAI does not know the mode.

    Example:
        >>> from_monai_boxes([torch.tensor([[5, 6, 7, 2, 4, 6]])], "cccwhd")
        tensor([[ 0.,  4.,  4.,  4.,  6.,  8., 10.]])
    """
    rows = []
    for index, of_image in enumerate(boxes):
        corners = convert_box_mode(_boxes(of_image), mode, StandardMode)
        rows.append(torch.cat([corners.new_full((len(corners), 1), index), corners], 1))
    return torch.cat(rows) if rows else torch.empty(0, 7, dtype=torch.float32, device="cpu")


def to_monai_boxes(boxes: Tensor, batch_size: int, mode: Mode = StandardMode) -> list[Tensor]:
    """The inverse of :func:`from_monai_boxes`.

    Args:
        boxes: [K, 7]: (batch index, z1, y1, x1, z2, y2, x2), voxels.
        batch_size: number of images; boxes of other images are dropped.
        mode: the box mode of the result.

    Returns:
        For each image, [n, 6] in MONAI's ``mode``, in the order of ``boxes``.

    Raises:
        ValueError: boxes are not [K, 7], or MONAI does not know the mode.

    Example:
        >>> to_monai_boxes(torch.tensor([[0, 4.0, 4, 4, 6, 8, 10]]), 1, "xyzwhd")
        [tensor([[4., 4., 4., 2., 4., 6.]])]
    """
    if boxes.dim() != 2 or boxes.shape[1] != 7:
        raise ValueError(f"to_monai_boxes: boxes must be [K, 7], got shape {tuple(boxes.shape)}")
    return [
        convert_box_mode(boxes[boxes[:, 0] == index, 1:], StandardMode, mode).reshape(-1, 6)
        for index in range(batch_size)
    ]


class SoftTargetRetinaNetDetector(RetinaNetDetector):
    r"""MONAI's detector, trained with soft targets on all anchors.

    Boxes of equal weight are matched with the anchors together, by the matcher that was set. The
    target of an anchor and a class is

    .. math::
        y = \min(1, \mathrm{anchor\_targets} +
            \sum_w w \, [\text{the anchor is matched with a box of weight } w])

    An anchor that any of these matchings leaves between its thresholds is ignored. Images mixed by
    :class:`MixUpBoxd` therefore have the mixed targets of their parts. The classification loss is
    divided by the number of anchors that are matched with a box of weight at least 1/2. Only these
    anchors regress their boxes.

    The arguments are those of MONAI's detector, for a network of 3D images. The classification loss
    is :class:`fmkernels.nn.SoftTargetFocalLoss`: set its hyper-parameters by
    ``detector.set_cls_loss(SoftTargetFocalLoss(alpha0, alpha1, gamma))``. Do not set a sampler.
    Labels are integers of any dtype in [0, number of classes). Inference, state and everything else
    are MONAI's.

    Raises:
        ValueError: the network is for 2D images; in training, a sampler is set, labels are out of
            range or not one per box, or anchor targets do not have the shape of the logits.
        TypeError: labels are not integers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.spatial_dims != 3:
            raise ValueError(
                f"SoftTargetRetinaNetDetector: spatial_dims must be 3, got {self.spatial_dims}"
            )
        self.set_cls_loss(SoftTargetFocalLoss())

    def compute_loss(
        self,
        head_outputs_reshape: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        anchors: list[Tensor],
        num_anchor_locs_per_level: Sequence[int],
    ) -> dict[str, Tensor]:
        """The two losses of MONAI's ``forward``, 0-d.

        Args:
            head_outputs_reshape: class logits [B, anchors, classes] and box deltas [B, anchors, 6].
            targets: for each image its boxes, labels, and what the module's description lists.
            anchors: for each image [anchors, 6].
            num_anchor_locs_per_level: number of grid cells of each level.
        """
        if self.fg_bg_sampler is not None:
            raise ValueError(
                "SoftTargetRetinaNetDetector: trains on all anchors, fg_bg_sampler must be None, "
                f"got {describe(self.fg_bg_sampler)}"
            )
        logits = convert_to_tensor(head_outputs_reshape[self.cls_key], track_meta=False)
        deltas = convert_to_tensor(head_outputs_reshape[self.box_reg_key], track_meta=False)
        soft: list[Tensor] = []
        regressed: list[tuple] = []
        positives = logits.new_zeros((), dtype=torch.int64)
        for target, image_logits, image_deltas, image_anchors in zip(
            targets, logits, deltas, anchors, strict=True
        ):
            y = self._anchor_targets(target, image_logits)
            ignored = logits.new_zeros(len(image_logits), dtype=torch.bool)
            for weight, group in self._groups(target, image_logits):
                (matched,) = self.compute_anchor_matched_idxs(
                    [image_anchors], [group], num_anchor_locs_per_level
                )
                is_matched = matched >= 0
                y[is_matched, group[self.target_label_key][matched[is_matched]]] += weight
                ignored |= matched == self.proposal_matcher.BETWEEN_THRESHOLDS
                if weight >= 0.5 and is_matched.any():
                    positives += is_matched.sum()
                    regressed.append((group, image_deltas, image_anchors, matched))
            soft.append(y.clamp(max=1).masked_fill(ignored[:, None], -1))

        weights = [
            torch.as_tensor(
                target.get(_IMAGE_WEIGHT, 1.0), dtype=torch.float32, device=logits.device
            )
            for target in targets
        ]
        classification = self.cls_loss_func(
            logits,
            torch.stack(soft),
            weight=torch.stack(weights)[:, None, None],
            normalizer=positives,
        )
        if regressed:
            groups, group_deltas, group_anchors, matches = map(list, zip(*regressed, strict=True))
            box = self.compute_box_loss(group_deltas, groups, group_anchors, matches)
        else:
            box = 0 * deltas.sum()
        return {self.cls_key: classification, self.box_reg_key: box}

    def _anchor_targets(self, target: Mapping[str, Any], logits: Tensor) -> Tensor:
        """float32 [anchors, classes], a copy: the targets before those of the boxes are added."""
        given = target.get(_ANCHOR_TARGETS)
        if given is None:
            return torch.zeros_like(logits, dtype=torch.float32)
        if given.shape != logits.shape:
            raise ValueError(
                f"SoftTargetRetinaNetDetector: {_ANCHOR_TARGETS} must have the shape of the logits "
                f"of an image, {tuple(logits.shape)}, got {tuple(given.shape)}"
            )
        return given.detach().to(logits.device, torch.float32, copy=True)

    def _groups(
        self, target: Mapping[str, Any], logits: Tensor
    ) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """The boxes and labels of each weight above 0, for logits [anchors, classes]."""
        name, device, classes = "SoftTargetRetinaNetDetector", logits.device, logits.shape[1]
        boxes = convert_to_tensor(target[self.target_box_key], track_meta=False, device=device)
        labels = _labels(name, target, self.target_label_key, len(boxes)).to(device)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"{name}: {self.target_label_key} must be in [0, {classes}), got {wrong[0].item()}"
            )
        weights = _weights(target, boxes)
        for weight in weights.unique().tolist():
            if weight > 0:
                chosen = weights == weight
                yield (
                    weight,
                    {
                        self.target_box_key: boxes[chosen],
                        self.target_label_key: labels[chosen],
                    },
                )

    def _has_cubic_anchors(self) -> bool:
        corners = torch.cat(list(self.anchor_generator.cell_anchors))
        sides = corners[:, 3:] - corners[:, :3]
        return bool((sides == sides[:, :1]).all())

    @torch.no_grad()
    def predict_targets(
        self,
        images: Tensor | list[Tensor],
        flips: Sequence[int] = (0, 1, 2, 4),
        *,
        temperature: float = 0.7,
        confidence: float = 0.8,
        network: nn.Module | None = None,
    ) -> list[Item]:
        """Targets of unlabeled images from several views; see :func:`fmkernels.predict_targets`.

        The network predicts in evaluation mode; afterwards each of its modules is in its previous
        mode. The targets are exact if a flip maps anchors onto anchors, as it does with MONAI's
        anchors on levels of even stride.

        Args:
            images: as the detector takes them: [B, C, D, H, W], or a list of [C, D, H, W]; any
                float dtype.
            flips: the symmetry of each view, a code of :func:`fmkernels.apply_symmetry`: below 8 a
                bit mask of flips, 1, 2, 4 for the first, second, third spatial axis; from 8 to 47
                axes are permuted too, which needs cubic images and cubic anchors. The first view
                is the image as it is, 0.
            temperature: temperature of the sharpening, in (0, 1].
            confidence: minimum target, in [0, 1], for a predicted box to become an object. Lower
                targets train the classifier, but their boxes are not mixed.
            network: the network that predicts, for example the moving average of the detector's
                network; the detector's network by default.

        Returns:
            For each image the targets to train on: ``anchor_targets``; and boxes of weight 0, that
            is objects to mix, which the detector's box selector (see MONAI's
            ``set_box_selector_parameters``) chooses from the confident targets with the box deltas
            of the first view.

        Raises:
            ValueError: flips do not begin with 0, or need cubes where there are none, or a value is
                out of range.
        """
        if not flips or flips[0] != 0:
            raise ValueError(
                f"predict_targets: flips must begin with 0, the original, got {tuple(flips)}"
            )
        if max(flips) >= 8 and not self._has_cubic_anchors():
            raise ValueError(
                "predict_targets: flips must be in [0, 8) where anchors are not cubes, "
                f"got {tuple(flips)}"
            )
        if not 0 <= confidence <= 1:
            raise ValueError(f"predict_targets: confidence must be in [0, 1], got {confidence}")
        padded, sizes = preprocess_images(images, self.spatial_dims, self.size_divisible)
        padded, batch = convert_to_tensor(padded, track_meta=False), len(padded)
        codes = torch.tensor(tuple(flips), dtype=torch.uint8, device=padded.device)
        views = torch.cat([functional.apply_symmetry(padded, code) for code in flips])
        predictor = self.network if network is None else network
        with _evaluating(predictor):
            outputs = predictor(views)
        if isinstance(outputs, (list, tuple)):
            half = len(outputs) // 2
            outputs = {self.cls_key: list(outputs[:half]), self.box_reg_key: list(outputs[half:])}
        else:
            ensure_dict_value_to_list_(outputs)
        targets = functional.predict_targets(
            [level.unflatten(0, (len(flips), batch)) for level in outputs[self.cls_key]],
            codes,
            temperature=temperature,
        )
        self.generate_anchors(padded, {self.cls_key: targets})
        flat = self._reshape_maps(targets)
        detections = self.postprocess_detections(
            {
                self.cls_key: flat.masked_fill(flat < confidence, 0).logit(),
                self.box_reg_key: self._reshape_maps(
                    [level[:batch] for level in outputs[self.box_reg_key]]
                ),
            },
            self.anchors,
            sizes,
            [level.shape[2:].numel() for level in targets],
        )
        return [
            {
                self.target_box_key: detected[self.target_box_key],
                self.target_label_key: detected[self.target_label_key],
                _BOX_WEIGHTS: y.new_zeros(len(detected[self.target_box_key])),
                _ANCHOR_TARGETS: y,
            }
            for detected, y in zip(detections, flat, strict=True)
        ]


class _BatchTransform(Randomizable, Transform, ReduceTrait):
    """A transform of a batch, a list of dictionaries, that uses MONAI's random state."""

    def __init__(
        self,
        image_key: Hashable = "image",
        box_key: Hashable = "box",
        label_key: Hashable = "label",
        *,
        eta: float = 0.2,
        window: tuple[float, float] | None = None,
    ) -> None:
        name = type(self).__name__
        if check_number(name, "eta", eta) <= 0:
            raise ValueError(f"{name}: eta must be > 0, got {eta}")
        self.image_key, self.box_key, self.label_key = image_key, box_key, label_key
        self.eta, self.window = eta, check_window(name, window)

    def randomize(self, data: Any | None = None) -> None:
        self._generator = torch.Generator("cpu").manual_seed(int(self.R.randint(_MAX_SEED)))

    def _check_batch(self, argument: str, batch: Any) -> None:
        name = type(self).__name__
        hint = "a list of dictionaries, one per image, not collated (monai.data.no_collation)"
        if not isinstance(batch, (list, tuple)):
            raise TypeError(f"{name}: {argument} must be {hint}, got {describe(batch)}")
        for item in batch:
            if not isinstance(item, Mapping):
                raise TypeError(f"{name}: {argument} must be {hint}, got {describe(item)} in it")
            missing = [key for key in self._keys() if key not in item]
            if missing:
                raise ValueError(
                    f"{name}: {argument} must hold {missing[0]!r} in each dictionary, "
                    f"got {list(item)}"
                )

    def _keys(self) -> tuple[Hashable, ...]:
        return self.image_key, self.box_key, self.label_key

    def _images(self, batch: Sequence[Mapping[Any, Any]]) -> Tensor:
        """[B, C, D, H, W] without metadata."""
        images = [_tensor(item[self.image_key]) for item in batch]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"{type(self).__name__}: {self.image_key} must have one shape in all images, "
                f"got {[tuple(image.shape) for image in images]}"
            )
        return torch.stack(images)

    def _with_images(self, batch: Sequence[Mapping[Any, Any]], images: Tensor) -> list[Item]:
        """Copies of the dictionaries with new images, of the types and metadata of the old ones."""
        items = []
        for item, image in zip(batch, images, strict=True):
            converted, *_ = convert_to_dst_type(image, item[self.image_key], dtype=image.dtype)
            items.append({**item, self.image_key: converted})
        return items


class MixUpBoxd(_BatchTransform):
    r"""Image-level MixUp of a batch with its boxes, labels and weights.

    .. math::
        \mathrm{image}_b \leftarrow \lambda_b \, \mathrm{image}_b
            + (1 - \lambda_b) \, \mathrm{image}_{\pi(b)}, \qquad
        \lambda = \max(l, 1 - l), \; l \sim \mathrm{Beta}(\eta, \eta)

    in one launch. Boxes and labels of the partner are appended to those of the image. The
    ``box_weights`` of the image are multiplied with lambda, those of the partner with 1 - lambda;
    ``anchor_targets`` are mixed as the images are. An image whose partner is itself does not
    change. All other entries, ``image_weight`` and metadata included, are those of the image.

    Apply it to the batches of a DataLoader (with ``monai.data.no_collation``), on the device; or
    inside of ``monai.transforms.Compose``, after a transform that makes several images of one, such
    as ``RandCropBoxByPosNegLabeld``.

    Args:
        image_key: key of the images [C, D, H, W]; tensors, metatensors or arrays, float16,
            bfloat16, float32, float64, int16 or uint8, all of one shape and dtype.
        box_key: key of the boxes [n, 6], in any mode, the same in the whole batch.
        label_key: key of the labels [n], integers.
        eta: both parameters of the Beta distribution, > 0.
        window: (lo, hi): every voxel v counts as clamp((v - lo) / (hi - lo), 0, 1), in the same
            launch; integer images become float32. None keeps the values.

    Called with a list of dictionaries, which it does not change, it returns a list of new ones.

    Raises:
        TypeError: the batch is not a list of dictionaries, or an argument is of a wrong type.
        ValueError: images differ in shape, labels or weights are not one per box, or a value is out
            of range.
    """

    def __call__(self, batch: Sequence[Mapping[Any, Any]]) -> list[Item]:
        self._check_batch("batch", batch)
        if not batch:
            return []
        self.randomize()
        images = self._images(batch)
        boxes = [_boxes(item[self.box_key]) for item in batch]
        labels = [
            _labels("MixUpBoxd", item, self.label_key, len(b))
            for item, b in zip(batch, boxes, strict=True)
        ]
        weights = [_weights(item, b) for item, b in zip(batch, boxes, strict=True)]
        lam, index = functional.sample_mixup(len(batch), eta=self.eta, generator=self._generator)
        mixed = functional.mixup3d(
            images, lam.to(images.device), index.to(images.device), window=self.window
        )
        items = self._with_images(batch, mixed)
        for i, (item, weight, j) in enumerate(
            zip(items, lam.tolist(), index.tolist(), strict=True)
        ):
            if i == j:
                continue
            item[self.box_key] = torch.cat([boxes[i], boxes[j]])
            item[self.label_key] = torch.cat([labels[i], labels[j]])
            item[_BOX_WEIGHTS] = torch.cat([weight * weights[i], (1 - weight) * weights[j]])
            parts = [
                factor * source[_ANCHOR_TARGETS]
                for factor, source in ((weight, batch[i]), (1 - weight, batch[j]))
                if source.get(_ANCHOR_TARGETS) is not None
            ]
            if parts:
                item[_ANCHOR_TARGETS] = sum(parts[1:], parts[0])
        return items


class ObjectMixUpBoxd(_BatchTransform):
    r"""Object-level MixUp of a batch: mix each object with another one of its label.

    .. math::
        \mathrm{object}_k \leftarrow \lambda_k \, \mathrm{object}_k
            + (1 - \lambda_k) \, \mathrm{donor}_k, \qquad
        \lambda = \max(l, 1 - l), \; l \sim \mathrm{Beta}(\eta, \eta)

    in one launch; see :func:`fmkernels.object_mixup3d`. Objects are all boxes, of any weight. The
    donor of each is drawn from all others of its label in the batch by
    :func:`fmkernels.sample_donors` and resized to its box. An object without another of its label
    does not change. Boxes, labels and weights do not change.

    Args:
        image_key: as in :class:`MixUpBoxd`.
        box_key: key of the boxes [n, 6], in voxels.
        label_key: key of the labels [n], integers.
        eta: both parameters of the Beta distribution, > 0.
        window: as in :class:`MixUpBoxd`; only applied to the donors if they are integers and the
            images are not.
        mode: the box mode.

    Called with a list of dictionaries, which it does not change, it returns a list of new ones. A
    second list, ``objects``, gives the boxes, and the images of the donors, for the same images in
    the same order: the batch before :class:`MixUpBoxd`, as in FocalMix.

    Raises:
        TypeError: a batch is not a list of dictionaries, or an argument is of a wrong type.
        ValueError: images differ in shape, ``objects`` has another number of images, labels are not
            one per box, or a value is out of range.
    """

    def __init__(
        self,
        image_key: Hashable = "image",
        box_key: Hashable = "box",
        label_key: Hashable = "label",
        *,
        eta: float = 0.2,
        window: tuple[float, float] | None = None,
        mode: Mode = StandardMode,
    ) -> None:
        super().__init__(image_key, box_key, label_key, eta=eta, window=window)
        get_boxmode(mode)  # raises if MONAI does not know it
        self.mode = mode

    def __call__(
        self, batch: Sequence[Mapping[Any, Any]], objects: Sequence[Mapping[Any, Any]] | None = None
    ) -> list[Item]:
        sources = batch if objects is None else objects
        self._check_batch("batch", batch)
        self._check_batch("objects", sources)
        if len(sources) != len(batch):
            raise ValueError(
                f"ObjectMixUpBoxd: objects must be of the {len(batch)} images, got {len(sources)}"
            )
        if not batch:
            return []
        self.randomize()
        images = self._images(batch)
        donors = None if objects is None else self._images(objects)
        rows = [_boxes(item[self.box_key]) for item in sources]
        labels = [
            _labels("ObjectMixUpBoxd", item, self.label_key, len(b))
            for item, b in zip(sources, rows, strict=True)
        ]
        boxes = from_monai_boxes(rows, self.mode).to(images.device)
        lam, _ = functional.sample_mixup(len(boxes), eta=self.eta, generator=self._generator)
        seed = int(torch.randint(_MAX_SEED, (), generator=self._generator, device="cpu"))
        donor_boxes = functional.sample_donors(
            boxes,
            labels=torch.cat(labels).to(images.device),
            generator=torch.Generator(images.device).manual_seed(seed),
        )
        mixed = functional.object_mixup3d(
            images,
            boxes,
            donor_boxes,
            lam.to(images.device),
            donors=donors,
            window=self.window,
        )
        return self._with_images(batch, mixed)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in its previous mode again."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def _tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor without metadata; on the CPU if it was none, whatever the default device is."""
    device = value.device if isinstance(value, Tensor) else torch.device("cpu")
    return convert_to_tensor(value, track_meta=False, dtype=dtype, device=device)


def _boxes(boxes: Any) -> Tensor:
    """float32 [n, 6] in any mode; [0, 6] for boxes of any shape without elements."""
    boxes = _tensor(boxes, torch.float32)
    if not boxes.numel():
        return boxes.reshape(0, 6)
    if boxes.dim() != 2 or boxes.shape[1] != 6:
        raise ValueError(f"boxes must be [n, 6], got shape {tuple(boxes.shape)}")
    return boxes


def _labels(name: str, item: Mapping[Any, Any], key: Hashable, count: int) -> Tensor:
    """int64 [n], one label per box. As uint8, they would be a mask if used as an index."""
    labels = _tensor(item[key]).flatten()
    if len(labels) != count:
        raise ValueError(f"{name}: {key} must be one for each of {count} boxes, got {len(labels)}")
    real = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if real and count:
        got = str(labels.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: {key} must be integers, got {got}")
    return labels.to(torch.int64)


def _weights(item: Mapping[Any, Any], boxes: Tensor) -> Tensor:
    """float32 [n] on the device of the boxes."""
    weights = item.get(_BOX_WEIGHTS)
    if weights is None:
        return torch.ones(len(boxes), dtype=torch.float32, device=boxes.device)
    weights = _tensor(weights, torch.float32).to(boxes.device)
    if weights.shape != (len(boxes),):
        raise ValueError(
            f"{_BOX_WEIGHTS} must be one for each of {len(boxes)} boxes, got {tuple(weights.shape)}"
        )
    return weights
