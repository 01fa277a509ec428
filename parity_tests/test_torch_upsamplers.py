"""The other upsamplers in PyTorch against outputs, intermediate results and gradients of the published code."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from anyup_torch import upsamplers
from anyup_torch.upsamplers import featup, loftup
from parity_tests import tolerances
from parity_tests.golden import UPSAMPLER_CASES as CASES
from parity_tests.golden import UPSAMPLERS as GOLDEN
from parity_tests.golden import needs_upsamplers, upsampler_settings

pytestmark = needs_upsamplers
EVALUATED = [name for name, case in CASES.items() if "image" in case and not case.get("training_mode")]
METHODS = ("jafar", "featup", "loftup", "naf")
OUTPUT, SCALAR = tolerances.UPSAMPLERS, tolerances.CANCELLING


@functools.cache
def arrays(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def model(name: str, **settings: Any) -> Any:
    case = CASES[name]
    return upsamplers.from_pretrained(case["method"], GOLDEN / case["weights"], **upsampler_settings(case), **settings)


def inputs(name: str) -> tuple[Tensor, Tensor]:
    return arrays(name)["image"].clone(), arrays(name)["features"].clone()


def size(name: str) -> tuple[int, int]:
    return tuple(CASES[name]["output"][2:])


def close(left: Tensor, right: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [(name, chunk) for name in EVALUATED for chunk in (None, 100, *([7] if name.endswith("gradients") else []))],
)
def test_output(name: str, chunk: int | None) -> None:
    with torch.no_grad():
        output = model(name)(*inputs(name), size(name), chunk)
    close(output, arrays(name)["output"], OUTPUT[CASES[name]["method"]])


@pytest.mark.parametrize("name", EVALUATED)
def test_native_size(name: str) -> None:
    case, (image, features) = CASES[name], inputs(name)
    native = model(name).native_size(image, features)
    assert native == (size(name) if case["method"] in ("featup", "loftup") else tuple(image.shape[2:]))


@pytest.mark.parametrize("method", METHODS)
def test_output_that_autograd_sees_and_every_gradient(method: str) -> None:
    name = f"{method}_gradients"
    trained, given, expected = model(name), [x.requires_grad_() for x in inputs(name)], arrays(name)
    output = trained(*given, size(name))
    close(output.detach(), expected["output"], OUTPUT[method])
    (output * expected["projection"]).sum().backward()
    ours = {f"grad/{key}": tensor.grad for key, tensor in trained.named_parameters() if tensor.grad is not None}
    ours |= dict(zip(("grad_image", "grad_features"), (x.grad for x in given)))
    theirs = {key: tensor for key, tensor in expected.items() if key.startswith("grad")}
    assert set(ours) == set(theirs)
    errors = {key: ((ours[key] - exact).abs().max() / exact.abs().max()).item() for key, exact in theirs.items()}
    limits = {key: SCALAR if exact.numel() == 1 else tolerances.GRADIENT for key, exact in theirs.items()}
    assert {key: error for key, error in errors.items() if not error <= limits[key]} == {}


def test_dead_weights_are_not_trained() -> None:
    dead = {name for name, tensor in model("jafar_gradients").named_parameters() if not tensor.requires_grad}
    assert dead == set(CASES["jafar_gradients"]["no_gradient"])


@pytest.mark.parametrize("chunk", [None, 16, 1])
def test_adaptive_convolution(chunk: int | None) -> None:
    expected = arrays("featup_adaptive_conv")
    given = [expected[name].clone().requires_grad_() for name in ("input", "filters")]
    output = featup.adaptive_conv(*given, chunk)
    close(output.detach(), expected["output"], tolerances.OUTPUT)
    (output * expected["projection"]).sum().backward()
    for ours, name in zip(given, ("input", "filters")):
        exact = expected[f"grad_{name}"]
        close(ours.grad / exact.abs().max(), exact / exact.abs().max(), tolerances.GRADIENT)


def test_statistics_of_a_batch() -> None:
    name = "loftup_batch_statistics"
    trained = model(name).train()
    with torch.no_grad():
        output = trained(*inputs(name))
    close(output, arrays(name)["output"], tolerances.OUTPUT)
    state = trained.state_dict()
    after = {key.removeprefix("after/"): x for key, x in arrays(name).items() if key.startswith("after/")}
    assert after
    for key, exact in after.items():
        torch.testing.assert_close(state[key], exact.to(state[key].dtype), rtol=0, atol=tolerances.STAGE)


def test_jafar_intermediates() -> None:
    expected, jafar = arrays("jafar_intermediates"), model("jafar_intermediates")
    image, features = inputs("jafar_intermediates")
    with torch.no_grad():
        encoded = jafar.image_encoder(image)
        guide = jafar.rope(encoded)
        query = jafar.query_encoder(guide)
        key = F.adaptive_avg_pool2d(jafar.key_encoder(guide), features.shape[2:])
        described = jafar.key_features_encoder(F.normalize(features, dim=1))
        pooled = upsamplers.jafar.normed(F.adaptive_avg_pool2d(query, size("jafar_intermediates")))
        stages = {
            "image_encoder": encoded[:, :, ::4, ::4],
            "rope": guide[:, :, ::4, ::4],
            "query_encoder": query[:, :, ::4, ::4],
            "query_pooled_normed": pooled,
            "key_pooled": key,
            "key_features": described,
            "key_modulated": jafar.sft_key(key, described),
            "query_conv": jafar.cross_decode.conv2d(pooled),
        }
    for name, stage in stages.items():
        close(stage, expected[name], tolerances.STAGE * tolerances.largest(expected[name]))


def test_loftup_phases_are_the_published_ones() -> None:
    expected, network = arrays("loftup_intermediates"), model("loftup_intermediates").upsampler
    image, features = inputs("loftup_intermediates")
    with torch.no_grad():
        colours = loftup.scale_colours(image, per_image=False)
        torch.testing.assert_close(colours, expected["scaled_image"], rtol=0, atol=0)
        height = image.shape[2]
        close(network.encode(colours, 0, height, torch.float32), expected["fourier"], 1e-6)
        code = network.lr_pe(tuple(features.shape[2:]), slice(None)).permute(2, 0, 1)
        close(code.expand_as(expected["lr_pe"]), expected["lr_pe"], 1e-6)
        for begin in (0, 7, height - 2):
            strip = network.queries(colours, begin, begin + 2, torch.float32)
            close(strip, expected["queries"][:, :, begin : begin + 2], tolerances.STAGE)


def test_naf_intermediates() -> None:
    expected, encoder = arrays("naf_intermediates"), model("naf_intermediates").image_encoder
    image, features = inputs("naf_intermediates")
    with torch.no_grad():
        for name in ("encoder", "sem_encoder"):
            close(encoder.get_submodule(name)(image)[:, :, ::4, ::4], expected[name], tolerances.STAGE)
        pooled = F.adaptive_avg_pool2d(encoder(image), size("naf_intermediates"))
        close(pooled, expected["pooled"], tolerances.STAGE)
        query = encoder.rope(pooled.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        close(query, expected["queries"], tolerances.STAGE)
        close(F.adaptive_avg_pool2d(query, features.shape[2:]), expected["keys"], tolerances.STAGE)


@pytest.mark.parametrize(
    ("name", "settings", "alike"),
    [
        ("jafar_nonsquare_batch2", {}, True),
        ("featup_nonsquare_batch2", {}, True),
        ("loftup_batch2", {}, False),  # the published one scales the colours by the range of the whole batch
        ("loftup_batch2", dict(per_image=True), True),
        ("naf_output_larger_than_image_batch2", {}, True),
    ],
)
def test_independence_of_the_batch(name: str, settings: dict, alike: bool) -> None:
    upsampler, (image, features) = model(name, **settings), inputs(name)
    with torch.no_grad():
        together = upsampler(image, features, size(name))
        alone = torch.cat([upsampler(*pair, size(name)) for pair in zip(image.split(1), features.split(1))])
    limit = 1e-4  # phases of LoftUp's colours may be off by a rounding
    assert ((together - alone).abs().max() <= limit) == alike
