"""torch.export of a model with an op inside: it trains, and it can be saved."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from fmkernels import crop_and_resize3d

torch.manual_seed(0)


class SecondStage(nn.Module):
    """Features of each box; gradients go through the crop to the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 1)

    def forward(self, scans, boxes):
        crops = crop_and_resize3d(self.conv(scans), boxes, (6, 6, 6))
        return self.head(crops.mean((2, 3, 4)))


model = SecondStage()
scans = torch.rand(2, 1, 16, 16, 16)
boxes = torch.tensor([[0, 1, 2, 3, 9, 10, 11], [1, 4, 4, 4, 12.5, 12, 12]])
number = torch.export.Dim("number", max=1000)
program = torch.export.export(model, (scans, boxes), dynamic_shapes=({}, {0: number}))

exported = program.module()
exported(scans, boxes).sum().backward()
model(scans, boxes).sum().backward()
gradient = exported.get_parameter("conv.weight").grad
torch.testing.assert_close(gradient, model.conv.weight.grad)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "model.pt2"
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()  # `import fmkernels` comes first
more = boxes.repeat(3, 1)
torch.testing.assert_close(loaded(scans, more), model(scans, more))
print(f"exported, trained, saved and loaded; gradient {gradient.norm():.4f}")
