"""Crop lesions for a second-stage classifier, with gradients to the detector."""

import torch
from torch import nn

from fmkernels import crop_and_resize3d, soft_target_focal_loss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
scans = torch.randint(-1000, 400, (2, 1, 48, 48, 48), dtype=torch.int16, device=device)
# Candidates of all scans: (batch index, z1, y1, x1, z2, y2, x2) in voxels.
boxes = torch.tensor(
    [
        [0, 10.5, 8, 8, 18.5, 16, 16],
        [0, 30, 30, 30, 45, 45, 45],
        [1, -4, 20, 20, 6, 30, 30],
    ],
    device=device,
)
labels = torch.tensor([[1.0], [0.0], [1.0]], device=device)

# Boxes of twice the width give the classifier some context.
center, width = (boxes[:, 1:4] + boxes[:, 4:]) / 2, boxes[:, 4:] - boxes[:, 1:4]
wider = torch.cat([boxes[:, :1], center - width, center + width], dim=1)
# [3, 1, 24, 24, 24]
window = (-1200, 600)
crops = crop_and_resize3d(scans, wider, (24, 24, 24), clamp="volume", window=window)

# stands for the detector's backbone
backbone = nn.Conv3d(1, 8, 3, stride=2, padding=1).to(device)
classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 6**3 + 24**3, 1)).to(device)

# Crops of features have a gradient. On a map of stride 2 the boxes are half as large.
features = backbone(scans.float() / 1000)
on_map = torch.cat([boxes[:, :1], boxes[:, 1:] / 2], dim=1)
rois = crop_and_resize3d(features, on_map, (6, 6, 6))
logits = classifier(torch.cat([rois.flatten(1), crops.flatten(1)], dim=1))
loss = soft_target_focal_loss(logits, labels, alpha0=0.5, alpha1=0.5)
loss.backward()
norm = backbone.weight.grad.norm()
print(f"{len(crops)} crops of {tuple(crops.shape[1:])}, gradient norm {norm:.3g}")
