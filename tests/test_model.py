"""The JAX model: shapes, types, transformations, numbers that must not change, and what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import anyup_jax
import anyup_torch
from anyup_core import geometry
from anyup_jax import AnyUp, AnyUpConfig, attention, blocked, layers, pretrained
from anyup_jax.blocked import map_rows
from anyup_jax.layers import FeatureUnification, Unused
from anyup_jax.model import FeatureEncoder, compiled
from anyup_jax.row_shards import ALL_ROWS
from convert import Checkpoint
from tests.weights import SMALL, random_weights

TOLERANCE = 2e-5


@functools.cache
def small(window: str = "paper", backend: str = "auto", dtype=jnp.float32) -> AnyUp:
    """A model whose every parameter matters: perturbed weights, not initial ones."""
    fields = dict(num_heads=2, window_ratio=0.2, window=window, backend=backend)
    return pretrained.build(Checkpoint(random_weights(SMALL)), dtype=dtype, **fields)


def inputs(image=(20, 28), cells=(5, 7), channels=6, batch=1, seed=0):
    random = np.random.default_rng(seed)
    shapes = (batch, *image, 3), (batch, *cells, channels)
    return tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)


def close(left, right, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(left, np.float32), np.asarray(right, np.float32), rtol=0, atol=tolerance)


def by_path(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def mean_square(model: AnyUp, *arguments, wrap=lambda function: function):
    """Return path -> gradient of the mean square of the model's output."""
    graph, trained, unused = nnx.split(model, nnx.Param, Unused)
    forward = wrap(lambda state: nnx.merge(graph, state, unused)(*arguments))
    return by_path(jax.jit(jax.grad(lambda state: jnp.square(forward(state)).mean()))(trained))


