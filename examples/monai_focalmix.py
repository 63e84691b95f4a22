"""MONAI's detection training as FocalMix. Lines marked + are new or replace others."""

import torch
from monai import transforms
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.apps.detection.transforms import dictionary
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.data import DataLoader, Dataset
from monai.data.utils import no_collation
from monai.networks.blocks.backbone_fpn_utils import BackboneWithFPN
from monai.networks.nets import resnet
from monai.utils import set_determinism
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmkernels.integrations import monai as fm  # +

# A demonstration: hundreds of epochs and a decay of 0.999 are usual.
epochs, burn_in, ramp, decay = 16, 6, 6, 0.9
set_determinism(0)


def scan(size=24, side=5):
    """A cube in noise, in HU, instead of a scan read by LoadImaged."""
    image = -850 + 50 * torch.randn(1, size, size, size)
    corner = torch.randint(size - side, (3,))
    x, y, z = (slice(start, start + side) for start in corner.tolist())
    image[:, x, y, z] += 850
    box = torch.cat([corner, corner + side])[None].float()
    return {"image": image, "box": box, "label": torch.zeros(1, dtype=torch.long)}


def loader_of(scans, *augmentation):
    window = transforms.ScaleIntensityRanged("image", -1024, 300, 0, 1, clip=True)
    first = transforms.EnsureTyped(keys=list(scans[0]))
    data = Dataset(scans, transforms.Compose([first, window, *augmentation]))
    return DataLoader(data, batch_size=2, shuffle=True, collate_fn=no_collation)


crop = dictionary.RandCropBoxByPosNegLabeld(
    ["image"], "box", "label", [16] * 3, num_samples=2, pos=1, neg=0
)
keys = ["image"], ["box"], ["image"]
flips = [dictionary.RandFlipBoxd(*keys, prob=0.5, spatial_axis=a) for a in range(3)]
loader = loader_of([scan() for _ in range(8)], crop, *flips)
crop = transforms.RandSpatialCropd(keys="image", roi_size=16, random_size=False)
unlabeled_loader = loader_of([{"image": scan()["image"]} for _ in range(16)], crop)  # +

backbone = resnet.ResNet(
    resnet.ResNetBlock, [1] * 4, [8, 16, 32, 64], n_input_channels=1, conv1_t_stride=2
)
features = BackboneWithFPN(backbone, {"layer1": "0"}, [8], 32, spatial_dims=3)
anchors = AnchorGeneratorWithAnchorShape([1, 2], [[4, 4, 4], [6, 6, 6]])
network = RetinaNet(3, 1, num_anchors=2, feature_extractor=features, size_divisible=8)
detector = fm.SoftTargetRetinaNetDetector(network, anchors)  # + was RetinaNetDetector
detector.set_atss_matcher(num_candidates=4)  # no set_hard_negative_sampler(...)
detector.set_target_keys(box_key="box", label_key="label")
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
average = get_ema_multi_avg_fn(decay)  # +
teacher = AveragedModel(network, multi_avg_fn=average, use_buffers=True)  # +
mix_images, mix_objects = fm.MixUpBoxd(), fm.ObjectMixUpBoxd()  # +

losses = []
for epoch in range(epochs):
    weight = min(max(epoch - burn_in, 0) / ramp, 1.0)  # + of an unlabeled image
    for crops, unlabeled in zip(loader, unlabeled_loader, strict=False):  # +
        batch = [item for items in crops for item in items]
        if weight > 0:  # +
            seen = [item["image"] for item in unlabeled]  # +
            found = detector.predict_targets(seen, network=teacher, confidence=0.8)  # +
            for item, pseudo in zip(unlabeled, found, strict=True):  # +
                batch.append({**item, **pseudo, "image_weight": weight})  # +
            batch = mix_objects(mix_images(batch), objects=batch)  # +
        outputs = detector([item["image"] for item in batch], batch)
        loss = outputs[detector.cls_key] + outputs[detector.box_reg_key]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(network)  # +
        losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
