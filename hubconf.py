"""Entry points of `torch.hub.load(REPO, "anyup_multi_backbone", ...)`; also with `source="local"`."""

import logging as _logging
from pathlib import Path as _Path

import torch as _torch

from anyup_core.checkpoints.names import RELEASES as _RELEASES
from anyup_torch import AnyUp as _AnyUp
from anyup_torch import AnyUpConfig as _AnyUpConfig
from anyup_torch import from_pretrained as _from_pretrained
from anyup_torch.attention import resolve as _resolve
from anyup_torch.attention.natten import installed as _natten_installed

dependencies = ["torch", "numpy", "jaxtyping", "ml_dtypes", "safetensors"]


def anyup(use_natten: bool = False, pretrained: bool = True, device: str = "cpu") -> _AnyUp:
    """AnyUp trained on DINOv2 ViT-S/14 features, the model of the paper.

    Args:
        use_natten: take the windows of the published NATTEN variant (`window="natten"`), another output. NATTEN itself
            is not needed: the best backend here computes the windows, and a line on stderr says which.
        pretrained: take the published weights, from torch.hub's own cache (`checkpoints/anyup_paper.pth`) if they are
            there, or else from `ANYUP_CACHE`, into which they are fetched once; otherwise initialise randomly.
        device: where the parameters go.
    """
    return _load("anyup", use_natten, pretrained, device)


def anyup_multi_backbone(use_natten: bool = False, pretrained: bool = True, device: str = "cpu") -> _AnyUp:
    """AnyUp trained on DINOv2 (with, without registers), CLIP, SigLIP2 and ViT-B features; arguments as for `anyup`."""
    return _load("anyup_multi_backbone", use_natten, pretrained, device)


def anyup_efficientnet_lite(use_natten: bool = False, pretrained: bool = True, device: str = "cpu") -> _AnyUp:
    """AnyUp trained on EfficientNet-Lite0 and -Lite1 features of a few hundred images; arguments as for `anyup`.

    The weights lie in this repository, and nothing is fetched.
    """
    return _load("anyup_efficientnet_lite", use_natten, pretrained, device)


def _load(name: str, use_natten: bool, pretrained: bool, device: str) -> _AnyUp:
    window = "natten" if use_natten else "paper"
    if use_natten and not _natten_installed():
        _logging.getLogger("anyup_torch").warning(
            'NATTEN is not installed; its windows are computed by backend="%s", with the same result.',
            _resolve("auto", _torch.device(device)),
        )
    if pretrained:
        own = (
            _Path(_torch.hub.get_dir(), "checkpoints", _RELEASES[name].rsplit("/", 1)[-1])
            if name in _RELEASES
            else None
        )
        return _from_pretrained(own if own and own.is_file() else name, device=device, window=window)
    return _AnyUp(_AnyUpConfig(window=window)).to(device).eval()
