"""The objectives of JAFAR, NAF and FeatUp: one function each, from a model and its views to weighted terms.

What is random is drawn for every photograph, and follows from its place in the run: neither the number of devices nor
the parts of a batch change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PRNGKeyArray

from anyup_core.preprocessing import IMAGENET, Preprocessing
from anyup_jax.upsamplers.featup import FeatUp
from anyup_jax.upsamplers.interpolation import resize
from anyup_jax.upsamplers.jafar import JAFAR
from anyup_jax.upsamplers.naf import NAF, Buffer
from train import featup as parts
from train.config import Size
from train.loss import difference

Terms = dict[str, Float[Array, ""]]
CONSISTENCY = 0.1  # weight of JAFAR's second term
BLURRED, NOISY, NOISE = 0.5, 0.3, 0.02  # probabilities of JAFAR's blur and noise, and its deviation
STRETCH = 2.0  # greatest factor of NAF's coordinates in training; 1 / STRETCH is the least
CRF = 0.001  # weight of FeatUp's second term


def photograph_keys(places: Float[Array, "B 1 2"], seed: int) -> Key[Array, " B"]:
    """Return a key for each photograph, from the random numbers that it has in the batch."""
    bits = lax.bitcast_convert_type(places[:, 0], jnp.uint32)
    fold = jax.vmap(lambda two: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), two[0]), two[1]))
    return fold(bits)


def normalised(image: Float[Array, "B H W 3"], size: Size, normalisation: Preprocessing) -> Float[Array, "B h w 3"]:
    """Return images with values in [0, 1] as guidance: bilinear, not antialiased, then mean and deviation."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in normalisation)
    return (resize(image, size, "bilinear") - mean) / std


def jafar(
    model: JAFAR,
    image: Float[Array, "B H W 3"],
    size: Size,
    low: Float[Array, "B h w C"],
    target: Float[Array, "B hc wc C"],
    keys: Key[Array, " B"],
) -> Terms:
    """Return reconstruction and, with the target's features upsampled to the guidance's size, consistency under noise.

    Args:
        model: the upsampler.
        image: the photographs, in [0, 1].
        size: height and width of the guidance.
        low, target: features of the photographs made smaller, and of the photographs.
        keys: for each photograph.
    """
    guidance = normalised(image, size, model.normalisation)
    clean = lax.stop_gradient(model.upsample(guidance, target, size, None))
    noisy = model.upsample(noised(guidance, keys), target, size, None)
    return dict(
        reconstruction=difference(model.upsample(guidance, low, _size(target), None), target),
        consistency=CONSISTENCY * difference(noisy, clean),
    )


def noised(guidance: Float[Array, "B H W 3"], keys: Key[Array, " B"]) -> Float[Array, "B H W 3"]:
    """Return guidance blurred and with noise, either at random.

    It is clamped to [0, 1] as in the published training, although it is normalised already.
    """

    def draw(key):
        happens, noise = jax.random.split(key)
        return jax.random.uniform(happens, (2,)), NOISE * jax.random.normal(noise, guidance.shape[1:])

    happens, noise = jax.vmap(draw)(keys)
    blurred, noisy = (x[:, None, None, None] for x in (happens[:, 0] < BLURRED, happens[:, 1] < NOISY))
    return jnp.clip(jnp.where(blurred, parts.blur(guidance), guidance) + noisy * noise, 0, 1)


def naf(
    model: NAF,
    image: Float[Array, "B H W 3"],
    size: Size,
    low: Float[Array, "B h w C"],
    target: Float[Array, "B hc wc C"],
    key: PRNGKeyArray,
) -> Terms:
    """Return the mean squared error; the coordinates of all positions are multiplied by one random factor.

    The published training draws that factor once for every size; here it is drawn for every step, of which `key` is.
    The other arguments are those of `jafar`.
    """
    factor = STRETCH ** jax.random.uniform(key, minval=-1.0, maxval=1.0)
    model.rope.periods = Buffer(model.rope.periods[...] / factor)  # angles are coordinates over periods
    prediction = model.upsample(normalised(image, size, model.normalisation), low, _size(target), None)
    return dict(reconstruction=jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)).mean())


def featup(
    model: FeatUp,
    image: Float[Array, "B H W 3"],
    size: Size,
    encode: Callable[[Float[Array, "B H W 3"]], Float[Array, "B h w C"]],
    keys: Key[Array, " B"],
) -> Terms:
    """Return what the features of jittered photographs are missed by, and the CRF term of the first jitter.

    The upsampled features are jittered as the photograph is, and downsampled. Both treat all channels alike, so that
    the features are projected on the random directions first, which are far fewer. The published CRF term compares
    features that are jittered with an image that is not; here both are.

    Args:
        model: the upsampler, with `helpers`.
        image: the photographs, in [0, 1].
        size: height and width of the guidance.
        encode: returns the features of photographs.
        keys: for each photograph.
    """

    def features_of(image):
        features = lax.stop_gradient(encode(image)).astype(jnp.float32)
        return features if model.norm is None else model.norm(features)

    helpers = cast(Any, model).helpers  # by `models.create`
    features = encode(image)
    whole = model.upsample(normalised(image, size, model.normalisation), features, _size(image), None)
    whole, guide = whole.astype(jnp.float32), normalised(image, _size(image), IMAGENET)

    logits = helpers.logit(whole)

    def compare(number):
        jittered, projected, dropped, points = (
            jax.vmap(lambda key, n=n: jax.random.fold_in(jax.random.fold_in(key, number), n))(keys) for n in range(4)
        )
        jitter = parts.Jitter.draw(jittered, _size(image))
        seen = lax.stop_gradient(features_of(jitter(image)))
        project = parts.directions(projected, seen.shape[-1])
        kept = jax.vmap(lambda key: jax.random.uniform(key, _size(seen)) >= parts.DROP)(dropped).astype(jnp.float32)

        @jax.checkpoint
        def missed(whole, logits):
            upsampled, along = jitter(directed(whole, project)), jitter(logits)
            error = helpers.downsample(upsampled, along, kept) - directed(seen, project)
            scale = helpers.scale(seen)[..., None]
            return (jnp.square(error) / (2 * jnp.square(scale)) + jnp.log(scale)).mean()

        return missed(whole, logits), (jitter, project, points)

    def others(total, number):
        return total + compare(number)[0], None

    first, (jitter, project, points) = compare(jnp.zeros((), jnp.int32))
    total, _ = lax.scan(others, first, jnp.arange(1, parts.JITTERS))
    crf = parts.crf(jitter(guide), jitter(directed(whole, project)), points)
    return dict(reconstruction=total / parts.JITTERS, crf=CRF * crf)


def directed(x: Float[Array, "B H W C"], project: Float[Array, "B C n"]) -> Float[Array, "B H W n"]:
    """Return features along the directions of their photograph."""
    return jnp.einsum("bhwc,bcn->bhwn", x, project, precision="highest")


def _size(x: Float[Array, "B H W C"]) -> Size:
    return int(x.shape[1]), int(x.shape[2])
