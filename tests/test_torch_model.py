"""The PyTorch model: shapes, types, streaming against the plain path, compilation, gradients, and what it refuses."""

from __future__ import annotations

import functools

import matplotlib
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyup_core import geometry
from anyup_torch import AnyUp, AnyUpConfig, attention, layers, pretrained, streaming, upsample_bands, upsample_many
from anyup_torch.bands import RecomputedMaps
from anyup_torch.layers import FeatureUnification
from convert import Checkpoint
from parity_tests.golden import GOLDEN, needs_golden
from tests.test_model import FIELDS, literal_unification
from tests.weights import EQUAL, SMALL, random_weights

TOLERANCE = 2e-5
BACKENDS = tuple(attention.PORTABLE)
UNUSED = {f"cross_decode.cross_attn.attention.out_proj.{part}" for part in ("weight", "bias")}


def build(sizes=SMALL, **fields) -> AnyUp:
    """Return a model whose every parameter matters: perturbed weights, not initial ones."""
    fields = dict(num_heads=2, window_ratio=0.2) | fields
    return pretrained.build(Checkpoint(random_weights(sizes)), **fields)


@functools.cache
def small(window: str = "paper", backend: str = "auto") -> AnyUp:
    return build(window=window, backend=backend)


def inputs(image=(20, 28), cells=(5, 7), channels=6, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 3, *image), (batch, channels, *cells)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def close(left, right, tolerance=TOLERANCE):
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance, check_dtype=False)


def infer(model: AnyUp, *arguments, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(*arguments, **options)


@needs_golden
@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("weights.pth", {}),
        ("weights_small.pth", dict(qk_dim=64, num_heads=2, kernel_size=3, kernel_size_lfu=3, lfu_dim=96)),
    ],
)
def test_state_dict_is_the_published_one(file, fields):
    published = torch.load(GOLDEN / file, weights_only=True)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in AnyUp(AnyUpConfig(**fields)).state_dict().items()]
    assert shapes == [(name, tuple(tensor.shape)) for name, tensor in published.items()]


