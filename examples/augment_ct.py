"""Augment int16 CT on the device: flips, window, MixUp and cast in one pass."""

import torch

from fmkernels import mixup3d, object_mixup3d, sample_mixup

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator(device).manual_seed(0)
window = (-1200, 600)  # HU, to [0, 1]

# A batch as it comes from disk: 2 bytes per voxel over the bus instead of 4.
scans = torch.randint(
    -1000, 400, (4, 1, 32, 32, 32), generator=generator, device=device
).to(torch.int16)
# Bits: 1 = D, 2 = H, 4 = W.
flips = torch.randint(0, 8, (4,), generator=generator, dtype=torch.uint8, device=device)

# Flips, window and cast only: with a weight of 1, each volume keeps all of itself.
keep, own = torch.ones(4, device=device), torch.arange(4, device=device)
flipped = mixup3d(scans, keep, own, flips=flips, window=window, dtype=torch.bfloat16)

# The same with MixUp.
lam, index = sample_mixup(4, eta=0.2, generator=generator)
mixed = mixup3d(scans, lam, index, flips=flips, window=window, dtype=torch.bfloat16)

# Mix lesions into lesions, in place. Boxes are (batch index, z1, y1, x1, z2, y2, x2).
boxes = torch.tensor([[0, 4, 4, 4, 12, 12, 12], [2, 8, 9, 9, 14, 19, 19.0]]).to(device)
donor_boxes = boxes.flip(0)  # donors of any size are resized
lam = torch.tensor([0.7, 0.6], device=device)  # weight of the original lesion
object_mixup3d(mixed, boxes, donor_boxes, lam, donors=scans, window=window, out=mixed)
low, high = mixed.min().item(), mixed.max().item()
print(f"{scans.dtype} HU -> {mixed.dtype} of {low:.2f} to {high:.2f} on {mixed.device}")
