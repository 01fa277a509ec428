"""The frames of a video as one batch; each frame gets what it would get alone."""

from pathlib import Path

import skimage.data
import torch
from torch import nn

torch.manual_seed(0)
repository = str(Path(__file__).resolve().parents[2])
upsampler = torch.hub.load(repository, "anyup_efficientnet_lite", source="local")
encoder = nn.Conv2d(3, 16, 16, stride=16)  # in the place of an encoder of yours
mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
photograph = (torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1) / 255 - mean) / deviation
video = torch.stack([photograph[:, 40 : 40 + 96, left : left + 128] for left in range(0, 64, 16)])  # the camera pans

with torch.inference_mode():
    features = encoder(video)
    hr = upsampler(video, features, output_size=(48, 64), q_chunk_size=1024)
    for frame, maps, expected in zip(video, features, hr):
        torch.testing.assert_close(upsampler(frame[None], maps[None], (48, 64))[0], expected, rtol=0, atol=1e-5)
print("video:", tuple(video.shape), "->", tuple(hr.shape))