@pytest.mark.parametrize("size", [None, (20, 28), (33, 47), (40, 56), (3, 4), (1, 1), (50, 9)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_shape_and_type(grad, size):
    with torch.set_grad_enabled(grad):
        output = small()(*inputs(batch=2), size)
    assert output.shape == (2, 6, *(size or (20, 28)))
    assert output.dtype == torch.float32
    assert output.isfinite().all()


@pytest.mark.parametrize("side", ["rows", "cols", "both"])
@pytest.mark.parametrize("of", ["image", "features"])
def test_sides_of_one(of, side):
    def shape(height, width):
        return (height if side == "cols" else 1, width if side == "rows" else 1)

    given = inputs(**({"image": shape(8, 12)} if of == "image" else {"cells": shape(4, 6)}))
    output = infer(small(), *given, (9, 10))
    assert output.shape == (1, 6, 9, 10)
    assert output.isfinite().all()
    close(small()(*given, (9, 10)).detach(), output)


STREAMED = {
    "same size": dict(size=None),
    "larger": dict(size=(45, 60)),
    "smaller": dict(size=(21, 22)),
    "no shortcut": dict(size=None, sizes=EQUAL),
    "channels that hold the workspace": dict(size=(45, 60), channels=70),
    "wide strip": dict(size=None, image=(10, 90), cells=(3, 25)),
}


@pytest.mark.parametrize("window", ["paper", "natten"])
@pytest.mark.parametrize("block", [16_384, 100, 64])
@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
def test_streaming_equals_the_plain_path(case, block, window, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", block)
    case = dict(case)
    size, model = case.pop("size"), build(case.pop("sizes", SMALL), window=window)
    image, features = inputs(**{"image": (31, 42), "cells": (5, 7), "batch": 2, **case})
    plain = model(image, features, size)
    assert not streaming.possible(model, image, features)
    with torch.no_grad():
        assert streaming.possible(model, image, features)
        close(model(image, features, size), plain.detach())


MANY = ((5, 7), 6), ((9, 8), 70), ((5, 7), 1), ((4, 3), 33)  # grids and channels of feature maps of one image


def many(batch=2, dtype=torch.float32, image=(31, 42)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 3, *image), *((batch, channels, *cells) for cells, channels in MANY)]
    image, *features = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return image, features


@pytest.mark.parametrize("size", [None, (45, 60), (21, 22)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("backend", "chunk"), [("dense", None), ("tiled", None), ("tiled", 7), ("tiled", 130)])
def test_many_maps_equal_separate_calls(backend, chunk, grad, size, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 100)
    model, (image, features) = small("paper", backend), many()
    with torch.set_grad_enabled(grad):
        outputs = upsample_many(model, image, features, size, chunk)
        for output, maps in zip(outputs, features, strict=True):
            close(output, model(image, maps, size, q_chunk_size=chunk), 1e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.05)])
def test_many_maps_in_other_types(dtype, tolerance, grad):
    model, (image, features) = build().to(dtype), many(dtype=dtype)
    with torch.set_grad_enabled(grad):
        outputs = upsample_many(model, image, features)
        for output, maps in zip(outputs, features, strict=True):
            assert output.dtype == dtype
            close(output, model(image, maps), tolerance)


def test_values_of_many_maps():
    image, features = many()
    values = [None, features[1][:, :3], None, None]
    outputs = infer_many(image, features, values=values)
    close(outputs[0], infer(small(), image, features[0]), 1e-6)
    close(outputs[1], infer(small(), image, features[1], values=values[1]), 1e-6)


def infer_many(*arguments, **options):
    with torch.no_grad():
        return upsample_many(small(), *arguments, **options)


def test_gradients_of_many_maps_are_sums_of_the_separate_ones():
    model, (image, features) = build(), many(batch=1, image=(12, 14))
    separate, joint = ([tensor.clone().requires_grad_() for tensor in (image, *features)] for _ in range(2))
    parameters = [parameter for name, parameter in model.named_parameters() if name not in UNUSED]
    loss = sum(model(separate[0], maps).square().mean() for maps in separate[1:])
    expected = torch.autograd.grad(loss, [*separate, *parameters])
    loss = sum(output.square().mean() for output in upsample_many(model, joint[0], joint[1:]))
    for ours, theirs in zip(torch.autograd.grad(loss, [*joint, *parameters]), expected, strict=True):
        close(ours, theirs, 1e-5 * max(1, theirs.abs().max().item()))


def test_many_maps_share_one_pass_over_the_image(monkeypatch):
    """The work of three maps is that of one and two more attentions: queries are convolved and projected once."""
    counts, model, (image, features) = [], small(), many(batch=1)
    for function in ("project_image", "rotate_and_project"):
        original = getattr(streaming, function)
        monkeypatch.setattr(streaming, function, lambda *a, f=original: counts.append("pass") or f(*a))
    original = model.cross_decode.project_rows
    monkeypatch.setattr(
        model.cross_decode, "project_rows", lambda rows: counts.append(rows.shape[1] - 2) or original(rows)
    )
    with torch.no_grad():
        upsample_many(model, image, features)
    assert counts[:2] == ["pass", "pass"]
    assert sum(counts[2:]) == image.shape[2]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_verbs_equal_a_plain_call_at_every_size(backend, grad):
    sizes = [(31, 42), (45, 60), (9, 12)]
    model, (image, features) = small("paper", backend), many()
    with torch.set_grad_enabled(grad):
        code = model.encode_image(image, [cells for cells, _ in MANY], sizes)
        assert {grid: keys.shape for grid, keys in code.keys.items()} == {cells: (2, 16, *cells) for cells, _ in MANY}
        keys = [model.describe(code, maps) for maps in features]
        for size in sizes:
            outputs = model.decode(code, list(zip(keys, features)), size)
            for output, maps in zip(outputs, features, strict=True):
                close(output, model(image, maps, size), 1e-6)
        assert model.decode(code, [], sizes[0]) == []


def test_keys_and_queries_may_have_the_size_of_the_image():
    model, (image, _) = small(), many()
    features = torch.randn(2, 5, *image.shape[2:], generator=torch.Generator().manual_seed(1))
    plain = model(image, features)
    close(infer(model, image, features), plain.detach())
    with torch.no_grad():
        code = model.encode_image(image, [image.shape[2:]], [tuple(image.shape[2:])])
        close(model.decode(code, [(model.describe(code, features), features)], (31, 42))[0], plain.detach())


def test_recomputed_maps_are_an_image_code():
    model, (image, features) = small(), many(batch=1)
    with torch.no_grad():
        code = RecomputedMaps(model, image[0], [cells for cells, _ in MANY], hold_guide=True)
        outputs = model.decode(code, [(model.describe(code, maps), maps) for maps in features], (45, 60))
        for output, maps in zip(outputs, features, strict=True):
            close(output, model(image, maps, (45, 60)))


def test_a_code_refuses_what_it_was_not_made_for():
    model, (image, features) = small(), many()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            code = model.encode_image(image, [(5, 7)], [(31, 42)])
            keys = model.describe(code, features[0])
            with pytest.raises(ValueError, match=r"\(9, 8\)"):
                model.describe(code, features[1])
            with pytest.raises(ValueError, match=r"\(20, 20\)"):
                model.decode(code, [(keys, features[0])], (20, 20))
            with pytest.raises(ValueError, match=r"keys .* and values"):
                model.decode(code, [(keys, features[1])], (31, 42))


MANY_REFUSED = {
    "no list": (dict(features=torch.zeros(1, 6, 5, 7)), TypeError, "features is a Tensor"),
    "empty list": (dict(features=[]), ValueError, "features"),
    "values that are no list": (dict(values=torch.zeros(1, 6, 5, 7)), TypeError, "values is a Tensor"),
    "too few values": (dict(values=[None]), ValueError, "values has 1 entries for 2"),
    "shape of a map": (dict(features=[torch.zeros(1, 6, 5, 7), torch.zeros(6, 5, 7)]), ValueError, "Feature map 1: "),
    "chunk": (dict(q_chunk_size=0), ValueError, "q_chunk_size=0"),
    "size": (dict(output_size=4.5), TypeError, "output_size=4.5"),
}


@pytest.mark.parametrize(("change", "error", "message"), MANY_REFUSED.values(), ids=MANY_REFUSED)
def test_many_maps_refused(change, error, message):
    arguments = dict(image=torch.zeros(1, 3, 20, 28), features=[torch.zeros(1, 6, 5, 7)] * 2) | change
    with pytest.raises(error, match=message):
        upsample_many(small(), **arguments)


def test_a_frozen_model_streams_with_grad_enabled():
    model, given = build().requires_grad_(False), inputs()
    assert streaming.possible(model, *given)
    close(model(*given), small()(*given).detach())


def test_streaming_leaves_its_inputs_as_they_were():
    given = inputs(batch=2)
    copies = [tensor.clone() for tensor in given]
    infer(small(), *given)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_equals_its_images(backend, grad):
    image, features = inputs(batch=2)
    with torch.set_grad_enabled(grad):
        single = [small("paper", backend)(image[i : i + 1], features[i : i + 1]) for i in range(2)]
        close(small("paper", backend)(image, features), torch.cat(single))


def test_gradients_reach_every_parameter_that_matters():
    model = build()
    model(*inputs()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is None} == UNUSED
    live = {name: gradient for name, gradient in gradients.items() if name not in UNUSED}
    assert all(gradient.isfinite().all() for gradient in live.values())
    assert {name for name, gradient in live.items() if not gradient.abs().max() > 1e-9} == set()
    for part in ("weight", "bias"):
        query, _, value = live[f"cross_decode.cross_attn.attention.in_proj_{part}"].chunk(3)
        assert query.any()
        assert not value.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_and_features_receive_gradients(backend):
    given = [tensor.requires_grad_() for tensor in inputs(batch=2)]
    model = build(backend=backend).requires_grad_(False)
    model(*given).square().mean().backward()
    for tensor in given:
        assert tensor.grad.isfinite().all()
        assert (tensor.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_go_through_linearly_and_default_to_the_features(backend):
    image, features = inputs()
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    model = small("paper", backend)
    after = infer(model, image, features)
    before = infer(model, image, features, values=torch.einsum("bchw,ce->behw", features, head))
    close(before, torch.einsum("bchw,ce->behw", after, head))
    close(infer(model, image, features, values=features), after, 1e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("window", ["paper", "natten"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_chunks_do_not_change_the_result(chunk, backend, window, grad):
    given = inputs(image=(10, 14))
    with torch.set_grad_enabled(grad):
        close(small(window, backend)(*given, q_chunk_size=chunk), small(window, backend)(*given))


def test_outputs_are_averages_of_the_features():
    image, features = inputs()
    constant = features[:, :, :1, :1].expand_as(features)
    close(infer(small(), image, constant), constant[:, :, :1, :1].expand(1, 6, *image.shape[2:]))
    output, slack = infer(small(), image, features), 1e-5
    assert (output <= features.amax((2, 3), keepdim=True) + slack).all()
    assert (output >= features.amin((2, 3), keepdim=True) - slack).all()
    assert output.std() > 0.05  # and not one average for all


def unification(channels: int, filters: int = 8, kernel: int = 5) -> FeatureUnification:
    torch.manual_seed(channels)
    return FeatureUnification(filters, kernel, False)


@pytest.mark.parametrize("channels", [1, 3, 8, 13])
def test_unification_is_the_published_one_with_its_quirk(channels):
    layer, features = unification(channels), inputs(channels=channels)[1]
    basis = layer.basis.detach()[:, 0].double().numpy()
    expected = literal_unification(features[0].permute(1, 2, 0).double().numpy(), basis)
    close(layer(features)[0].detach(), torch.from_numpy(expected).permute(2, 0, 1), 1e-6)


@pytest.mark.parametrize("block", [1, 100, 500])
@pytest.mark.parametrize("grad", [False, True])
def test_unification_in_blocks(grad, block, monkeypatch):
    layer, features = unification(7), inputs(channels=7, batch=2)[1]
    with torch.set_grad_enabled(grad):
        whole = layer(features)
        monkeypatch.setattr(layers, "UNIFICATION_BLOCK", block)
        close(layer(features), whole, 1e-6)


def test_unification_depends_on_the_order_of_the_channels():
    layer, features = unification(6), inputs()[1]
    assert (layer(features) - layer(features.flip(1))).abs().max() > 1e-3


class Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.bytes = max([self.bytes, *(tensor.numel() * tensor.element_size() for tensor in tensors)])
        return result


@pytest.mark.parametrize("channels", [4096, 8192])
def test_unification_of_many_channels_never_holds_all_responses(channels):
    layer, features = unification(channels, 128), inputs(cells=(8, 8), channels=channels)[1]
    with torch.no_grad(), Largest() as largest:
        layer(features)
    assert features.nbytes < largest.bytes < channels * 128 * 8 * 8 * 4 / 4


def test_streaming_never_holds_all_attention_weights():
    pixels, cells = 192, 32
    image, features = inputs(image=(pixels, pixels), cells=(cells, cells))
    with torch.no_grad(), Largest() as largest:
        small()(image, features)
    assert largest.bytes < pixels**2 * cells**2 * 4 / 16


def test_filters_can_start_as_gaussian_derivatives():
    config = AnyUpConfig(qk_dim=16, num_heads=2, lfu_dim=24, kernel_size_lfu=3, init_gaussian_derivatives=True)
    basis = AnyUp(config).key_features_encoder[0].basis
    assert basis.requires_grad
    np.testing.assert_array_equal(basis.detach()[:, 0], geometry.gaussian_derivatives(24, 3))


# TorchDynamo looks at the .grad of the tensors it hands over where the program is split
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("grad", "window"), [(False, "paper"), (False, "natten"), (True, "paper")])
def test_compiled_equals_eager(unchecked, grad, window):
    given = inputs(image=(8, 12), cells=(2, 3))
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(small(window), backend="aot_eager")
        close(compiled(*given), small(window)(*given))


@compiles
@pytest.mark.slow
def test_inductor_equals_eager(unchecked):
    given = inputs(image=(8, 8), cells=(2, 2))
    torch.compiler.reset()
    close(infer(torch.compile(small()), *given), infer(small(), *given))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_close(grad):
    given = inputs()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        output = small()(*given)
    exact = infer(small(), *given)
    assert output.isfinite().all()
    close(output.detach(), exact, 0.05)
    assert (output - exact).abs().max() > 0  # bfloat16 was really used


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, TOLERANCE), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("grad", [False, True])
def test_other_types(grad, dtype, tolerance):
    model, given = build().to(dtype), inputs()
    with torch.set_grad_enabled(grad):
        output = model(*(tensor.to(dtype) for tensor in given))
    assert output.dtype == dtype
    close(output.detach(), infer(small(), *given), tolerance)


def test_showing_the_attention_returns_the_same_features(monkeypatch):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gca().images[0].get_array()))
    given = inputs(batch=2)
    try:
        close(infer(small(), *given, (18, 22), vis_attn=True), infer(small(), *given, (18, 22)), 0)
    finally:
        pyplot.close("all")
    assert [picture.shape for picture in shown] == [(18, 22, 3)]
    assert shown[0].std() > 0


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[str(fields) for fields, _ in FIELDS])
def test_an_invalid_configuration_cannot_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        AnyUpConfig(**fields)


