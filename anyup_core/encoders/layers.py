"""The layers of an encoder whose outputs are its features, and their common stride."""

from __future__ import annotations

from collections.abc import Sequence


def resolve_layers(name: str, layer: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return layers as indices from 0. Raises ValueError for one that an encoder of `count` layers does not have."""
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if not layers or any(not -count <= i < count for i in layers):
        raise ValueError(
            f"{name} has {count} layers; layer={layer!r} must be one or several of {-count} to {count - 1}."
        )
    return tuple(i % count for i in layers)


def common_stride(name: str, layers: tuple[int, ...], strides: Sequence[int]) -> int:
    """Return the stride of the chosen layers. Raises ValueError if they differ: only equal grids are concatenated."""
    chosen = {strides[i] for i in layers}
    if len(chosen) > 1:
        listed = ", ".join(f"layer {i}: {strides[i]}" for i in layers)
        raise ValueError(
            f"The layers chosen of {name} have different strides ({listed}); only equal grids can be concatenated."
        )
    return chosen.pop()
