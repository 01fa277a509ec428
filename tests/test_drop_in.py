"""What users of the published PyTorch code do with a model: keywords, attributes, parts called, replaced or hooked."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from anyup_torch import AnyUp, AnyUpConfig, upsample_bands
from anyup_torch.attention.tiled import TileAttention
from tests.test_torch_model import build, close, infer, inputs, small

UNCALLED = "cross_decode.cross_attn.attention.out_proj"  # PyTorch's attention reads its weights without calling it
NAMES = [name for name, _ in small().named_modules() if name not in ("", UNCALLED)]


def test_published_keywords():
    model = AnyUp(input_dim=13, qk_dim=32, window_ratio=0.2, use_natten=True, lfu_dim=16, num_heads=2)
    assert model.config == AnyUpConfig(
        input_dim=13, qk_dim=32, window_ratio=0.2, window="natten", lfu_dim=16, num_heads=2
    )
    assert (model.qk_dim, model.lfu_dim, model.window_ratio) == (32, 16, 0.2)
    assert AnyUp(qk_dim=32).lfu_dim == 32
    assert AnyUp(AnyUpConfig(qk_dim=32), window_ratio=0.3).config == AnyUpConfig(qk_dim=32, window_ratio=0.3)
    assert AnyUp(qk_dim=32, use_natten=False).config.window == "paper"


@pytest.mark.parametrize(
    ("arguments", "fields", "error", "named"),
    [
        ((), dict(use_nattn=True, depth=3), TypeError, "no field depth, use_nattn"),
        ((), dict(use_natten=True, window="paper"), ValueError, "use_natten"),
        ((3,), {}, TypeError, "config=3"),
        ((dict(qk_dim=32),), {}, TypeError, "config="),
    ],
)
def test_unknown_keywords_are_named(arguments, fields, error, named):
    with pytest.raises(error, match=named):
        AnyUp(*arguments, **fields)


@pytest.mark.parametrize("place", ["model", "cross_decode"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_window_is_a_live_setting(place, grad):
    given, expected = inputs(), build(window_ratio=0.05)
    model = build()
    before = infer(model, *given)
    (model if place == "model" else model.cross_decode).window_ratio = 0.05
    assert model.window_ratio == model.cross_decode.window_ratio == model.config.window_ratio == 0.05
    with torch.set_grad_enabled(grad):
        close(model(*given), infer(expected, *given), 0 if not grad else 2e-5)
    assert not torch.allclose(infer(model, *given), before, atol=1e-3)
    bands = torch.cat(list(upsample_bands(model, *given, rows=7)), 2)
    close(bands, infer(expected, *given))
    with pytest.raises(ValueError, match="window_ratio=nan"):
        model.cross_decode.window_ratio = float("nan")


def test_replace_shares_the_parameters():
    model, given = build(), inputs()
    other = model.replace(window_ratio=0.05, num_heads=4)
    assert {id(tensor) for tensor in model.parameters()} == {id(tensor) for tensor in other.parameters()}
    assert model.config == build().config
    close(infer(other, *given), infer(build(window_ratio=0.05, num_heads=4), *given), 0)
    close(infer(model, *given), infer(build(), *given), 0)
    other.window_ratio = 0.4
    assert model.window_ratio == 0.2
    for change in (dict(qk_dim=64), dict(lfu_dim=8), dict(kernel_size=7), dict(num_heads=5)):
        with pytest.raises(ValueError, match=next(iter(change))):
            model.replace(**change)
    with pytest.raises(TypeError, match="no field depth"):
        model.replace(depth=2)


def published_forward(model, image, features, size):
    """The steps of the published `forward`, in the way that those who need one of them call them."""
    guide = model.image_encoder(image)
    height, width = guide.shape[2:]
    rows, cols = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    coords = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).reshape(1, -1, 2)
    guide = model.rope(guide.permute(0, 2, 3, 1).reshape(len(guide), -1, guide.shape[1]), coords)
    guide = guide.view(len(guide), height, width, -1).permute(0, 3, 1, 2)
    query = F.adaptive_avg_pool2d(model.query_encoder(guide), size)
    key = F.adaptive_avg_pool2d(model.key_encoder(guide), features.shape[-2:])
    described = model.key_features_encoder(F.normalize(features, dim=1))
    key = model.aggregation(torch.cat([key, described], 1))
    return guide, model.cross_decode(query, key, features, q_chunk_size=64)


@pytest.mark.parametrize("window", ["paper", "natten"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [(20, 28), (33, 17)])
def test_parts_called_one_by_one(window, grad, size):
    model, given = small(window), inputs(batch=2)
    with torch.set_grad_enabled(grad):
        guide, output = published_forward(model, *given, size)
        close(output, infer(model, *given, size))
        close(model.upsample(guide, given[1], size, vis_attn=False, q_chunk_size=50), infer(model, *given, size))
    with pytest.raises(ValueError, match=r"image has shape \(2, 4, "):
        model.upsample(guide[:, :4], given[1], size)


class Called(nn.Module):
    """Somebody's own module in the place of one of ours."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments, **options):
        self.calls += 1
        return self.inner(*arguments, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_each_module_may_be_replaced_or_hooked(name, grad):
    given, expected = inputs(), infer(small(), *inputs())
    replaced, hooked, overridden = (copy.deepcopy(small()) for _ in range(3))
    called = Called(replaced.get_submodule(name))
    replaced.set_submodule(name, called)
    calls = []
    handle = hooked.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    module = overridden.get_submodule(name)
    forward, module.forward = module.forward, lambda *a, **k: (calls.append("own"), forward(*a, **k))[1]
    with torch.set_grad_enabled(grad):
        for model in (replaced, hooked, overridden):
            assert name in model.changed
            close(model(*given), expected)
    assert called.calls == 1
    assert calls == [name, "own"]
    for model in (replaced, hooked):
        with pytest.raises(ValueError, match=f"upsample_bands.* {name}"):
            upsample_bands(model, *given)
    handle.remove()
    assert hooked.changed == []


@pytest.mark.parametrize("name", [name for name, _ in small().named_parameters() if UNCALLED not in name])
def test_weights_set_after_loading_take_effect(name):
    """In the streaming path as in the plain one, the norms' among them."""
    model, given = copy.deepcopy(small()), inputs()
    owner, _, attribute = name.rpartition(".")
    weight = model.get_parameter(name)
    setattr(model.get_submodule(owner), attribute, nn.Parameter(weight * 1.5 + 0.1 * torch.randn_like(weight)))
    streamed = infer(model, *given)
    close(streamed, model(*given).detach())
    if "in_proj_bias" not in name:  # most of it is read by nobody
        assert not torch.equal(streamed, infer(small(), *given))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["image_encoder.1.block.2", "key_encoder.0", "cross_decode.conv2d", "aggregation.0"])