def test_unknown_names():
    with pytest.raises(TypeError, match="no field windows; its fields are input_dim, "):
        AnyUpConfig().replace(windows="paper")
    with pytest.raises(ValueError, match="backend='fast' is unknown; choose one of auto, dense, tiled"):
        AnyUp(AnyUpConfig(backend="fast"))


@pytest.mark.parametrize("kinds", [("float32", "float16"), ("float64", "float64"), ("float16", "bfloat16")], ids=str)
def test_inputs_of_another_type(kinds):
    """The model computes in its own type and returns that of the features."""
    image, features = inputs(image=(20, 24), cells=(5, 6))
    guidance, maps = (x.to(getattr(torch, kind)) for x, kind in zip((image, features), kinds))
    expected = infer(small(), guidance.float(), maps.float(), 12)
    bands = torch.cat(list(upsample_bands(small(), guidance, maps, 12, rows=5, dtype=torch.float32)), 2)
    close(bands, expected)
    code = small().encode_image(guidance, [(5, 6)], [(12, 12)])
    steps = small().decode(code, [(small().describe(code, maps), maps)], (12, 12))
    differentiable = upsample_many(small(), guidance, [maps.clone().requires_grad_()], 12)
    for output in (infer(small(), guidance, maps, 12), *steps, *differentiable):
        assert output.dtype == maps.dtype
        close(output.detach(), expected, TOLERANCE + 4 * torch.finfo(maps.dtype).eps)


