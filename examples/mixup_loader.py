"""MixUp in a DataLoader loop: scans stay int16 until they are mixed."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fmkernels import mixup3d, sample_mixup, soft_target_focal_loss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
labels = torch.arange(16) % 2
scans = torch.randint(-900, -700, (16, 1, 16, 16, 16), dtype=torch.int16)  # HU: lung
scans[labels == 1, :, 4:8, 4:8, 4:8] = 40  # a nodule in every second scan
data = TensorDataset(scans, labels)
loader = DataLoader(data, batch_size=4, shuffle=True, pin_memory=device == "cuda")
model = nn.Sequential(nn.AvgPool3d(4), nn.Flatten(), nn.Linear(64, 1)).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

losses = []
for _ in range(16):
    for batch, classes in loader:
        batch = batch.to(device, non_blocking=True)
        targets = classes.float()[:, None].to(device, non_blocking=True)
        lam, index = sample_mixup(len(batch), eta=0.2, device=device)
        # int16 HU to float32 in [0, 1]
        mixed = mixup3d(batch, lam, index, window=(-1200, 600))
        # The loss mixes the targets with the same lam and index.
        loss = soft_target_focal_loss(
            model(mixed), targets, alpha0=1, alpha1=1, gamma=0, mix=(lam, index)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
losses = torch.stack(losses).tolist()  # synchronizes once, at the end
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
