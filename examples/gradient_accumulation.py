"""Gradient accumulation with a GradScaler: the same step as with the whole batch."""

import torch
from torch import nn

from fmkernels import soft_target_focal_loss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = torch.float16 if device == "cuda" else torch.bfloat16
model = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 1))
model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
scaler = torch.amp.GradScaler(device)
scans = torch.rand(8, 1, 8, 8, 8, device=device)
targets = (scans > 0.9).float()
PARTS = 4

losses = []
for _ in range(10):
    # The positives of the whole batch: the mean of the parts' means is another loss.
    positives = (targets > 0.5).sum()
    total = torch.zeros((), device=device)
    parts = zip(scans.chunk(PARTS), targets.chunk(PARTS), strict=True)
    for part, part_targets in parts:
        with torch.autocast(device, dtype=precision):
            logits = model(part)
            # The loss takes 16-bit logits and computes in float32: no upcast is needed.
            loss = soft_target_focal_loss(
                logits, part_targets, alpha0=0.25, alpha1=0.75, normalizer=positives
            )
        scaler.scale(loss).backward()  # small gradients do not vanish in float16
        total += loss.detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    losses.append(total)
losses = torch.stack(losses).tolist()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, scale {scaler.get_scale():g}")
