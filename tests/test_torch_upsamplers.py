"""The other upsamplers in PyTorch: the protocol, names and types of the weights, sizes, modes, and what they refuse."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import anyup_torch
from anyup_core.checkpoints import formats
from anyup_core.encoders.rows import Row
from anyup_core.preprocessing import IMAGENET
from anyup_core.upsamplers import catalogue
from anyup_core.upsamplers.featup import doubled_slabs
from anyup_torch import upsamplers
from anyup_torch.upsamplers import featup, loftup

TRAINED = {
    "jafar": dict(channels=12, qk_dim=16, num_heads=2),
    "featup": dict(channels=12),
    "loftup": dict(channels=12),
    "naf": dict(dim=32, kernel_size=3, num_heads=2, rope_heads=2),
}
SIZES = dict(image=(24, 32), cells=(3, 4), channels=12)


def build(method: str, **fields: Any) -> Any:
    """Return a model whose every parameter matters."""
    torch.manual_seed(0)
    model = upsamplers.pretrained.model_class(method)(**TRAINED.get(method, {}) | fields)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


@functools.cache
def small(method: str) -> Any:
    if method == "anyup":
        return anyup_torch.AnyUp(qk_dim=16, num_heads=2).eval()
    return build(method) if method in TRAINED else upsamplers.from_pretrained(method)


def inputs(image=(24, 32), cells=(3, 4), channels=12, batch=1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 3, *image), (batch, channels, *cells)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The tolerance is in units of the largest number, but of at least 1."""
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance * max(1.0, float(right.detach().abs().max())))


def infer(model: Any, *arguments: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(*arguments, **options)


@pytest.mark.parametrize("method", upsamplers.NAMES)
class TestProtocol:
    def test_attributes(self, method: str) -> None:
        model = small(method)
        assert isinstance(model, upsamplers.Upsampler)
        assert model.channels == (12 if method in ("jafar", "featup", "loftup") else None)
        assert model.multiple == (2 if method == "naf" else 1)
        assert model.normalisation == IMAGENET
        assert model.native_size(*inputs()) == ((48, 64) if method == "featup" else (24, 32))

    def test_sizes(self, method: str) -> None:
        model = small(method)
        native = infer(model, *inputs())
        assert native.shape == (1, 12, *model.native_size(*inputs()))
        assert infer(model, *inputs(), output_size=(40, 36), q_chunk_size=None).shape == (1, 12, 40, 36)
        assert infer(model, *inputs(), 30).shape == (1, 12, 30, 30)

    @pytest.mark.parametrize("chunk", [1, 50, 700])
    def test_chunk_never_changes_the_result(self, method: str, chunk: int) -> None:
        few = dict(cells=(2, 2)) if method == "featup" and chunk == 1 else {}  # whose stages go pixel by pixel
        given, size = inputs(batch=2, **few), (10, 12) if chunk == 1 else None
        whole = infer(small(method), *given, size)
        close(infer(small(method), *given, size, q_chunk_size=chunk), whole)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_output_has_the_type_of_the_features(self, method: str, dtype: torch.dtype) -> None:
        image, features = inputs()
        output = infer(small(method), image.to(dtype), features.to(dtype))
        assert output.dtype == dtype
        exact = infer(small(method), image.to(dtype).float(), features.to(dtype).float())
        close(output.float(), exact, 0.05 if dtype == torch.bfloat16 else 1e-4)

    def test_copies_are_alike(self, method: str) -> None:
        model = small(method)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(infer(twin, *inputs()), infer(model, *inputs()), 0)

    def test_a_batch_is_as_many_images(self, method: str) -> None:
        model = build(method, per_image=True) if method == "loftup" else small(method)
        image, features = inputs(batch=3)
        alone = [infer(model, *pair) for pair in zip(image.split(1), features.split(1))]
        close(infer(model, image, features), torch.cat(alone), 1e-3 if method == "loftup" else 1e-5)

    def test_bad_inputs_are_refused(self, method: str) -> None:
        model, (image, features) = small(method), inputs()
        for given, error in [
            ((image[0], features), ValueError),
            ((image.numpy(), features), TypeError),
            ((image, features.int()), TypeError),
            ((image[:, :2], features), ValueError),
            ((image, features, (0, 4)), ValueError),
            ((image, features, None), ValueError),
        ]:
            options = dict(q_chunk_size=0) if given[-1] is None else {}
            with pytest.raises(error, match=r"\.$"):
                model(*given, **options)


@pytest.mark.parametrize("method", TRAINED)
class TestWeights:
    def test_names_and_order_are_the_published_ones(self, method: str) -> None:
        model = small(method)
        rows: list[Row] = list(model.config.rows())
        state, table = model.state_dict(), list(dict.fromkeys(row.torch for row in rows))
        assert list(state) == table
        assert {row.torch: tuple(row.shape) for row in rows} == {name: tuple(x.shape) for name, x in state.items()}

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_there_and_back(self, method: str, suffix: str, tmp_path: Path) -> None:
        model = small(method)
        path = formats.write(tmp_path / f"weights{suffix}", upsamplers.checkpoint(model))
        decided = model.config.decided
        settings = {name: x for name, x in TRAINED[method].items() if name not in decided and suffix == ".pth"}
        again = upsamplers.from_pretrained(method, path, **settings)
        assert not again.training
        assert again.config == model.config
        close(infer(again, *inputs()), infer(model, *inputs()), 0)
        trained = [{n for n, x in m.named_parameters() if x.requires_grad} for m in (model, again)]
        assert trained[0] == trained[1]

    def test_plain_and_streamed_computations_agree(self, method: str) -> None:
        model, given = small(method), inputs(batch=2)
        followed = model(*given, (21, 26))
        assert followed.requires_grad
        close(infer(model, *given, (21, 26)), followed.detach())

    def test_gradients_reach_all_that_is_trained(self, method: str) -> None:
        model, (image, features) = build(method), inputs()
        model.train()
        output = model(image.requires_grad_(), features.requires_grad_(), q_chunk_size=300)
        output.square().sum().backward()
        missing = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
        assert missing == []
        assert image.grad.isfinite().all()
        assert features.grad.abs().sum() > 0

    def test_settings_are_checked(self, method: str) -> None:
        make = type(small(method))
        with pytest.raises(TypeError, match="windows"):
            make(windows=1)
        field = next(iter(TRAINED[method]))
        with pytest.raises(ValueError, match=f"{field}=0"):
            make(**{field: 0})

    def test_weights_are_asked_for(self, method: str) -> None:
        with pytest.raises(ValueError, match=catalogue.find(method).config.published_names()[0]):
            upsamplers.from_pretrained(method)


@pytest.mark.parametrize("method", ["jafar", "featup", "loftup"])
def test_features_of_another_width_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"16 channels.*12"):
        small(method)(*inputs(channels=16))


