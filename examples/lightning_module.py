"""A LightningModule: MixUp on the device, soft-target focal loss, 16-bit precision."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fmkernels import mixup3d, sample_mixup, soft_target_focal_loss
from fmkernels.nn import GroupNorm3d


class Detector(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        norm = GroupNorm3d(2, 8, activation="relu")
        first, last = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 1, 1)
        self.network = nn.Sequential(first, norm, last)
        self.losses = []

    def training_step(self, batch, _):
        scans, targets = batch
        lam, index = sample_mixup(len(scans), device=self.device)
        mixed = mixup3d(scans, lam, index, window=(-1200, 600))
        positives = (targets > 0.5).sum()
        loss = soft_target_focal_loss(
            self.network(mixed), targets, mix=(lam, index), normalizer=positives
        )
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


torch.manual_seed(0)
scans = torch.randint(-1000, 400, (8, 1, 8, 8, 8), dtype=torch.int16)
loader = DataLoader(TensorDataset(scans, (scans > 300).float()), batch_size=4)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(max_epochs=20, precision="bf16-mixed", devices=1, **quiet)
detector = Detector()
trainer.fit(detector, loader)
losses = torch.stack(detector.losses).tolist()
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
