"""What only the TPU kernels do: `tests/test_attention.py` has the contract of every backend."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from anyup_core.geometry import axis_window
from anyup_jax.attention import dense, pallas_tpu, tiled, window_attention
from benchmarks.encoders import TPU_ENVIRONMENT

CASES = {  # output, cells, C, D, heads, batch, window, ratio, q_chunk_size
    "whole ratio": ((32, 48), (4, 6), 20, 64, 2, 2, "paper", 0.1, None),
    "natten, whole ratio": ((32, 48), (4, 6), 20, 64, 2, 1, "natten", 0.2, None),
    "odd sizes, C just above three registers": ((37, 53), (5, 7), 385, 128, 4, 1, "paper", 0.2, None),
    "fewer queries than a register has rows": ((3, 5), (2, 2), 1, 16, 2, 1, "paper", 0.3, 1),
}


def arrays(case, dtype="float32"):
    (height, width), (h, w), channels, dim, _, batch, window, ratio, _ = case
    rng = np.random.default_rng(0)
    shapes = (batch, height, width, dim), (batch, h, w, dim), (batch, h, w, channels), (batch, height, width, channels)
    rows, cols = axis_window(height, h, ratio, window), axis_window(width, w, ratio, window)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes], rows, cols


def error(ours, expected) -> float:
    """Largest error in units of the largest entry expected, at least 1."""
    ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["whole ratio", "natten, whole ratio"])
def test_bfloat16(name: str) -> None:
    """Within the rounding of the inputs' type: eight bits, in scores of some units and in the weights."""
    case = CASES[name]
    (*inputs, cotangent), rows, cols = arrays(case, "bfloat16")
    wide = [x.astype(jnp.float32) for x in inputs]
    ours, pull = jax.vjp(lambda *x: pallas_tpu(*x, rows, cols, num_heads=2, interpret=True), *inputs)
    expected, pull_expected = jax.vjp(lambda *x: dense(*x, rows, cols, num_heads=2), *wide)
    assert ours.dtype == jnp.bfloat16
    assert error(ours, expected) <= 0.01
    for gradient, right in zip(pull(cotangent), pull_expected(cotangent.astype(jnp.float32))):
        assert gradient.dtype == jnp.bfloat16
        assert np.abs(gradient - right).max() <= 0.02 * np.abs(right).max()


def test_several_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup_jax.attention import pallas_tpu as module

    kernels = sys.modules[module.__module__]
    monkeypatch.setattr(kernels, "VMEM_BUDGET", 600_000)
    kernels._plan.cache_clear()
    case = CASES["odd sizes, C just above three registers"]
    (*inputs, cotangent), rows, cols = arrays(case)
    assert kernels.kernel_tables(*inputs, rows, cols, 4).channels < 385
    ours, pull = jax.vjp(lambda *x: pallas_tpu(*x, rows, cols, num_heads=4, interpret=True), *inputs)
    expected, pull_expected = jax.vjp(lambda *x: dense(*x, rows, cols, num_heads=4), *inputs)
    kernels._plan.cache_clear()
    assert error(ours, expected) <= 2e-5
    for gradient, right in zip(pull(cotangent), pull_expected(cotangent)):
        assert np.abs(gradient - right).max() <= 1e-4 * np.abs(right).max()


def test_vmap_and_strips() -> None:
    case = CASES["whole ratio"]
    (query, key, values, _), rows, cols = arrays(case)
    expected = dense(query, key, values, rows, cols, num_heads=2)
    options = dict(num_heads=2, interpret=True)
    each = jax.vmap(lambda *x: pallas_tpu(*(y[None] for y in x), rows, cols, **options)[0])(query, key, values)
    assert error(each, expected) <= 2e-5
    strips = [
        jax.jit(lambda part, q: pallas_tpu(q, key, values, rows, cols, strip=part, **options))(
            part, query[:, at : at + 8]
        )
        for part, at in enumerate(range(0, 32, 8))
    ]
    assert error(jnp.concatenate(strips, 1), expected) <= 2e-5


def test_too_many_keys_are_refused_and_left_to_the_tiles() -> None:
    window = axis_window(256, 256, 0.0)
    query, key = (jax.ShapeDtypeStruct((1, 256, 256, 128), jnp.float32) for _ in range(2))
    with pytest.raises(ValueError, match=r"256 x 256 keys .* 36 MiB"):
        jax.eval_shape(lambda q, k: pallas_tpu(q, k, k, window, window, num_heads=4), query, key)
    attend = lambda q, k: window_attention(q, k, k, window, window, num_heads=4)  # noqa: E731
    assert jax.eval_shape(attend, query, key).shape == (1, 256, 256, 128)