def test_naf_refuses_what_its_heads_or_its_neighbourhood_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        small("naf")(*inputs(channels=13))
    with pytest.raises(ValueError, match=r"3 cells.*2 features"):
        small("naf")(*inputs(cells=(2, 4)))
    with pytest.raises(ValueError, match="output"):
        small("naf")(*inputs(), (2, 8))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="jafar"):
        upsamplers.from_pretrained("jaffar")
    with pytest.raises(ValueError, match="no weights"):
        upsamplers.from_pretrained("bilinear", "weights.pth")
    with pytest.raises(ValueError, match="no weights"):
        upsamplers.checkpoint(small("bilinear"))
    with pytest.raises(AttributeError, match="JAFAR"):
        _ = upsamplers.nothing


def test_fused_projections() -> None:
    model = build("jafar", channels=16, qk_dim=16)
    assert "cross_decode.cross_attn.attention.in_proj_weight" in model.state_dict()
    assert list(model.state_dict()) == list(dict.fromkeys(row.torch for row in model.config.rows()))
    streamed, plain = infer(model, *inputs(channels=16)), model(*inputs(channels=16))
    close(streamed, plain.detach())


def test_a_hook_is_called() -> None:
    model, calls = build("jafar"), []
    streamed = infer(model, *inputs())
    model.query_encoder.register_forward_hook(lambda *_: calls.append(1))
    close(infer(model, *inputs()), streamed)
    assert calls == [1]


def test_other_sizes_are_interpolated() -> None:
    image, features = inputs()
    native = infer(small("featup"), image, features)
    resized = F.interpolate(native, (30, 41), mode="bilinear", align_corners=False)
    close(infer(small("featup"), image, features, (30, 41)), resized)
    guidance = F.interpolate(image, (30, 41), mode="bilinear", align_corners=False)
    close(infer(small("loftup"), image, features, (30, 41)), infer(small("loftup"), guidance, features))