def test_parametrisations_take_effect(name):
    given, doubled, parametrised = inputs(), copy.deepcopy(small()), copy.deepcopy(small())
    doubled.get_submodule(name).weight.data *= 2
    parametrize.register_parametrization(parametrised.get_submodule(name), "weight", Doubled())
    close(infer(parametrised, *given), infer(doubled, *given))


def test_layers_with_other_settings_take_effect():
    """A norm of other groups is of the same class, and only its settings tell it apart."""
    given, model = inputs(), copy.deepcopy(small())
    norm = model.aggregation[1].block[0]
    model.aggregation[1].block[0] = other = nn.GroupNorm(1, norm.num_channels, eps=1.0)
    other.load_state_dict(norm.state_dict())
    close(infer(model, *given), model(*given).detach())
    assert not torch.allclose(infer(model, *given), infer(small(), *given), atol=1e-4)


def test_hooks_of_all_modules():
    names = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module)))
    try:
        close(infer(small(), *inputs()), infer(small(), *inputs()))
    finally:
        handle.remove()
    assert nn.GroupNorm in names
    assert small().changed == []


def test_copies():
    given = inputs()
    written = io.BytesIO()
    torch.save(small(), written)
    written.seek(0)
    for model in (copy.deepcopy(small()), pickle.loads(pickle.dumps(small())), torch.load(written, weights_only=False)):
        assert model.changed == []
        close(infer(model, *given), infer(small(), *given), 0)


