"""Upsample a timm encoder's features in PyTorch: `python examples/timm_features.py`."""

from __future__ import annotations

import skimage.data
import torch
import torch.nn.functional as F

import anyup_torch
from anyup_torch import encoders

MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # ImageNet: how the guidance image is normalised


def main() -> None:
    photograph = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None] / 255
    photograph = F.interpolate(photograph, (192, 288), mode="bilinear", antialias=True)
    encoder = encoders.create("efficientnet_lite0", layer=-1)
    features = encoder(encoder.normalize(photograph))

    model = anyup_torch.AnyUp().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.inference_mode():
        upsampled = model((photograph - mean) / std, features)
    print(f"{tuple(features.shape)} -> {tuple(upsampled.shape)}")


if __name__ == "__main__":
    main()
