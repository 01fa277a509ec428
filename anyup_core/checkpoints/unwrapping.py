"""Finds the state dict in what a PyTorch training loop saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints.pickle_reader import Inert

STATE_KEYS = ("anyup", "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Keys of a training checkpoint under which the state dict, or another checkpoint, may be; the first one wins.

Weights averaged over the training come before the last ones, as timm has it.
"""

PREFIXES = ("module.", "_orig_mod.", "anyup.", "model.")
"""What DataParallel, torch.compile and enclosing modules put before every key."""

ARGUMENTS = ("window_ratio", "num_heads", "init_gaussian_derivatives", "window")
"""Arguments of the model that its weights do not tell, and that are therefore taken from a saved configuration."""


_MISSING = "???"  # as omegaconf writes it


def unwrap(saved: Any, origin: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state dict within `saved`, without prefixes, and the model's arguments if a `cfg` names them.

    Raises:
        ValueError: if there is no state dict; the message says what there is instead.
    """
    config: dict[str, Any] = {}
    while True:
        if not isinstance(saved, Mapping):
            raise ValueError(f"{origin} holds a {type(saved).__name__}, not a state dict.")
        config = _arguments(saved.get("cfg")) | config
        saved = _strip(saved)
        inner = next((saved[key] for key in STATE_KEYS if isinstance(saved.get(key), Mapping)), None)
        if inner is None:
            break
        saved = inner
    others = [str(key) for key, value in saved.items() if not isinstance(key, str) or not isinstance(value, np.ndarray)]
    if others or not saved:
        content = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "") or "nothing"
        raise ValueError(
            f"{origin} holds no state dict: it has {content} and none of {', '.join(STATE_KEYS)}. "
            "Save the model's state_dict()."
        )
    return dict(saved), config


def _strip(saved: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Remove prefixes that all keys share."""
    while True:
        prefix = next(
            (p for p in PREFIXES if saved and all(isinstance(k, str) and k.startswith(p) for k in saved)), None
        )
        if prefix is None:
            return saved
        saved = {key.removeprefix(prefix): value for key, value in saved.items()}


def _arguments(cfg: Any) -> dict[str, Any]:
    model = _children(_children(cfg).get("model"))
    given = {name: _value(node) for name, node in model.items()}
    known = {name: given[name] for name in ARGUMENTS if not _is_open(given.get(name, _MISSING))}
    return known | ({"window": "natten"} if given.get("use_natten") is True else {})


def _children(node: Any) -> Mapping[Any, Any]:
    """Return the entries of a mapping, or of a stand-in for a mapping of omegaconf; nothing for any other object."""
    if isinstance(node, Inert):
        node = node.state.get("_content") if isinstance(node.state, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def _value(node: Any) -> Any:
    """Return a plain value, also from a stand-in for a value of omegaconf."""
    if isinstance(node, Inert):
        return node.state.get("_val", _MISSING) if isinstance(node.state, Mapping) else _MISSING
    return node


def _is_open(value: Any) -> bool:
    """Whether a setting has no value of its own: omegaconf's ??? or a reference to another setting."""
    return value == _MISSING or (isinstance(value, str) and value.startswith("${")) or isinstance(value, Inert)
