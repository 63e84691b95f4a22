"""DDP with the loss of the joint batch: torchrun --nproc-per-node 2 examples/ddp.py"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmkernels import soft_target_focal_loss

processes = int(os.environ["LOCAL_WORLD_SIZE"])
cuda = torch.cuda.is_available() and torch.cuda.device_count() >= processes
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same data in every process; each takes a part of it
scans = torch.rand(4, 1, 8, 8, 8, device=device)
targets = (scans > 0.9).float()
own, own_targets = scans[rank::world], targets[rank::world]
model = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 1))
model.to(device)
ddp = DistributedDataParallel(model, device_ids=[device] if cuda else None)

positives = (own_targets > 0.5).sum()
dist.all_reduce(positives)
# DDP averages gradients over processes: divide the number of positives by their number.
loss = soft_target_focal_loss(ddp(own), own_targets, normalizer=positives / world)
loss.backward()
mine = [p.grad.clone() for p in model.parameters()]

model.zero_grad()  # the same without DDP, on the joint batch
joint = soft_target_focal_loss(model(scans), targets, normalizer=(targets > 0.5).sum())
joint.backward()
for gradient, p in zip(mine, model.parameters(), strict=True):
    torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
print(f"rank {rank} of {world}: the gradient of the joint batch")
dist.barrier()
dist.destroy_process_group()
