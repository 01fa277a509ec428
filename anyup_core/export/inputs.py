"""The inputs of an exported ONNX file: image, features, values, and the tables of their sizes.

The graph of `anyup_core.export.graph` holds no sizes: whatever follows from them is an input, made here with numpy, so
that one file serves images, features and outputs of every size.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from anyup_core.geometry import (
    AxisWindow,
    axis_window,
    coordinates,
    kernel_window,
    plan_tiles,
    pool_bins,
    reflection,
    taps_in_bounds,
    tile_axis,
)
from anyup_core.upsamplers.naf import centres, reduced

METADATA = "anyup"  # the entry of a file's metadata that holds the settings, as JSON
BLOCK = 4096  # pixels of the image worked on at once
RESPONSES = 1 << 20  # responses of the feature unification worked on at once
PAIRS = 1 << 21  # pairs of positions and cells of a strip, where every position sees every cell
NEVER = -1e4  # added to the score of a key that is not seen


def onnx_inputs(
    model: str | os.PathLike | Mapping[str, str],
    image: np.ndarray,
    features: np.ndarray | None = None,
    output_size: int | Sequence[int] | None = None,
    values: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return everything that an exported file takes: `session.run(None, onnx_inputs("F.onnx", image, features))`.

    Args:
        model: path of the file, or its metadata (`session.get_modelmeta().custom_metadata_map`).
        image: guidance (B, input_dim, H, W), normalised with the ImageNet mean and standard deviation.
        features: any encoder's feature map of the same view (B, C, h, w); None for a file that holds an encoder.
        output_size: height and width of the output (default: the image's), or one number for both.
        values: what is averaged instead of the features (B, E, h, w).

    Raises:
        ValueError: for a file that was not exported by this package, and for shapes that do not fit.
    """
    settings = onnx_settings(model)
    check_image(settings, image)
    given: Any = image.shape[2:] if output_size is None else output_size
    size = (given, given) if np.ndim(given) == 0 else tuple(given)
    if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"output_size={output_size!r}: give a height and a width of at least 1, or one number.")
    size = int(size[0]), int(size[1])
    if "encoder" in settings:
        if features is not None or values is not None:
            raise ValueError(f"the file holds an encoder, {settings['encoder']}; give the image alone.")
        cells = [side // settings["stride"] for side in image.shape[2:]]
        if min(cells) < 1:
            raise ValueError(f"image {image.shape} is smaller than a cell of {settings['stride']} pixels.")
        shape, arrays = (image.shape[0], settings["channels"], *cells), dict(image=image)
        channels = shape[1]
    else:
        if features is None:
            raise ValueError("features are missing; the file holds no encoder.")
        values = features if values is None else values
        check_maps(settings, image, features, values)
        shape, arrays, channels = features.shape, dict(image=image, features=features, values=values), values.shape[1]
    tables = onnx_tables(settings, image.shape, shape, size, channels)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()} | tables


def check_image(settings: Mapping[str, Any], image: np.ndarray) -> None:
    """Raise ValueError for an image that the file does not take."""
    if np.ndim(image) != 4 or 0 in np.shape(image):
        raise ValueError(f"image has shape {np.shape(image)}; it must have four axes, NCHW, none of them empty.")
    if image.shape[1] != settings["input_dim"]:
        raise ValueError(f"image has shape {image.shape}; the model is for {settings['input_dim']} channels, NCHW.")


def check_maps(settings: Mapping[str, Any], image: np.ndarray, features: np.ndarray, values: np.ndarray) -> None:
    """Raise ValueError for features or values that do not fit the image or each other."""
    for name, array in (("features", features), ("values", values)):
        if np.ndim(array) != 4 or 0 in np.shape(array):
            raise ValueError(f"{name} has shape {np.shape(array)}; it must have four axes, NCHW, none of them empty.")
    if settings.get("width", features.shape[1]) != features.shape[1]:
        raise ValueError(f"features have shape {features.shape}; the model is for {settings['width']} channels, NCHW.")
    for name, array in (("features", features), ("values", values)):
        if array.shape[1] % settings.get("multiple", 1):
            raise ValueError(
                f"{name} have shape {array.shape}; the channels must be a multiple of {settings['multiple']}."
            )
    if image.shape[0] != features.shape[0]:
        raise ValueError(f"image {image.shape}, features {features.shape} differ in the batch size.")
    if values.shape[0] != features.shape[0] or values.shape[2:] != features.shape[2:]:
        raise ValueError(f"values {values.shape} must share batch, height and width with features {features.shape}.")


