"""torch.compile of a step: a graph of augmentation, model and loss, and the update."""

import torch
from torch import nn

from fmkernels import mixup3d, sample_mixup, soft_target_focal_loss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 1))
model.to(device)
rate = torch.tensor(0.5, device=device)  # as a tensor, a new rate needs no new graph
optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


@torch.compile(fullgraph=True)  # raises if anything breaks the graph
def loss_of(scans, targets):
    lam, index = sample_mixup(scans.shape[0], device=scans.device)
    mixed = mixup3d(scans, lam, index, window=(-1200, 600))
    return soft_target_focal_loss(
        model(mixed), targets, mix=(lam, index), normalizer=(targets > 0.5).sum()
    )


@torch.compile
def update():
    optimizer.step()


scans = torch.randint(-1000, 400, (2, 1, 8, 8, 8), dtype=torch.int16, device=device)
targets = (scans > 300).float()
losses = []
for _ in range(80):
    loss = loss_of(scans, targets)
    loss.backward()  # compiled too
    update()
    optimizer.zero_grad()
    losses.append(loss.detach())
losses = torch.stack(losses).tolist()
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
