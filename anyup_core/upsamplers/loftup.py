"""LoftUp (arXiv 2504.14032): sizes, key table and published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from anyup_core.encoders.rows import Row, conv, linear, norm
from anyup_core.layouts import SAME, TRANSPOSE
from anyup_core.settings import require
from anyup_core.upsamplers.config import Published, UpsamplerConfig, require_positive, size_of

ADDRESS = "haiwen/loftup-"  # on the Hugging Face hub
FILE = "pytorch_model.bin"
NAMES = {
    **dict.fromkeys(("dinov2s", "dinov2s_reg"), 384),
    **dict.fromkeys(("dinov2b", "dinov2b_reg"), 768),
    "clip": 512,
    **dict.fromkeys(("siglip", "siglip2"), 768),
}
"""Published name -> channels of the encoder's features."""

LAYERS, HEADS = 2, 4
CELL_FREQUENCIES, IMAGE_FREQUENCIES = 5, 20
CELL_CODE = 2 * 2 * CELL_FREQUENCIES  # channels of a cell's position
IMAGE_CODE = 2 * 5 * IMAGE_FREQUENCIES + 3  # channels of a pixel's position and colour, and the colour itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftUpConfig(UpsamplerConfig):
    """Settings of one LoftUp, of the published sine variant.

    Attributes:
        channels: of the features C; a multiple of 4, as the attention has 4 heads of C + 20 channels.
        per_image: scale the colours by the range of each image by itself. The published model takes the range of the
            whole batch, so that an image's output depends on its companions.

    Raises:
        ValueError: if a field has a value no model can have.
    """

    decided: ClassVar[tuple[str, ...]] = ("channels",)
    entries: ClassVar[tuple[str, ...]] = ("state_dict",)

    channels: int = 384
    per_image: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "channels")
        require(self.channels % HEADS == 0, "channels", self.channels, f"it must be a multiple of {HEADS}")
        require(isinstance(self.per_image, bool), "per_image", self.per_image, "it is True or False")

    @property
    def width(self) -> int:
        return self.channels

    @property
    def dim(self) -> int:
        """Width D of queries, keys and values."""
        return self.channels + CELL_CODE

    def rows(self) -> Iterator[Row]:
        dim, channels = self.dim, self.channels
        yield from norm("channelnorm.norm", channels, "norm")
        yield Row("upsampler.lr_pe.biases", (2, 2, CELL_FREQUENCIES), "cell_code.biases")
        yield Row("upsampler.fourier_feat.1.biases", (2, 5, IMAGE_FREQUENCIES), "image_code.biases")
        yield from norm("upsampler.first_conv.0.norm", IMAGE_CODE, "queries.norm")
        for torch, flax, inputs in (("1", "1", IMAGE_CODE), ("4", "2", dim)):
            yield from conv(f"upsampler.first_conv.{torch}", (dim, inputs, 3, 3), f"queries.conv{flax}")
            yield from batch_norm(f"upsampler.first_conv.{int(torch) + 1}", dim, f"queries.batch_norm{flax}")
        for layer in range(LAYERS):
            torch, flax = f"upsampler.ca_transformer.layers.{layer}", f"layer{layer + 1}"
            yield from norm(f"{torch}.0.norm_q", dim, f"{flax}.norm_q")
            yield from norm(f"{torch}.0.norm_kv", dim, f"{flax}.norm_kv")
            for end, shape, op in (("weight", (3 * dim, dim), TRANSPOSE), ("bias", (3 * dim,), SAME)):
                for i, name in enumerate(("query", "key", "value")):
                    path = f"{flax}.{name}.{'kernel' if end == 'weight' else end}"
                    yield Row(f"{torch}.0.attention.in_proj_{end}", shape, path, op, part=(i, 3))
            yield from linear(f"{torch}.0.attention.out_proj", dim, dim, f"{flax}.out")
            yield from norm(f"{torch}.1.net.0", dim, f"{flax}.norm_ff")
            yield from linear(f"{torch}.1.net.1", dim, channels, f"{flax}.narrow")
            yield from linear(f"{torch}.1.net.4", channels, dim, f"{flax}.widen")
        yield from norm("upsampler.ca_transformer.norm", dim, "final_norm")
        yield from conv("upsampler.final_conv.0", (channels, dim, 1, 1), "final_conv")
        yield from norm("upsampler.final_conv.1", channels, "output_norm")

    @classmethod
    def select(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return upsampler and channel norm, also of a training checkpoint, which has the norm after the encoder.

        Raises ValueError for an upsampler without its channel norm.
        """
        if any(key.startswith("model.1.norm.") for key in tensors):
            tensors = {key.replace("model.1.norm.", "channelnorm.norm."): x for key, x in tensors.items()}
            return {key: x for key, x in tensors.items() if key.startswith(("channelnorm.", "upsampler."))}
        whole = any(key.startswith("channelnorm.") for key in tensors)
        if not whole and any(key.removeprefix("upsampler.").startswith("ca_transformer.") for key in tensors):
            raise ValueError(
                "this is LoftUp without its channel norm (channelnorm.norm.weight and .bias), as a model.safetensors "
                f"on the hub may be; give the {FILE} beside it, which has them."
            )
        return dict(tensors)

    @classmethod
    def shapes_tell(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"channels": size_of(tensors, "channelnorm.norm.weight", 0, cls.channels)}

    @classmethod
    def published(cls, name: str) -> Published | None:
        return Published(f"{ADDRESS}{name}/{FILE}", NAMES[name]) if name in NAMES else None

    @classmethod
    def published_names(cls) -> tuple[str, ...]:
        return tuple(NAMES)


def linspace(start: float, stop: float, size: int) -> Float[np.ndarray, " size"]:
    """Return evenly spaced numbers, end points included, float32, bit for bit as PyTorch computes them on a CPU.

    Every entry is rounded once, and counted from the end that is nearer; a single one is `start`.
    """
    if size == 1:
        return np.full(1, start, np.float32)
    step, i = np.float64(np.float32((stop - start) / (size - 1))), np.arange(size)
    return np.where(i < size // 2, start + i * step, stop - (size - 1 - i) * step).astype(np.float32)


def frequencies(count: int) -> Float[np.ndarray, " count"]:
    """Return the frequencies of a Fourier code, from exp(-2) to exp(10), float32.

    They reach 22026, so that one unit in the last place of a coordinate moves a phase by 1e-3: coordinates, frequencies
    and their products have to be float32, rounded as here, to give the output of the published model.
    """
    return np.exp(linspace(-2, 10, count).astype(np.float64)).astype(np.float32)


def coordinates(size: int) -> Float[np.ndarray, " size"]:
    """Return the coordinates of rows or columns, from -1 to 1, float32."""
    return linspace(-1, 1, size)


def batch_norm(torch: str, width: int, flax: str) -> Iterator[Row]:
    """Yield scale, shift, running statistics and the counter of a batch norm that may go on learning."""
    yield from norm(torch, width, flax)
    yield Row(f"{torch}.running_mean", (width,), f"{flax}.mean")
    yield Row(f"{torch}.running_var", (width,), f"{flax}.var")
    yield Row(f"{torch}.num_batches_tracked", (), f"{flax}.batches", integer=True)
