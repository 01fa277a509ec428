"""A vision transformer as an ONNX graph that gives the map of its last block, for images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.encoders.vit import ViT
from anyup_core.export.builder import Graph
from anyup_core.export.cropping import crop, pad

GELU_TANH = np.sqrt(2 / np.pi), 0.044715


class ViTWriter:
    """Writes the graph; the methods return names of tensors.

    Position embeddings are resized as timm does, by `Resize`.
    """

    def __init__(self, config: ViT, tensors: Mapping[str, np.ndarray], half: bool, prefix: str = ""):
        self.config, self.tensors = config, {name: np.asarray(x, np.float32) for name, x in tensors.items()}
        self.g = Graph(half, loops=False, prefix=prefix)

    def model(self, metadata: Mapping[str, str]) -> Any:
        """Return the model, with the input `image` (B, 3, H, W) and the output `strideP` (B, C, H // P, W // P)."""
        g, config = self.g, self.config
        image = g.input(f"{g.prefix}image", np.float32, ("B", 3, "H", "W"))
        patch = config.patch_size
        size = g.op("Slice", g.op("Shape", image), g.ints(2), g.ints(4))
        bias = None if config.pre_norm else self.tensors["patch_embed.proj.bias"]
        image = pad(g, image, size, patch)
        cells = g.conv(image, self.tensors["patch_embed.proj.weight"], bias, stride=patch)
        shape = g.op("Shape", cells)
        tokens = self.embed(cells, shape)
        for index in range(config.depth):
            tokens = self.block(tokens, f"blocks.{index}")
        tokens = self.norm(tokens, "norm")
        tokens = g.op("Slice", tokens, g.ints(config.prefix_tokens), g.ints(2**62), g.ints(1))
        output = g.op("Reshape", g.op("Transpose", tokens, perm=[0, 2, 1]), shape)
        name = f"stride{patch}"
        output = crop(g, output, size, patch)
        outputs = {f"{g.prefix}{name}": (output, ("B", config.width, f"H // {patch}", f"W // {patch}"))}
        return g.finish("encoder", outputs, metadata)

    def embed(self, cells: str, shape: str) -> str:
        """Return the tokens of the first block (B, T, C)."""
        g, config, count, side = self.g, self.config, self.config.embedded_prefix, self.config.grid_size
        table = self.tensors["pos_embed"][0]
        embedding = g.weight(table[count:].T.reshape(1, config.width, side, side))
        size = g.op("Concat", g.ints(1), g.op("Slice", shape, g.ints(1), g.ints(4)), axis=0)
        cubic: dict[str, Any] = dict(mode="cubic", antialias=1, cubic_coeff_a=-0.5, exclude_outside=1)
        cells = g.op("Add", cells, g.op("Resize", embedding, "", "", size, **cubic))
        tokens = g.op("Transpose", g.op("Reshape", cells, g.ints(0, 0, -1)), perm=[0, 2, 1])
        parts = [self.tensors[name][0] for name in ("cls_token", "reg_token") if name in self.tensors]
        if parts:
            prefix = np.concatenate(parts) + (table[:count] if count else 0)
            batch = g.op("Concat", g.op("Slice", shape, g.ints(0), g.ints(1)), g.ints(1, 1), axis=0)
            tokens = g.op("Concat", g.op("Expand", g.constant(prefix[None]), batch), tokens, axis=1)
        return self.norm(tokens, "norm_pre") if config.pre_norm else tokens

    def block(self, x: str, name: str) -> str:
        g = self.g
        for part, layer, number in ((self.attention, "attn", 1), (self.mlp, "mlp", 2)):
            y = part(self.norm(x, f"{name}.norm{number}"), f"{name}.{layer}")
            if self.config.layer_scale:
                y = g.op("Mul", y, g.constant(self.tensors[f"{name}.{self.config.layer_scale_keys[number - 1]}"]))
            x = g.op("Add", x, y)
        return x

    def attention(self, x: str, name: str) -> str:
        g, heads = self.g, self.config.num_heads
        head = self.config.width // heads
        qkv = g.op("Reshape", self.linear(x, f"{name}.qkv"), g.ints(0, 0, 3, heads, head))
        qkv = g.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        q, k, v = (g.op("Gather", qkv, g.constant(np.array(i)), axis=0) for i in range(3))  # (B, N, T, K)
        scores = g.op("MatMul", g.op("Mul", q, g.number(head**-0.5)), g.op("Transpose", k, perm=[0, 1, 3, 2]))
        y = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self.linear(g.op("Reshape", y, g.ints(0, 0, -1)), f"{name}.proj")

    def mlp(self, x: str, name: str) -> str:
        return self.linear(self.activation(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def activation(self, x: str) -> str:
        g, kind = self.g, self.config.activation
        if kind == "swiglu":
            gate, value = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
            return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), value)
        if kind == "quick_gelu":
            return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.number(1.702))))
        if kind == "gelu_tanh":
            cube = g.op("Mul", g.op("Mul", x, g.op("Mul", x, x)), g.number(GELU_TANH[1]))
            share = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.number(GELU_TANH[0])))
        else:
            share = g.op("Erf", g.op("Mul", x, g.number(0.5**0.5)))
        return g.op("Mul", g.op("Mul", x, g.number(0.5)), g.op("Add", share, g.number(1)))

    def linear(self, x: str, name: str) -> str:
        g = self.g
        y = g.op("MatMul", x, g.weight(self.tensors[f"{name}.weight"].T))
        return g.op("Add", y, g.constant(self.tensors[f"{name}.bias"]))

    def norm(self, x: str, name: str) -> str:
        affine = (self.g.constant(self.tensors[f"{name}.{key}"]) for key in ("weight", "bias"))
        return self.g.op("LayerNormalization", x, *affine, axis=-1, epsilon=self.config.epsilon)
