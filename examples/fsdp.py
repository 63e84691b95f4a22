"""FSDP2 with the loss of a joint batch: torchrun --nproc-per-node 2 examples/fsdp.py"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fmkernels import soft_target_focal_loss
from fmkernels.nn import GroupNorm3d

processes = int(os.environ["LOCAL_WORLD_SIZE"])
cuda = torch.cuda.is_available() and torch.cuda.device_count() >= processes
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh(device.type, (world,))

torch.manual_seed(0)  # the same data in every process; each takes a part of it
scans = torch.rand(4, 1, 8, 8, 8, device=device)
targets = (scans > 0.9).float()
own, own_targets = scans[rank::world], targets[rank::world]


def new_model():
    torch.manual_seed(1)
    norm = GroupNorm3d(2, 8, activation="relu")
    return nn.Sequential(nn.Conv3d(1, 8, 1), norm, nn.Conv3d(8, 1, 1)).to(device)


model, sharded = new_model(), fully_shard(new_model(), mesh=mesh)
positives = (own_targets > 0.5).sum()
dist.all_reduce(positives)
# FSDP averages gradients over processes: divide the positives by their number.
loss = soft_target_focal_loss(sharded(own), own_targets, normalizer=positives / world)
loss.backward()

joint = soft_target_focal_loss(model(scans), targets, normalizer=(targets > 0.5).sum())
joint.backward()
for shard, p in zip(sharded.parameters(), model.parameters(), strict=True):
    torch.testing.assert_close(shard.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6)
print(f"rank {rank} of {world}: the gradient of the joint batch, in shards")
dist.barrier()
dist.destroy_process_group()
