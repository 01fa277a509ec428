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
from anyup_torch.upsamplers import JAFAR as _JAFAR
from anyup_torch.upsamplers import NAF as _NAF
from anyup_torch.upsamplers import FeatUp as _FeatUp
from anyup_torch.upsamplers import LoftUp as _LoftUp
from anyup_torch.upsamplers.pretrained import make as _make

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


def jafar(
    name: str = "vit_small_patch14_dinov2.lvd142m", pretrained: bool = True, device: str = "cpu", num_heads: int = 4
) -> _JAFAR:
    """JAFAR for the features of one encoder.

    Args:
        name: timm's of the encoder, of those with published weights.
        pretrained: take the published weights, which are fetched once; otherwise initialise randomly, with the sizes
            and the normalisation of the image that go with the name.
        device: where the parameters go.
        num_heads: heads of the attention.
    """
    return _make("jafar", name, pretrained, device, num_heads=num_heads)


def featup(name: str = "dinov2", pretrained: bool = True, use_norm: bool = True, device: str = "cpu") -> _FeatUp:
    """FeatUp's stack of joint bilateral upsamplers for the features of one encoder, in evaluation mode.

    Args:
        name: the published one of the encoder.
        pretrained, device: as for `jafar`.
        use_norm: take the weights that begin with a norm of the features' channels.
    """
    return _make("featup", name, pretrained, device, use_norm=use_norm)


def loftup(name: str = "dinov2s", pretrained: bool = True, device: str = "cpu") -> _LoftUp:
    """LoftUp for the features of one encoder, by its published name, in evaluation mode; arguments as for `jafar`."""
    return _make("loftup", name, pretrained, device)


def naf(pretrained: bool = True, device: str = "cpu") -> _NAF:
    """NAF, for the features of any encoder; arguments as for `jafar`."""
    return _make("naf", "naf", pretrained, device)


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
