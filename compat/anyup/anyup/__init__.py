"""The module `anyup` of the published AnyUp: its class and the entry points of its `hubconf.py`, in anyup_torch."""

from __future__ import annotations

import anyup_torch
from anyup.model import AnyUp

__all__ = ["AnyUp", "anyup", "anyup_multi_backbone"]


def anyup(use_natten: bool = False, pretrained: bool = True, device: str = "cpu") -> AnyUp:
    """AnyUp trained on DINOv2 ViT-S/14 features, the model of the paper.

    Args:
        use_natten: take the windows of the published NATTEN variant, another output; NATTEN is not needed for it.
        pretrained: fetch the published weights once; otherwise initialise randomly.
        device: where the parameters go.
    """
    return _load("anyup", use_natten, pretrained, device)


def anyup_multi_backbone(use_natten: bool = False, pretrained: bool = True, device: str = "cpu") -> AnyUp:
    """AnyUp trained on DINOv2 (with, without registers), CLIP, SigLIP2 and ViT-B features; arguments as for `anyup`."""
    return _load("anyup_multi_backbone", use_natten, pretrained, device)


def _load(name: str, use_natten: bool, pretrained: bool, device: str) -> AnyUp:
    model = AnyUp(use_natten=use_natten)
    if pretrained:
        model.load_state_dict(anyup_torch.from_pretrained(name).state_dict())
    return model.to(device).eval()
