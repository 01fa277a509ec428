"""The objective of AnyUp: reconstruction of crops, consistency under augmentation, agreement with the input.

A fourth term that was not published, `outlines`, is for features of few cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from anyup_jax.model import AnyUp
from anyup_jax.pooling import adaptive_average_pool
from train.config import LossConfig, Size

SCALE_EPS, NORM_EPS, SHARE_EPS = 1e-6, 1e-8, 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """What the objective compares.

    Attributes:
        guidance, augmented: the whole photograph as guidance, clean and augmented, normalised.
        lr_features: features of the whole photograph.
        hr_features: features of each of n crops of it.
        crops: row and column of each crop, in cells of the upsampled map.
        regions: for each pixel of the photograph, 1 for the region it belongs to and 0 for the others, the first of
            which is what nothing was pasted onto; None without pasted regions.
    """

    guidance: Float[Array, "B H W I"]
    augmented: Float[Array, "B H W I"]
    lr_features: Float[Array, "B h w C"]
    hr_features: Float[Array, "B n hc wc C"]
    crops: Int[Array, "B n 2"]
    regions: Float[Array, "B Hc Wc k"] | None = None


def objective(
    model: AnyUp, views: Views, size: Size, consistency_size: Size, weights: LossConfig, *, remat: bool = False
) -> dict[str, Float[Array, ""]]:
    """Return the weighted terms; their sum is what is minimised.

    The clean guidance is encoded once for all: the prediction at `size`, the consistency target, through which no
    gradient passes, and the outlines, at the size of the guidance, differ in the pooling of the queries only. The
    features are described once for both guidances. A term whose weight is 0 is not computed and is 0.

    Args:
        model: the upsampler.
        views: the batch.
        size: height and width of the map that the crops are cut from.
        consistency_size: height and width at which clean and augmented guidance are compared.
        weights: of the terms.
        remat: compute the augmented branch again in the gradient instead of keeping its maps.
    """
    features, guide_size = views.lr_features, views.guidance.shape[1:3]
    grid = features.shape[1:3]
    sizes = [size, *[consistency_size] * bool(weights.consistency), *[guide_size] * bool(weights.outlines)]
    described = model.key_features_encoder(features)
    code = model.encode_image(views.guidance, [grid], sizes)
    keys = model.describe(code, features, described)
    (prediction,) = model.decode(code, [(keys, features)], size)

    terms = dict.fromkeys(("reconstruction", "consistency", "input", "outlines"), jnp.zeros(()))
    if weights.reconstruction:
        cut = cut_crops(prediction, views.crops, views.hr_features.shape[2:4])
        terms["reconstruction"] = weights.reconstruction * difference(cut, views.hr_features)
    if weights.consistency:
        (target,) = lax.stop_gradient(model.decode(code, [(keys, features)], consistency_size))

        def augmented(described):
            code = model.encode_image(views.augmented, [grid], [consistency_size])
            keys = model.describe(code, features, described)
            return difference(model.decode(code, [(keys, features)], consistency_size)[0], target)

        branch = jax.checkpoint(augmented) if remat else augmented
        terms["consistency"] = weights.consistency * branch(described)
    if weights.outlines:
        terms["outlines"] = weights.outlines * outlines(
            lambda values: model.decode(code, [(keys, values)], guide_size)[0], views.regions, grid, guide_size
        )
    if weights.input:
        back = adaptive_average_pool(prediction, grid)
        terms["input"] = weights.input * difference(back, features)
    return terms


def outlines(
    upsample: Callable[[Float[Array, "B h w n"]], Float[Array, "B H W n"]],
    regions: Float[Array, "B Hc Wc k"],
    cells: Size,
    size: Size,
) -> Float[Array, ""]:
    """Mean cross-entropy of the shares that regions have of cells, upsampled, with those that they have of pixels.

    What is upsampled has nothing to do with the features, whose attention it is: where a region ends, it should weigh
    the cells of the right side only. Within a region every attention is right.

    Args:
        upsample: averages what cells hold with the attention at every pixel.
        regions: 1 for the region of a pixel, 0 for the others.
        cells: height and width of the features.
        size: height and width of the upsampled map.
    """
    target, coarse = (adaptive_average_pool(regions, grid) for grid in (size, cells))
    return -(target * jnp.log(jnp.maximum(upsample(coarse), SHARE_EPS))).sum(-1).mean()


def difference(prediction: Float[Array, "... C"], target: Float[Array, "... C"]) -> Float[Array, ""]:
    """Mean of 1 - cosine, plus the mean squared error after both are scaled by the target's range at each position.

    The scaling takes the least channel of the target to 0 and the greatest to 1; only its width matters here.
    """
    prediction, target = prediction.astype(jnp.float32), lax.stop_gradient(target.astype(jnp.float32))
    cosine = (prediction * target).sum(-1) / (_norm(prediction) * _norm(target))
    width = target.max(-1, keepdims=True) - target.min(-1, keepdims=True) + SCALE_EPS
    return (1 - cosine).mean() + jnp.square((prediction - target) / width).mean()


def _norm(x: Float[Array, "... C"]) -> Float[Array, "..."]:
    square = jnp.square(x).sum(-1)
    return jnp.maximum(jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0), NORM_EPS)


def cut_crops(maps: Shaped[Array, "B H W C"], crops: Int[Array, "B n 2"], size: Size) -> Shaped[Array, "B n h w C"]:
    """Cut n regions of `size` out of each map (or image), their corners given as rows and columns."""

    def cut(image, corner):
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), (*size, image.shape[-1]))

    return jax.vmap(jax.vmap(cut, (None, 0)))(maps, crops)