def test_loftup_starts_in_evaluation_mode_and_learns_statistics_in_the_other() -> None:
    model = upsamplers.LoftUp(channels=4)
    assert not any(module.training for module in model.modules())
    image, features = inputs(channels=4, batch=2)
    infer(model.train(), image, features)
    assert model.upsampler.first_conv[2].num_batches_tracked == 1
    assert model.upsampler.first_conv[5].running_mean.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loftup_phases_are_float32(dtype: torch.dtype) -> None:
    layer = loftup.Fourier(5, 20).to(dtype)
    colours = torch.rand(1, 4, 6, 3) - 0.5
    waves = layer((4, 6), slice(1, 3), colours[:, 1:3]).detach()
    assert waves.dtype == torch.float32
    assert waves.shape == (1, 2, 6, 200)
    rows, cols = (torch.linspace(-1, 1, n) for n in (4, 6))
    places = torch.stack([*torch.meshgrid(rows[1:3], cols, indexing="ij"), *colours[0, 1:3].movedim(-1, 0)], -1)
    biases = layer.biases.detach().float().reshape(2, 100)
    frequencies = layer.tables()[1]
    phases = [(places[..., None, :] * frequencies[:, None]).flatten(2) + bias for bias in biases]
    close(waves[0], torch.cat([phases[0].sin(), phases[1].cos()], -1), 1e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", TRAINED)
def test_half_precision(method: str, grad: bool) -> None:
    """Under autocast and with half weights the output is near; LoftUp's phases are those of a float32 image."""
    model, given = small(method), inputs()
    exact = infer(model, *given)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        outputs = [model(*given)]
    with torch.set_grad_enabled(grad):
        outputs.append(copy.deepcopy(model).bfloat16()(*given))
    for output in outputs:
        assert output.dtype == torch.float32
        assert (output - exact).square().mean().sqrt() <= 0.1 * exact.square().mean().sqrt()


def test_dropout_is_drawn_in_training_only() -> None:
    model, given = build("featup"), inputs()
    close(infer(model, *given), infer(model, *given), 0)
    model.train()
    torch.manual_seed(0)
    first, second = infer(model, *given), infer(model, *given)
    assert (first - second).abs().max() > 1e-3
    torch.manual_seed(0)
    close(infer(model, *given, q_chunk_size=70), first)


def test_coordinates_of_naf_are_stretched_in_training_only() -> None:
    model, given = build("naf"), inputs()
    evaluated = infer(model, *given)
    torch.manual_seed(0)
    drawn = [infer(model.train(), *given) for _ in range(2)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-6
    close(infer(model.eval(), *given), evaluated, 0)


@pytest.mark.parametrize(("kernel", "cells", "chunk"), [(7, (5, 9), None), (3, (8, 16), 64), (5, (1, 1), 3)])
def test_adaptive_convolution(kernel: int, cells: tuple[int, int], chunk: int | None) -> None:
    torch.manual_seed(0)
    padded = torch.randn(2, 4, *(n + kernel - 1 for n in cells))
    filters = torch.randn(2, *cells, kernel, kernel)
    patches = padded.unfold(2, kernel, 1).unfold(3, kernel, 1)
    close(featup.adaptive_conv(padded, filters, chunk), torch.einsum("bcyxij,byxij->bcyx", patches, filters))
    with pytest.raises(ValueError, match="does not fit"):
        featup.adaptive_conv(padded[:, :, 1:], filters)


@pytest.mark.parametrize(("cells", "tile"), [(2, 4), (3, 2), (9, 5), (16, 8)])
def test_doubled_slabs(cells: int, tile: int) -> None:
    source = torch.randn(1, 1, cells, 1, dtype=torch.float64)
    doubled = F.interpolate(source, (2 * cells, 1), mode="bicubic", align_corners=False)
    padded = F.pad(doubled, (0, 0, 3, 3), mode="reflect").flatten()
    first, weights = doubled_slabs(cells, tile)
    assert weights.shape[:2] == (-(-2 * cells // tile), tile + 6)
    for run, position in np.ndindex(weights.shape[:2]):
        if run * tile + position < len(padded):
            seen = source.flatten()[first[run] : first[run] + weights.shape[2]]
            average = (seen * torch.from_numpy(weights[run, position])).sum()
            assert abs(average - padded[run * tile + position]) <= 1e-6


@pytest.mark.parametrize(
    ("kernel", "mode"), [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("nearest", "nearest-exact")]
)
def test_interpolation(kernel: str, mode: str) -> None:
    image, features = inputs()
    options = {} if kernel == "nearest" else dict(align_corners=False)
    expected = F.interpolate(features, (24, 32), mode=mode, **options)
    close(infer(small(kernel), image, features), expected, 0)


def test_joint_bilateral_averages_cells_of_its_colour() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 4.0
    features = torch.zeros(1, 1, 8, 8)
    features[..., 4:] = 1.0
    output = infer(small("joint_bilateral"), image, features)
    close(output[..., :16], torch.zeros(1, 1, 32, 16), 1e-4)
    close(output[..., 16:], torch.ones(1, 1, 32, 16), 1e-4)


@pytest.mark.parametrize(
    ("entry", "options"), [("jafar", {}), ("featup", dict(use_norm=False)), ("loftup", {}), ("naf", {})]
)
def test_hub(entry: str, options: dict) -> None:
    root = str(Path(__file__).resolve().parents[1])
    model = torch.hub.load(root, entry, source="local", pretrained=False, device="meta", **options)
    assert not model.training
    assert model.channels == (None if entry == "naf" else 384)
    if entry == "featup":
        assert not model.config.channel_norm
    if entry != "naf":
        with pytest.raises(ValueError, match="dinov2"):
            torch.hub.load(root, entry, "nothing", source="local", pretrained=False)
