"""AnyUp as an ONNX graph: dynamic in every size, with the tables of `inputs.py` as inputs.

Every pass over the image's pixels is a loop over blocks of rows, and the attention one over rows of tiles, so that
little more is held at once than the maps that one pass hands to the next:

    image -> blocks -> image encoder -> rotation -> key encoder -> averages over cells -> keys
                                                 -> query encoder -> rows -> tiles of queries -> attention -> output
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.config import NORM_GROUPS, AnyUpConfig
from anyup_core.export.builder import Graph
from anyup_core.export.inputs import METADATA, onnx_tables
from anyup_core.export.program import Shapes

GROUP_NORM_EPS = 1e-5
RMS_NORM_EPS = float(np.finfo(np.float32).eps)

TABLES: dict[str, tuple[type, tuple[str | int, ...]]] = {
    "image_rows": (np.int64, ("padded",)),
    "block_shape": (np.int64, (4,)),
    "row_shape": (np.int64, (4,)),
    "pixel_shares": (np.float32, ("blocks", "pixels", 1)),
    "rotation_cos": (np.float32, ("blocks", "D", "rows", 2)),
    "rotation_sin": (np.float32, ("blocks", "D", "rows", 2)),
    "rotation_cols": (np.float32, ("D", 2, "W")),
    "pool_rows": (np.float32, ("h", "padded")),
    "pool_cols": (np.float32, ("W", "w")),
    "feature_pads": (np.int64, (8,)),
    "feature_rows": (np.int64, ("groups", "group_rows")),
    "patch_shape": (np.int64, (4,)),
    "response_shape": (np.int64, (5,)),
    "cells_shape": (np.int64, (4,)),
    "rows_shape": (np.int64, (4,)),
    "feature_shares": (np.float32, ("groups", "group", "w")),
    "cell_rows": (np.int64, ("h",)),
    "reflected_rows": (np.int64, ("reflected_h",)),
    "reflected_cols": (np.int64, ("reflected_w",)),
    "query_rows": (np.int64, ("steps", "strips", "strip_rows", "row_taps")),
    "query_row_shares": (np.float32, ("steps", "strips", "strip_rows", "row_taps", 1, 1, 1)),
    "strip_shares": (np.float32, ("steps", "strips", "strip_rows", 1, 1, 1)),
    "resize_cols": (np.bool_, (1,)),
    "query_cols": (np.float32, ("query_W", "query_Wo")),
    "guide_size": (np.int64, (4,)),
    "halo_rows": (np.int64, ("blocks", "halo")),
    "own_rows": (np.int64, ("blocks", "rows")),
    "turn_rows_cos": (np.float32, ("steps", "strips", "tile_rows", 1, "D", 1)),
    "turn_rows_sin": (np.float32, ("steps", "strips", "tile_rows", 1, "D", 1)),
    "turn_cols_cos": (np.float32, ("D", "Wo")),
    "turn_cols_sin": (np.float32, ("D", "Wo")),
    "key_pool_rows": (np.float32, ("h", "tile_rows_in_all")),
    "key_pool_cols": (np.float32, ("Wo", "w")),
    "key_pool_shape": (np.int64, (4,)),
    "query_shape": (np.int64, (4,)),
    "query_pads": (np.int64, (8,)),
    "tile_shape": (np.int64, (5,)),
    "key_rows": (np.int64, ("steps", "strips", 1, "seen_rows", 1)),
    "key_cols": (np.int64, ("tiles", 1, "seen_cols")),
    "key_shape": (np.int64, (6,)),
    "key_tiles": (np.int64, (4,)),
    "row_bias": (np.float32, ("steps", "strips", 1, "tile_rows", 1, "seen_rows", 1)),
    "col_bias": (np.float32, ("tiles", 1, "tile_cols", 1, "seen_cols")),
    "bias_shape": (np.int64, (6,)),
    "score_shape": (np.int64, (6,)),
    "value_shape": (np.int64, (5,)),
    "output_tiles": (np.int64, (6,)),
    "strip_shape": (np.int64, (4,)),
    "output_shape": (np.int64, (4,)),
    "crop_rows": (np.bool_, (1,)),
    "output_height": (np.int64, (1,)),
    "output_width": (np.int64, (1,)),
}
"""Element types and axes of the tables."""

Block = tuple[str, str]  # names of a map in blocks of rows (blocks, B, D, pixels) and of its moments (blocks, B, D, 2)


def build(
    config: AnyUpConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    half: bool = False,
    sizes: Shapes | None = None,
    loops: bool = True,
) -> Any:
    """Return the model as an `onnx.ModelProto`.

    Args:
        config: the model's.
        tensors: its parameters under their published names.
        half: store the weights as float16; the graph computes in float32.
        sizes: those of a file without tables among its inputs. It has no loops: every map is whole, and the memory
            several times as large.
        loops: False for a file for every size whose maps are whole as well, for runtimes whose loops leave the device.

    Raises:
        ValueError: for a window that holds no key.
    """
    return Writer(config, tensors, half, sizes, loops).model()


class Writer:
    """Writes the graph; the methods return names of tensors."""

    extra_tables: tuple[str, ...] = ()  # that a strip needs

    def __init__(
        self,
        config: AnyUpConfig,
        tensors: Mapping[str, np.ndarray],
        half: bool,
        sizes: Shapes | None = None,
        loops: bool = True,
    ):
        self.config, self.tensors = config, {name: np.asarray(x, np.float32) for name, x in tensors.items()}
        self.g, self.sizes = Graph(half, loops=loops and sizes is None), sizes
        self.shapes: dict[int, str] = {}

    def model(self) -> Any:
        g, shapes, dim = self.g, self.input_shapes(), self.config.qk_dim
        image, features, values = (g.input(name, np.float32, shapes[name]) for name in ("image", "features", "values"))
        if self.sizes is None:
            for name, (kind, shape) in TABLES.items():
                g.input(name, kind, tuple(dim if axis == "D" else axis for axis in shape))
        else:
            del g.inputs["values"]
            values, channels = features, shapes["hr"][1]
            given = (shapes["image"], shapes["features"], shapes["hr"][2:], channels)
            g.known.update(onnx_tables(self.settings(), *given))
        output = self.output(image, features, values)
        used = g.used()
        for name in TABLES:
            if name not in used:
                g.inputs.pop(name, None)
        settings = self.settings() | dict(tables=[name for name in TABLES if name in g.inputs])
        return g.finish("anyup", {"hr": (output, shapes["hr"])}, {METADATA: json.dumps(settings)})

    def output(self, image: str, features: str, values: str) -> str:
        """Return the upsampled values (B, E, Ho, Wo)."""
        described = self.describe(features)
        key, query = self.encode(image)
        return self.attend(query, self.project(self.keys(key, described)), values)

    def input_shapes(self) -> dict[str, tuple[Any, ...]]:
        """Return the shapes of image, features, values and output; letters where they are not fixed."""
        depth = self.config.input_dim
        if self.sizes is None:
            image, cells, output, channels, more, batch = ("H", "W"), ("h", "w"), ("Ho", "Wo"), "C", "E", "B"
        else:
            image, cells, output = self.sizes.image, self.sizes.cells, self.sizes.output or self.sizes.image
            channels, more, batch = self.sizes.channels, self.sizes.channels, 1
        return {
            "image": (batch, depth, *image),
            "features": (batch, channels, *cells),
            "values": (batch, more, *cells),
            "hr": (batch, more, *output),
        }

    def settings(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.config)
        names = ("input_dim", "qk_dim", "kernel_size_lfu", "num_heads", "window", "window_ratio")
        frequencies = [[float(f"{x:.9g}") for x in row] for row in self.tensors["rope.freqs"]]
        settings = {name: fields[name] for name in names}
        return settings | dict(filters=self.config.filters, loops=self.g.loops, frequencies=frequencies)

    def keys(self, key: str, described: str) -> str:
        """Return the keys of the cells, from the image's and the features'."""
        return self.small_encoder(self.g.op("Concat", key, described, axis=1), "aggregation")

    # the pixels of the image, in blocks of rows

    def encode(self, image: str) -> tuple[str, str]:
        """Return the averages of the keys over the cells (B, D, h, w), and the rows of queries (padded, B, D, W)."""
        key, query = self.rotate(self.image_encoder(self.blocks(image)))
        key = self.pool(self.residual(key, "key_encoder.1"), "key_encoder.2")
        return key, self.rows(self.residual(query, "query_encoder.1"), "query_encoder.2")

    def blocks(self, image: str) -> str:
        """Return the image, or the patches around its pixels, in blocks (blocks, B, inputs, pixels)."""
        g, weight = self.g, self.tensors["image_encoder.0.weight"]
        inputs, side = weight.shape[1], weight.shape[2]
        if side > 1:
            half = side // 2
            image = g.op("Pad", image, g.ints(0, 0, half, half, 0, 0, half, half), mode="reflect")
            patches = np.eye(inputs * side**2, dtype=np.float32).reshape(-1, inputs, side, side)
            image = g.conv(image, patches)
        image = g.op("Gather", image, "image_rows", axis=2)
        return g.op("Transpose", g.op("Reshape", image, "block_shape"), perm=[2, 0, 1, 3])

    def image_encoder(self, blocks: str) -> Block:
        weight = self.tensors["image_encoder.0.weight"]

        def project(g: Graph, x: str, shares: str) -> list[str]:
            x = g.op("MatMul", g.weight(weight.reshape(len(weight), -1)), x)
            return [x, self.moments(g, x, shares)]

        x, moments = self.g.over_blocks(project, blocks, "pixel_shares")
        return self.residual((x, moments), "image_encoder.1")

    def residual(self, x: Block, name: str) -> Block:
        """Apply a residual block to a map in blocks."""
        hidden = self.layer(x, f"{name}.block.0", f"{name}.block.2")
        return self.layer(hidden, f"{name}.block.3", f"{name}.block.5", residual=x[0])

    def layer(self, x: Block, norm: str, conv: str, residual: str | None = None) -> Block:
        affine = self.affine(x[1], norm)

        def body(g: Graph, block: str, shares: str, *rest: str) -> list[str]:
            y = self.convolve(g, self.activate(g, block, affine), conv)
            if rest:
                y = g.op("Add", y, rest[0])
            return [y, self.moments(g, y, shares)]

        tables = [x[0], "pixel_shares", *([] if residual is None else [residual])]
        y, moments = self.g.over_blocks(body, *tables)
        return y, moments

    def rotate(self, x: Block) -> tuple[Block, Block]:
        """Apply the image encoder's last residual block, rotate, and apply the encoders' first layers to the result."""
        name = "image_encoder.2"
        hidden = self.layer(x, f"{name}.block.0", f"{name}.block.2")
        affine = self.affine(hidden[1], f"{name}.block.3")

        def body(g: Graph, block: str, before: str, shares: str, cos: str, sin: str) -> list[str]:
            y = self.convolve(g, self.activate(g, block, affine), f"{name}.block.5")
            y = g.op("Reshape", g.op("Add", y, before), "row_shape")
            cos, sin = (g.op("MatMul", table, "rotation_cols") for table in (cos, sin))
            first, second = g.op("Split", y, outputs=2, axis=1, num_outputs=2)
            turned = g.op("Mul", g.op("Concat", second, first, axis=1), sin)
            y = g.op("Add", g.op("Mul", y, cos), turned)
            y = g.op("Reshape", y, g.ints(0, 0, -1))
            outputs = [self.convolve(g, y, f"{encoder}.0") for encoder in ("key_encoder", "query_encoder")]
            return [*outputs, *(self.moments(g, output, shares) for output in outputs)]

        tables = [hidden[0], x[0], "pixel_shares", "rotation_cos", "rotation_sin"]
        key, query, *moments = self.g.over_blocks(body, *tables)
        return (key, moments[0]), (query, moments[1])

    def pool(self, x: Block, name: str) -> str:
        """Apply a residual block and average over the cells, before its last convolution, which is linear."""
        hidden = self.layer(x, f"{name}.block.0", f"{name}.block.2")
        affine = self.affine(hidden[1], f"{name}.block.3")

        def body(g: Graph, block: str, before: str) -> list[str]:
            maps = (self.activate(g, block, affine), before)
            return [g.op("MatMul", g.op("Reshape", one, "row_shape"), "pool_cols") for one in maps]

        g, averages = self.g, []
        for partial in self.g.over_blocks(body, hidden[0], x[0]):
            rows = g.op("Transpose", partial, perm=[1, 2, 0, 3, 4])  # (B, D, blocks, rows, w)
            averages.append(g.op("MatMul", "pool_rows", g.op("Reshape", rows, "cells_shape")))
        return g.op("Add", g.conv(averages[0], self.tensors[f"{name}.block.5.weight"]), averages[1])

    def rows(self, x: Block, name: str) -> str:
        """Apply a residual block; return the map by rows (padded, B, D, W)."""
        hidden = self.layer(x, f"{name}.block.0", f"{name}.block.2")
        affine = self.affine(hidden[1], f"{name}.block.3")

        def body(g: Graph, block: str, before: str) -> list[str]:
            y = self.convolve(g, self.activate(g, block, affine), f"{name}.block.5")
            y = g.op("Reshape", g.op("Add", y, before), "row_shape")
            return [g.op("Transpose", y, perm=[2, 0, 1, 3])]

        g = self.g
        (rows,) = g.over_blocks(body, hidden[0], x[0])
        return g.op("Reshape", rows, "rows_shape")

    def affine(self, moments: str, norm: str | None) -> tuple[str, str]:
        """Return scale and shift (B, D, 1) that apply a GroupNorm, given each block's share of mean and mean square.

        `norm` is None for one without weights.
        """
        g = self.g
        gamma, beta = np.ones((self.config.qk_dim, 1), np.float32), np.zeros((self.config.qk_dim, 1), np.float32)
        if norm is not None:
            gamma, beta = self.tensors[f"{norm}.weight"][:, None], self.tensors[f"{norm}.bias"][:, None]
        size = len(gamma) // NORM_GROUPS
        groups = np.kron(np.eye(NORM_GROUPS), np.full((size, size), 1 / size)).astype(np.float32)
        whole = g.op("ReduceSum", moments, g.ints(0), keepdims=0)
        mean, square = g.op("Split", g.op("MatMul", g.constant(groups), whole), outputs=2, axis=2, num_outputs=2)
        variance = g.op("Max", g.op("Sub", square, g.op("Mul", mean, mean)), g.number(0))
        deviation = g.op("Sqrt", g.op("Add", variance, g.number(GROUP_NORM_EPS)))
        scale = g.op("Div", g.constant(gamma), deviation)
        return scale, g.op("Sub", g.constant(beta), g.op("Mul", mean, scale))

    def activate(self, g: Graph, x: str, affine: tuple[str, str]) -> str:
        y = g.op("Add", g.op("Mul", x, affine[0]), affine[1])
        return g.op("Mul", y, g.op("Sigmoid", y))

    def convolve(self, g: Graph, x: str, name: str) -> str:
        weight = self.tensors[f"{name}.weight"]
        return g.op("MatMul", g.weight(weight[:, :, 0, 0]), x)

    def moments(self, g: Graph, x: str, shares: str) -> str:
        """Return a block's share of each channel's mean and mean square (B, D, 2)."""
        squares = g.op("Mul", x, x)
        return g.op("Concat", *(g.op("MatMul", y, shares) for y in (x, squares)), axis=2)

    # the cells of the features

    def describe(self, features: str) -> str:
        """Return the description of the features (B, D, h, w)."""
        g, basis = self.g, self.tensors["key_features_encoder.0.basis"]
        filters = len(basis)
        norm = g.op("Max", g.op("ReduceL2", features, g.ints(1)), g.number(1e-12))
        padded = g.op("Pad", g.op("Div", features, norm), "feature_pads")

        def body(g: Graph, index: str, shares: str) -> list[str]:
            rows = g.op("Gather", padded, index, axis=2)  # (B, C, rows, width)
            response = g.conv(g.op("Reshape", rows, "patch_shape"), basis)  # (B C, M, rows, w)
            # written channel by channel, read filter by filter: the published layer's quirk
            misread = g.op("Reshape", g.op("Mul", response, shares), "response_shape")  # (B, M, C, rows, w)
            power = g.op("Exp", g.op("Sub", misread, g.op("ReduceMax", misread, g.ints(1))))
            picks = g.op("Div", power, g.op("ReduceSum", power, g.ints(1)))
            picks = g.op("Sub", picks, g.number(1 / filters))  # which the next norm takes away, at a loss of digits
            return [g.op("ReduceMean", picks, g.ints(2), keepdims=0)]  # (B, M, rows, w)

        (unified,) = g.over_blocks(body, "feature_rows", "feature_shares")
        unified = g.op("Transpose", unified, perm=[1, 2, 0, 3, 4])
        unified = g.op("Gather", g.op("Reshape", unified, "cells_shape"), "cell_rows", axis=2)
        unified = self.small_residual(unified, "key_features_encoder.1")
        shortcut = self.tensors.get("key_features_encoder.1.shortcut.weight", np.ones((1, 1, 1, 1), np.float32))
        unified = g.op("Add", unified, g.constant(shortcut.sum(1) / filters))
        return self.small_residual(unified, "key_features_encoder.2")

    def small_encoder(self, x: str, name: str) -> str:
        g, weight = self.g, self.tensors[f"{name}.0.weight"]
        if weight.shape[2] > 1:
            x = g.op("Gather", g.op("Gather", x, "reflected_rows", axis=2), "reflected_cols", axis=3)
        x = g.conv(x, weight)
        return self.small_residual(self.small_residual(x, f"{name}.1"), f"{name}.2")

    def small_residual(self, x: str, name: str) -> str:
        g = self.g
        y = g.conv(self.small_norm(x, f"{name}.block.0"), self.tensors[f"{name}.block.2.weight"])
        y = g.conv(self.small_norm(y, f"{name}.block.3"), self.tensors[f"{name}.block.5.weight"])
        shortcut = self.tensors.get(f"{name}.shortcut.weight")
        return g.op("Add", y, x if shortcut is None else g.conv(x, shortcut))

    def small_norm(self, x: str, name: str) -> str:
        """Return SiLU(GN(x)) of a map of cells."""
        g, gamma, beta = self.g, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        y = self.group_norm(x, len(gamma))
        return self.activate(g, y, (g.constant(gamma[:, None, None]), g.constant(beta[:, None, None])))

    def group_norm(self, x: str, channels: int) -> str:
        """Apply a GroupNorm without weights to a map of cells."""
        g, ones = self.g, np.ones(NORM_GROUPS, np.float32)
        y = g.op("Reshape", x, g.ints(0, NORM_GROUPS, -1))
        y = g.op("InstanceNormalization", y, g.constant(ones), g.constant(0 * ones), epsilon=GROUP_NORM_EPS)
        return g.op("Reshape", y, self.shape_of(x, channels))

    def shape_of(self, x: str, channels: int) -> str:
        """Return the shape of a map of the cells, which all of the same width share."""
        if channels not in self.shapes:
            self.shapes[channels] = self.g.op("Shape", x)
        return self.shapes[channels]

    # attention

    def project(self, keys: str) -> str:
        """Return what a query is multiplied by for its scores (cells, B, N (D + 1)).

        The score of head h is (Wq x / rms + bq) (Wk y + bk) / sqrt(K). The queries' projection goes to the keys: a
        query x / rms, followed by a 1, meets for each head D numbers and one more.
        """
        g, dim, heads = self.g, self.config.qk_dim, self.config.num_heads
        name, width = "cross_decode.cross_attn", self.config.head_dim
        weights = self.tensors[f"{name}.attention.in_proj_weight"].astype(np.float64)
        biases = self.tensors[f"{name}.attention.in_proj_bias"].astype(np.float64)
        query = np.sqrt(dim) * weights[:dim] * self.tensors[f"{name}.norm_q.weight"]
        key = np.sqrt(dim) * weights[dim : 2 * dim] * self.tensors[f"{name}.norm_k.weight"]
        rows, offsets = [], []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            left = np.concatenate([query[part], biases[:dim][part, None]], 1).T / np.sqrt(width)  # (D + 1, K)
            rows.append(left @ key[part])
            offsets.append(left @ biases[dim : 2 * dim][part])
        cells = g.op("Transpose", g.op("Reshape", keys, g.ints(0, 0, -1)), perm=[2, 0, 1])  # (cells, B, D)
        cells = g.op("Div", cells, self.norm(g, cells, 2))
        matrix = g.weight(np.concatenate(rows).T.astype(np.float32))
        return g.op("Add", g.op("MatMul", cells, matrix), g.constant(np.concatenate(offsets).astype(np.float32)))

    def norm(self, g: Graph, x: str, axis: int) -> str:
        """Return the root of the mean square times that of the number of channels, which the weights make up for."""
        square = g.op("ReduceSumSquare", x, g.ints(axis))
        return g.op("Sqrt", g.op("Add", square, g.number(self.config.qk_dim * RMS_NORM_EPS)))

    def attend(self, query: str, keys: str, values: str) -> str:
        """Return the output (B, E, Ho, Wo)."""
        g, query = self.g, self.normed_query(query)
        seen = g.op("Transpose", g.op("Reshape", values, g.ints(0, 0, -1)), perm=[2, 0, 1])  # (cells, B, E)

        def body(g: Graph, rows: str, shares: str, key_rows: str, row_bias: str, *extra: str) -> list[str]:
            q = self.strip(g, query, rows, shares, *extra)
            q = g.op("Pad", self.query(g, q), "query_pads")
            tiles = g.op("Transpose", g.op("Reshape", q, "tile_shape"), perm=[0, 3, 1, 2, 4])
            tiles = g.op("Reshape", tiles, g.ints(0, 0, 0, -1))  # (strips B, tiles, D + 1, positions)

            index = g.op("Add", key_rows, "key_cols")  # (strips, tiles, rows, columns)
            k = g.op("Reshape", g.op("Gather", keys, index, axis=0), "key_shape")
            k = g.op("Reshape", g.op("Transpose", k, perm=[0, 3, 1, 4, 2, 5]), "key_tiles")
            q, k = (g.op("Transpose", one, perm=[0, 1, 3, 2]) for one in (tiles, k))
            scores = g.op("Reshape", g.op("MatMul", q, k), "score_shape")  # (strips, B, tiles, positions, N, seen)
            bias = g.op("Reshape", g.op("Add", row_bias, "col_bias"), "bias_shape")
            weights = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
            v = g.op("Reshape", g.op("Gather", seen, index, axis=0), "value_shape")
            output = self.average(g, weights, g.op("Transpose", v, perm=[0, 3, 1, 2, 4]))
            output = g.op("Transpose", g.op("Reshape", output, "output_tiles"), perm=[1, 3, 0, 4, 2, 5])
            output = g.op("Reshape", output, "strip_shape")
            return [g.op("Slice", output, g.ints(0), "output_width", g.ints(3))]

        tables = ("query_rows", "query_row_shares", "key_rows", "row_bias", *self.extra_tables)
        (strips,) = g.over_blocks(body, *tables)  # (steps, B, E, rows, Wo)

        def whole(g: Graph) -> str:
            return g.op("Reshape", g.op("Transpose", strips, perm=[1, 2, 0, 3, 4]), "output_shape")

        def cropped(g: Graph) -> str:
            return g.op("Slice", whole(g), g.ints(0), "output_height", g.ints(2))

        return g.choose("crop_rows", cropped, whole)

    def query(self, g: Graph, q: str) -> str:
        """Return strips of queries (strips B, D + 1, rows, Wo), convolved and normed, with a 1 as the last channel."""
        q = g.op("Reshape", g.op("Transpose", q, perm=[0, 2, 3, 1, 4]), "query_shape")
        q = g.conv(q, self.tensors["cross_decode.conv2d.weight"], pads=(0, 1, 0, 1))
        norm = self.norm(g, q, 1)
        return g.op("Div", g.op("Concat", q, norm, axis=1), norm)

    def average(self, g: Graph, weights: str, values: str) -> str:
        """Average values (strips, B, tiles, seen, E) by weights (strips, B, tiles, positions, N, seen), and the heads.

        Returns (strips, B, tiles, E, positions).
        """
        weights = g.op("ReduceMean", weights, g.ints(4), keepdims=0)
        values, weights = (g.op("Transpose", x, perm=[0, 1, 2, 4, 3]) for x in (values, weights))
        return g.op("MatMul", values, weights)

    def normed_query(self, query: str) -> str:
        """Prepare the norm of the queries of the output's size, where there is one; return their rows."""
        return query

    def strip(self, g: Graph, query: str, rows: str, shares: str, *extra: str) -> str:
        """Return strips of queries at the output's size (strips, rows, B, D, Wo); rows outside of it are zero."""
        q = g.op("Mul", g.op("Gather", query, rows, axis=0), shares)  # (strips, rows, taps, B, D, W)
        q = g.op("ReduceSum", q, g.ints(2), keepdims=0)
        return g.choose("resize_cols", lambda g: g.op("MatMul", q, "query_cols"), lambda g: g.op("Identity", q))
