"""Open-vocabulary segmentation in bfloat16: sliding windows, cosines of upsampled features and text embeddings."""

from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
repository = str(Path(__file__).resolve().parents[2])
upsampler = torch.hub.load(repository, "anyup_efficientnet_lite", source="local").to(torch.bfloat16)
encoder = nn.Conv2d(3, 64, 16, stride=16).to(torch.bfloat16)  # in the place of CLIP's image encoder
text = F.normalize(torch.randn(5, 64), dim=1).to(torch.bfloat16)  # and of its text encoder: five classes
photograph = torch.from_numpy(skimage.data.astronaut()[:128, :192]).permute(2, 0, 1)[None] / 255
mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
image = ((photograph - mean) / deviation).to(torch.bfloat16)


def segment(upsampler, encoder, text, window=128, stride=64):
    cosines = torch.zeros(1, 5, 128, 192)
    for left in range(0, 192 - window + 1, stride):
        view = image[..., left : left + window].to(text.dtype)
        hr = F.normalize(upsampler(view, encoder(view)), dim=1)
        cosines[..., left : left + window] += torch.einsum("kc,bchw->bkhw", text, hr).float()
    return cosines.argmax(1)


with torch.inference_mode():
    classes = segment(upsampler, encoder, text)
    exact = segment(upsampler.float(), encoder.float(), text.float())
agree = (classes == exact).float().mean().item()
assert agree > 0.95, agree
print(f"open vocabulary: {tuple(classes.shape)}, {agree:.1%} of the pixels as in float32")
