"""Tokens of vision transformers as feature maps, in both frameworks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyup_jax
import anyup_torch
from anyup_torch import encoders


def tokens(count: int, batch: int = 2, channels: int = 3) -> np.ndarray:
    return np.arange(batch * count * channels, dtype=np.float32).reshape(batch, count, channels)


def both(array: np.ndarray, *size, **options) -> np.ndarray:
    """Return the map, NHWC, after comparing both frameworks."""
    ours = anyup_jax.tokens_to_map(jnp.asarray(array), *size, **options)
    theirs = anyup_torch.tokens_to_map(torch.from_numpy(array), *size, **options)
    assert isinstance(ours, jax.Array)
    assert np.array_equal(np.asarray(ours), theirs.permute(0, 2, 3, 1).numpy())
    return np.asarray(ours)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("given", [False, True], ids=["inferred", "given"])
@pytest.mark.parametrize(
    ("image_size", "patch", "grid"),
    [((28, 42), 14, (2, 3)), ((42, 28), 14, (3, 2)), (32, 16, (2, 2)), ([16, 64], (16, 8), (1, 8)), (8, 8, (1, 1))],
)
def test_cells_lie_row_by_row_behind_the_prefix(prefix: int, given: bool, image_size, patch, grid) -> None:
    array = tokens(prefix + grid[0] * grid[1])
    made = both(array, image_size, patch, **({"prefix": prefix} if given else {}))
    assert made.shape == (2, *grid, 3)
    for row, column in np.ndindex(*grid):
        assert np.array_equal(made[:, row, column], array[:, prefix + row * grid[1] + column])


def test_numpy_stays_numpy_and_a_program_may_take_any_batch() -> None:
    array = tokens(7)
    made = anyup_jax.tokens_to_map(array, (28, 42), 14)
    assert isinstance(made, np.ndarray)
    shape = jax.export.symbolic_shape("b, 7, 3")
    program = jax.export.export(jax.jit(lambda x: anyup_jax.tokens_to_map(x, (28, 42), 14)))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert np.array_equal(program.call(jnp.asarray(array)), made)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_transformers_tokens_make_the_map_that_its_encoder_returns(name: str) -> None:
    encoder = encoders.create(name, pretrained=False)
    size = 2 * encoder.patch_size, 3 * encoder.patch_size
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        made = anyup_torch.tokens_to_map(encoder.model.forward_features(image), size, encoder.patch_size)
    assert made.shape == (2, encoder.channels, 2, 3)
    torch.testing.assert_close(made, encoder(image), rtol=1e-5, atol=1e-5)


SIZES = dict(image_size=(28, 42), patch=14)
REFUSED = {
    "too few": (dict(tokens=tokens(5)), ValueError, r"tokens \(2, 5, 3\) .* 2 x 3 = 6 cells"),
    "a prefix that leaves too few": (dict(prefix=2), ValueError, r"tokens \(2, 7, 3\) .* leaves 1, not prefix=2"),
    "a prefix that leaves too many": (dict(prefix=0), ValueError, r"leaves 1, not prefix=0"),
    "a negative prefix": (dict(prefix=-1), ValueError, "^prefix=-1 "),
    "a fractional prefix": (dict(prefix=1.0), ValueError, "^prefix=1.0 "),
    "tokens of a larger image": (dict(tokens=tokens(1370)), ValueError, "leaves 1364 .*prefix=1364"),
    "a part of a patch": (dict(image_size=(30, 42)), ValueError, r"\(28, 42\) if it crops .* \(42, 42\) if it pads"),
    "an image smaller than a patch": (dict(image_size=(28, 7)), ValueError, r"image_size=\(28, 7\) is not made of"),
    "a map": (dict(tokens=np.zeros((1, 2, 3, 4), np.float32)), ValueError, r"\(1, 2, 3, 4\); it must have three axes"),
    "an empty patch": (dict(patch=0), ValueError, r"patch=\(0, 0\) must be at least 1 x 1"),
    "a fractional size": (dict(image_size=(28.0, 42)), TypeError, "image_size=.* must be a whole number, or two"),
    "three sides": (dict(patch=(14, 14, 3)), TypeError, "patch=.* must be a whole number, or two"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, error, message) -> None:
    arguments = dict(tokens=tokens(7)) | SIZES | change
    with pytest.raises(error, match=message):
        anyup_jax.tokens_to_map(**arguments)
    with pytest.raises(error, match=message):
        anyup_torch.tokens_to_map(**arguments | dict(tokens=torch.from_numpy(arguments["tokens"])))


def test_many_leading_tokens_are_taken_where_their_number_is_given() -> None:
    array = tokens(106)
    assert np.array_equal(both(array, prefix=100, **SIZES).reshape(2, 6, 3), array[:, 100:])


def test_tokens_of_the_other_framework_are_refused() -> None:
    with pytest.raises(TypeError, match=r"tokens is a torch.Tensor; give a JAX or NumPy array"):
        anyup_jax.tokens_to_map(torch.zeros(1, 7, 3), **SIZES)
    with pytest.raises(TypeError, match=r"tokens is a numpy.ndarray; give a torch.Tensor"):
        anyup_torch.tokens_to_map(tokens(7), **SIZES)


@pytest.mark.parametrize("name", ["features", "values"])
def test_the_model_names_the_function_where_it_is_given_tokens(name: str) -> None:
    for package, image, maps in (
        (anyup_jax, np.zeros((1, 28, 42, 3), np.float32), np.zeros((1, 2, 3, 4), np.float32)),
        (anyup_torch, torch.zeros(1, 3, 28, 42), torch.zeros(1, 4, 2, 3)),
    ):
        model = package.from_pretrained("anyup_efficientnet_lite")
        arguments = dict(features=maps) | {name: maps.reshape(1, 6, 4)}
        with pytest.raises(ValueError, match=rf"{name} has shape \(1, 6, 4\).*{package.__name__}\.tokens_to_map"):
            model(image, **arguments)
