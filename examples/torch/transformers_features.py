"""Features of `transformers` models: `last_hidden_state` holds tokens, `AutoBackbone` makes maps of them."""

import skimage.data
import torch
from transformers import AutoBackbone, Dinov2Config, Dinov2Model

import anyup_torch

torch.manual_seed(0)
image = torch.from_numpy(skimage.data.chelsea()[64:134, 128:226]).permute(2, 0, 1)[None] / 255
image = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
    :, None, None
]
config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=70, patch_size=14)
transformer = Dinov2Model(config).eval()  # a small random one; Dinov2Model.from_pretrained("facebook/dinov2-small")
backbone = AutoBackbone.from_config(config).eval()
backbone.load_state_dict(transformer.state_dict(), strict=False)
upsampler = anyup_torch.from_pretrained("anyup_efficientnet_lite")

with torch.inference_mode():
    tokens = transformer(image).last_hidden_state  # (1, 1 + 5 * 7, 48)
    features = anyup_torch.tokens_to_map(tokens, image.shape[2:], config.patch_size)
    hr = upsampler(image, features)
    (maps,) = backbone(image).feature_maps  # already a map, of the last layer
    torch.testing.assert_close(maps, features)
    torch.testing.assert_close(upsampler(image, maps), hr)
print("transformers:", tuple(tokens.shape), "->", tuple(features.shape), "->", tuple(hr.shape))
