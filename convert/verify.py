"""Runs both frameworks on the same input."""

from __future__ import annotations

import numpy as np

from convert.apply import Checkpoint

TOLERANCE = 1e-4  # on outputs of order 1; float32 in two frameworks differs by about 1e-5
IMAGE, FEATURES = (1, 48, 60, 3), (1, 6, 5, 24)  # NHWC; a whole ratio in both directions, for the natten window


def largest_difference(torch_side: Checkpoint, flax_side: Checkpoint, *, seed: int = 0) -> float:
    """Return the largest difference between two models' outputs for a seeded image and features.

    Args:
        torch_side: weights of the PyTorch model.
        flax_side: weights of the Flax model.
        seed: of the input.

    Raises:
        ImportError: if a framework is not installed.
    """
    try:
        import torch
        from flax import nnx

        import anyup_jax.pretrained
        import anyup_torch.pretrained
    except ImportError as error:
        raise ImportError(f"--verify runs both frameworks, and {error.name} is not installed.") from error
    random = np.random.default_rng(seed)
    channels = flax_side.config["input_dim"]
    image = random.standard_normal((*IMAGE[:3], channels), dtype=np.float32)
    features = random.standard_normal(FEATURES, dtype=np.float32)
    upsample = nnx.jit(lambda model, *inputs: model(*inputs))
    flax_output = np.asarray(upsample(anyup_jax.pretrained.build(flax_side), image, features))
    model = anyup_torch.pretrained.build(torch_side)
    with torch.inference_mode():
        output = model(*(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, features)))
    return float(np.abs(output.numpy().transpose(0, 2, 3, 1) - flax_output).max())