SIZES = [None, (33, 47), (3, 4), (1, 1), (50, 9)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shape_and_type(size):
    image, features = inputs(batch=2)
    output = anyup_jax.upsample(small(), image, features, size)
    assert output.shape == (2, *(size or (20, 28)), 6)
    assert output.dtype == jnp.float32
    assert jnp.isfinite(output).all()


@pytest.mark.parametrize(
    "shapes", [dict(image=(1, 12)), dict(image=(8, 1)), dict(cells=(4, 1)), dict(cells=(1, 1))], ids=str
)
def test_sides_of_one(shapes):
    image, features = inputs(**shapes)
    output = anyup_jax.upsample(small(), image, features, (9, 10))
    assert output.shape == (1, 9, 10, 6)
    assert jnp.isfinite(output).all()


@pytest.mark.slow
def test_compiled_equals_eager():
    image, features = inputs()
    eager = small()(image, features)
    close(anyup_jax.upsample(small(), image, features), eager)
    close(nnx.jit(lambda model, *given: model(*given))(small(), image, features), eager)


def test_gradients_reach_every_parameter_that_matters():
    gradients = mean_square(small(), *inputs())
    dead = {"cross_decode.value.kernel", "cross_decode.value.bias"}
    live = set(gradients) - dead - {"cross_decode.key.bias"}  # a key bias moves all logits of a query alike
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert {path for path in live if not np.abs(gradients[path]).max() > 1e-9} == set()
    assert {path for path in dead if gradients[path].any()} == set()


def test_the_unused_projection_is_kept_and_not_trained():
    model = small()
    assert set(by_path(nnx.state(model, Unused))) == {"cross_decode.out.kernel", "cross_decode.out.bias"}
    assert not [path for path in by_path(nnx.state(model, nnx.Param)) if path.startswith("cross_decode.out")]


def test_vmap_equals_a_loop():
    image, features = inputs(batch=3)
    call = jax.jit(jax.vmap(lambda image, features: small()(image[None], features[None])[0]))
    looped = [anyup_jax.upsample(small(), image[i : i + 1], features[i : i + 1])[0] for i in range(3)]
    close(call(image, features), jnp.stack(looped))


@pytest.mark.parametrize("backend", attention.PORTABLE)
def test_a_batch_equals_its_images(backend):
    image, features = inputs(batch=2)
    single = [anyup_jax.upsample(small("paper", backend), image[i : i + 1], features[i : i + 1]) for i in range(2)]
    close(anyup_jax.upsample(small("paper", backend), image, features), jnp.concatenate(single))


@pytest.mark.slow
def test_rematerialisation_keeps_the_gradients():
    plain, remat = (mean_square(small(), *inputs(), wrap=wrap) for wrap in (lambda f: f, jax.checkpoint))
    for path, gradient in plain.items():
        np.testing.assert_allclose(remat[path], gradient, rtol=0, atol=1e-5 * max(1e-3, np.abs(gradient).max()))


def test_bfloat16_computation_has_float32_parameters_and_stays_close():
    model = small(dtype=jnp.bfloat16)
    assert {array.dtype for array in by_path(nnx.state(model)).values()} == {np.dtype(np.float32)}
    image, features = inputs()
    output = anyup_jax.upsample(model, image, features)
    assert output.dtype == features.dtype
    close(output, anyup_jax.upsample(small(), image, features), 0.05)
    assert np.abs(output - anyup_jax.upsample(small(), image, features)).max() > 0  # bfloat16 was really used


@pytest.mark.parametrize("backend", attention.PORTABLE)
def test_values_go_through_linearly_and_default_to_the_features(backend):
    image, features = inputs()
    head = jnp.asarray(np.random.default_rng(1).standard_normal((6, 4)), jnp.float32)
    after = anyup_jax.upsample(small("paper", backend), image, features)
    before = anyup_jax.upsample(small("paper", backend), image, features, values=features @ head)
    close(before, after @ head)
    close(anyup_jax.upsample(small("paper", backend), image, features, values=features), after, 1e-6)


@pytest.mark.parametrize(("backend", "window"), [("tiled", "paper"), ("tiled", "natten"), ("dense", "paper")])
@pytest.mark.parametrize("chunk", [1, 23, 100_000])
def test_chunks_do_not_change_the_result(chunk, backend, window):
    image, features = inputs(image=(10, 14))
    whole = anyup_jax.upsample(small(window, backend), image, features)
    close(anyup_jax.upsample(small(window, backend), image, features, q_chunk_size=chunk), whole)


def test_outputs_are_averages_of_the_features():
    image, features = inputs()
    constant = jnp.broadcast_to(features[:, :1, :1], features.shape)
    close(anyup_jax.upsample(small(), image, constant), jnp.broadcast_to(constant[:, :1, :1], (*image.shape[:3], 6)))
    output = anyup_jax.upsample(small(), image, features)
    slack = 1e-5
    assert (output <= features.max((1, 2), keepdims=True) + slack).all()
    assert (output >= features.min((1, 2), keepdims=True) - slack).all()
    assert output.std() > 0.05  # and not one average for all


MANY = {"one map": [((5, 7), 6)], "grids and channels differ": [((5, 7), 6), ((10, 14), 3), ((5, 7), 9)]}


def image_and_maps(name: str, batch: int = 2):
    maps = [
        inputs(cells=cells, channels=channels, batch=batch, seed=i)[1] for i, (cells, channels) in enumerate(MANY[name])
    ]
    return inputs(batch=batch, seed=9)[0], maps


@pytest.mark.parametrize("window", ["paper", "natten"])
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("size", [None, (33, 47)], ids=str)
def test_many_maps_equal_separate_calls(name, size, window):
    image, maps = image_and_maps(name)
    outputs = anyup_jax.upsample_many(small(window), image, maps, size, q_chunk_size=100)
    assert len(outputs) == len(maps)
    for output, features in zip(outputs, maps):
        close(output, anyup_jax.upsample(small(window), image, features, size), 1e-6)


def test_many_maps_with_values():
    image, maps = image_and_maps("grids and channels differ")
    values = [maps[0][..., :2], None, maps[2][..., :4]]
    outputs = anyup_jax.upsample_many(small(), image, maps, values=values)
    assert [output.shape[-1] for output in outputs] == [2, 3, 4]
    for output, features, value in zip(outputs, maps, values):
        close(output, anyup_jax.upsample(small(), image, features, values=value), 1e-6)


def test_gradient_of_many_maps_is_the_sum_of_the_gradients():
    image, maps = image_and_maps("grids and channels differ", batch=1)
    graph, trained, unused = nnx.split(small(), nnx.Param, Unused)

    def together(trained, maps):
        outputs = anyup_jax.upsample_many(nnx.merge(graph, trained, unused), image, maps)
        return sum(jnp.square(output).mean() for output in outputs)

    def apart(trained, maps):
        model = nnx.merge(graph, trained, unused)
        return sum(jnp.square(anyup_jax.upsample(model, image, features)).mean() for features in maps)

    ours, expected = (jax.grad(function, (0, 1))(trained, maps) for function in (together, apart))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        close(one, other, 1e-5 * max(1e-3, float(np.abs(other).max())))


def test_many_maps_are_compiled_once_per_set_of_shapes():
    image, maps = image_and_maps("grids and channels differ", batch=3)
    anyup_jax.upsample_many(small(), image, maps)
    before = compiled._cache_size()
    anyup_jax.upsample_many(small(), image + 1, [features + 1 for features in maps])
    assert compiled._cache_size() == before


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        (dict(features=[]), ValueError, "features"),
        (dict(features=inputs()[1]), TypeError, "features"),
        (dict(values=[]), ValueError, "0 entries for 2"),
        (dict(values=inputs()[1]), TypeError, "values"),
        (dict(features=[inputs()[1], inputs(batch=2)[1]]), ValueError, r"(?s)1.*\(2, 5, 7, 6\)"),
        (dict(values=[None, inputs(cells=(2, 2))[1]]), ValueError, r"(?s)1.*\(1, 2, 2, 6\)"),
    ],
)
def test_many_maps_refused(change, error, field):
    image, features = inputs()
    with pytest.raises(error, match=field):
        anyup_jax.upsample_many(small(), image, **dict(features=[features, features]) | change)


