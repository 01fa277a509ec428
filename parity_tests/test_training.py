"""The training objective and one AdamW step against those of the published implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import anyup_jax
from anyup_jax.layers import Unused
from convert import Checkpoint
from parity_tests import tolerances
from parity_tests.golden import GOLDEN, needs_golden
from train import optim
from train.config import LossConfig, OptimizerConfig
from train.loss import Views, objective

pytestmark = needs_golden
TERMS = {"reconstruction": "reconstruction", "consistency": "consistency", "input": "downsample"}


def nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)


def by_torch_key(state: nnx.State, carried: nnx.State) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}
    flat |= {path: np.zeros(variable.shape, np.float32) for path, variable in nnx.to_flat_state(carried)}
    return Checkpoint.from_flax({".".join(path): array for path, array in flat.items()}).tensors


@functools.cache
def terms_and_gradients(remat: bool) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    recorded = load_file(GOLDEN / "training_objective.safetensors")
    guidance, augmented, lr, hr = (
        jnp.asarray(nhwc(recorded[name])) for name in ("guidance", "augmented_guidance", "lr_features", "hr_features")
    )
    crops = len(hr) // len(lr)
    views = Views(
        guidance,
        augmented,
        lr,
        hr.reshape(-1, crops, *hr.shape[1:]),
        jnp.asarray(recorded["crops"]).reshape(-1, crops, 2),
    )
    graph, trained, carried = nnx.split(anyup_jax.from_pretrained(GOLDEN / "weights.pth"), nnx.Param, Unused)

    @jax.jit
    def compute(trained):
        def total(trained):
            model = nnx.merge(graph, trained, carried)
            terms = objective(model, views, (8, 8), guidance.shape[1:3], LossConfig(), remat=remat)
            return sum(terms.values()), terms

        return jax.grad(total, has_aux=True)(trained)

    gradients, terms = compute(trained)
    return {name: float(value) for name, value in terms.items()}, by_torch_key(gradients, carried), recorded


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("term", TERMS)
def test_term(term: str, remat: bool) -> None:
    terms, _, recorded = terms_and_gradients(remat)
    assert abs(terms[term] - recorded[f"loss_{TERMS[term]}"].item()) <= tolerances.LOSS


@pytest.mark.parametrize("remat", [False, True])
def test_every_gradient_of_the_objective(remat: bool) -> None:
    _, gradients, recorded = terms_and_gradients(remat)
    expected = {name.removeprefix("grad/"): x for name, x in recorded.items() if name.startswith("grad/")}
    assert len(expected) > 60
    errors = {name: np.abs(gradients[name] - x).max() / np.abs(x).max() for name, x in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerances.GRADIENT} == {}


def test_one_step_of_adamw() -> None:
    """From the recorded gradients to the recorded parameters, the ones without a gradient staying as they are."""
    recorded = load_file(GOLDEN / "training_step.safetensors")
    model = anyup_jax.from_pretrained(GOLDEN / "weights.pth")
    _, trained, carried = nnx.split(model, nnx.Param, Unused)
    start = Checkpoint.from_flax(
        {".".join(path): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model))}
    ).tensors
    given = {name: recorded.get(f"grad/{name}", np.zeros_like(x)) for name, x in start.items()}
    flax = Checkpoint(given).flax()
    flat = [(path, x.replace(jnp.asarray(flax[".".join(path)]))) for path, x in nnx.to_flat_state(trained)]
    gradients = nnx.from_flat_state(flat)
    config = OptimizerConfig()
    moved, state = optim.update(
        config, jnp.float32(2e-4), gradients, jnp.float32(1), optim.init(config, trained), trained
    )
    after = by_torch_key(moved, carried)
    expected = {name.removeprefix("after_step/"): x for name, x in recorded.items() if name.startswith("after_step/")}
    wrong = {
        name for name, x in expected.items() if f"grad/{name}" in recorded and np.abs(after[name] - x).max() > 1e-6
    }
    assert len(expected) > 60
    assert wrong == set()
    assert int(state.count) == 1
