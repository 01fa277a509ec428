"""NAF as an ONNX graph: two encoders of the image, and AnyUp's attention with each head's own share of the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.config import AnyUpConfig
from anyup_core.export.builder import Graph
from anyup_core.export.graph import Block, Writer
from anyup_core.export.program import Shapes
from anyup_core.upsamplers.naf import NAFConfig


def build_naf(
    config: NAFConfig, tensors: Mapping[str, np.ndarray], *, half: bool = False, sizes: Shapes | None = None
) -> Any:
    """Return the model as an `onnx.ModelProto`; arguments as of `graph.build`."""
    return NAFWriter(config, tensors, half, sizes).model()


class NAFWriter(Writer):
    """Writes the graph of NAF. Maps of the image are rows first: (rows, B, D, W)."""

    extra_tables = ("turn_rows_cos", "turn_rows_sin")

    def __init__(self, config: NAFConfig, tensors: Mapping[str, np.ndarray], half: bool, sizes: Shapes | None = None):
        settings = AnyUpConfig(qk_dim=config.dim, num_heads=config.num_heads, kernel_size_lfu=1)
        super().__init__(settings, tensors, half, sizes)
        self.naf = config

    def settings(self) -> dict[str, Any]:
        names = dict(neighbourhood=self.naf.kernel_size, rope_heads=self.naf.rope_heads, multiple=self.naf.multiple)
        config = dict(input_dim=3, qk_dim=self.naf.dim, score_width=self.naf.dim, num_heads=self.naf.num_heads)
        periods = [float(f"{x:.9g}") for x in self.tensors["image_encoder.rope.periods"]]
        unused = dict(kernel_size_lfu=1, filters=1)
        return names | config | unused | dict(method="naf", loops=self.g.loops, periods=periods)

    def output(self, image: str, features: str, values: str) -> str:
        g = self.g
        image = g.op("Resize", image, "", "", "guide_size", mode="linear", coordinate_transformation_mode="half_pixel")
        rows = g.op("Transpose", image, perm=[2, 0, 1, 3])
        parts = [self.image_part(rows, f"image_encoder.{name}") for name in ("encoder", "sem_encoder")]
        query = g.op("Concat", *parts, axis=2)
        return self.attend(query, self.project(self.average_query(query)), values)

    def image_part(self, rows: str, name: str) -> str:
        x = self.row_layer(rows, None, f"{name}.0")
        for block in (1, 2):
            for layer in (1, 2):
                affine = self.affine(x[1], f"{name}.{block}.norm{layer}")
                x = self.row_layer(x[0], affine, f"{name}.{block}.conv{layer}")
        return x[0]

    def row_layer(self, rows: str, affine: tuple[str, str] | None, conv: str) -> Block:
        """Convolve SiLU(GN(x)), over reflected borders."""
        weight, bias = self.tensors[f"{conv}.weight"], self.tensors[f"{conv}.bias"]
        border = weight.shape[2] // 2
        spread = affine and [self.g.op("Unsqueeze", one, self.g.ints(3)) for one in affine]  # (B, D, 1, 1)

        def body(g: Graph, index: str, shares: str) -> list[str]:
            y = g.op("Transpose", g.op("Gather", rows, index, axis=0), perm=[1, 2, 0, 3])
            if spread:
                y = self.activate(g, y, (spread[0], spread[1]))
            if border:
                y = g.op("Pad", y, g.ints(0, 0, 0, border, 0, 0, 0, border), mode="reflect")
            y = g.conv(y, weight, bias)
            flat = g.op("Reshape", y, g.ints(0, 0, -1))
            return [g.op("Transpose", y, perm=[2, 0, 1, 3]), self.moments(g, flat, shares)]

        index = "halo_rows" if border else "own_rows"
        blocks, moments = self.g.over_blocks(body, index, "pixel_shares")
        shape = self.g.op("Shape", blocks, start=2, end=5)
        merged = self.g.op("Reshape", blocks, self.g.op("Concat", self.g.ints(-1), shape, axis=0))
        return merged, moments

    def turned(self, g: Graph, query: str, tables: tuple[str, str, str, str]) -> str:
        """Return strips of rotated queries (strips, rows, B, D, Wo), without the rows at either end."""
        rows, shares, cos, sin = tables
        q = super().strip(g, query, rows, shares)
        q = g.op("Slice", q, g.ints(1), g.ints(-1), g.ints(1))
        half = self.naf.dim // self.naf.rope_heads // 2
        other = np.arange(self.naf.dim).reshape(-1, 2, half)[:, ::-1].ravel()
        cos, sin = g.op("Mul", cos, "turn_cols_cos"), g.op("Mul", sin, "turn_cols_sin")
        return g.op("Add", g.op("Mul", q, cos), g.op("Mul", g.op("Gather", q, g.constant(other), axis=3), sin))

    def average_query(self, query: str) -> str:
        """Return the averages of the rotated queries over the cells (B, D, h, w)."""
        g = self.g

        def body(g: Graph, rows: str, shares: str, cos: str, sin: str) -> list[str]:
            return [g.op("MatMul", self.turned(g, query, (rows, shares, cos, sin)), "key_pool_cols")]

        (rows,) = g.over_blocks(body, "query_rows", "query_row_shares", *self.extra_tables)
        rows = g.op("Transpose", g.op("Reshape", rows, "key_pool_shape"), perm=[1, 2, 0, 3])
        return g.op("MatMul", "key_pool_rows", rows)

    def project(self, keys: str) -> str:
        """Return what a query is multiplied by for its scores (cells, B, N D): a head's channels, the others zero."""
        g, dim, heads = self.g, self.naf.dim, self.naf.num_heads
        own = np.arange(dim) // (dim // heads) == np.arange(heads)[:, None]
        matrix = np.where(own[:, None], np.eye(dim), 0) * (dim // heads) ** -0.5  # (N, D, D)
        cells = g.op("Transpose", g.op("Reshape", keys, g.ints(0, 0, -1)), perm=[2, 0, 1])
        return g.op("MatMul", cells, g.constant(matrix.transpose(1, 0, 2).reshape(dim, -1).astype(np.float32)))

    def strip(self, g: Graph, query: str, rows: str, shares: str, *extra: str) -> str:
        return self.turned(g, query, (rows, shares, extra[0], extra[1]))

    def query(self, g: Graph, q: str) -> str:
        q = g.op("Transpose", q, perm=[0, 2, 3, 1, 4])
        shape = g.op("Shape", q, start=2, end=5)
        return g.op("Reshape", q, g.op("Concat", g.ints(-1), shape, axis=0))

    def average(self, g: Graph, weights: str, values: str) -> str:
        weights = g.op("Transpose", weights, perm=[0, 1, 2, 4, 5, 3])  # (strips, B, tiles, N, seen, positions)
        each = g.op("Reshape", values, g.ints(0, 0, 0, 0, self.naf.num_heads, -1))
        values = g.op("Transpose", each, perm=[0, 1, 2, 4, 5, 3])
        return g.op("MatMul", values, weights)
