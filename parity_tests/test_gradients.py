"""Loss and gradients of one training step against those of the published implementation."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import anyup_jax.attention
import anyup_torch.attention
from anyup_jax.layers import Unused
from convert import Checkpoint
from parity_tests import tolerances
from parity_tests.golden import CASES, GOLDEN, needs_golden

pytestmark = needs_golden
BOTH = [("jax", name) for name in anyup_jax.attention.PORTABLE]
BOTH += [("torch", name) for name in anyup_torch.attention.PORTABLE]
EPS = 1e-6  # of the target's scaling


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "training_step.safetensors")


def objective(prediction, target, axis: int):
    """mean(1 - cos) plus the MSE after the target's scaling to [0, 1] over the channels of each position.

    Works on numpy, JAX and PyTorch arrays alike.
    """
    low, high = (torch_or_numpy(target, name, axis) for name in ("min", "max"))
    norms = ((prediction**2).sum(axis) * (target**2).sum(axis)) ** 0.5
    cosine = (prediction * target).sum(axis) / norms
    return (1 - cosine).mean() + (((prediction - target) / (high - low + EPS)) ** 2).mean()


def torch_or_numpy(target, name: str, axis: int):
    if isinstance(target, torch.Tensor):
        return getattr(target, f"a{name}")(axis, keepdim=True)
    return getattr(target, name)(axis, keepdims=True)


@functools.cache
def loss_and_gradients(framework: str, backend: str) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss and PyTorch key -> gradient, zeros for the weights that get none."""
    arrays = (recorded()[name] for name in ("image", "features", "target"))
    if framework == "torch":
        model = anyup_torch.from_pretrained(GOLDEN / "weights.pth", backend=backend)
        image, features, target = map(torch.from_numpy, arrays)
        value = objective(model(image, features, target.shape[2:]), target, 1)
        value.backward()
        named = model.named_parameters()
        return value.item(), {
            name: (p.grad if p.grad is not None else torch.zeros_like(p)).numpy() for name, p in named
        }
    model = anyup_jax.from_pretrained(GOLDEN / "weights.pth", backend=backend)
    image, features, target = (array.transpose(0, 2, 3, 1) for array in arrays)
    graph, trained, unused = nnx.split(model, nnx.Param, Unused)

    @jax.jit
    @jax.value_and_grad
    def compute(trained):
        return objective(nnx.merge(graph, trained, unused)(image, features, target.shape[1:3]), target, -1)

    value, gradients = compute(trained)
    flat = {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(gradients)}
    flat |= {path: np.zeros(variable.shape, np.float32) for path, variable in nnx.to_flat_state(unused)}
    return float(value), Checkpoint.from_flax({".".join(path): array for path, array in flat.items()}).tensors


def test_the_objective_is_the_recorded_one():
    value = objective(recorded()["output"].astype(np.float64), recorded()["target"].astype(np.float64), 1)
    assert abs(value - CASES["training_step"]["loss"]) <= tolerances.LOSS


@pytest.mark.parametrize(("framework", "backend"), BOTH)
def test_loss(framework, backend):
    value, _ = loss_and_gradients(framework, backend)
    assert abs(value - CASES["training_step"]["loss"]) <= tolerances.LOSS


@pytest.mark.parametrize(("framework", "backend"), BOTH)
def test_every_gradient(framework, backend):
    expected = {name[len("grad/") :]: array for name, array in recorded().items() if name.startswith("grad/")}
    _, gradients = loss_and_gradients(framework, backend)
    assert set(gradients) == set(expected) | set(CASES["training_step"]["no_grad"])
    errors = {name: np.abs(gradients[name] - array).max() / np.abs(array).max() for name, array in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerances.GRADIENT} == {}


@pytest.mark.parametrize(("framework", "backend"), BOTH)
def test_weights_that_never_reach_the_output_get_no_gradient(framework, backend):
    _, gradients = loss_and_gradients(framework, backend)
    assert not any(gradients[name].any() for name in CASES["training_step"]["no_grad"])
    for part in ("weight", "bias"):
        value = np.split(gradients[f"cross_decode.cross_attn.attention.in_proj_{part}"], 3)[2]
        assert not value.any()
