"""The browser page: its tables equal numpy's, its outputs those of the same files in Python; an error is one line."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from anyup_core import geometry, visualize
from anyup_core.export.inputs import onnx_tables

PAGE = Path(__file__).resolve().parents[1] / "anyup_core/page"
KEYS, QUERIES = range(1, 62), [*range(1, 41), *range(48, 97, 4), 112, 150, 196, 224, 255, 301, 337, 384, 448, 512, 1021]
RATIO = 0.1
SETTINGS = dict(input_dim=3, qk_dim=8, kernel_size_lfu=5, num_heads=4, window_ratio=RATIO, filters=8)
SHAPES = [  # image, cells, output, channels
    ((32, 48), (4, 6), (32, 48), 5),
    ((33, 47), (5, 3), (33, 47), 7),
    ((224, 224), (14, 14), (224, 224), 320),
    ((224, 160), (7, 5), (112, 80), 320),
    ((1, 9), (1, 1), (1, 9), 2),
    ((64, 40), (16, 9), (61, 101), 1),
    ((97, 89), (13, 11), (97, 89), 1500),
]

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def node(script: str, *arguments: str) -> str:
    """Return what a module prints that has all of tables.js as `t` and of maths.js as `m`."""
    files = {name: json.dumps((PAGE / f"{name}.js").as_uri()) for name in ("tables", "maths")}
    source = f"import * as t from {files['tables']};\nimport * as m from {files['maths']};\n{script}"
    command = ["node", "--input-type=module", "--eval", source, "--", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def numbers_of(window: geometry.AxisWindow) -> str:
    whole = np.concatenate([[window.keys, window.span], window.start, window.count.ravel()])
    return hashlib.sha256(whole.astype("<i4").tobytes()).hexdigest()


@needs_node
@pytest.mark.parametrize("kind", ["paper", "natten"])
def test_windows_are_those_of_numpy(kind: str) -> None:
    assert len(KEYS) * len(QUERIES) == 3904
    script = """
    import { createHash } from "node:crypto";
    const [kind, ratio, keys, queries] = process.argv.slice(-4).map((text) => text[0] < "a" ? JSON.parse(text) : text);
    const hash = (numbers) => createHash("sha256").update(Int32Array.from(numbers)).digest("hex");
    const found = keys.flatMap((n) => queries.map((m) => {
      try {
        const window = t.axisWindow(m, n, ratio, kind);
        return hash([window.keys, window.span, ...window.start, ...window.count]);
      } catch (error) {
        if (error instanceof RangeError) return "refused";
        throw error;
      }
    }));
    console.log(JSON.stringify(found));
    """
    arguments = (kind, str(RATIO), json.dumps([*KEYS]), json.dumps(QUERIES))
    found = iter(json.loads(node(script, *arguments)))
    for keys in KEYS:
        for queries in QUERIES:
            try:
                expected = numbers_of(geometry.axis_window(queries, keys, RATIO, kind))
            except ValueError:
                expected = "refused"
            assert next(found) == expected, (queries, keys)


@needs_node
def test_tiles_are_those_of_numpy() -> None:
    pairs = [(queries, keys) for queries in (17, 64, 112, 113, 224, 448) for keys in (6, 7, 14, 16)]
    pairs = [(queries, keys) for queries, keys in pairs if queries >= keys]
    script = """
    const pairs = JSON.parse(process.argv.at(-1));
    const windows = pairs.map(([queries, keys]) => t.axisWindow(queries, keys, 0.1));
    console.log(JSON.stringify(windows.map((one, i) => t.planTiles(one, windows[(i + 5) % windows.length]))));
    """
    windows = [geometry.axis_window(queries, keys, 0.1) for queries, keys in pairs]
    shifted = windows[5:] + windows[:5]
    expected = [[tiles.size for tiles in geometry.plan_tiles(*both)] for both in zip(windows, shifted)]
    assert json.loads(node(script, json.dumps(pairs))) == expected


@needs_node
@pytest.mark.parametrize("window", ["paper", "natten"])
@pytest.mark.parametrize("loops", [True, False])
def test_tables_are_those_of_numpy(window: str, loops: bool) -> None:
    random = np.random.default_rng(0)
    frequencies = [[float(f"{x:.9g}") for x in row] for row in random.uniform(-300, 300, (2, SETTINGS["qk_dim"]))]
    settings = SETTINGS | dict(window=window, loops=loops, frequencies=frequencies)
    batch = 2
    calls = [
        (settings, (batch, 3, *image), (batch, channels, *cells), size, channels)
        for image, cells, size, channels in SHAPES
        if window == "paper" or all(n >= m for n, m in zip(size, cells))
    ]
    script = """
    const list = ({ type, dims, data }) => ({ type, dims, data: Array.from(data, Number) });
    const tables = JSON.parse(process.argv.at(-1)).map((call) => t.onnxTables(...call));
    const listed = tables.map((one) => Object.fromEntries(Object.entries(one).map(([name, x]) => [name, list(x)])));
    console.log(JSON.stringify(listed));
    """
    for call, found in zip(calls, json.loads(node(script, json.dumps(calls))), strict=True):
        expected = onnx_tables(*call)
        assert set(expected) - set(found) == {"strip_shares"}  # of JAFAR
        for name, ours in found.items():
            table = expected[name]
            assert (ours["type"], tuple(ours["dims"])) == (str(table.dtype), table.shape), name
            tolerance = 1e-6 if table.dtype == np.float32 else 0
            data = np.array(ours["data"]).reshape(table.shape)
            np.testing.assert_allclose(data, table, rtol=0, atol=tolerance, err_msg=name)


@needs_node
@pytest.mark.parametrize(("channels", "height", "width"), [(24, 3, 4), (5, 6, 7), (2, 4, 4)])
def test_pictures_are_those_of_numpy(channels: int, height: int, width: int) -> None:
    random, size = np.random.default_rng(0), (11, 13)
    map_ = (random.standard_normal((channels, height, width)) * np.arange(1, channels + 1)[:, None, None]).astype("f4")
    script = """
    const [channels, height, width, data] = JSON.parse(process.argv.at(-1));
    const map = { data: Float32Array.from(data), channels, height, width };
    const query = m.feature(map, 1, 2), size = [11, 13];
    const { components } = m.principal(map), fine = m.bilinear(map, size);
    const [start] = m.npy(fine.data, [1, channels, ...size]);
    console.log(JSON.stringify([
      components.map((x) => [...x]), [...fine.data], [...m.similarity(map, query, m.norms(map))],
      [...m.bilinearSimilarity(map, query, m.bilinearNorms(map, size), size)], [...start],
    ]));
    """
    argument = json.dumps([channels, height, width, map_.ravel().tolist()])
    components, fine, similar, between, start = json.loads(node(script, argument))
    last = np.moveaxis(map_, 0, -1)
    np.testing.assert_allclose(components, visualize.pca_basis([last]).components, rtol=0, atol=1e-5)
    expected = np.moveaxis(visualize.bilinear(last, size), -1, 0)
    np.testing.assert_allclose(np.reshape(fine, expected.shape), expected, rtol=0, atol=1e-5)
    for found, features in ((similar, map_), (between, expected)):
        products = np.tensordot(map_[:, 1, 2], features, 1)
        cosines = products / (np.linalg.norm(map_[:, 1, 2]) * np.linalg.norm(features, axis=0))
        np.testing.assert_allclose(found, cosines.ravel(), rtol=0, atol=1e-5)
    file = io.BytesIO(bytes(start) + np.array(fine, "<f4").tobytes())
    np.testing.assert_array_equal(np.load(file), np.array(fine, "f4").reshape(1, channels, *size))


@needs_node
def test_metadata_are_read(tmp_path: Path) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    metadata = {"anyup": '{"window": "paper"}', "ö": "ü" * 200}
    onnx.helper.set_model_props(model, metadata)
    file = tmp_path / "empty.onnx"
    file.write_bytes(model.SerializeToString())
    script = """
    import { readFileSync } from "node:fs";
    const bytes = new Uint8Array(readFileSync(process.argv.at(-1)));
    const refuses = (part) => { try { t.readMetadata(part); return false; } catch { return true; } };
    console.log(JSON.stringify([t.readMetadata(bytes), refuses(bytes.subarray(0, bytes.length - 3))]));
    """
    assert json.loads(node(script, str(file))) == [metadata, True]
