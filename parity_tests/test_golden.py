"""Outputs and intermediate results against those of the published implementation, in both frameworks."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import anyup_jax.attention
import anyup_torch.attention
from anyup_jax.pooling import adaptive_average_pool
from parity_tests import tolerances
from parity_tests.golden import CASES, GOLDEN, needs_golden

pytestmark = needs_golden
FORWARD = [name for name, case in CASES.items() if "image" in case]
BACKENDS = {"jax": tuple(anyup_jax.attention.PORTABLE), "torch": tuple(anyup_torch.attention.PORTABLE)}
BOTH = [(framework, backend) for framework, names in BACKENDS.items() for backend in names]
STAGES = ("image_encoder", "guide", "query_pooled", "key_pooled", "feature_unification", "key_features", "key")


@functools.cache
def model(framework: str, name: str, backend: str):
    case, package = CASES[name], {"jax": anyup_jax, "torch": anyup_torch}[framework]
    fields = {field: case[field] for field in ("num_heads", "window_ratio")}
    return package.from_pretrained(GOLDEN / case["weights"], window=case["variant"], backend=backend, **fields)


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / f"{name}.safetensors")


def last(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)


def first(array) -> np.ndarray:
    return np.asarray(array).transpose(0, 3, 1, 2)


def output(framework: str, name: str, backend: str, *, grad: bool = False, values: np.ndarray | None = None):
    """Return the output for a case, NCHW; in PyTorch `grad` decides between the plain and the streamed computation."""
    size = CASES[name]["output_size"] and tuple(CASES[name]["output_size"])
    inputs = [arrays(name)["image"], arrays(name)["features"], *([] if values is None else [values])]
    if framework == "jax":
        image, features, *given = map(last, inputs)
        return first(anyup_jax.upsample(model(framework, name, backend), image, features, size, None, *given))
    image, features, *given = map(torch.from_numpy, inputs)
    with torch.set_grad_enabled(grad):
        result = model(framework, name, backend)(image, features, size, values=given[0] if given else None)
    assert result.requires_grad == grad
    return result.detach().numpy()


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize(("framework", "backend"), BOTH)
def test_output(framework, backend, name):
    error = np.abs(output(framework, name, backend) - arrays(name)["output"])
    assert error.max() <= tolerances.OUTPUT


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("backend", BACKENDS["torch"])
def test_output_of_the_computation_that_autograd_sees(backend, name):
    error = np.abs(output("torch", name, backend, grad=True) - arrays(name)["output"])
    assert error.max() <= tolerances.OUTPUT


@pytest.mark.parametrize(("framework", "backend"), BOTH)
def test_as_close_to_float64_as_the_reference(framework, backend):
    exact = arrays("square_c384_double")["output_float64_rounded"].astype(np.float64)
    ours, theirs = output(framework, "square_c384", backend), arrays("square_c384")["output"]
    distances = [np.sqrt(np.mean((result - exact) ** 2)) for result in (ours, theirs)]
    assert distances[0] <= tolerances.DOUBLE_RMS * distances[1]


@functools.cache
def stages(framework: str) -> dict[str, np.ndarray]:
    """Return what a model computes on the way to its output, NCHW."""
    net, given, size = model(framework, "intermediates", "auto"), arrays("intermediates"), (40, 40)
    cells = given["features"].shape[2:]
    if framework == "torch":
        image, features = torch.from_numpy(given["image"]), torch.from_numpy(given["features"])
        pool = torch.nn.functional.adaptive_avg_pool2d
        with torch.no_grad():
            encoded = net.image_encoder(image)
            guide = net.rope(encoded)
            query, key = pool(net.query_encoder(guide), size), pool(net.key_encoder(guide), cells)
            unified = net.key_features_encoder[0](torch.nn.functional.normalize(features, dim=1))
            described = net.key_features_encoder(features)
            combined = net.aggregation(torch.cat([key, described], 1))
            maps = (encoded, guide, query, key, unified, described, combined)
        results = dict(zip(STAGES, (tensor.numpy() for tensor in maps)))
    else:
        image, features = jnp.asarray(last(given["image"])), jnp.asarray(last(given["features"]))
        encoded = net.image_encoder(image)
        guide = net.rope(encoded)
        query = net.query_encoder(guide, lambda x: adaptive_average_pool(x, size))
        key = net.key_encoder(guide, lambda x: adaptive_average_pool(x, cells))
        unified = net.key_features_encoder.unify(features / jnp.linalg.norm(features, axis=-1, keepdims=True))
        described = net.key_features_encoder(features)
        combined = net.aggregation(jnp.concatenate([key, described], -1))
        found = (encoded, guide, query, key, unified, described, combined)
        results = dict(zip(STAGES, map(first, found)))
    return results | {name: results[name][:, :, ::4, ::4] for name in ("image_encoder", "guide")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("framework", BACKENDS)
def test_intermediate_results(framework, stage):
    expected = arrays("intermediates")[stage]
    error = np.abs(stages(framework)[stage] - expected)
    assert error.max() <= tolerances.STAGE * tolerances.largest(expected)


@pytest.mark.parametrize(("framework", "backend"), BOTH)
def test_attention_weights(framework, backend):
    """Values that are one-hot per cell come out as the head-averaged weights."""
    height, width = arrays("intermediates")["features"].shape[2:]
    onehot = np.eye(height * width, dtype=np.float32).reshape(1, height * width, height, width)
    weights = output(framework, "intermediates", backend, values=onehot)[0].reshape(height * width, -1).T
    assert np.abs(weights - arrays("intermediates")["attention"][0]).max() <= tolerances.OUTPUT
