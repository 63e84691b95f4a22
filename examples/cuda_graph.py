"""Capture a training step in a CUDA graph: no op waits for the GPU."""

import torch
from torch import nn

from fmkernels import mixup3d, sample_mixup, soft_target_focal_loss

if not torch.cuda.is_available():
    raise SystemExit(print("a CUDA graph needs a GPU, found none"))

# The graph reads and writes these tensors: refill them before each replay.
scans = torch.randint(-1000, 400, (4, 1, 32, 32, 32), dtype=torch.int16, device="cuda")
targets = (torch.rand(4, 1, 32, 32, 32, device="cuda") < 0.01).float()
lam, index = sample_mixup(4, device="cuda")
model = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 1))
model.cuda()
optimizer = torch.optim.Adam(model.parameters(), capturable=True)


def step():
    mixed = mixup3d(scans, lam, index, window=(-1200, 600))
    loss = soft_target_focal_loss(
        model(mixed), targets, mix=(lam, index), normalizer=(targets > 0.5).sum()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


# Warm up before the capture: compile the kernels and allocate the optimizer's state.
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3):
        first = step().item()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = step()
for _ in range(20):
    lam.uniform_(0.5, 1)
    graph.replay()
print(f"loss {first:.4f} -> {loss.item():.4f}")
