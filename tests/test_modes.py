"""JAX's global settings change no result: a model, encoders and a training in each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import training

NO_PROMOTION = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
MODES = [
    pytest.param("float32", {"JAX_ENABLE_X64": "1"}, id="x64"),
    pytest.param("bfloat16", NO_PROMOTION, id="no promotion", marks=pytest.mark.slow),
]
PROGRAM = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
import anyup_jax
from anyup_jax import encoders

dtype, path = sys.argv[1:]
random = np.random.default_rng(0)
image, features, photograph = (
    random.standard_normal(shape, np.float32) for shape in ((1, 32, 48, 3), (1, 4, 6, 24), (1, 32, 32, 3))
)
model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(qk_dim=16, num_heads=2), rngs=nnx.Rngs(0), dtype=dtype)
natten = anyup_jax.AnyUp(model.config.replace(window="natten", backend="dense"), rngs=nnx.Rngs(0), dtype=dtype)
outputs = dict(
    call=model(image, features),
    natten=natten(image, features),
    upsample=anyup_jax.upsample(model, image, features, (20, 30), 64),
    many=anyup_jax.upsample_many(model, image, [features, features[:, :2]])[1],
    bands=jnp.concatenate(list(anyup_jax.upsample_bands(model, image, features, (40, 60), rows=16)), 1),
    gradient=jax.grad(lambda x: model(image, x).astype(jnp.float32).sum())(jnp.asarray(features)),
    weights=nnx.grad(lambda m: m(image, features).astype(jnp.float32).sum())(model).query_encoder.conv.kernel[...],
)
for name in ("vit_tiny_patch16_224", "efficientnet_lite0"):
    encoder = encoders.create(name, pretrained=False, dtype=dtype)
    outputs[name] = encoder(encoder.normalize(jnp.asarray(photograph)))
np.savez(path, **{name: np.asarray(output, np.float32) for name, output in outputs.items()})
"""


def outputs(path: Path, dtype: str, **variables: str) -> dict[str, np.ndarray]:
    command = [sys.executable, "-c", PROGRAM, dtype, str(path)]
    subprocess.run(command, check=True, env=os.environ | variables)
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(("dtype", "variables"), MODES)
def test_outputs(tmp_path: Path, dtype: str, variables: dict[str, str]) -> None:
    expected, found = outputs(tmp_path / "plain.npz", dtype), outputs(tmp_path / "mode.npz", dtype, **variables)
    for name, output in expected.items():
        tolerance = (2e-5 if dtype == "float32" else 2e-2) * np.abs(output).max()
        np.testing.assert_allclose(found[name], output, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "variables"), MODES)
def test_training(tmp_path: Path, dtype: str, variables: dict[str, str]) -> None:
    words = "max_steps=2", "dataset.pasted_regions=2", "loss.outlines=1", f"dtype={dtype}"
    training.train(tmp_path, "output_dir=plain", *words)
    training.train(tmp_path, "output_dir=mode", *words, **variables)
    expected, found = (training.losses(tmp_path / name) for name in ("plain", "mode"))
    np.testing.assert_allclose(found, expected, rtol=2e-5 if dtype == "float32" else 2e-2)
