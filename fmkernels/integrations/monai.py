"""MONAI's 3D detection with soft targets: its RetinaNet detector, MixUp of images and of objects, its boxes.

Needs MONAI and torchvision, which the extra ``fmkernels[monai]`` brings.

A batch is a list of dictionaries, one for each image, as MONAI's detection pipelines make them. Besides the image, its
boxes [n, 6] and their labels [n], a dictionary may hold, and what is written here reads and writes:

- ``box_weights``: float32 [n] in [0, 1], the soft target of the anchors that find each box; 1 where absent. A box of
  weight 0 is an object for :class:`ObjectMixUpBoxd`, but no target.
- ``anchor_targets``: float32 [anchors, classes] in [0, 1], added to the targets that come from the boxes.
- ``image_weight``: float or 0-d tensor, the weight of the image in the classification loss; 1 where absent.

MONAI calls the spatial axes of an image x, y, z in the order of the tensor; fmkernels calls the same axes z, y, x. So
the numbers of a box stay in the order of the axes. In both, as MONAI flips and crops boxes, voxel i covers [i, i + 1).
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.utils.detector_utils import preprocess_images
from monai.apps.detection.utils.predict_utils import ensure_dict_value_to_list_
from monai.data.box_utils import BoxMode, StandardMode, convert_box_mode
from monai.transforms import Randomizable, Transform
from monai.transforms.traits import ReduceTrait
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor, nn

from fmkernels import functional
from fmkernels.nn import SoftTargetFocalLoss

__all__ = [
    "MixUpBoxd",
    "ObjectMixUpBoxd",
    "SoftTargetRetinaNetDetector",
    "from_monai_boxes",
    "to_monai_boxes",
]

Item = dict[Any, Any]
Mode: TypeAlias = "str | BoxMode | type[BoxMode]"

_BOX_WEIGHTS = "box_weights"
_ANCHOR_TARGETS = "anchor_targets"
_IMAGE_WEIGHT = "image_weight"
_MAX_SEED = 2**31


def from_monai_boxes(boxes: Iterable[Any], mode: Mode = StandardMode) -> Tensor:
    """Boxes of a batch as :func:`fmkernels.crop_and_resize3d` and :func:`fmkernels.object_mixup3d` take them.

    Args:
        boxes: for each image, [n, 6] in MONAI's ``mode``, voxels; tensors, metatensors or arrays of any real type.
        mode: one of MONAI's box modes for 3D, as a name such as "cccwhd" or a class.

    Returns:
        float32 [K, 7]: (batch index, z1, y1, x1, z2, y2, x2), z being the first spatial axis of the image.

    Raises:
        ValueError: boxes that are not [n, 6], or a mode that MONAI does not know.

    Example:
        >>> from_monai_boxes([torch.tensor([[5, 6, 7, 2, 4, 6]])], "cccwhd")
        tensor([[ 0.,  4.,  4.,  4.,  6.,  8., 10.]])
    """
    rows = []
    for index, own in enumerate(boxes):
        corners = convert_box_mode(_boxes(own), mode, StandardMode)
        rows.append(torch.cat([corners.new_full((len(corners), 1), index), corners], 1))
    return torch.cat(rows) if rows else torch.empty(0, 7)


def to_monai_boxes(boxes: Tensor, batch_size: int, mode: Mode = StandardMode) -> list[Tensor]:
    """The inverse of :func:`from_monai_boxes`.

    Args:
        boxes: [K, 7]: (batch index, z1, y1, x1, z2, y2, x2), voxels.
        batch_size: number of images; boxes of other images are left out.
        mode: the box mode of the result.

    Returns:
        For each image, [n, 6] in MONAI's ``mode``, in the order of ``boxes``.

    Raises:
        ValueError: boxes that are not [K, 7], or a mode that MONAI does not know.

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

    Boxes of equal weight are matched with the anchors together, by the matcher that was set. The target of an anchor
    and a class is

    .. math::
        y = \min(1, \mathrm{anchor\_targets} + \sum_w w \, [\text{the anchor finds a box of weight } w])

    and an anchor that a matching leaves between its thresholds is ignored. So images mixed by :class:`MixUpBoxd` have
    the mixed targets of their parts. The classification loss is divided by the number of anchors that find a box of
    weight at least 1/2; of these, and of no others, the boxes are regressed.

    It takes the arguments of MONAI's detector, for a network of 3D images. Its classification loss is
    :class:`fmkernels.nn.SoftTargetFocalLoss`: set the hyper-parameters by
    ``detector.set_cls_loss(SoftTargetFocalLoss(alpha0, alpha1, gamma))``. A sampler must not be set. Inference, state
    and everything else are MONAI's.

    Raises:
        ValueError: a network of 2D images; in training, a sampler, or anchor targets of another shape than the logits.
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
            num_anchor_locs_per_level: places of each level.
        """
        if self.fg_bg_sampler is not None:
            raise ValueError(
                "SoftTargetRetinaNetDetector: trains on all anchors, expected no sampler to be set"
            )
        logits = convert_to_tensor(head_outputs_reshape[self.cls_key], track_meta=False)
        deltas = convert_to_tensor(head_outputs_reshape[self.box_reg_key], track_meta=False)
        soft: list[Tensor] = []
        regressed: list[tuple] = []
        positives = logits.new_zeros((), dtype=torch.int64)
        for target, own_logits, own_deltas, own_anchors in zip(
            targets, logits, deltas, anchors, strict=True
        ):
            y, ignored = (
                self._anchor_targets(target, own_logits),
                logits.new_zeros(len(own_logits), dtype=torch.bool),
            )
            for weight, group in self._groups(target, logits.device):
                (matched,) = self.compute_anchor_matched_idxs(
                    [own_anchors], [group], num_anchor_locs_per_level
                )
                found = matched >= 0
                y[found, group[self.target_label_key][matched[found]]] += weight
                ignored |= matched == self.proposal_matcher.BETWEEN_THRESHOLDS
                if weight >= 0.5 and found.any():
                    positives += found.sum()
                    regressed.append((group, own_deltas, own_anchors, matched))
            soft.append(y.clamp(max=1).masked_fill(ignored[:, None], -1))

        weights = [
            torch.as_tensor(target.get(_IMAGE_WEIGHT, 1.0), dtype=torch.float32)
            for target in targets
        ]
        of_images = torch.stack([w.to(logits.device) for w in weights])[:, None, None]
        classification = self.cls_loss_func(
            logits, torch.stack(soft), weight=of_images, normalizer=positives
        )
        if regressed:
            groups, group_deltas, group_anchors, matches = map(list, zip(*regressed, strict=True))
            box = self.compute_box_loss(group_deltas, groups, group_anchors, matches)
        else:
            box = 0 * deltas.sum()
        return {self.cls_key: classification, self.box_reg_key: box}

    def _anchor_targets(self, target: Mapping[str, Any], logits: Tensor) -> Tensor:
        """float32 [anchors, classes] of its own: what is known of the anchors before the boxes are."""
        given = target.get(_ANCHOR_TARGETS)
        if given is None:
            return torch.zeros_like(logits, dtype=torch.float32)
        if given.shape != logits.shape:
            raise ValueError(
                f"SoftTargetRetinaNetDetector: {_ANCHOR_TARGETS} must have the shape of an image's logits, "
                f"{tuple(logits.shape)}, got {tuple(given.shape)}"
            )
        return given.detach().to(logits.device, torch.float32, copy=True)

    def _groups(
        self, target: Mapping[str, Any], device: torch.device
    ) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Boxes and labels of each weight above 0."""
        boxes = convert_to_tensor(target[self.target_box_key], track_meta=False, device=device)
        labels = convert_to_tensor(target[self.target_label_key], track_meta=False, device=device)
        weights = _weights(target, boxes)
        for weight in weights.unique().tolist():
            if weight > 0:
                own = weights == weight
                yield weight, {self.target_box_key: boxes[own], self.target_label_key: labels[own]}

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
        """Targets of unlabelled images from flipped views; see :func:`fmkernels.predict_targets`.

        The network predicts in evaluation mode; afterwards each of its modules is in the mode that it was in. Exact
        where flipped anchors are anchors, as MONAI's are on levels of even stride.

        Args:
            images: as the detector takes them: [B, C, D, H, W], or a list of [C, D, H, W]; any float type.
            flips: the flip of each view as a bit mask: 1, 2, 4 for the first, second, third spatial axis. The first
                view is not flipped.
            temperature: of the sharpening, in (0, 1].
            confidence: the target, in [0, 1], from which a predicted box is an object. Those of lower targets teach
                the classifier, but are not mixed.
            network: what predicts, the moving average of the detector's network, say; the detector's network by
                default.

        Returns:
            For each image the targets to train on: ``anchor_targets``, and as boxes of weight 0, so as objects to be
            mixed, what the detector's box selector (``set_box_selector_parameters``) finds by the confident ones of
            them and by the box deltas of the first view.

        Raises:
            ValueError: flips that do not begin with 0, or a value that fits no function below.
        """
        if not flips or flips[0] != 0:
            raise ValueError(
                f"predict_targets: flips must begin with 0, the image as it is, got {tuple(flips)}"
            )
        if not 0 <= confidence <= 1:
            raise ValueError(f"predict_targets: confidence must be in [0, 1], got {confidence}")
        padded, sizes = preprocess_images(images, self.spatial_dims, self.size_divisible)
        padded, batch = convert_to_tensor(padded, track_meta=False), len(padded)
        masks = torch.tensor(flips, dtype=torch.uint8, device=padded.device)
        views = torch.cat(
            [padded.flip([2 + axis for axis in range(3) if mask >> axis & 1]) for mask in flips]
        )
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
            masks,
            temperature=temperature,
        )
        self.generate_anchors(padded, {self.cls_key: targets})
        flat = self._reshape_maps(targets)
        found = self.postprocess_detections(
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
                self.target_box_key: own[self.target_box_key],
                self.target_label_key: own[self.target_label_key],
                _BOX_WEIGHTS: y.new_zeros(len(own[self.target_box_key])),
                _ANCHOR_TARGETS: y,
            }
            for own, y in zip(found, flat, strict=True)
        ]


