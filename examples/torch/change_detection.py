"""A change detector that trains through a frozen upsampler: gradients reach the encoder before it."""

from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
repository = str(Path(__file__).resolve().parents[2])
upsampler = torch.hub.load(repository, "anyup_efficientnet_lite", source="local").requires_grad_(False)
mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
before = (torch.from_numpy(skimage.data.coffee()[100:164, 200:296]).permute(2, 0, 1)[None] / 255 - mean) / deviation
after, changed = before.clone(), torch.zeros(1, 1, 64, 96)
after[..., 16:40, 32:64] = 0.5  # what was built meanwhile
changed[..., 16:40, 32:64] = 1

encoder, head = nn.Conv2d(3, 32, 8, stride=8), nn.Conv2d(32, 1, 1)
optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-2)
losses = []
for _ in range(12):
    difference = upsampler(before, encoder(before)) - upsampler(after, encoder(after))
    loss = F.binary_cross_entropy_with_logits(head(difference.abs()), changed)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert encoder.weight.grad.abs().max() > 0
assert all(parameter.grad is None for parameter in upsampler.parameters())
assert losses[-1] < 0.8 * losses[0]
print(f"change detection: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
