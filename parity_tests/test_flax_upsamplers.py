"""JAFAR, FeatUp, LoftUp and NAF in JAX against the published implementations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from anyup_jax import upsamplers
from anyup_jax.upsamplers import featup, loftup
from parity_tests import tolerances
from parity_tests.golden import UPSAMPLER_CASES, UPSAMPLERS, needs_upsamplers, upsampler_settings

pytestmark = needs_upsamplers
OUTPUTS = [name for name, case in UPSAMPLER_CASES.items() if "weights" in case and "training_mode" not in case]
GRADIENTS = [name for name in OUTPUTS if name.endswith("_gradients")]


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    return load_file(UPSAMPLERS / f"{name}.safetensors")


def last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def model(name: str):
    case = UPSAMPLER_CASES[name]
    return upsamplers.from_pretrained(case["method"], UPSAMPLERS / case["weights"], **upsampler_settings(case))


def size_of(name: str) -> tuple[int, int] | None:
    return tuple(UPSAMPLER_CASES[name]["output_size"]) if "output_size" in UPSAMPLER_CASES[name] else None


def inputs(name: str) -> list[np.ndarray]:
    return [last(arrays(name)[key]) for key in ("image", "features")]


def error(actual, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual) - expected).max())


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(name):
    method, size = UPSAMPLER_CASES[name]["method"], size_of(name)
    expected = last(arrays(name)["output"])
    for chunk in (None, 37) if name.endswith("_intermediates") else (None,):
        output = nnx.jit(lambda model, *x, chunk=chunk: model(*x, size, q_chunk_size=chunk))(model(name), *inputs(name))
        assert (output.shape, output.dtype) == (expected.shape, jnp.float32)
        assert error(output, expected) <= tolerances.UPSAMPLERS[method]


@pytest.mark.parametrize("method", tolerances.UPSAMPLERS)
def test_output_without_compilation(method):
    name = {"jafar": "jafar_kernel3", "naf": "naf_same_size", "featup": "featup_small_guidance"}.get(
        method, f"{method}_small_guidance"
    )
    output = model(name)(*inputs(name), output_size=size_of(name))
    assert error(output, last(arrays(name)["output"])) <= tolerances.UPSAMPLERS[method]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    case, size, projection = UPSAMPLER_CASES[name], size_of(name), last(arrays(name)["projection"])

    def loss(model, image, features):
        return (model(image, features, size) * projection).sum()

    arguments = [jnp.asarray(x) for x in inputs(name)]
    to_model, to_image, to_features = nnx.jit(nnx.grad(loss, argnums=(0, 1, 2)))(model(name), *arguments)
    published = upsamplers.to_published(case["method"], to_model)
    expected = {key.removeprefix("grad/"): x for key, x in arrays(name).items() if key.startswith("grad/")}
    assert published.keys() == expected.keys()
    for key, gradient in expected.items():
        bound = tolerances.CANCELLING if gradient.size == 1 else tolerances.GRADIENT
        assert error(published[key], gradient) <= bound * np.abs(gradient).max(), key
    for actual, key in ((to_image, "grad_image"), (to_features, "grad_features")):
        assert error(actual, last(arrays(name)[key])) <= tolerances.GRADIENT * np.abs(arrays(name)[key]).max()


def test_adaptive_convolution():
    case = arrays("featup_adaptive_conv")
    padded, filters, projection = last(case["input"]), jnp.asarray(case["filters"]), last(case["projection"])
    for chunk in (None, 5):
        convolve = functools.partial(featup.adaptive_conv, q_chunk_size=chunk)
        assert error(jax.jit(convolve)(padded, filters), last(case["output"])) <= tolerances.OUTPUT

    def loss(padded, filters):
        return (featup.adaptive_conv(padded, filters) * projection).sum()

    to_padded, to_filters = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(padded), filters)
    gradients = {key: x for key, x in case.items() if key.startswith("grad")}
    (to_input,) = (x for x in gradients.values() if x.shape == case["input"].shape)
    (to_kernels,) = (x for x in gradients.values() if x.shape == case["filters"].shape)
    assert error(to_padded, last(to_input)) <= tolerances.GRADIENT * np.abs(to_input).max()
    assert error(to_filters, to_kernels) <= tolerances.GRADIENT * np.abs(to_kernels).max()


def test_phases_are_bit_equal():
    case, tuned = arrays("loftup_intermediates"), model("loftup_intermediates")
    image = jnp.asarray(last(case["image"]))
    np.testing.assert_array_equal(loftup.frequencies(20), case["frequencies_image"])
    np.testing.assert_array_equal(loftup.coordinates(24), case["grid_rows"])
    scale = functools.partial(loftup.scale_colours, per_image=False)
    for run in (scale, jax.jit(scale)):
        np.testing.assert_array_equal(run(image), last(case["scaled_image"]))
    code = nnx.jit(lambda model, image: model.image_code((24, 20), scale(image)))(tuned, image)
    assert error(code, last(case["fourier"])) <= 5e-7  # one unit in the last place of a phase would be 1e-3


def test_statistics_of_the_batch():
    name = "loftup_batch_statistics"
    trained = model(name)
    trained.train()
    output = nnx.jit(lambda model, *x: model(*x))(trained, *inputs(name))
    assert error(output, last(arrays(name)["output"])) <= tolerances.UPSAMPLERS["loftup"]
    published = upsamplers.to_published("loftup", nnx.state(trained))
    after = {key.removeprefix("after/"): x for key, x in arrays(name).items() if key.startswith("after/")}
    assert after
    for key, expected in after.items():
        assert error(published[key], expected) <= tolerances.OUTPUT, key
