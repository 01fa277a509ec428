"""Runs both frameworks on the same input."""

from __future__ import annotations

import numpy as np

from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.upsamplers.checkpoint import UpsamplerCheckpoint

TOLERANCE = 1e-4  # on outputs of order 1; float32 in two frameworks differs by about 1e-5
IMAGE, FEATURES = (1, 48, 60, 3), (1, 6, 5, 24)  # NHWC; a whole ratio in both directions, for the natten window
CELLS = (4, 5)  # of the image that encoders see
UPSAMPLED = (10, 9)  # cells of the features of other upsamplers: NAF needs as many as its window has

Weights = Checkpoint | EncoderCheckpoint | UpsamplerCheckpoint


def compare(torch_side: Weights, flax_side: Weights) -> str:
    """Return a line on the largest difference between both frameworks.

    Raises:
        ValueError: if it exceeds TOLERANCE.
        ImportError: if a framework is not installed.
    """
    try:
        if isinstance(torch_side, EncoderCheckpoint) and isinstance(flax_side, EncoderCheckpoint):
            difference = largest_encoder_difference(torch_side, flax_side)
            line = f"largest difference between timm and Flax: {difference:.2e} of the largest feature"
        elif isinstance(torch_side, Checkpoint) and isinstance(flax_side, Checkpoint):
            difference = largest_difference(torch_side, flax_side)
            line = f"largest difference between PyTorch and Flax: {difference:.2e}"
        elif isinstance(torch_side, UpsamplerCheckpoint) and isinstance(flax_side, UpsamplerCheckpoint):
            difference = largest_upsampler_difference(torch_side, flax_side)
            line = f"largest difference between PyTorch and Flax: {difference:.2e}"
        else:
            raise TypeError("the two sides are different models; compare a model with itself in another format.")
    except ImportError as error:
        raise ImportError(f"--verify runs both frameworks, and {error.name} is not installed.") from error
    if not difference <= TOLERANCE:
        raise ValueError(f"the frameworks differ by {difference:.2e}, more than {TOLERANCE:.0e}.")
    return line


def largest_difference(torch_side: Checkpoint, flax_side: Checkpoint, *, seed: int = 0) -> float:
    """Return the largest difference between two models' outputs for a seeded image and features.

    Args:
        torch_side: weights of the PyTorch model.
        flax_side: weights of the Flax model.
        seed: of the input.

    Raises:
        ImportError: if a framework is not installed.
    """
    import torch
    from flax import nnx

    import anyup_jax.pretrained
    import anyup_torch.pretrained

    random = np.random.default_rng(seed)
    image = random.standard_normal((*IMAGE[:3], flax_side.config["input_dim"]), dtype=np.float32)
    features = random.standard_normal(FEATURES, dtype=np.float32)
    upsample = nnx.jit(lambda model, *inputs: model(*inputs))
    flax_output = np.asarray(upsample(anyup_jax.pretrained.build(flax_side), image, features))
    model = anyup_torch.pretrained.build(torch_side)
    with torch.inference_mode():
        output = model(*(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, features)))
    return float(np.abs(output.numpy().transpose(0, 2, 3, 1) - flax_output).max())


def largest_encoder_difference(torch_side: EncoderCheckpoint, flax_side: EncoderCheckpoint, *, seed: int = 0) -> float:
    """Return the largest difference between timm's and Flax's features of a seeded image, and between class tokens.

    It is relative to the largest feature. Arguments as for `largest_difference`.

    Raises:
        ImportError: if a framework is not installed.
    """
    import jax.numpy as jnp
    import torch

    import anyup_torch.encoders
    from anyup_jax.encoders import creation

    published = flax_side.published
    class_token = bool(published.config.class_tokens)
    flax = creation.build(flax_side, class_token=class_token)
    encoder = anyup_torch.encoders.create(published.architecture, pretrained=False, class_token=class_token)
    reach = {key for row in torch_side.rows if not (row.unused or row.optional) for key in row.keys}
    state = {key: torch.from_numpy(torch_side.tensors[key].astype(np.float32)) for key in reach}
    encoder.model.load_state_dict(state, strict=False)  # without the head, which may have any number of classes
    shape = (1, *(cells * flax.stride for cells in CELLS), 3)
    image = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    ours, theirs = flax(jnp.asarray(image)), encoder(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    (maps, *token), (expected, *expected_token) = (ours, theirs) if class_token else ((ours,), (theirs,))
    pairs = zip((maps, *token), (expected.permute(0, 2, 3, 1), *expected_token))
    return max(float(np.abs(np.asarray(x) - y.numpy()).max() / np.abs(y.numpy()).max()) for x, y in pairs)


def largest_upsampler_difference(
    torch_side: UpsamplerCheckpoint, flax_side: UpsamplerCheckpoint, *, seed: int = 0
) -> float:
    """Return the largest difference between two upsamplers' outputs for a seeded image and features.

    It is relative to the largest output where that exceeds 1. Arguments as for `largest_difference`.

    Raises:
        ImportError: if a framework is not installed.
    """
    import torch
    from flax import nnx

    import anyup_jax.upsamplers.pretrained
    import anyup_torch.upsamplers.pretrained

    random, settings = np.random.default_rng(seed), flax_side.settings
    channels = settings.width or 4 * settings.multiple
    image = random.standard_normal((1, 60, 72, 3), dtype=np.float32)
    features = random.standard_normal((1, *UPSAMPLED, channels), dtype=np.float32)
    upsample = nnx.jit(lambda model, *inputs: model(*inputs))
    flax_output = np.asarray(upsample(anyup_jax.upsamplers.pretrained.build(flax_side), image, features))
    model = anyup_torch.upsamplers.pretrained.build(torch_side)
    with torch.inference_mode():
        output = model(*(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, features)))
    difference = np.abs(output.numpy().transpose(0, 2, 3, 1) - flax_output).max()
    return float(difference / max(1, np.abs(flax_output).max()))
