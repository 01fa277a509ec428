"""A guide whose rows are spread over devices: the same output, gradients too, and memory that falls with the chips."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import anyup_jax
from anyup_jax import sharding
from benchmarks import tpu

DEVICES = 8
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
import anyup_jax

def inputs(image, cells, channels=19, batch=2):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, *size), np.float32) for size in ((*image, 3), (*cells, channels))]

def spread(image, mesh=None, spec=P(None, "rows")):
    return jax.device_put(image, NamedSharding(mesh or jax.make_mesh((8,), ("rows",)), spec))

def model(dtype="float32", **config):
    config = anyup_jax.AnyUpConfig(**dict(qk_dim=64, num_heads=2) | config)
    return anyup_jax.AnyUp(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))

def error(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).max())
"""


def run(program: str) -> dict:
    """Run PROGRAM and `program` on 8 host devices, and return what it prints last."""
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    options = dict(capture_output=True, text=True, check=False, env=os.environ | flags)
    process = subprocess.run([sys.executable, "-c", PROGRAM + program], **options)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_equal_to_one_device() -> None:
    cases = {
        "tiled": (dict(backend="tiled"), (64, 48), (8, 6), None),
        "dense": (dict(backend="dense"), (64, 48), (8, 6), None),
        "smaller output": ({}, (64, 40), (7, 5), (32, 20)),
        "larger output, kernel of 3": (dict(kernel_size=3), (64, 48), (5, 6), (96, 52)),
        "natten": (dict(window="natten"), (64, 48), (5, 6), (96, 52)),
        "every key": (dict(window_ratio=0.0), (32, 40), (9, 3), None),
        "one row a device": ({}, (8, 24), (3, 4), None),
        "more cells than rows a device": ({}, (24, 24), (16, 16), None),
    }
    errors = run(f"""
errors = {{}}
for name, (config, image, cells, size) in {cases!r}.items():
    net, (image, features) = model(**config), inputs(image, cells)
    expected = anyup_jax.upsample(net, image, features, size)
    ours = anyup_jax.upsample(net, spread(image), features, size, q_chunk_size=50)
    assert ours.sharding.spec[1] == "rows" and len(ours.addressable_shards) == 8, ours.sharding
    errors[name] = error(ours, expected)
print(json.dumps(errors))
""")
    assert errors.keys() == cases.keys()
    assert max(errors.values()) <= 2e-5, errors


def test_batch_and_rows_values_and_types() -> None:
    errors = run("""
mesh = jax.make_mesh((2, 4), ("data", "rows"))
automatic = jax.make_mesh((2, 4), ("data", "rows"), (jax.sharding.AxisType.Auto,) * 2)
image, features = inputs((32, 24), (5, 4), batch=4)
values = features[..., :3]
net, half = model(), model("bfloat16")
errors = {
    "both axes": error(
        anyup_jax.upsample(net, spread(image, mesh, P("data", "rows")), features, values=values),
        anyup_jax.upsample(net, image, features, values=values),
    ),
    "partitioner": error(
        jax.jit(lambda image: net(image, features))(spread(image, automatic, P("data", "rows"))),
        anyup_jax.upsample(net, image, features),
    ),
    "bfloat16": error(
        anyup_jax.upsample(half, spread(image, mesh), features), anyup_jax.upsample(half, image, features)
    ),
}
print(json.dumps(errors))
""")
    assert errors.pop("bfloat16") <= 0.03, errors  # queries and keys are rounded to 8 bits
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.slow
def test_gradients() -> None:
    errors = run("""
from anyup_jax import sharding
from anyup_jax.model import compiled
net, (image, features) = model(kernel_size=3), inputs((32, 24), (5, 4))
graph, params, rest = nnx.split(net, nnx.Param, ...)
mesh, weight = jax.make_mesh((8,), ("rows",)), np.random.default_rng(1).standard_normal((2, 32, 24, 19), np.float32)

def loss(params, image, features, spread):
    state = nnx.merge_state(params, rest)
    if spread:
        output, = sharding.compiled(graph, state, image, [(features, None)], (32, 24), None, mesh, P(None, "rows"))
    else:
        output, = compiled(graph, state, image, [(features, None)], (32, 24), None)
    return (output * weight).sum()

gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
expected = gradient(params, image, features, False)
ours = gradient(params, spread(image), features, True)
errors = {
    jax.tree_util.keystr(path): error(a, b) / max(float(np.abs(b).max()), 1e-2)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected))
}
print(json.dumps(errors))
""")
    assert len(errors) > 40
    key_bias = next(name for name in errors if "'key']['bias']" in name)
    assert errors.pop(key_bias) < 0.01  # softmax does not see it: its gradient is rounding only
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize(
    ("image", "output", "spec", "message"),
    [
        (
            (1, 60, 64, 3),
            (64, 64),
            P(None, "rows"),
            r"image \(60\) and of the output \(64\) must be multiples",
        ),
        ((1, 64, 64, 3), (60, 64), P(None, "rows"), r"of the output \(60\)"),
        ((1, 64, 64, 3), (64, 64), P(None, "rows", "cols"), "over its batch and its rows only"),
        ((1, 64, 64, 3), (64, 64), P(None, ("rows", "cols")), "over one mesh axis"),
        ((1, 16, 64, 3), (64, 64), P(None, "rows"), "has 2 rows of the image, and a kernel of 5 needs more than 2"),
    ],
)
def test_refusals(image, output, spec, message) -> None:
    mesh = AbstractMesh((8, 1), ("rows", "cols"))
    with pytest.raises(ValueError, match=message):
        sharding.check(anyup_jax.AnyUpConfig(kernel_size=5), image, output, mesh, spec)


def test_one_device() -> None:
    assert sharding.row_sharding(np.zeros((1, 8, 8, 3))) is None
    assert sharding.row_sharding(jax.numpy.zeros((1, 8, 8, 3))) is None
    mesh = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
    image = jax.device_put(np.zeros((1, 8, 8, 3)), jax.sharding.NamedSharding(mesh, P(None, "rows")))
    net = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(qk_dim=16, num_heads=2), rngs=nnx.Rngs(0))
    assert anyup_jax.upsample(net, image, np.ones((1, 2, 2, 4), np.float32)).shape == (1, 8, 8, 4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_memory_falls_with_the_chips() -> None:
    """448² on 1 and on 8 chips of a v5e slice, compiled ahead of time: temporaries and output per chip."""
    one = tpu.Case(backend="tiled")
    whole, spread = tpu.compile_apart(one), tpu.compile_apart(dataclasses.replace(one, chips=8))
    assert whole.temporary < 200e6
    assert spread.output == pytest.approx(whole.output / 8, rel=0.01)
    assert spread.temporary < whole.temporary / 4
    assert spread.collectives["all-gather"] == spread.collectives["all-to-all"] == 0
    assert spread.collectives["collective-permute"] == 2  # a row up and a row down, for the queries' convolution
    assert spread.collectives["all-reduce"] > 0
