"""Replace torchvision's focal loss: equal for hard targets, right for soft ones."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fmkernels import soft_target_focal_loss


def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """torchvision.ops.sigmoid_focal_loss(..., reduction="sum"): eight passes."""
    p = torch.sigmoid(logits)
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return (alpha_t * (1 - p_t) ** gamma * cross_entropy).sum()


device = "cuda" if torch.cuda.is_available() else "cpu"
# anchors of a 3D detector
logits = torch.randn(2, 3, 8, 8, 8, device=device, requires_grad=True)
targets = (torch.rand(2, 3, 8, 8, 8, device=device) < 0.1).float()

before = sigmoid_focal_loss(logits, targets, alpha=0.25)
# alpha1 = alpha, alpha0 = 1 - alpha
after = soft_target_focal_loss(
    logits, targets, alpha0=0.75, alpha1=0.25, reduction="sum"
)
torch.testing.assert_close(after, before)
(gradient_before,) = torch.autograd.grad(before, logits)
(gradient_after,) = torch.autograd.grad(after, logits)
torch.testing.assert_close(gradient_after, gradient_before)

# Beyond torchvision: soft targets, ignored anchors, a normalizer on the device.
soft = torch.where(targets > 0, 0.7, targets)
soft[:, :, 0] = -1  # negative: ignored
positives = (soft > 0.5).sum()
loss = soft_target_focal_loss(
    logits, soft, alpha0=0.75, alpha1=0.25, normalizer=positives
)
loss.backward()
print(f"hard targets: {before.item():.4f} and {after.item():.4f}")
print(f"soft targets: {loss.item():.4f}")