@pytest.mark.parametrize("size", [(16, 16), torch.Size([16, 16]), [np.int64(16), np.int32(16)], 16, np.int64(16)])
def test_output_sizes(size):
    assert infer(small(), *inputs(), size).shape == (1, 6, 16, 16)


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("scaled", [False, True])
def test_guidance_of_any_channels(channels, scaled):
    """Not normalised, and features that are themselves a mask or a PCA picture."""
    torch.manual_seed(0)
    model = AnyUp(input_dim=channels, qk_dim=32, num_heads=2).eval()
    image = torch.rand(1, channels, 24, 32) * (1 if scaled else 255)
    for features in (torch.rand(1, 1, 6, 8).round(), torch.randn(1, 3, 6, 8)):
        output = infer(model, image, features)
        assert output.shape == (1, features.shape[1], 24, 32)
        close(output, model(image, features).detach())
        assert output.min() >= features.min() - 1e-5
        assert output.max() <= features.max() + 1e-5


def test_a_mask_becomes_larger():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 10:30] = 1
    large = infer(small(), torch.randn(1, 3, 64, 64), mask, (256, 256), q_chunk_size=4096)
    assert large.shape == (1, 1, 256, 256)
    assert 0.05 < large.mean() < 0.15


def test_memory_formats_and_frames_as_a_batch():
    image, features = inputs(batch=3)
    expected = infer(small(), image, features)
    channels_last = (x.contiguous(memory_format=torch.channels_last) for x in (image, features))
    close(infer(small(), *channels_last), expected)
    model = copy.deepcopy(small()).to(memory_format=torch.channels_last)
    close(infer(model, image, features), expected)
    frames = [infer(small(), image[index : index + 1], features[index : index + 1]) for index in range(3)]
    close(torch.cat(frames), expected)


def test_training_through_frozen_weights():
    model, (image, features) = copy.deepcopy(small()).requires_grad_(False), inputs()
    features.requires_grad_()
    model(image, features).square().sum().backward()
    assert features.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_halving_the_chunk_after_running_out_of_memory(monkeypatch):
    """The loop that people write around a call; the result is that of the first try."""
    given, expected = inputs(), infer(small(), *inputs())
    tries = []
    attend = TileAttention.write

    def write(self, begin, end, *arguments):
        if tries[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return attend(self, begin, end, *arguments)

    monkeypatch.setattr(TileAttention, "write", write)
    chunk, output = 640, None
    while output is None:
        tries.append(chunk)
        try:
            output = infer(small(), *given, q_chunk_size=chunk)
        except torch.OutOfMemoryError:
            chunk //= 2
    assert tries == [640, 320, 160, 80, 40]
    close(output, expected)


def test_outputs_of_more_elements_than_int32_counts():
    model = copy.deepcopy(small()).to("meta")
    output = model(*(tensor.to("meta") for tensor in inputs()), (40_000, 60_000))
    assert output.shape == (1, 6, 40_000, 60_000)
    assert output.numel() > 2**33


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_distributed_data_parallel(process_group):
    """Every trained parameter gets a gradient, as DDP wants it; those that reach no output are frozen."""
    model, given = copy.deepcopy(small()), inputs()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        f"{UNCALLED}.weight", f"{UNCALLED}.bias"
    ]  # fmt: skip
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-4)
    for _ in range(3):  # DDP complains at the second step
        optimizer.zero_grad()
        parallel(*given).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    close(nn.DataParallel(small())(*given).detach(), infer(small(), *given))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("parts", [(), ("image_encoder", "cross_decode", "aggregation", "key_features_encoder")])
def test_fully_sharded(parts, process_group):
    model, given = copy.deepcopy(small()), inputs()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for part in parts:
        fully_shard(model.get_submodule(part), mesh=mesh)
    fully_shard(model, mesh=mesh)
    close(infer(model, *given), infer(small(), *given))
    model(*given).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compiled_once_for_any_batch_and_channels(unchecked):
    torch.compiler.reset()
    compiled = torch.compile(small(), backend="aot_eager")
    for batch, channels in ((2, 6), (3, 9)):
        close(
            infer(compiled, *inputs(batch=batch, channels=channels)),
            infer(small(), *inputs(batch=batch, channels=channels)),
        )
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, channels in ((4, 12), (5, 33), (2, 129)):
            given = inputs(batch=batch, channels=channels)
            close(infer(compiled, *given), infer(small(), *given))
