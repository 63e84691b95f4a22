"""Hugging Face accelerate: accumulation in 16 bits, the loss of the whole batch."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fmkernels import soft_target_focal_loss
from fmkernels.nn import GroupNorm3d

torch.manual_seed(0)
PARTS = 2
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=PARTS)
norm = GroupNorm3d(2, 8, activation="relu")
model = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), norm, nn.Conv3d(8, 1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
scans = torch.rand(8, 1, 8, 8, 8)
data = TensorDataset(scans, (scans > 0.9).float())
loader = DataLoader(data, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for _ in range(20):
    for own, targets in loader:
        with accelerator.accumulate(model):
            # accelerate divides by the number of parts and averages over processes
            positives = accelerator.reduce((targets > 0.5).sum(), "mean")
            loss = soft_target_focal_loss(model(own), targets, normalizer=positives)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
losses = torch.stack(losses).tolist()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