def test_a_code_serves_features_and_sizes_that_come_later():
    image, maps = image_and_maps("grids and channels differ", batch=1)
    encode = jax.jit(lambda image: small().encode_image(image, [(5, 7), (10, 14)], [(20, 28), (9, 4)]))
    code = encode(image)
    assert {grid: key.shape for grid, key in code.keys.items()} == {(5, 7): (1, 5, 7, 16), (10, 14): (1, 10, 14, 16)}
    assert set(code.queries) == {(20, 28), (9, 4)}
    for size in code.queries:
        pairs = [(small().describe(code, features), features) for features in maps]
        for output, features in zip(small().decode(code, pairs, size), maps):
            close(output, anyup_jax.upsample(small(), image, features, size), 1e-6)


def test_a_code_names_what_it_was_not_made_for():
    image, features = inputs()
    code = small().encode_image(image, [(2, 2)], [(3, 3)])
    with pytest.raises(ValueError, match=r"grids=\[\(2, 2\)\].*\(5, 7\)"):
        small().describe(code, features)
    with pytest.raises(ValueError, match=r"sizes=\[\(3, 3\)\].*\(4, 4\)"):
        small().decode(code, [(code.keys[2, 2], features[:, :2, :2])], (4, 4))
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 16\).*\(1, 5, 7, 6\)"):
        small().decode(code, [(code.keys[2, 2], features)], (3, 3))


@pytest.mark.parametrize("height", [1, 4, 12, 13, 17])
@pytest.mark.parametrize("count", [1, 2])
def test_blocks_of_rows_equal_the_whole(height, count, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 2 * 4 * 5)  # 4 rows of 5 pixels in a batch of 2
    random = np.random.default_rng(height)
    images = [jnp.asarray(random.standard_normal((2, height, 5, 3)), jnp.float32) for _ in range(count)]

    def function(*images):
        return sum(jnp.sin(image) * (i + 1) for i, image in enumerate(images))

    assert ("scan" in str(jax.make_jaxpr(functools.partial(map_rows, function))(*images))) == (height > 4)
    close(map_rows(function, *images), function(*images), 1e-6)


def test_small_blocks_do_not_change_the_model(monkeypatch):
    image, features = inputs(image=(21, 29))
    whole = anyup_jax.upsample(small(), image, features, (19, 23))
    monkeypatch.setattr(blocked, "BLOCK", 29 * 4)
    call = jax.jit(lambda image, features: small()(image, features, (19, 23)))  # not in upsample's cache
    close(call(image, features), whole)


