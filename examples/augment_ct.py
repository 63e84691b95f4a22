"""Augment int16 CT on the device: random flips, HU window, mixup and the cast to bfloat16, each volume read once."""

import torch

from fmkernels import mixup3d, object_mixup3d, sample_mixup

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator(device).manual_seed(0)
window = (-1200, 600)  # HU, to [0, 1]

# A batch as it comes from disk: 2 bytes a voxel over the bus, instead of 4.
scans = torch.randint(
    -1000, 400, (4, 1, 32, 32, 32), generator=generator, dtype=torch.int16, device=device
)
flips = torch.randint(
    0, 8, (4,), generator=generator, dtype=torch.uint8, device=device
)  # bits: 1 = D, 2 = H, 4 = W

# Flips, window and cast alone: each volume keeps all of itself.
keep, self_index = torch.ones(4, device=device), torch.arange(4, device=device)
flipped = mixup3d(scans, keep, self_index, flips=flips, window=window, dtype=torch.bfloat16)

# The same with mixup.
lam, index = sample_mixup(4, eta=0.2, generator=generator)
mixed = mixup3d(scans, lam, index, flips=flips, window=window, dtype=torch.bfloat16)

# Mix lesions into lesions, in place; boxes are (batch index, z1, y1, x1, z2, y2, x2) in voxels, half-open.
boxes = torch.tensor([[0, 4, 4, 4, 12, 12, 12], [2, 8, 10, 10, 14, 20, 20.0]], device=device)
donor_boxes = boxes.flip(0)  # of any size: donors are resized
share = torch.tensor([0.7, 0.6], device=device)  # of the lesion that was there
object_mixup3d(mixed, boxes, donor_boxes, share, donors=scans, window=window, out=mixed)
print(
    f"{scans.dtype} HU -> {mixed.dtype} of {mixed.min().item():.2f} to {mixed.max().item():.2f} on {mixed.device}"
)
