"""Finds the state dict in what a PyTorch training loop saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints.pickle_reader import Inert

LOG = logging.getLogger(__name__)
AVERAGES = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "shadow")
STATE_KEYS = ("anyup", "state_dict", "model_state_dict", "model")
"""Keys of a training checkpoint under which the state dict, or another checkpoint, may be; the first one wins.

Weights averaged over the training come before the last ones, as timm has it.
"""

PREFIXES = ("module.", "_orig_mod.", "anyup.", "model.", "net.", "upsampler.")
"""What DataParallel, torch.compile and enclosing modules put before every key."""

ARGUMENTS = ("window_ratio", "num_heads", "init_gaussian_derivatives", "window")
"""Arguments of the model that its weights do not tell, and that are therefore taken from a saved configuration."""

_MISSING = "???"  # as omegaconf writes it


def unwrap(saved: Any, origin: Path, *, averages: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state dict within `saved`, without prefixes, and the model's arguments if a `cfg` names them.

    Which of two state dicts was taken, and which tensors were left out, is logged.

    Args:
        saved: what was saved.
        origin: the file, for messages.
        averages: prefer weights averaged over the training to the last ones.

    Raises:
        ValueError: if there is no state dict; the message says what there is instead.
    """
    config: dict[str, Any] = {}
    outer: dict[int, Mapping[Any, Any]] = {}
    while True:
        if not isinstance(saved, Mapping):
            raise ValueError(f"{origin} holds a {type(saved).__name__}, not a state dict.")
        if id(saved) in outer:
            raise ValueError(f"{origin} holds no state dict: a dictionary in it contains itself.")
        outer[id(saved)] = saved
        config = _arguments(saved.get("cfg")) | config
        saved = _strip(saved, origin)
        keys = (*AVERAGES, *STATE_KEYS) if averages else (*STATE_KEYS, *AVERAGES)
        inner = ((key, saved[key]) for key in keys if isinstance(saved.get(key), Mapping))
        states = [key for key, x in inner if any(isinstance(item, np.ndarray | Mapping) for item in x.values())]
        if not states:
            break
        if averages and states[0] in AVERAGES and len(states) > 1:
            LOG.warning("%s: took the averaged weights in %s, not those in %s.", origin, states[0], states[-1])
        saved = saved[states[0]]
    others = [_shown(key) for key, x in saved.items() if not (isinstance(key, str) and isinstance(x, np.ndarray))]
    if others or not saved:
        content = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "") or "nothing"
        raise ValueError(
            f"{origin} holds no state dict: it has {content} and none of {', '.join((*STATE_KEYS, *AVERAGES))}. "
            "Save the model's state_dict()."
        )
    return dict(saved), config


def _shown(key: Any) -> str:
    text = " ".join(str(key).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _strip(saved: Mapping[Any, Any], origin: Path) -> Mapping[Any, Any]:
    """Remove prefixes that all keys share, or all but a few beside them, which are left out and logged."""
    for _ in range(16):  # a key may repeat a prefix as often as it likes
        names = [key for key, value in saved.items() if isinstance(key, str) and isinstance(value, np.ndarray)]
        prefixed = {prefix: [name for name in names if name.startswith(prefix)] for prefix in PREFIXES}
        prefix = max(PREFIXES, key=lambda prefix: len(prefixed[prefix]))
        if not prefixed[prefix] or 10 * len(prefixed[prefix]) < 9 * len(saved):
            break
        if odd := [_shown(key) for key in saved if not str(key).startswith(prefix)]:
            LOG.warning("%s: left out %s, which does not begin with %r.", origin, ", ".join(odd[:8]), prefix)
        saved = {name.removeprefix(prefix): saved[name] for name in prefixed[prefix]}
    return saved


def _arguments(cfg: Any) -> dict[str, Any]:
    """Return the model's arguments; omegaconf's ??? and references to other settings are no values."""
    cfg = _plain(cfg, "_content")
    model = _plain(cfg.get("model"), "_content") if isinstance(cfg, Mapping) else None
    values = {name: _plain(node, "_val") for name, node in model.items()} if isinstance(model, Mapping) else {}
    arguments = {name: values[name] for name in ARGUMENTS if name in values and not isinstance(values[name], Inert)}
    known = {name: x for name, x in arguments.items() if not (isinstance(x, str) and x.startswith((_MISSING, "${")))}
    return known | ({"window": "natten"} if values.get("use_natten") is True else {})


def _plain(node: Any, attribute: str) -> Any:
    """Return a plain value, also from a stand-in for an object of omegaconf, which holds it in an attribute."""
    if isinstance(node, Inert):
        return node.state.get(attribute, _MISSING) if isinstance(node.state, Mapping) else _MISSING
    return node
