"""Turn MONAI's detection training into FocalMix: the lines marked + are new, in place of a sampler and a plain step."""

import torch
from monai.apps.detection.networks.retinanet_network import RetinaNet, resnet_fpn_feature_extractor
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.networks.nets import resnet
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmkernels.integrations.monai import MixUpBoxd, ObjectMixUpBoxd, SoftTargetRetinaNetDetector  # +

torch.manual_seed(0)
backbone = resnet.ResNet(resnet.ResNetBlock, [1, 1, 1, 1], [8, 16, 32, 64], n_input_channels=1, conv1_t_stride=2)
features = resnet_fpn_feature_extractor(backbone, spatial_dims=3, returned_layers=[1])
anchors = AnchorGeneratorWithAnchorShape([1, 2], [[4, 4, 4], [6, 6, 6]])
network = RetinaNet(spatial_dims=3, num_classes=1, num_anchors=2, feature_extractor=features, size_divisible=8)
detector = SoftTargetRetinaNetDetector(network, anchors)  # + was RetinaNetDetector
detector.set_atss_matcher(num_candidates=4)  # + and no detector.set_hard_negative_sampler(...)
detector.set_target_keys(box_key="box", label_key="label")
optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
teacher = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # +
mix_images, mix_objects = MixUpBoxd(), ObjectMixUpBoxd()  # +

labeled, unlabeled = torch.rand(2, 2, 1, 16, 16, 16) * 0.1  # stand for what the loaders give
labeled[:, :, 4:9, 4:9, 4:9] = unlabeled[:, :, 6:11, 6:11, 6:11] = 1
box, label = torch.tensor([[4.0, 4, 4, 9, 9, 9]]), torch.zeros(1, dtype=torch.long)
losses = []
for _ in range(6):
    batch = [{"image": image, "box": box, "label": label} for image in labeled]
    found = detector.predict_targets(unlabeled, network=teacher)  # +
    batch += [{"image": image, **own} for image, own in zip(unlabeled, found, strict=True)]  # +
    batch = mix_objects(mix_images(batch), objects=batch)  # +
    outputs = detector([item["image"] for item in batch], batch)
    loss = outputs[detector.cls_key] + outputs[detector.box_reg_key]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    teacher.update_parameters(network)  # +
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
