"""Tiles of a large micrograph: features of each tile at full resolution, in chunks that bound memory, put together."""

from pathlib import Path

import skimage.data
import torch
from torch import nn

torch.manual_seed(0)
repository = str(Path(__file__).resolve().parents[2])
upsampler = torch.hub.load(repository, "anyup_efficientnet_lite", source="local")
encoder = nn.Conv2d(3, 32, 16, stride=16)  # in the place of an encoder of yours, with patches of 16 pixels
coins = torch.from_numpy(skimage.data.coins()[:192, :256]) / 255
image = coins.expand(1, 3, -1, -1).sub(0.45).div(0.22)

tile, out = 64, 32  # pixels of a tile, and positions of its output
maps = torch.empty(1, 32, 192 * out // tile, 256 * out // tile)
with torch.inference_mode():
    for top in range(0, 192, tile):
        for left in range(0, 256, tile):
            part = image[..., top : top + tile, left : left + tile]
            hr = upsampler(part, encoder(part), output_size=(out, out), q_chunk_size=256)
            row, column = top * out // tile, left * out // tile
            maps[..., row : row + out, column : column + out] = hr
    torch.testing.assert_close(maps[..., -out:, -out:], upsampler(part, encoder(part), out), rtol=0, atol=1e-5)
print("microscopy:", tuple(image.shape), "->", tuple(maps.shape))
