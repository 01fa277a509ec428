"""Open-vocabulary segmentation in bfloat16: sliding windows, and class scores upsampled instead of features."""

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
image = torch.from_numpy(skimage.data.astronaut()[:128, :192]).permute(2, 0, 1)[None] / 127.5 - 1
image = image.to(torch.bfloat16)

window, stride = 128, 64
logits, count = torch.zeros(1, 5, 128, 192), torch.zeros(1, 1, 128, 192)
with torch.inference_mode():
    for left in range(0, 192 - window + 1, stride):
        view = image[..., left : left + window]
        features = F.normalize(encoder(view), dim=1)
        scores = torch.einsum("kc,bchw->bkhw", text, features)  # linear, so it may come before upsampling
        logits[..., left : left + window] += upsampler(view, features, values=scores).float()
        count[..., left : left + window] += 1
    classes = (logits / count).argmax(1)
    late = torch.einsum("kc,bchw->bkhw", text.float(), upsampler(view, features).float())
    torch.testing.assert_close(upsampler(view, features, values=scores).float(), late, rtol=0, atol=2e-2)
print("open vocabulary:", tuple(classes.shape), "with", len(classes.unique()), "of 5 classes")
