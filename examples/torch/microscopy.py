"""Tiles of a large micrograph: features of each tile at full resolution, in chunks that bound memory, put together."""

from pathlib import Path

import skimage.data
import torch
from torch import nn

torch.manual_seed(0)
repository = str(Path(__file__).resolve().parents[2])
upsampler = torch.hub.load(repository, "anyup_efficientnet_lite", source="local")
encoder = nn.Conv2d(3, 32, 16, stride=16)  # in the place of an encoder of yours, with patches of 16 pixels
tissue = torch.from_numpy(skimage.data.immunohistochemistry()[:192, :256]).permute(2, 0, 1)[None] / 255
mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
image = (tissue - mean) / deviation

tile, out = 64, 32  # pixels of a tile, and positions of its output
maps, tiles = torch.empty(1, 32, 192 * out // tile, 256 * out // tile), []
with torch.inference_mode():
    for top in range(0, 192, tile):
        for left in range(0, 256, tile):
            tiles.append(image[..., top : top + tile, left : left + tile])
            hr = upsampler(tiles[-1], encoder(tiles[-1]), output_size=(out, out), q_chunk_size=256)
            row, column = top * out // tile, left * out // tile
            maps[..., row : row + out, column : column + out] = hr
    batch = torch.cat(tiles)  # all of them in one call, without chunks
    expected = upsampler(batch, encoder(batch), out).unflatten(0, (3, 4)).permute(2, 0, 3, 1, 4).reshape(maps.shape)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)
print("microscopy:", tuple(image.shape), "->", tuple(maps.shape))
