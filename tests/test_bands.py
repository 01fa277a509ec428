"""Bands of rows: together what a plain call returns, in memory that does not grow with the output's height."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import anyup_jax
import anyup_torch
from anyup_jax import bands
from anyup_torch import bands as torch_bands

SMALL = dict(qk_dim=64, num_heads=2, kernel_size=3, lfu_dim=96)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: its sizes, the model's options, and whether the guide is held."""

    image: tuple[int, int] = (33, 27)
    cells: tuple[int, int] = (5, 4)
    output: tuple[int, int] | None = None
    batch: int = 1
    rows: int | None = 7
    values: bool = False
    q_chunk_size: int | None = None
    held: bool = False
    config: dict = dataclasses.field(default_factory=dict)


CASES = {
    "one row a band, two images": Case(batch=2, rows=1, image=(9, 14)),
    "all rows at once": Case(rows=100),
    "rows left to the function": Case(rows=None),
    "larger output, not square": Case(output=(70, 41), values=True),
    "smaller output": Case(output=(13, 50), q_chunk_size=20),
    "one row of output": Case(output=(1, 5)),
    "fewer image rows than cells": Case(image=(4, 27), output=(19, 27), batch=2),
    "natten": Case(output=(61, 27), rows=6, config=dict(window="natten")),
    "every key": Case(config=dict(window_ratio=0.0)),
    "dense": Case(output=(50, 27), config=dict(backend="dense")),
    "guide held, kernel of 1": Case(held=True, batch=2, config=dict(kernel_size=1, lfu_dim=None)),
}


def inputs(case: Case) -> tuple[list[np.ndarray], dict]:
    """Image and features, NHWC, and the options of a plain call."""
    random = np.random.default_rng(0)
    sizes = ((*case.image, 3), (*case.cells, 19), (*case.cells, 5))
    image, features, values = (random.standard_normal((case.batch, *size), np.float32) for size in sizes)
    image += 2  # norms with a mean far from zero
    options = dict(output_size=case.output, q_chunk_size=case.q_chunk_size, values=values if case.values else None)
    return [image, features], options


def joined(pieces, rows: int | None, axis: int):
    """Concatenate the bands; all but the last one have the rows asked for."""
    pieces = list(pieces)
    if rows is not None:
        height = sum(piece.shape[axis] for piece in pieces)
        assert [piece.shape[axis] for piece in pieces[:-1]] == [min(rows, height)] * (len(pieces) - 1)
        assert len(pieces) == -(-height // rows)
    return np.concatenate([np.asarray(piece) for piece in pieces], axis)


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Strips of few rows, so that small images have several and a shorter last one."""
    monkeypatch.setattr(bands, "BLOCK", 150)
    monkeypatch.setattr(torch_bands, "block_size", lambda pixels: 150)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_a_plain_call(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(bands, "GUIDE", 1 << 28 if case.held else 0)
    model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(**SMALL | case.config), rngs=nnx.Rngs(0))
    arrays, options = inputs(case)
    expected = np.asarray(anyup_jax.upsample(model, *map(jnp.asarray, arrays), **options))
    ours = joined(anyup_jax.upsample_bands(model, *arrays, **options, rows=case.rows), case.rows, 1)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_a_plain_call_in_pytorch(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(torch_bands, "GUIDE", 1 << 28 if case.held else 0)
    torch.manual_seed(0)
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**SMALL | case.config))
    arrays, options = inputs(case)
    arrays = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in arrays]
    if case.values:
        options["values"] = torch.from_numpy(options["values"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(*arrays, **options)
    pieces = []
    for piece in anyup_torch.upsample_bands(model, *arrays, **options, rows=case.rows):
        assert torch.is_grad_enabled()  # the caller's mode is its own
        assert not piece.requires_grad
        pieces.append(piece)
    ours = joined(pieces, case.rows, 2)
    assert ours.shape == tuple(expected.shape)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=2e-5)


def test_norms_are_those_of_the_whole_image():
    """Sums over strips lose no digits, also where a channel's mean is far larger than its spread."""
    model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(**SMALL), rngs=nnx.Rngs(0))
    image = 30 + np.random.default_rng(0).standard_normal((2, 40, 31, 3), np.float32)
    maps = bands.prepare(model, jnp.asarray(image))
    assert maps.held
    x = np.asarray(model.image_encoder.conv(jnp.asarray(image)), np.float64).reshape(2, -1, 8, 8)
    scale = 1 / np.sqrt(x.var((1, 3)) + 1e-5)
    scales, shift = (np.asarray(a).reshape(2, 8, 8) for a in maps.affines["image_encoder"][0])
    np.testing.assert_allclose(scales, np.repeat(scale[..., None], 8, -1), rtol=2e-3)
    np.testing.assert_allclose(shift, -scales * x.mean((1, 3))[..., None], rtol=1e-5)
    assert [len(known) for known in maps.affines.values()] == [4, 4, 4]