def onnx_tables(
    settings: Mapping[str, Any],
    image: tuple[int, ...],
    features: tuple[int, ...],
    size: tuple[int, int],
    channels: int,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return the tables for an image and features of these shapes, NCHW.

    Args:
        settings: of the file.
        image, features: the shapes.
        size: height and width of the output.
        channels: of the values.
    """
    if "periods" in settings:  # of NAF, which resizes a large image first
        image = (*image[:2], *reduced((image[2], image[3]), size))
    tables = image_tables(settings, image, features) | attention_tables(settings, image, features, size, channels)
    if "periods" in settings:
        tables |= naf_tables(settings, image, features, size, tables["query_rows"].shape[1:3])
    tables = {name: tables[name] for name in settings.get("tables", tables)}
    types = {"f": np.float32, "i": np.int64, "b": np.bool_}
    return {name: np.ascontiguousarray(table, types[np.asarray(table).dtype.kind]) for name, table in tables.items()}


def image_tables(settings: Mapping[str, Any], image: tuple[int, ...], features: tuple[int, ...]) -> dict[str, Any]:
    """Return the tables of the encoders: blocks of rows, shares of the pixels, rotations and averages over cells."""
    (batch, _, height, width), (_, channels, *cells) = image, features
    dim, kernel, loops = settings["qk_dim"], settings["kernel_size_lfu"], settings["loops"]
    blocks, rows = row_blocks(batch * height * width, height, loops)
    padded, inside = np.minimum(np.arange(blocks * rows), height - 1), np.arange(blocks * rows) < height
    shares = np.repeat(inside / (height * width), width).reshape(blocks, rows * width, 1)

    row_freqs, col_freqs = np.asarray(settings.get("frequencies", np.zeros((2, dim))), np.float32)
    down, across = coordinates(height, width)
    below, beside = (down[padded][:, None] * row_freqs).T, (across[:, None] * col_freqs).T
    sign = np.where(np.arange(dim) < dim // 2, -1, 1)[:, None, None]
    cos, sin = (function(below).reshape(dim, blocks, rows).transpose(1, 0, 2) for function in (np.cos, np.sin))

    pool_rows = np.zeros((cells[0], blocks * rows), np.float32)
    pool_rows[:, :height] = pooling(height, cells[0])
    described = max(1, RESPONSES // (batch * channels * settings["filters"] * cells[1])) if loops else cells[0]
    steps = -(-cells[0] // min(described, cells[0]))
    described = -(-cells[0] // steps)
    steps = -(-cells[0] // described)
    pads = np.array([0, 0, kernel // 2, kernel // 2, 0, 0, kernel // 2 + steps * described - cells[0], kernel // 2])
    taps = np.outer(*(taps_in_bounds(n, kernel) for n in cells))
    taps = taps[np.minimum(np.arange(steps * described), cells[0] - 1)].reshape(steps, described, -1)
    return {
        "image_rows": padded,
        "block_shape": np.array([0, 0, blocks, -1]),
        "row_shape": np.array([0, 0, rows, -1]),
        "pixel_shares": shares,
        "rotation_cos": np.stack([cos, -sin], 3),
        "rotation_sin": sign * np.stack([sin, cos], 3),
        "rotation_cols": np.stack([np.cos(beside), np.sin(beside)], 1),
        "pool_rows": pool_rows,
        "pool_cols": pooling(width, cells[1]).T,
        "feature_pads": pads,
        "feature_rows": described * np.arange(steps)[:, None] + np.arange(described + kernel - 1),
        "feature_shares": 1 / taps,
        "patch_shape": np.array([batch * channels, 1, described + kernel - 1, cells[1] + kernel - 1]),
        "response_shape": np.array([batch, settings["filters"], channels, described, cells[1]]),
        "cells_shape": np.array([0, 0, -1, cells[1]]),
        "rows_shape": np.array([-1, batch, dim, width]),
        "cell_rows": np.arange(cells[0]),
        "reflected_rows": reflection(cells[0], 1),
        "reflected_cols": reflection(cells[1], 1),
    }


def attention_tables(
    settings: Mapping[str, Any],
    image: tuple[int, ...],
    features: tuple[int, ...],
    size: tuple[int, int],
    channels: int,
) -> dict[str, Any]:
    """Return the tables of the attention: tiles of output positions, the cells they see, and what they do not see.

    A step works on `strips` rows of tiles. The rows of queries of a strip come with one more at either end.
    """
    (batch, _, *sides), cells = image, features[2:]
    heads, dim = settings["num_heads"], settings["qk_dim"]
    depth = settings.get("score_width", dim + 1)
    if "neighbourhood" in settings:
        windows = [kernel_window(n, m, settings["neighbourhood"]) for n, m in zip(size, cells)]
    else:
        windows = [axis_window(n, m, settings["window_ratio"], settings["window"]) for n, m in zip(size, cells)]
    if all((window.count == 1).all() and window.span == window.keys for window in windows):  # one tile a strip
        sizes = [min(size[0], max(1, PAIRS // (size[1] * cells[0] * cells[1]))), size[1]]
    else:
        sizes = [tiles.size for tiles in plan_tiles(*windows)]
    tall, wide = (tile_axis(lengthened(window, side), side) for window, side in zip(windows, sizes))
    strips = 1 if settings["loops"] else tall.runs
    steps, seen, tile = tall.runs // strips, tall.span * wide.span, tall.size * wide.size
    row_bias, col_bias = (np.where(t.count > 0, np.log(np.maximum(t.count, 1)), NEVER) for t in (tall, wide))

    wanted = tall.size * np.arange(tall.runs)[:, None] + np.arange(-1, tall.size + 1)
    index, weights = pool_bins(sides[0], size[0])
    inside, wanted = (wanted >= 0) & (wanted < size[0]), wanted.clip(0, size[0] - 1)
    strip_shares = inside / (size[0] * size[1])
    strip_shares[:, [0, -1]] = 0
    split = (steps, strips, tall.size + 2, index.shape[1])
    key_rows = cells[1] * (tall.start[:, None] + np.arange(tall.span))
    return {
        "query_rows": index[wanted].reshape(split),
        "query_row_shares": (weights[wanted] * inside[..., None]).reshape(*split, 1, 1, 1),
        "strip_shares": strip_shares.reshape(steps, strips, -1, 1, 1, 1),
        "resize_cols": np.array([sides[1] != size[1]]),
        "query_cols": pooling(sides[1], size[1]).T if sides[1] != size[1] else np.zeros((1, 1), np.float32),
        "query_shape": np.array([-1, dim, tall.size + 2, size[1]]),
        "query_pads": np.array([0, 0, 0, 0, 0, 0, 0, wide.runs * wide.size - size[1]]),
        "tile_shape": np.array([-1, depth, tall.size, wide.runs, wide.size]),
        "key_rows": key_rows.reshape(steps, strips, 1, tall.span, 1),
        "key_cols": (wide.start[:, None] + np.arange(wide.span))[:, None],
        "key_shape": np.array([strips, wide.runs, seen, batch, heads, depth]),
        "key_tiles": np.array([-1, wide.runs, heads * seen, depth]),
        "row_bias": row_bias.reshape(steps, strips, 1, tall.size, 1, tall.span, 1),
        "col_bias": col_bias[:, None, :, None],
        "bias_shape": np.array([strips, 1, wide.runs, tile, 1, seen]),
        "score_shape": np.array([strips, batch, wide.runs, tile, heads, seen]),
        "value_shape": np.array([strips, wide.runs, seen, batch, channels]),
        "output_tiles": np.array([strips, batch, wide.runs, channels, tall.size, wide.size]),
        "strip_shape": np.array([batch, channels, strips * tall.size, wide.runs * wide.size]),
        "output_shape": np.array([batch, channels, tall.runs * tall.size, size[1]]),
        "crop_rows": np.array([tall.runs * tall.size != size[0]]),
        "output_height": np.array(size[:1]),
        "output_width": np.array(size[1:]),
    }


def naf_tables(
    settings: Mapping[str, Any],
    image: Sequence[int],
    features: Sequence[int],
    size: tuple[int, int],
    strip: Sequence[int],
) -> dict[str, Any]:
    """Return the tables that NAF has beside the others: rows with a border, and rotations of the output's positions.

    Args:
        settings, image, features, size: as for `onnx_tables`; the image has been reduced.
        strip: how many strips a step works on, and their rows with one more at either end.
    """
    (batch, depth, height, width), cells = image, features[2:]
    blocks, rows = row_blocks(batch * height * width, height, settings["loops"])
    own = np.minimum(np.arange(blocks * rows), height - 1).reshape(blocks, rows)
    border = np.minimum(rows * np.arange(blocks)[:, None] + np.arange(rows + 2), height + 1)
    runs = -(-size[0] // (strip[1] - 2))
    wanted = np.minimum(np.arange(runs * (strip[1] - 2)), size[0] - 1)
    periods, heads = np.asarray(settings["periods"], np.float32), settings["rope_heads"]
    (down, across), turns = (centres(n) for n in size), {}
    along = np.tile(np.repeat([True, False], len(periods)), 2 * heads)[:, None]  # channels that rows turn
    sign = np.tile(np.repeat([-1, 1], 2 * len(periods)), heads)[:, None]
    for axis, places, seen in (("rows", down[wanted], along), ("cols", across, ~along)):
        angle = np.tile(2 * np.pi * places / periods[:, None], (4 * heads, 1)).astype(np.float32)
        turns[f"turn_{axis}_cos"] = np.where(seen, np.cos(angle), 1)
        turns[f"turn_{axis}_sin"] = np.where(seen, np.sin(angle) * sign, 1)
    for name in ("turn_rows_cos", "turn_rows_sin"):
        turns[name] = turns[name].T.reshape(-1, strip[0], strip[1] - 2, 1, len(sign), 1)
    pool_rows = np.zeros((cells[0], len(wanted)), np.float32)
    pool_rows[:, : size[0]] = pooling(size[0], cells[0])
    return turns | {
        "guide_size": np.array([batch, depth, height, width]),
        "halo_rows": reflection(height, 1)[border],
        "own_rows": own,
        "key_pool_rows": pool_rows,
        "key_pool_cols": pooling(size[1], cells[1]).T,
        "key_pool_shape": np.array([-1, batch, len(sign), cells[1]]),
    }


def row_blocks(pixels: int, height: int, loops: bool) -> tuple[int, int]:
    """Return the number of blocks of an image and their rows; those below the image repeat its last one."""
    rows = -(-height // min(-(-pixels // BLOCK) if loops else 1, height))
    return -(-height // rows), rows


def lengthened(window: AxisWindow, size: int) -> AxisWindow:
    """Return a window of a whole number of runs of `size` queries, the last of which repeats as often as needed."""
    index = np.minimum(np.arange(-(-window.queries // size) * size), window.queries - 1)
    return AxisWindow(window.keys, window.start[index], window.count[index])


def pooling(size: int, out: int) -> Float[np.ndarray, "out size"]:
    """Return the matrix of an adaptive average pooling along one axis."""
    index, weights = pool_bins(size, out)
    table = np.zeros((out, size), np.float32)
    np.add.at(table, (np.arange(out)[:, None], index), weights)
    return table


def onnx_settings(model: str | os.PathLike | Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of an exported file: of its path, or of its metadata.

    Raises:
        ValueError: if the file was not exported by this package.
    """
    if isinstance(model, Mapping):
        metadata, name = model, "this metadata"
    else:
        with open(model, "rb") as file:
            metadata, name = dict(read_metadata(file)), os.fspath(model)
    if METADATA not in metadata:
        raise ValueError(f"{name} has no entry {METADATA!r}; give a file that `anyup export` wrote, or its metadata.")
    return json.loads(metadata[METADATA])


def read_metadata(file: io.BufferedIOBase) -> Iterator[tuple[str, str]]:
    """Yield the metadata of an ONNX file, field 14 of its protocol buffer; everything else is skipped.

    Raises:
        ValueError: if the file is no ONNX file or is cut off.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    while file.tell() < end:
        field, kind = divmod(_varint(file), 8)
        length = _varint(file) if kind in (0, 2) else {1: 8, 5: 4}.get(kind, -1)
        if kind == 0:
            continue
        if length < 0 or file.tell() + length > end:
            raise ValueError("this is no whole ONNX file; export it or copy it again.")
        if field == 14 and kind == 2:
            yield _entry(file.read(length))
        else:
            file.seek(length, os.SEEK_CUR)


def _entry(data: bytes) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    file, texts = io.BytesIO(data), {}
    while file.tell() < len(data):
        field = _varint(file) // 8
        texts[field] = file.read(_varint(file)).decode()
    return texts.get(1, ""), texts.get(2, "")


def _varint(file: io.BufferedIOBase) -> int:
    value, shift = 0, 0
    while True:
        byte = file.read(1)
        if not byte or shift > 63:
            raise ValueError("this is no whole ONNX file; export it or copy it again.")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