@pytest.mark.parametrize("height", [4, 8, 11])
def test_gradients_of_blocks_equal_those_of_the_whole(height, monkeypatch):
    """Of the rotation and of a 1 x 1 convolution, for the image and the parameters, against plain formulas."""
    monkeypatch.setattr(blocked, "BLOCK", 2 * 4 * 5)  # 4 rows of 5 pixels in a batch of 2
    random = np.random.default_rng(height)
    shapes = (2, height, 5, 8), (2, height, 5, 8), (2, 8), (1, 1, 8, 8)
    image, weight, freqs, kernel = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    rows, cols = map(jnp.asarray, ALL_ROWS.coordinates(height, 5))

    def turned(x, freqs):
        angle = rows[:, None, None] * freqs[0] + cols[:, None] * freqs[1]
        first, second = jnp.split(x, 2, -1)
        return x * jnp.cos(angle) + jnp.concatenate([-second, first], -1) * jnp.sin(angle)

    def multiplied(x, kernel):
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0], precision="highest")

    for function, plain, parameter in (
        (lambda x, freqs: layers.rotate(x, freqs, rows, cols), turned, freqs),
        (lambda x, kernel: layers.convolve(x, kernel, ((0, 0), (0, 0))), multiplied, kernel),
    ):
        gradients, expected = (
            jax.grad(lambda *args, f=f: (f(*args) * weight).sum(), (0, 1))(image, parameter) for f in (function, plain)
        )
        for one, other in zip(gradients, expected):
            close(one, other, 1e-5)


def unification(channels: int, filters: int = 8, kernel: int = 5) -> FeatureUnification:
    return FeatureUnification(filters, kernel, False, dtype=jnp.float32, rngs=nnx.Rngs(channels))