class _BatchTransform(Randomizable, Transform, ReduceTrait):
    """Of a whole batch, a list of dictionaries; draws from the random state of MONAI's transforms."""

    def __init__(
        self,
        image_key: Hashable = "image",
        box_key: Hashable = "box",
        label_key: Hashable = "label",
        *,
        eta: float = 0.2,
        window: tuple[float, float] | None = None,
    ) -> None:
        self.image_key, self.box_key, self.label_key, self.eta, self.window = (
            image_key,
            box_key,
            label_key,
            eta,
            window,
        )

    def randomize(self, data: Any | None = None) -> None:
        self._generator = torch.Generator().manual_seed(int(self.R.randint(_MAX_SEED)))

    def _images(self, batch: Sequence[Mapping[Any, Any]]) -> Tensor:
        """[B, C, D, H, W] without meta data."""
        images = [convert_to_tensor(item[self.image_key], track_meta=False) for item in batch]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"{type(self).__name__}: images must be of one shape, got {[tuple(image.shape) for image in images]}"
            )
        return torch.stack(images)

    def _with_images(self, batch: Sequence[Mapping[Any, Any]], images: Tensor) -> list[Item]:
        """Copies of the dictionaries with these images, each of the kind and with the meta data of the former one."""
        return [
            {
                **item,
                self.image_key: convert_to_dst_type(image, item[self.image_key], dtype=image.dtype)[
                    0
                ],
            }
            for item, image in zip(batch, images, strict=True)
        ]