def test_other_types():
    arrays, _ = inputs(Case())
    model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(**SMALL), rngs=nnx.Rngs(0))
    full = joined(anyup_jax.upsample_bands(model, *arrays, rows=7), 7, 1)
    half = joined(anyup_jax.upsample_bands(model, *arrays, rows=7, dtype=np.float16), 7, 1)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))

    rough = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(**SMALL), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    expected = np.asarray(anyup_jax.upsample(rough, *map(jnp.asarray, arrays)))
    ours = joined(anyup_jax.upsample_bands(rough, *arrays, rows=7), 7, 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.05)  # queries and keys are rounded to 8 bits
    assert 0 < np.abs(ours - full).max() < 0.1


def test_other_types_in_pytorch():
    arrays = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in inputs(Case())[0]]
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**SMALL))
    full = joined(anyup_torch.upsample_bands(model, *arrays, rows=7), 7, 2)
    half = joined(anyup_torch.upsample_bands(model, *arrays, rows=7, dtype=torch.float16), 7, 2)
    np.testing.assert_array_equal(half, full.astype(np.float16))
    model, arrays = model.bfloat16(), [x.bfloat16() for x in arrays]
    ours = list(anyup_torch.upsample_bands(model, *arrays, rows=7))
    assert {piece.dtype for piece in ours} == {torch.bfloat16}
    with torch.no_grad():
        expected = model(*arrays).float().numpy()
    np.testing.assert_allclose(joined([x.float() for x in ours], 7, 2), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (dict(rows=0), ValueError, "rows=0 "),
        (dict(rows=-3), ValueError, "rows=-3"),
        (dict(rows=2.5), ValueError, r"rows=2\.5"),
        (dict(rows=True), ValueError, "rows=True"),
        (dict(q_chunk_size=0), ValueError, "q_chunk_size=0"),
        (dict(output_size=(0, 4)), ValueError, "output_size"),
        (dict(dtype="int8"), TypeError, "must be a floating type of at most 32 bits"),
        (dict(dtype="float64"), TypeError, "must be a floating type of at most 32 bits"),
    ],
)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_refused_before_the_first_band(framework, options, error, sentence):
    arrays, _ = inputs(Case())
    if framework == "jax":
        model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(**SMALL), rngs=nnx.Rngs(0))
        function = anyup_jax.upsample_bands
    else:
        model, function = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**SMALL)), anyup_torch.upsample_bands
        arrays = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in arrays]
        options = {name: getattr(torch, x) if name == "dtype" else x for name, x in options.items()}
    with pytest.raises(error, match=sentence):
        function(model, *arrays, **options)
    with pytest.raises(ValueError, match="must have four axes"):
        function(model, arrays[0][0], arrays[1])


def test_one_program_serves_all_bands():
    """As many bands as you like, one compilation; and the iterator does no work that nobody asks for."""
    arrays, _ = inputs(Case())
    model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(**SMALL), rngs=nnx.Rngs(1))
    before = bands.finish._cache_size()
    iterator = anyup_jax.upsample_bands(model, *arrays, (70, 31), rows=4)
    assert bands.finish._cache_size() == before
    assert len(list(iterator)) == 18
    assert bands.finish._cache_size() == before + 1


MEMORY = """
import json, resource, sys
import numpy as np
height, rows = int(sys.argv[1]), 32
random = np.random.default_rng(0)
image, features = (random.standard_normal(s, dtype=np.float32) for s in ((1, 64, 64, 3), (1, 8, 8, 256)))
"""
MEMORY_JAX = """
from flax import nnx
import anyup_jax
model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(qk_dim=32, num_heads=2), rngs=nnx.Rngs(0))
pieces = anyup_jax.upsample_bands(model, image, features, (height, 128), rows=rows)
"""
MEMORY_TORCH = """
import torch, anyup_torch
model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(qk_dim=32, num_heads=2))
image, features = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (image, features))
pieces = anyup_torch.upsample_bands(model, image, features, (height, 128), rows=rows)
"""
MEASURE = """
size = sum(piece.nbytes for piece in pieces)
print(json.dumps([size, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("program", [MEMORY_JAX, MEMORY_TORCH], ids=["jax", "torch"])
def test_memory_does_not_grow_with_the_output(program):
    """Four times the height: 200 MB more output, less than a tenth of it more memory at the peak."""

    def peak(height: int) -> tuple[int, int]:
        argv = [sys.executable, "-c", MEMORY + program + MEASURE, str(height)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    (small, low), (large, high) = peak(512), peak(2048)
    assert large - small == 1536 * 128 * 256 * 4
    assert high - low < (large - small) / 10
