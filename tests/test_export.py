"""Programs that `jax.export` makes of the model: for several platforms in one, for any batch and number of channels."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies

import anyup_jax
from tests.training import ROOT

PLATFORMS = ["cpu", "tpu", "cuda"]
Program = export.Exported


@pytest.fixture(scope="module")
def model() -> anyup_jax.AnyUp:
    return anyup_jax.from_pretrained(next((ROOT / "anyup_core" / "weights").glob("*.safetensors")))


def exported(model: anyup_jax.AnyUp, batch, channels, vjp_order: int = 0) -> Program:
    """Export the call of a model, and read back what would be written."""
    shapes = [jax.ShapeDtypeStruct((batch, *rest), np.float32) for rest in ((48, 64, 3), (6, 8, channels))]
    program = export.export(jax.jit(lambda *inputs: model(*inputs)), platforms=PLATFORMS)(*shapes)
    return export.deserialize(program.serialize(vjp_order))


@pytest.fixture(scope="module")
def of_any_size(model: anyup_jax.AnyUp) -> Program:
    return exported(model, *export.symbolic_shape("batch, channels"))


def inputs(batch: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    image = random.standard_normal((batch, 48, 64, 3), np.float32)
    return image, random.standard_normal((batch, 6, 8, channels), np.float32)


@pytest.mark.parametrize(("batch", "channels"), [(1, 9), (3, 9), (1, 384), (3, 513)])
def test_one_program_for_any_batch_and_channels(
    batch: int, channels: int, model: anyup_jax.AnyUp, of_any_size: Program
) -> None:
    image, features = inputs(batch, channels)
    expected = anyup_jax.upsample(model, image, features)
    np.testing.assert_allclose(of_any_size.call(image, features), expected, rtol=0, atol=2e-5)


def test_the_kernels_are_in_it(of_any_size: Program) -> None:
    assert of_any_size.platforms == ("cpu", "tpu", "cuda")
    assert "tpu_custom_call" in of_any_size.mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [384, 900])
def test_it_compiles_for_a_tpu(channels: int, of_any_size: Program) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in inputs(2, channels)]
    compiled = jax.jit(lambda *inputs: of_any_size.call(*inputs)).lower(*shapes).compile()
    assert "tpu_custom_call" in compiled.as_text()


def test_a_program_with_its_gradient(model: anyup_jax.AnyUp) -> None:
    program, (image, features) = exported(model, 2, 5, vjp_order=1), inputs(2, 5)

    def gradients(call):
        return jax.grad(lambda *inputs: (call(*inputs) ** 2).sum(), (0, 1))(image, features)

    for ours, theirs in zip(gradients(program.call), gradients(model)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * abs(theirs).max())
