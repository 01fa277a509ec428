"""Training checkpoints: weights, AdamW's moments and the step between PyTorch and a run, exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from omegaconf import OmegaConf

import anyup_jax.pretrained
import anyup_torch
import convert
from anyup_core.checkpoints import pickle_reader, torch_file
from anyup_jax.layers import Unused
from convert import __main__ as cli
from convert import training_state
from convert.training_state import TrainingState
from tests.weights import EQUAL, SMALL, assert_same_bits, random_weights

RATE, DECAY = 2e-4, 1e-5
EPS = 1e-3  # at 1e-8 an entry without a gradient moves by the whole rate, whichever way its rounding points
CONFIG = {"qk_dim": 16, "window_ratio": 0.2}
INPUTS = np.random.default_rng(7)
IMAGE = INPUTS.standard_normal((2, 16, 20, 3), dtype=np.float32)
FEATURES = INPUTS.standard_normal((2, 4, 5, 6), dtype=np.float32)
TARGET = INPUTS.standard_normal((2, 16, 20, 6), dtype=np.float32)
OUT = "cross_decode.cross_attn.attention.out_proj"


def torch_side(seed: int = 0):
    """Return a new model and its optimizer."""
    torch.manual_seed(seed)
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, eps=EPS)
    return model, optimizer


def train_torch(model, optimizer, steps: int) -> list[float]:
    image, features, target = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (IMAGE, FEATURES, TARGET))
    losses = []
    for _ in range(steps):
        loss = 100 * torch.nn.functional.mse_loss(model(image, features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(model, optimizer, cfg=None) -> dict:
    cfg = OmegaConf.create({"model": CONFIG | {"use_natten": False}}) if cfg is None else cfg
    return {"optimizer_anyup": optimizer.state_dict(), "epoch": 1, "cfg": cfg, "anyup": model.state_dict()}


def train_jax(state: TrainingState, steps: int) -> tuple[TrainingState, list[float]]:
    """Train by the recipe and return the new state; what PyTorch names is what a run would keep."""
    graph, params, fixed = nnx.split(anyup_jax.pretrained.build(state.checkpoint), nnx.Param, Unused)
    adam = optax.scale_by_adam(eps=EPS)

    def tree(moments):
        flat = training_state.trained_to_flax(moments, state.checkpoint)
        return nnx.from_flat_state([(tuple(path.split(".")), nnx.Param(jnp.asarray(x))) for path, x in flat.items()])

    moments = optax.ScaleByAdamState(jnp.int32(state.step), tree(state.mu), tree(state.nu))

    @jax.jit
    def step(params, moments):
        def objective(params):
            output = nnx.merge(graph, params, fixed)(IMAGE, FEATURES)
            return 100 * jnp.mean(jnp.square(output - TARGET))

        loss, gradients = jax.value_and_grad(objective)(params)
        updates, moments = adam.update(gradients, moments)
        params = jax.tree.map(lambda p, u: p - RATE * (u + DECAY * p), params, updates)
        return params, moments, loss

    losses = []
    for _ in range(steps):
        params, moments, loss = step(params, moments)
        losses.append(float(loss))

    def flat(*states):
        return {".".join(path): np.asarray(x[...]) for s in states for path, x in nnx.to_flat_state(s)}

    checkpoint = convert.Checkpoint.from_flax(flat(params, fixed), state.checkpoint.config)
    mu, nu = (training_state.trained_to_torch(flat(x), checkpoint, "optax") for x in (moments.mu, moments.nu))
    return TrainingState(checkpoint, int(moments.count), mu, nu, state.hyper_parameters), losses


def random_state(sizes: dict[str, int] = SMALL) -> TrainingState:
    checkpoint = convert.Checkpoint(random_weights(sizes), {"window_ratio": 0.25, "num_heads": 2})
    draws = [random_weights(sizes, seed=seed) for seed in (1, 2)]
    mu, nu = ({name: x for name, x in draw.items() if not name.startswith(OUT)} for draw in draws)
    hyper = {"lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    return TrainingState(checkpoint, 1234, mu, nu, hyper, epoch=3)


def assert_same_state(left: TrainingState, right: TrainingState) -> None:
    assert (left.step, left.epoch, dict(left.hyper_parameters)) == (
        right.step,
        right.epoch,
        dict(right.hyper_parameters),
    )
    assert_same_bits(left.checkpoint.tensors, right.checkpoint.tensors)
    assert_same_bits(left.mu, right.mu)
    assert_same_bits(left.nu, right.nu)


@pytest.mark.parametrize("config", [dict(qk_dim=16), dict(qk_dim=16, lfu_dim=24)])
def test_parameters_are_counted_as_pytorch_counts_them(config):
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**config))
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    expected = [name for name, _ in model.named_parameters()]
    assert list(convert.Checkpoint(state).tensors) == expected


@pytest.mark.parametrize("sizes", [SMALL, EQUAL])
def test_round_trips_are_exact(tmp_path, sizes):
    state = random_state(sizes)
    training_state.write(tmp_path / "x.pth", state)
    assert_same_state(training_state.read(tmp_path / "x.pth"), state)
    state.write_run(tmp_path / "run")
    found = TrainingState.from_run(tmp_path / "run")
    assert_same_state(found, state)
    assert {"window_ratio": 0.25, "num_heads": 2}.items() <= found.checkpoint.config.items()
    assert_same_state(TrainingState.from_run(tmp_path / "run" / "checkpoints" / "1234"), state)
    training_state.write(tmp_path / "y.pth", found)
    assert (tmp_path / "x.pth").read_bytes() == (tmp_path / "y.pth").read_bytes()


def test_a_run_is_what_orbax_restores(tmp_path):
    """With the manager and items of the trainer; data and config are absent."""
    import orbax.checkpoint as ocp

    state = random_state()
    state.write_run(tmp_path / "run")
    args = ocp.args
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        assert manager.latest_step() == 1234
        items = args.Composite(
            params=args.StandardRestore(), optimizer=args.StandardRestore(), progress=args.JsonRestore()
        )
        found = manager.restore(1234, args=items)
    assert set(found.optimizer) == {"count", "mu", "nu"}
    assert found.optimizer["count"] == 1234
    assert found.optimizer["count"].dtype == np.int32
    assert "out" not in found.optimizer["mu"]["cross_decode"]
    assert "out" in found.params["cross_decode"]
    assert found.progress["step"] == 1234
    kernel = state.nu["image_encoder.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found.optimizer["nu"]["image_encoder"]["conv"]["kernel"], kernel)


def test_moments_of_a_real_training_go_there_and_back(tmp_path):
    model, optimizer = torch_side()
    train_torch(model, optimizer, 2)
    torch.save(saved(model, optimizer), tmp_path / "model_2steps.pth")
    assert cli.main([str(tmp_path / "model_2steps.pth"), str(tmp_path / "run"), "--training"]) == 0
    state = TrainingState.from_run(tmp_path / "run")
    assert (state.step, state.epoch, state.checkpoint.config["window_ratio"]) == (2, 1, 0.2)
    expected = {name: optimizer.state.get(parameter) for name, parameter in model.named_parameters()}
    assert [name for name, moments in expected.items() if not moments] == [f"{OUT}.weight", f"{OUT}.bias"]
    for name, moments in expected.items():
        if moments:
            np.testing.assert_array_equal(state.mu[name], moments["exp_avg"].numpy())
            np.testing.assert_array_equal(state.nu[name], moments["exp_avg_sq"].numpy())
    assert cli.main([str(tmp_path / "run"), str(tmp_path / "back.pth"), "--training"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    other, resumed = torch_side(seed=1)
    other.load_state_dict(back["anyup"], strict=True)
    resumed.load_state_dict(back["optimizer_anyup"])
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert train_torch(other, resumed, 2) == train_torch(model, optimizer, 2)  # as if nothing had happened
    for mine, theirs in zip(other.parameters(), model.parameters()):
        assert torch.equal(mine, theirs)


def start() -> TrainingState:
    model, _ = torch_side()
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    checkpoint = convert.Checkpoint(tensors, CONFIG)
    hyper = {"lr": RATE, "betas": (0.9, 0.999), "eps": EPS, "weight_decay": DECAY}
    return TrainingState(checkpoint, 0, {}, {}, hyper)


def assert_close(left: TrainingState, right: TrainingState) -> None:
    """Weights within 1e-5, but for the bias of the keys: softmax cancels it, its gradient is rounding alone."""
    assert left.step == right.step == 6
    for name, weight in left.checkpoint.tensors.items():
        other = right.checkpoint.tensors[name]
        if name.endswith("in_proj_bias"):
            weight, other = weight[:16], other[:16]
        np.testing.assert_allclose(weight, other, rtol=0, atol=1e-5, err_msg=name)


def test_three_steps_in_jax_and_three_in_pytorch_are_six_in_jax(tmp_path):
    expected, losses = train_jax(start(), 6)
    half, first = train_jax(start(), 3)
    half.write_run(tmp_path / "run")
    assert cli.main([str(tmp_path / "run"), str(tmp_path / "x.pth"), "--training"]) == 0
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    model, optimizer = torch_side(seed=1)
    model.load_state_dict(loaded["anyup"])
    optimizer.load_state_dict(loaded["optimizer_anyup"])
    np.testing.assert_allclose(first + train_torch(model, optimizer, 3), losses, rtol=1e-5)
    torch.save(saved(model, optimizer), tmp_path / "y.pth")
    assert_close(training_state.read(tmp_path / "y.pth"), expected)


def test_three_steps_in_pytorch_and_three_in_jax_are_six_in_jax(tmp_path):
    expected, losses = train_jax(start(), 6)
    model, optimizer = torch_side()
    first = train_torch(model, optimizer, 3)
    torch.save(saved(model, optimizer), tmp_path / "x.pth")
    assert cli.main([str(tmp_path / "x.pth"), str(tmp_path / "run"), "--training"]) == 0
    found, rest = train_jax(TrainingState.from_run(tmp_path / "run"), 3)
    np.testing.assert_allclose(first + rest, losses, rtol=1e-5)
    assert_close(found, expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_configuration_is_inert(tmp_path, protocol):
    cfg = OmegaConf.create(
        {
            "model": {"window_ratio": 0.3, "num_heads": 2, "use_natten": True, "init_gaussian_derivatives": "${flag}"},
            "flag": False,
            "sizes": [224, {"deep": None}],
            "text": "???",
        }
    )
    content = {"anyup": {name: torch.from_numpy(x) for name, x in random_weights().items()}, "cfg": cfg}
    torch.save(content, tmp_path / "x.pth", pickle_protocol=protocol)
    found = torch_file.read(tmp_path / "x.pth")["cfg"]
    assert isinstance(found, pickle_reader.Inert)
    assert repr(found) == "Inert(omegaconf.dictconfig.DictConfig)"
    config = convert.read(tmp_path / "x.pth").config
    assert {"window_ratio": 0.3, "num_heads": 2, "window": "natten"}.items() <= config.items()
    assert "init_gaussian_derivatives" not in config
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert convert.read(tmp_path / "old.pth").config == config


def test_nested_plain_data_is_written(tmp_path):
    value = {
        "numbers": [1, -1, 2**31, -(2**40), 2**80, 0.5, float("inf"), True, False, None],
        "keys": {0: (), 3: ("a", [], {})},
        "scalar": np.array(3, np.float32),
    }
    torch_file.write(tmp_path / "x.pth", value)
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert found["scalar"].shape == ()
    assert dict(found) == value
    assert torch_file.read(tmp_path / "x.pth") == value
    with pytest.raises(TypeError, match="cannot hold a set"):
        torch_file.write(tmp_path / "y.pth", {"x": {1}})
    with pytest.raises(TypeError, match=r"cannot hold the key 0\.5"):
        torch_file.write(tmp_path / "y.pth", {"x": {0.5: 1}})
    with pytest.raises(ValueError, match=r"no storage type for x\.0 "):
        torch_file.write(tmp_path / "y.pth", {"x": [np.array(["a"])]})
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("optimizer_anyup"), "has no optimizer state"),
        (lambda s: s.update(optimizer_anyup={"a": 1}), "is not what torch.optim.AdamW.state_dict"),
        (lambda s: s["optimizer_anyup"]["param_groups"].append({}), "has 2 groups of weights"),
        (lambda s: s["optimizer_anyup"]["param_groups"][0].update(amsgrad=True), "plain AdamW only"),
        (lambda s: s["optimizer_anyup"]["param_groups"][0].update(params=[0]), "must hold the model's 74 weights"),
        (lambda s: s["optimizer_anyup"]["state"][0].update(step=np.array(7, np.float32)), "took 7, 1234 steps"),
        (lambda s: s["optimizer_anyup"]["state"][0].pop("exp_avg"), "is not AdamW"),
        (lambda s: s["optimizer_anyup"]["state"][0].update(exp_avg=np.zeros(3)), "moments of image_encoder.0.weight"),
        (lambda s: s["optimizer_anyup"]["state"].update({99: s["optimizer_anyup"]["state"][0]}), "state of weight 99"),
    ],
)
def test_files_without_a_usable_optimizer_are_refused(tmp_path, capsys, change, message):
    content = random_state().to_torch()
    change(content)
    torch_file.write(tmp_path / "x.pth", content)
    assert cli.main([str(tmp_path / "x.pth"), str(tmp_path / "run"), "--training"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_command_refuses(tmp_path, capsys):
    state = random_state()
    file, run = training_state.write(tmp_path / "x.pth", state), state.write_run(tmp_path / "run")
    for arguments, message in [
        ([file, run], "run is not empty and stays as it is"),
        ([run, file], "exists already"),
        ([run, tmp_path / "other"], "are no such pair"),
        ([tmp_path / "none", file], "none does not exist"),
        ([tmp_path, tmp_path / "y.pth"], "is no run with a checkpoint"),
    ]:
        assert cli.main([*map(str, arguments), "--training"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([str(run), str(file), "--training", "--overwrite"]) == 0
    assert cli.main([str(file), "--training", "--inspect"]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main([str(file), str(tmp_path / "empty"), "--training"]) == 0
    assert_same_state(TrainingState.from_run(tmp_path / "empty"), training_state.read(file))


def test_without_the_option_only_weights_are_converted(tmp_path):
    training_state.write(tmp_path / "x.pth", random_state())
    assert cli.main([str(tmp_path / "x.pth"), str(tmp_path / "y.pth")]) == 0
    assert_same_bits(torch_file.read(tmp_path / "y.pth"), random_state().checkpoint.tensors)