def test_a_model_of_half_precision_takes_float32():
    model, (image, features) = build().bfloat16(), inputs()
    output = infer(model, image, features)
    assert output.dtype == torch.float32
    close(output, infer(small(), image, features), 0.1)
    close(output, infer(model, image.bfloat16(), features.bfloat16()), 3e-2)


def test_transformations_of_torch_func(unchecked):
    model, (image, features) = build().requires_grad_(False), inputs()
    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(image, leaf).square().sum(), leaf)
    close(torch.func.grad(lambda x: model(image, x).square().sum())(features), expected, 1e-4)
    pairs = inputs(batch=3)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda *pair: model(*(x[None] for x in pair))[0])(*pairs)
    close(mapped, infer(model, *pairs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
def test_traced_by_jit(unchecked):
    model, other = build().requires_grad_(False), inputs(seed=1)
    close(torch.jit.trace(model, inputs())(*other), model(*other))


@pytest.mark.parametrize("gradients", [False, True])
def test_on_the_meta_device_there_are_shapes(gradients):
    with torch.set_grad_enabled(gradients):
        output = build().to("meta")(*(x.to("meta") for x in inputs(batch=2)), (9, 11))
    assert output.shape == (2, 6, 9, 11)
    assert output.device.type == "meta"


zeros = torch.zeros
IMAGE, FEATURES = zeros(1, 3, 20, 28), zeros(1, 6, 5, 7)
REFUSED = {
    "rank": (dict(image=zeros(3, 20, 28)), ValueError, "image has shape .*; it must have four axes, NCHW"),
    "empty": (dict(features=zeros(1, 6, 0, 7)), ValueError, "features has shape .* none of them empty"),
    "rank of values": (dict(values=zeros(6, 5, 7)), ValueError, "values has shape .* four axes"),
    "integer image": (dict(image=IMAGE.byte()), TypeError, "image holds torch.uint8; .*divide by 255"),
    "integer features": (dict(features=FEATURES.int()), TypeError, "features holds torch.int32; .*convert it"),
    "transposed image": (dict(image=zeros(1, 20, 28, 3)), ValueError, r"another axis: transpose by \(0, 3, 1, 2\)"),
    "channels": (dict(image=zeros(1, 4, 20, 28)), ValueError, "NCHW with 3 channels is expected.$"),
    "batch": (dict(features=zeros(2, 6, 5, 7)), ValueError, "differ in the batch size; give one feature map per image"),
    "values": (dict(values=zeros(1, 2, 5, 8)), ValueError, "must share batch, height and width with the features"),
    "chunk of 0": (dict(q_chunk_size=0), ValueError, "^q_chunk_size=0 "),
    "chunk of 1.5": (dict(q_chunk_size=1.5), ValueError, "^q_chunk_size=1.5 "),
    "size of 0": (dict(output_size=(0, 4)), ValueError, "must be at least 1 x 1"),
    "fractional size": (dict(output_size=(4.0, 4)), TypeError, "must be a whole number, or two"),
    "three sizes": (dict(output_size=(4, 4, 4)), TypeError, "must be a whole number, or two"),
    "array": (dict(features=FEATURES.numpy()), TypeError, "features is a numpy.ndarray; give a torch.Tensor"),
    "list": (dict(image=IMAGE.tolist()), TypeError, "image is a list; give a torch.Tensor"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        small()(**(dict(image=IMAGE, features=FEATURES) | change))


def test_features_that_may_be_transposed_are_upsampled_with_a_warning():
    features = torch.randn(1, 5, 7, 384)
    with pytest.warns(UserWarning, match=r"transpose by \(0, 3, 1, 2\) unless"):
        assert infer(small(), zeros(1, 3, 20, 28), features).shape == (1, 5, 20, 28)


@pytest.mark.parametrize("name", ["image", "features", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_names_what_is_not_finite(name, bad):
    arguments = dict(image=IMAGE.clone(), features=FEATURES.clone(), values=FEATURES.clone())
    arguments[name][0, 0, 1, 2] = bad
    with pytest.raises(ValueError, match=f"^{name} of shape .* holds NaN or infinity"):
        small()(**arguments, check=True)


def test_check_passes_finite_inputs():
    assert infer(small(), IMAGE, FEATURES, (2, 2), check=True).isfinite().all()
