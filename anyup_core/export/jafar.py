"""JAFAR as an ONNX graph: AnyUp's encoders and attention, with other keys, normed queries, and all cells seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.config import AnyUpConfig
from anyup_core.export.builder import Graph
from anyup_core.export.graph import Writer
from anyup_core.export.program import Shapes
from anyup_core.upsamplers.jafar import JAFARConfig

LAYERS = {".norm1.": ".block.0.", ".conv1.": ".block.2.", ".norm2.": ".block.3.", ".conv2.": ".block.5."}
"""Names of a residual block's layers here -> in AnyUp."""


def build_jafar(
    config: JAFARConfig, tensors: Mapping[str, np.ndarray], *, half: bool = False, sizes: Shapes | None = None
) -> Any:
    """Return the model as an `onnx.ModelProto`; arguments as of `graph.build`."""
    return JAFARWriter(config, tensors, half, sizes).model()


class JAFARWriter(Writer):
    """Writes the graph of JAFAR."""

    def __init__(self, config: JAFARConfig, tensors: Mapping[str, np.ndarray], half: bool, sizes: Shapes | None = None):
        attention = "cross_decode.cross_attn.attention"
        renamed = {}
        for name, tensor in tensors.items():
            for theirs, ours in LAYERS.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
        if not config.fused:
            parts = [renamed[f"{attention}.{part}_proj_weight"] for part in "qk"]
            renamed[f"{attention}.in_proj_weight"] = np.concatenate(parts)
        settings: dict[str, Any] = dict(
            qk_dim=config.qk_dim, num_heads=config.num_heads, kernel_size=config.kernel_size
        )
        super().__init__(AnyUpConfig(window_ratio=0.0, kernel_size_lfu=1, **settings), renamed, half, sizes)
        self.width = config.channels

    def settings(self) -> dict[str, Any]:
        return super().settings() | dict(method="jafar", width=self.width)

    def describe(self, features: str) -> str:
        g = self.g
        norm = g.op("Max", g.op("ReduceL2", features, g.ints(1)), g.number(1e-12))
        return self.small_encoder(g.op("Div", features, norm), "key_features_encoder")

    def keys(self, key: str, described: str) -> str:
        """Modulate the image's keys, normalised, as the features' description says."""
        g, y = self.g, self.group_norm(key, self.config.qk_dim)
        scale, shift = (g.conv(described, self.tensors[f"sft_key.{name}.weight"]) for name in ("gamma", "beta"))
        return g.op("Add", g.op("Mul", scale, y), shift)

    def normed_query(self, query: str) -> str:
        def body(g: Graph, rows: str, shares: str, inner: str) -> list[str]:
            q = super(JAFARWriter, self).strip(g, query, rows, shares)
            squares = g.op("Mul", q, q)
            sums = (g.op("Mul", g.op("ReduceSum", y, g.ints(4)), inner) for y in (q, squares))
            return [g.op("Concat", *(g.op("ReduceSum", y, g.ints(0, 1), keepdims=0) for y in sums), axis=2)]

        (moments,) = self.g.over_blocks(body, "query_rows", "query_row_shares", "strip_shares")
        self.query_affine = self.affine(moments, None)
        return query

    def strip(self, g: Graph, query: str, rows: str, shares: str, *extra: str) -> str:
        q = super().strip(g, query, rows, shares)
        inside = g.op("ReduceSum", shares, g.ints(2), keepdims=0)  # the convolution pads with 0
        scale, shift = self.query_affine
        return g.op("Add", g.op("Mul", q, scale), g.op("Mul", inside, shift))