class MixUpBoxd(_BatchTransform):
    r"""Image-level MixUp of a batch that carries boxes, labels and weights along.

    .. math::
        \mathrm{image}_b \leftarrow \lambda_b \, \mathrm{image}_b + (1 - \lambda_b) \, \mathrm{image}_{\pi(b)}, \qquad
        \lambda = \max(l, 1 - l), \; l \sim \mathrm{Beta}(\eta, \eta)

    in one launch. Boxes and labels of the partner follow the own ones; the own ``box_weights`` become lambda times as
    large, those of the partner 1 - lambda times; ``anchor_targets`` are mixed as the images are. An image whose partner
    is itself stays as it is. All other entries, ``image_weight`` and meta data too, are those of the own image.

    Use it on what the DataLoader gives, on the device, or inside of ``monai.transforms.Compose`` behind a transform
    that makes several images of one, such as ``RandCropBoxByPosNegLabeld``.

    Args:
        image_key: of the images [C, D, H, W]; tensors, metatensors or arrays, float16, bfloat16, float32, float64,
            int16 or uint8, all of one shape and type.
        box_key: of the boxes [n, 6], in any mode, the same in the whole batch.
        label_key: of the labels [n].
        eta: both parameters of the Beta distribution, > 0.
        window: (lo, hi): every voxel v counts as clamp((v - lo) / (hi - lo), 0, 1), in the same launch; integer images
            become float32. None keeps the values.

    Called with a sequence of dictionaries, which it leaves as they are, it returns a list of new ones.

    Raises:
        ValueError: images of several shapes, or a value that :func:`fmkernels.mixup3d` does not take.
    """

    def __call__(self, batch: Sequence[Mapping[Any, Any]]) -> list[Item]:
        if not batch:
            return []
        self.randomize()
        images = self._images(batch)
        lam, index = functional.sample_mixup(len(batch), eta=self.eta, generator=self._generator)
        mixed = functional.mixup3d(
            images, lam.to(images.device), index.to(images.device), window=self.window
        )
        items = self._with_images(batch, mixed)
        for item, own, share, partner in zip(
            items, batch, lam.tolist(), index.tolist(), strict=True
        ):
            other = batch[partner]
            if other is own:
                continue
            boxes, other_boxes = _boxes(own[self.box_key]), _boxes(other[self.box_key])
            labels = [
                convert_to_tensor(source[self.label_key], track_meta=False).flatten()
                for source in (own, other)
            ]
            item[self.box_key] = torch.cat([boxes, other_boxes])
            item[self.label_key] = torch.cat(labels)
            item[_BOX_WEIGHTS] = torch.cat(
                [share * _weights(own, boxes), (1 - share) * _weights(other, other_boxes)]
            )
            parts = [
                part * source[_ANCHOR_TARGETS]
                for part, source in ((share, own), (1 - share, other))
                if source.get(_ANCHOR_TARGETS) is not None
            ]
            if parts:
                item[_ANCHOR_TARGETS] = sum(parts[1:], parts[0])
        return items


