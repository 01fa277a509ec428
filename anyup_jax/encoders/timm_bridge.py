"""Any timm model as an encoder of JAX arrays: it runs in PyTorch, and DLPack shares the memory.

Nothing is copied where both frameworks compute on the same device and the model's maps have their channels last.
Such an encoder cannot be a part of a compiled JAX program; `encoders.create` gives those that can.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from anyup_core.encoders.frozen import EncoderSizes
from anyup_jax.encoders.encoder import Encoder

PREFIX = "timm:"


def create(name: str, **options: Any) -> Bridge:
    """Return a timm model, `name` being its name there; `options` are those of `anyup_torch.encoders.create`.

    Raises:
        ImportError: if PyTorch or timm is not installed.
        ValueError: for an unknown name, a layer the model does not have, or weights that do not fit.
        OSError: if the pretrained weights cannot be fetched or the file cannot be read.
    """
    try:
        encoders, torch = importlib.import_module("anyup_torch.encoders"), importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{PREFIX}{name} runs in PyTorch, and {error.name} is not installed: pip install "
            '"anyup-jax[torch]", or take one of anyup_jax.encoders.names().'
        ) from error
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    return Bridge(encoders.create(name, device=device, **options), torch, jax.devices(device)[0])


class Bridge(EncoderSizes):
    """An `anyup_torch.encoders.Encoder` between JAX arrays.

    Args:
        encoder: the encoder in PyTorch.
        torch: the module.
        device: the device of JAX that PyTorch computes on.

    Attributes:
        name: timm's name after `timm:`.
        layers, stride, channels, widths, class_token, mean, std: as of every encoder.
    """

    normalize, encode_array = Encoder.normalize, Encoder.encode_array

    def __init__(self, encoder: Any, torch: Any, device: jax.Device):
        self.encoder, self.torch, self.device = encoder, torch, device
        for field in ("layers", "stride", "channels", "widths", "mean", "std"):
            setattr(self, field, getattr(encoder, field))
        self.name, self.class_token = PREFIX + encoder.name, encoder.class_token

    def __call__(
        self, image: Float[Array | np.ndarray, "B H W 3"]
    ) -> Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B C"]]:
        """Return the features of a normalised image, h = H // stride, w = W // stride, where JAX computes by default;
        and its class token on request.

        Raises:
            ValueError: if its shape is not (B, H, W, 3), a side is shorter than the stride, or the model refuses it.
        """
        self.check_image(image)
        image = jax.block_until_ready(jax.device_put(image, self.device))
        output = self.encoder(self.torch.from_dlpack(image).permute(0, 3, 1, 2))
        features, *class_tokens = output if self.class_token else (output,)
        tensors = (features.permute(0, 2, 3, 1), *class_tokens)
        arrays = (jax.dlpack.from_dlpack(tensor.contiguous()) for tensor in tensors)
        arrays = tuple(jax.device_put(array, jax.devices()[0]) for array in arrays)
        return arrays if self.class_token else arrays[0]
