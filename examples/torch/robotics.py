"""A point cloud with a feature for every pixel of an RGB-D image, from a frozen upsampler of torch.hub."""

from pathlib import Path

import skimage.data
import torch
from torch import nn

torch.manual_seed(0)
repository = str(Path(__file__).resolve().parents[2])
upsampler = torch.hub.load(repository, "anyup_efficientnet_lite", use_natten=False, source="local").eval()
for parameter in upsampler.parameters():
    parameter.requires_grad = False
encoder = nn.Conv2d(3, 24, 14, stride=14).requires_grad_(False)  # in the place of an encoder of yours

image = torch.from_numpy(skimage.data.rocket()[100:212, 200:340]).permute(2, 0, 1)[None] / 255
mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
image = (image - mean) / deviation
height, width = image.shape[-2:]
depth = torch.linspace(2, 4, height)[:, None].expand(height, width)  # metres: a ramp
features = upsampler(image, encoder(image))[0].permute(1, 2, 0).reshape(-1, 24)

focal = 120.0
rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
points = torch.stack([(columns - width / 2) * depth / focal, (rows - height / 2) * depth / focal, depth], -1)
cloud = torch.cat([points.reshape(-1, 3), features], 1)
assert not cloud.requires_grad
flat = upsampler(image, encoder(image), (height, width))[0].flatten(1).t()
torch.testing.assert_close(cloud[:, 3:], flat, rtol=0, atol=1e-5)
print("robotics:", tuple(cloud.shape), "points of x, y, z and 24 features")