def literal_unification(features: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The published layer word for word, position by position: (h, w, C) and (M, k, k) -> (h, w, M)."""
    (height, width, channels), (filters, kernel, _) = features.shape, basis.shape
    half, unified = kernel // 2, np.zeros((height, width, filters))
    for i, j in np.ndindex(height, width):
        buffer, taps = np.zeros((channels, filters)), 0
        for di, dj in np.ndindex(kernel, kernel):
            row, col = i + di - half, j + dj - half
            if 0 <= row < height and 0 <= col < width:
                buffer += np.outer(features[row, col], basis[:, di, dj])
                taps += 1
        misread = (buffer / taps).reshape(-1).reshape(filters, channels)  # written (C, M), read (M, C)
        weights = np.exp(misread - misread.max(0))
        unified[i, j] = (weights / weights.sum(0)).mean(1)
    return unified


@pytest.mark.parametrize("channels", [1, 3, 8, 13])
def test_unification_is_the_published_one_with_its_quirk(channels):
    layer, features = unification(channels), inputs(channels=channels)[1]
    expected = literal_unification(np.asarray(features[0], np.float64), np.asarray(layer.basis[...], np.float64))
    close(layer(features)[0], expected, 1e-6)


@pytest.mark.parametrize("block", [1, 100, 500])
def test_unification_in_blocks(block, monkeypatch):
    layer, features = unification(7), inputs(channels=7, batch=2)[1]
    whole = layer(features)
    monkeypatch.setattr(layers, "UNIFICATION_BLOCK", block)
    close(layer(features), whole, 1e-6)


def test_unification_depends_on_the_order_of_the_channels():
    layer, features = unification(6), inputs()[1]
    assert np.abs(layer(features) - layer(features[..., ::-1])).max() > 1e-3


@pytest.mark.parametrize("channels", [4096, 8192])
def test_unification_of_many_channels_never_holds_all_responses(channels):
    layer, filters, cells = unification(channels, 128), 128, 8
    features = jax.ShapeDtypeStruct((1, cells, cells, channels), jnp.float32)
    memory = jax.jit(layer.__call__).lower(features).compile().memory_analysis()
    assert memory.temp_size_in_bytes < channels * filters * cells * cells * 4 / 4


def test_filters_can_start_as_gaussian_derivatives():
    config = AnyUpConfig(qk_dim=16, num_heads=2, lfu_dim=24, kernel_size_lfu=3, init_gaussian_derivatives=True)
    basis = FeatureEncoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)).unify.basis
    assert isinstance(basis, nnx.Param)
    np.testing.assert_array_equal(basis[...], geometry.gaussian_derivatives(24, 3))


FIELDS = [
    (dict(qk_dim=0), "^qk_dim=0 "),
    (dict(input_dim=True), "^input_dim=True "),
    (dict(num_heads=2.0), "^num_heads=2.0 "),
    (dict(kernel_size=-1), "^kernel_size=-1 "),
    (dict(lfu_dim=0), "^lfu_dim=0 "),
    (dict(kernel_size=2), "^kernel_size=2 "),
    (dict(kernel_size_lfu=4), "^kernel_size_lfu=4 "),
    (dict(qk_dim=100), "^qk_dim=100 "),
    (dict(lfu_dim=12), "^lfu_dim=12 "),
    (dict(num_heads=3), "^qk_dim=128 .*num_heads=3"),
    (dict(window_ratio=float("nan")), "^window_ratio=nan "),
    (dict(window_ratio=float("inf")), "^window_ratio=inf "),
    (dict(window_ratio="0.1"), "^window_ratio='0.1' "),
    (dict(window="round"), "^window='round' "),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[str(fields) for fields, _ in FIELDS])
def test_an_invalid_configuration_cannot_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        AnyUpConfig(**fields)
    with pytest.raises(ValueError, match=message):
        AnyUpConfig().replace(**fields)


def test_unknown_names():
    with pytest.raises(TypeError, match="no field windows; its fields are input_dim, "):
        AnyUpConfig().replace(windows="paper")
    with pytest.raises(ValueError, match="backend='fast' is unknown; choose one of auto, dense, tiled"):
        AnyUp(AnyUpConfig(backend="fast"), rngs=nnx.Rngs(0))


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


IMAGE, FEATURES = zeros(1, 20, 28, 3), zeros(1, 5, 7, 6)
REFUSED = {
    "rank": (dict(image=zeros(20, 28, 3)), ValueError, "image has shape .*; it must have four axes, NHWC"),
    "empty": (dict(features=zeros(1, 0, 7, 6)), ValueError, "features has shape .* none of them empty"),
    "rank of values": (dict(values=zeros(5, 7, 6)), ValueError, "values has shape .* four axes"),
    "integer image": (
        dict(image=zeros(1, 20, 28, 3, dtype=jnp.uint8)),
        TypeError,
        "image holds uint8; .*divide by 255",
    ),
    "integer features": (
        dict(features=zeros(1, 5, 7, 6, dtype=jnp.int32)),
        TypeError,
        "features holds int32; .*convert",
    ),
    "transposed image": (dict(image=zeros(1, 3, 20, 28)), ValueError, r"another axis: transpose by \(0, 2, 3, 1\)"),
    "channels": (dict(image=zeros(1, 20, 28, 4)), ValueError, "NHWC with 3 channels is expected.$"),
    "batch": (dict(features=zeros(2, 5, 7, 6)), ValueError, "differ in the batch size; give one feature map per image"),
    "values": (dict(values=zeros(1, 5, 8, 2)), ValueError, "must share batch, height and width with the features"),
    "chunk of 0": (dict(q_chunk_size=0), ValueError, "^q_chunk_size=0 "),
    "chunk of 1.5": (dict(q_chunk_size=1.5), ValueError, "^q_chunk_size=1.5 "),
    "size of 0": (dict(output_size=(0, 4)), ValueError, "must be at least 1 x 1"),
    "fractional size": (dict(output_size=(4.0, 4)), TypeError, "must be a whole number, or two"),
    "three sizes": (dict(output_size=(4, 4, 4)), TypeError, "must be a whole number, or two"),
    "tensor": (dict(features=torch.zeros(1, 6, 5, 7)), TypeError, "features is a torch.Tensor; give a JAX or NumPy"),
    "list": (dict(image=IMAGE.tolist()), TypeError, "image is a list; give a JAX or NumPy"),
    "float128": (dict(features=np.zeros((1, 5, 7, 6), np.longdouble)), TypeError, "features holds float128.*float32"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, error, message):
    arguments = dict(image=IMAGE, features=FEATURES) | change
    for call in (small(), functools.partial(anyup_jax.upsample, small())):
        with pytest.raises(error, match=message):
            call(**arguments)


def test_settings_by_keyword_and_replaced():
    model = AnyUp(qk_dim=32, use_natten=True, num_heads=2, rngs=nnx.Rngs(0))
    assert model.config == AnyUpConfig(qk_dim=32, window="natten", num_heads=2)
    with pytest.raises(TypeError, match="no field depth"):
        AnyUp(depth=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="config=3 "):
        AnyUp(3, rngs=nnx.Rngs(0))
    given = inputs()
    fields = dict(num_heads=4, window_ratio=0.05)
    other = small().replace(**fields)
    expected = pretrained.build(Checkpoint(random_weights(SMALL)), **fields)
    close(anyup_jax.upsample(other, *given), anyup_jax.upsample(expected, *given), 0)
    assert small().config.window_ratio == 0.2
    for change in (dict(qk_dim=64), dict(lfu_dim=8), dict(kernel_size=7), dict(num_heads=5)):
        with pytest.raises(ValueError, match=next(iter(change))):
            small().replace(**change)


@pytest.mark.parametrize("changes", [{}, dict(qk_dim=16, lfu_dim=8, input_dim=13, kernel_size=3, kernel_size_lfu=7)])
def test_parameters_are_counted_before_they_are_made(changes):
    config = anyup_jax.AnyUpConfig(**changes)
    model = nnx.eval_shape(lambda: anyup_jax.AnyUp(config, rngs=nnx.Rngs(0)))
    assert config.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, (nnx.Param, Unused))))
    for framework in (functools.partial(anyup_jax.AnyUp, rngs=nnx.Rngs(0)), anyup_torch.AnyUp):
        with pytest.raises(ValueError, match=r"qk_dim=2000000000.* GB of memory"):
            framework(anyup_jax.AnyUpConfig(qk_dim=2_000_000_000))


def test_features_that_may_be_transposed_are_upsampled_with_a_warning():
    features = np.random.default_rng(0).standard_normal((1, 16, 16, 64), np.float32)
    with pytest.warns(UserWarning, match=r"transpose by \(0, 2, 3, 1\) unless"):
        output = small()(zeros(1, 16, 64, 3), features)
    assert output.shape == (1, 16, 64, 64)


def test_no_promotion_is_asked_of_the_user():
    image, features = inputs()
    expected = small()(image, features)
    gradient = jax.grad(lambda x: small()(image, x).sum())(features)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        close(small()(image, features), expected)
        close(jax.grad(lambda x: small()(image, x).sum())(features), gradient)


def in_steps(image, features):
    code = small().encode_image(image, [features.shape[1:3]], [(9, 9)])
    return small().decode(code, [(small().describe(code, features), features)], (9, 9))[0]


@pytest.mark.parametrize("kind", [">f4", ">f8", "float64"])
def test_numpy_arrays_of_other_types_and_byte_orders(unchecked, kind):
    image, features = inputs()
    others = [np.asarray(array).astype(kind) for array in (image, features)]
    expected = anyup_jax.upsample(small(), image, features, 9)
    for output in (
        small()(*others, 9),
        anyup_jax.upsample(small(), *others, 9),
        jnp.concatenate(list(anyup_jax.upsample_bands(small(), *others, 9, rows=4)), 1),
        in_steps(*others),
    ):
        assert output.shape == (1, 9, 9, 6)
        close(output, expected)


@pytest.mark.parametrize("name", ["image", "features", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_check_names_what_is_not_finite(name, bad):
    arguments = dict(image=IMAGE, features=FEATURES, values=FEATURES)
    arguments[name] = arguments[name].at[0, 1, 2, 0].set(bad)
    with pytest.raises(ValueError, match=f"^{name} of shape .* holds NaN or infinity"):
        small()(**arguments, check=True)


def test_check_passes_finite_inputs_and_is_refused_in_jit():
    assert jnp.isfinite(small()(IMAGE, FEATURES, (2, 2), check=True)).all()
    with pytest.raises(TypeError, match="which jit and grad do not have"):
        jax.jit(lambda image: small()(image, FEATURES, (2, 2), check=True))(IMAGE)


def test_a_damaged_image_leaves_the_others_of_its_batch_alone():
    model, random = AnyUp(AnyUpConfig(qk_dim=16, num_heads=2), rngs=nnx.Rngs(0)), np.random.default_rng(0)
    image, features = (random.standard_normal(s, dtype=np.float32) for s in ((2, 12, 12, 3), (2, 3, 3, 4)))
    image[0] = np.nan
    output = np.asarray(model(image, features))
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1]).all()


def test_gradient_at_a_zero_feature_vector_is_finite():
    model, features = AnyUp(AnyUpConfig(qk_dim=16, num_heads=2), rngs=nnx.Rngs(0)), np.ones((1, 3, 3, 4), np.float32)
    features[0, 1, 1] = 0
    gradient = jax.grad(lambda features: model(np.ones((1, 12, 12, 3), np.float32), features).sum())(features)
    assert np.isfinite(gradient).all()