def test_auto_is_tiled_on_this_platform() -> None:
    """Bit for bit, gradients too; the program for a CPU holds no trace of the kernels."""
    case = CASES["odd sizes, C just above three registers"]
    (*inputs, cotangent), rows, cols = arrays(case)
    outputs = []
    for backend in ("auto", "tiled"):
        attend = lambda *x: window_attention(*x, rows, cols, num_heads=4, backend=backend)  # noqa: B023, E731
        program = jax.jit(lambda c, *x: (attend(*x), *jax.vjp(attend, *x)[1](c)))  # noqa: B023
        outputs.append(program(cotangent, *inputs))
        assert "pallas" not in program.lower(cotangent, *inputs).as_text()
    for ours, expected in zip(*outputs):
        np.testing.assert_array_equal(ours, expected)
    assert error(outputs[0][0], tiled(*inputs, rows, cols, num_heads=4)) <= 1e-6


def test_named_on_this_platform_it_raises() -> None:
    (*inputs, _), rows, cols = arrays(CASES["whole ratio"])
    with pytest.raises(ValueError, match="interpret"):
        window_attention(*inputs, rows, cols, num_heads=2, backend="pallas_tpu")


def test_the_interpreter_of_the_memories() -> None:
    """The detailed interpreter, which has VMEM, semaphores and copies of its own."""
    case = CASES["fewer queries than a register has rows"]
    (*inputs, cotangent), rows, cols = arrays(case)
    options = dict(num_heads=2, interpret=pltpu.InterpretParams())
    ours, pull = jax.vjp(lambda *x: pallas_tpu(*x, rows, cols, **options), *inputs)
    expected, pull_expected = jax.vjp(lambda *x: dense(*x, rows, cols, num_heads=2), *inputs)
    assert error(ours, expected) <= 2e-5
    for gradient, right in zip(pull(cotangent), pull_expected(cotangent)):
        assert np.abs(gradient - right).max() <= 1e-4 * np.abs(right).max()


AHEAD_OF_TIME = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from anyup_jax.attention import window_attention
from anyup_core.geometry import axis_window

programs = {}
for name in ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"):
    mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:1]), ("chip",))
    for side, cells, channels in ((448, 32, 384), (896, 64, 768), (2048, 128, 1024)):
        for dtype in ("bfloat16", "float32")[: 1 + (side == 448)]:
            for window in ("paper", "natten")[: 1 + (side == 448)]:
                shapes = (side, 128), (cells, 128), (cells, channels), (side, channels)
                *inputs, output = (
                    jax.ShapeDtypeStruct((1, n, n, c), jnp.dtype(dtype), sharding=NamedSharding(mesh, P()))
                    for n, c in shapes
                )
                axis = axis_window(side, cells, 0.1, window)
                attend = functools.partial(window_attention, rows=axis, cols=axis, num_heads=4)
                gradient = lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g)
                for kind, function, args in (("forward", attend, inputs), ("backward", gradient, [*inputs, output])):
                    with jax.set_mesh(mesh):
                        program = jax.jit(function).lower(*args).compile()
                    key = f"{name} {side} {dtype} {window} {kind}"
                    text = program.as_text()
                    temporary = program.memory_analysis().temp_size_in_bytes
                    programs[key] = [text.count("tpu_custom_call"), text.count(" while("), temporary]

# a mapped gradient: its kernels run one image after the other
axis = axis_window(64, 4, 0.1)
attend = functools.partial(window_attention, rows=axis, cols=axis, num_heads=4)
gradient = jax.vmap(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))
args = [
    jax.ShapeDtypeStruct((2, 1, n, n, c), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    for n, c in ((64, 128), (4, 128), (4, 384), (64, 384))
]
with jax.set_mesh(mesh):
    mapped = jax.jit(gradient).lower(*args).compile().as_text().count("tpu_custom_call")
print(json.dumps([programs, mapped]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_programs_for_chips() -> None:
    """`auto` compiled for v5e, v5p and v6e: only the kernels, and next to no memory beside inputs and outputs."""
    options = dict(capture_output=True, text=True, check=False, env=os.environ | TPU_ENVIRONMENT)
    process = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME], **options)
    assert process.returncode == 0, process.stderr[-3000:]
    programs, mapped = json.loads(process.stdout.splitlines()[-1])
    assert mapped >= 2
    assert len(programs) == 3 * (4 + 1 + 1) * 2
    for name, (kernels, loops, temporary) in programs.items():
        assert kernels == (1 if name.endswith("forward") else 2), name
        assert loops == 0, name
        # at most: keys and values padded to whole registers, their gradients before rounding (float32), and the biases
        _, cells, channels = next(s for s in ((448, 32, 384), (896, 64, 768), (2048, 128, 1024)) if str(s[0]) in name)
        assert temporary <= cells**2 * (128 + channels) * (4 + 4) * 1.5 + 4e6, name