class ObjectMixUpBoxd(_BatchTransform):
    r"""Object-level MixUp of a batch: each object is mixed with another one of its label, resized to its box.

    .. math::
        \mathrm{object}_k \leftarrow \lambda_k \, \mathrm{object}_k + (1 - \lambda_k) \, \mathrm{donor}_k, \qquad
        \lambda = \max(l, 1 - l), \; l \sim \mathrm{Beta}(\eta, \eta)

    in one launch; see :func:`fmkernels.object_mixup3d`. Objects are all boxes, of whatever weight; the donor of each is
    drawn from all others of its label in the batch. An object without another stays. Boxes, labels and weights stay.

    Args:
        image_key: as in :class:`MixUpBoxd`.
        box_key: of the boxes [n, 6], in voxels.
        label_key: of the labels [n].
        eta: both parameters of the Beta distribution, > 0.
        window: as in :class:`MixUpBoxd`; of the donors alone where they are integers and the images are not.
        mode: the box mode.

    Called with a sequence of dictionaries, which it leaves as they are, it returns a list of new ones. A second
    sequence, ``objects``, gives the boxes, and the images that the donors are read from, of the same images in the same
    order: the batch before :class:`MixUpBoxd`, as FocalMix has it.

    Raises:
        ValueError: images of several shapes, ``objects`` of another number of images, or a value that
            :func:`fmkernels.object_mixup3d` does not take.
    """

    def __init__(self, *args: Any, mode: Mode = StandardMode, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode = mode

    def __call__(
        self, batch: Sequence[Mapping[Any, Any]], objects: Sequence[Mapping[Any, Any]] | None = None
    ) -> list[Item]:
        if not batch:
            return []
        if objects is not None and len(objects) != len(batch):
            raise ValueError(
                f"ObjectMixUpBoxd: objects must be of the {len(batch)} images, got {len(objects)}"
            )
        self.randomize()
        sources = batch if objects is None else objects
        images = self._images(batch)
        donors = None if objects is None else self._images(objects)
        boxes = from_monai_boxes([item[self.box_key] for item in sources], self.mode).to(
            images.device
        )
        labels = torch.cat(
            [
                convert_to_tensor(item[self.label_key], track_meta=False).flatten()
                for item in sources
            ]
        )
        lam, _ = functional.sample_mixup(len(boxes), eta=self.eta, generator=self._generator)
        mixed = functional.object_mixup3d(
            images,
            boxes,
            self._donors(boxes, labels.to(images.device)),
            lam.to(images.device),
            donors=donors,
            window=self.window,
        )
        return self._with_images(batch, mixed)

    def _donors(self, boxes: Tensor, labels: Tensor) -> Tensor:
        """For each box another one of its label at random; NaN where there is none."""
        if not len(boxes):
            return boxes
        wish = torch.rand(len(boxes), len(boxes), generator=self._generator).to(boxes.device)
        other = (labels[:, None] == labels) & ~torch.eye(
            len(boxes), dtype=torch.bool, device=boxes.device
        )
        best, donor = wish.masked_fill(~other, -1.0).max(1)
        return boxes[donor].masked_fill((best < 0)[:, None], torch.nan)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in its own again."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def _boxes(boxes: Any) -> Tensor:
    """float32 [n, 6], of any mode; none where there are no numbers, whatever the shape."""
    boxes = convert_to_tensor(boxes, track_meta=False, dtype=torch.float32)
    if not boxes.numel():
        return boxes.reshape(0, 6)
    if boxes.dim() != 2 or boxes.shape[1] != 6:
        raise ValueError(f"boxes must be [n, 6], got shape {tuple(boxes.shape)}")
    return boxes


def _weights(item: Mapping[Any, Any], boxes: Tensor) -> Tensor:
    """float32 [n] on the device of the boxes."""
    weights = item.get(_BOX_WEIGHTS)
    if weights is None:
        return torch.ones(len(boxes), device=boxes.device)
    weights = convert_to_tensor(weights, track_meta=False, dtype=torch.float32, device=boxes.device)
    if weights.shape != (len(boxes),):
        raise ValueError(
            f"{_BOX_WEIGHTS} must be one for each of {len(boxes)} boxes, got {tuple(weights.shape)}"
        )
    return weights
