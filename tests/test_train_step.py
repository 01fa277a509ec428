"""The step: accumulation, clipping, averages, schedules, losses that are not finite, layouts, choice of encoder."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from anyup_core.config import AnyUpConfig
from anyup_jax.model import AnyUp
from tests.training import environment
from train import encoders, optim, sharding
from train.config import Config, DatasetConfig, EncoderConfig, FeaturesConfig, LossConfig, MeshConfig, OptimizerConfig
from train.state import from_trees, init_state, state_specs, to_trees
from train.step import StepPlan, StepSizes, draw_channels, loss_of, make_step, updated

SIZES = StepSizes(8, (32, 32), *[(16, 16)] * 4)
VIEWS = DatasetConfig(crop_size=(32, 32), img_size=(16, 16), num_local_crops=2)


def tiny(**changes: Any) -> Config:
    fields = dict(
        model=AnyUpConfig(qk_dim=16, num_heads=2, backend="tiled"),  # compiles faster than auto
        encoders={"none": EncoderConfig(name="timm:none")},
        dataset=VIEWS,
        batch_size=8,
        max_steps=20,
        dtype="float32",
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    return Config(**fields | changes)


def batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    random, size = np.random.default_rng(seed), config.batch_size
    photographs = (random.integers(0, 256, (size, 32, 32, 3), np.uint8) for _ in range(2))
    image, augmented = photographs
    maps = dict(lr=(2, 2, 5), hr=(2, 2, 2, 5))
    features = {name: random.standard_normal((size, *shape), np.float32) for name, shape in maps.items()}
    return dict(image=image, augmented=augmented, crops=random.random((size, 2, 2), np.float32), **features)


COMPILED: dict[str, Any] = {}


def steps(config: Config, count: int = 2, spoil: int | None = None) -> tuple[Any, list[dict[str, float]]]:
    """Return the state after some steps, and the metrics of each; `spoil` is a step whose features hold NaN."""
    mesh = sharding.make_mesh(config.mesh)
    graph, state = init_state(config, AnyUp(config.model, rngs=nnx.Rngs(0)))
    specs = state_specs(state, config.mesh.parameters, mesh)
    state = sharding.place(state, specs, mesh)
    if repr(config) not in COMPILED:
        COMPILED[repr(config)] = make_step(StepPlan(config, graph, specs, SIZES, mesh, None))
    step = COMPILED[repr(config)]
    results = []
    for number in range(count):
        arrays = batch(config, number)
        if number == spoil:
            arrays["lr"][0] = np.nan
        state, metrics = step(state, (), sharding.place_batch(arrays, mesh))
        results.append({name: float(x) for name, x in metrics.items()})
    return jax.tree.map(np.asarray, state), results


def largest_difference(left: Any, right: Any) -> float:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in pairs)


def test_terms_add_up_and_parameters_move() -> None:
    config = tiny()
    before = init_state(config, AnyUp(config.model, rngs=nnx.Rngs(0)))[1]
    state, metrics = steps(config, 1)
    assert int(state.step) == int(state.optimizer.count) == 1
    assert largest_difference(state.params, before.params) > 1e-3
    assert largest_difference(state.unused, before.unused) == 0
    first = metrics[0]
    total = first["reconstruction"] + first["consistency"] + first["input"]
    assert first["loss"] == pytest.approx(total, rel=1e-6)
    assert first["reconstruction"] > 0.1
    assert min(first["consistency"], first["input"]) > -1e-6  # 0 but for rounding: an untrained model averages evenly
    assert first["learning_rate"] == pytest.approx(1e-2)


def test_accumulation_gives_the_same_step() -> None:
    whole, metrics = steps(tiny())
    parts, other = steps(tiny(optimizer=OptimizerConfig(learning_rate=1e-2, accumulate=4)))
    assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in metrics], rel=1e-5)
    assert largest_difference(whole.optimizer.mu, parts.optimizer.mu) < 1e-6


@pytest.mark.slow
def test_remat_gives_the_same_step() -> None:
    kept, again = (steps(tiny(remat=remat), 1)[0] for remat in (False, True))
    assert largest_difference(kept.optimizer.mu, again.optimizer.mu) < 1e-6


def advanced(optimizer: OptimizerConfig, loss: float = 1.0, factor: float = 1.0, ok: bool = True) -> tuple[Any, ...]:
    """Return the state before and after an update with gradients of norm `factor`, and the metrics."""
    config = tiny(optimizer=optimizer)
    _, before = init_state(config, AnyUp(config.model, rngs=nnx.Rngs(0)))
    before = dataclasses.replace(before, ok=jnp.array(ok))
    random = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32)), before.params)
    norm = optax.tree_utils.tree_norm(gradients)
    gradients = jax.tree.map(lambda x: x * factor / norm, gradients)
    update = jax.jit(functools.partial(updated, config))
    return before, *update(before, gradients, jnp.float32(factor), dict(loss=jnp.float32(loss)))


def test_clipping_bounds_the_gradient_and_the_average_follows() -> None:
    _, free, _ = advanced(OptimizerConfig(learning_rate=1e-2))
    before, clipped, metrics = advanced(OptimizerConfig(learning_rate=1e-2, clip_norm=0.5, ema_decay=0.5))
    assert metrics["gradient_norm"] == 1  # the norm before clipping is reported
    halved = jax.tree.map(lambda x: x / 2, free.optimizer.mu)
    assert largest_difference(clipped.optimizer.mu, halved) < 1e-8
    average = jax.tree.map(lambda a, p: 0.1 * a + 0.9 * p, before.params, clipped.params)
    assert largest_difference(clipped.ema, average) < 1e-6


@pytest.mark.parametrize("fault", [dict(loss=np.nan), dict(factor=np.inf), dict(ok=False)])
def test_an_update_that_is_not_finite_is_not_made(fault: dict[str, Any]) -> None:
    before, after, metrics = advanced(OptimizerConfig(), **fault)
    assert not metrics["ok"]
    assert int(after.step) == int(after.optimizer.count) == 0
    assert largest_difference(after.params, before.params) == 0
    assert largest_difference(after.optimizer, before.optimizer) == 0


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_state_through_the_trees_of_a_checkpoint(decay: float | None) -> None:
    before, after, _ = advanced(OptimizerConfig(ema_decay=decay))
    trees = {name: tree for name, tree in to_trees(after).items() if tree is not None}
    assert ("ema" in trees) == (decay is not None)
    assert trees["params"].keys() == {*nnx.to_pure_dict(after.params), *nnx.to_pure_dict(after.unused)}
    restored = from_trees(before, 1, trees, sharding.make_mesh(MeshConfig()))
    assert jax.tree.structure(restored) == jax.tree.structure(after)
    assert largest_difference(restored, after) == 0


def test_what_is_not_finite_changes_nothing_and_stays_so() -> None:
    good, _ = steps(tiny(), 1)
    state, metrics = steps(tiny(), 3, spoil=1)
    assert [m["ok"] for m in metrics] == [1, 0, 0]
    assert int(state.step) == 1
    assert largest_difference(state.params, good.params) == 0
    assert largest_difference(state.optimizer, good.optimizer) == 0


def loss_and_terms(config: Config, step: int = 0, channels: np.ndarray | None = None) -> dict[str, float]:
    """Return the terms and their sum at a step, with the initial parameters, of the batch of seed 0.

    `channels` are those that the features of the batch are to have.
    """
    mesh = sharding.make_mesh(config.mesh)
    graph, state = init_state(config, AnyUp(config.model, rngs=nnx.Rngs(0)))
    arrays = batch(config)
    if channels is not None:
        arrays |= {name: arrays[name][..., channels] for name in ("lr", "hr")}
    if repr(config) not in LOSSES:
        plan = StepPlan(config, graph, state_specs(state, "replicated", mesh), SIZES, mesh, None)
        LOSSES[repr(config)] = jax.jit(lambda state, batch: loss_of(state.params, plan, state, None, batch))
    state = dataclasses.replace(state, step=jnp.int32(step))
    loss, terms = LOSSES[repr(config)](state, jax.tree.map(jnp.asarray, arrays))
    return {name: float(x) for name, x in (terms | dict(loss=loss)).items()}


LOSSES: dict[str, Any] = {}


@pytest.mark.parametrize("names", [("consistency",), ("reconstruction", "input")])
def test_a_weight_of_zero_leaves_a_term_out(names: tuple[str, ...]) -> None:
    terms = loss_and_terms(tiny(loss=dataclasses.replace(LossConfig(), **dict.fromkeys(names, 0.0))))
    whole = loss_and_terms(tiny())
    for name in ("reconstruction", "consistency", "input"):
        expected = 0 if name in names else whole[name]
        assert terms[name] == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("shuffle", "share"), [(True, 1.0), (True, 0.6), (False, 0.6)])
def test_channels_of_a_step(shuffle: bool, share: float) -> None:
    config = FeaturesConfig(shuffle=shuffle)
    drawn = [np.asarray(draw_channels(config, share, 10, jax.random.key(seed))) for seed in range(40)]
    assert {len(channels) for channels in drawn} == {round(10 * share)}
    assert all(len(set(channels)) == len(channels) for channels in drawn)
    assert set(np.concatenate(drawn)) == set(range(10))
    assert all((np.diff(channels) > 0).all() for channels in drawn) == (not shuffle)
    assert len({tuple(channels) for channels in drawn}) > 30
    assert draw_channels(FeaturesConfig(), 1.0, 10, jax.random.key(0)) is None


def test_a_step_takes_other_channels_of_both_maps_and_the_next_step_others() -> None:
    mixed, plain, drawn = tiny(features=FeaturesConfig(shuffle=True), seed=3), tiny(), []
    for step in range(2):
        key = jax.random.fold_in(jax.random.key(3), step)
        drawn.append(np.asarray(draw_channels(mixed.features, 1.0, 5, key)))
        expected = loss_and_terms(plain, step, channels=drawn[step])["loss"]
        assert loss_and_terms(mixed, step)["loss"] == pytest.approx(expected, rel=1e-6)
        assert loss_and_terms(plain, step)["loss"] != pytest.approx(expected, rel=1e-6)
    assert not np.array_equal(*drawn)


def test_schedule() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_learning_rate=0.1)
    rates = [float(optim.schedule(config, 14)(jnp.asarray(step))) for step in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert float(optim.schedule(OptimizerConfig(), 10)(jnp.asarray(7))) == pytest.approx(2e-4)


def test_corners_are_patch_aligned_and_reach_both_ends() -> None:
    sizes = StepSizes(14, (448, 448), *[(224, 224)] * 4)
    corners = np.asarray(sizes.corners(jnp.asarray(np.random.default_rng(0).random((1, 4000, 2), np.float32))))
    counts = np.bincount(corners.ravel())
    assert len(counts) == 17  # 32 cells less 16
    assert counts.min() > 350
    assert sizes.corners(jnp.full((1, 1, 2), np.float32(1) - np.finfo(np.float32).epsneg)).max() == 16


def test_choice_of_encoder() -> None:
    patches = {"a": 14, "b": 16, "c": 16, "d": 16}
    chosen = [encoders.choose(3, step, patches) for step in range(2000)]
    assert chosen == [encoders.choose(3, step, patches) for step in range(2000)]
    assert chosen != [encoders.choose(4, step, patches) for step in range(2000)]
    shares = {name: chosen.count(name) / 2000 for name in patches}
    assert shares["a"] == pytest.approx(1 / 2, abs=0.05)  # a patch size first, then an encoder
    assert shares["b"] == pytest.approx(1 / 6, abs=0.04)


def test_guidance_of_random_size() -> None:
    data = DatasetConfig(global_view_random_resize=(0.5, 1.0))
    config = tiny(dataset=data)
    sides = {encoders.step_sizes(config, 14, step).whole for step in range(300)}
    assert {side % 14 for size in sides for side in size} == {0}
    assert (min(sides), max(sides)) == ((224, 224), (448, 448))


def test_shares_of_channels_are_drawn() -> None:
    config = tiny(features=FeaturesConfig(shares=(1.0, 0.5)))
    shares = [encoders.step_sizes(config, 14, step).share for step in range(400)]
    assert shares == [encoders.step_sizes(config, 14, step).share for step in range(400)]
    assert set(shares) == {1.0, 0.5}
    assert shares.count(1.0) / 400 == pytest.approx(0.5, abs=0.1)


def test_sizes_that_are_no_whole_cells_are_refused() -> None:
    config = tiny(dataset=DatasetConfig())
    with pytest.raises(ValueError, match=r"dataset.crop_size=\(448, 448\).*\(440, 440\)"):
        encoders.check_sizes("x", 20, config, config.model)


def test_batches_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mesh\.data=3"):
        sharding.make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match=r"batch_size=6 .*multiple of 4"):
        sharding.check_batch(6, 4, sharding.make_mesh(MeshConfig()))


LAYOUTS = """
import json
import numpy as np
from tests.test_train_step import largest_difference, steps, tiny
from train.config import MeshConfig
runs = [MeshConfig(), MeshConfig(data=4, model=2, parameters="fsdp")]
results = [steps(tiny(mesh=mesh), 3) for mesh in runs]
print(json.dumps([[[m["loss"] for m in metrics], largest_difference(state.optimizer.mu, results[0][0].optimizer.mu)]
                  for state, metrics in results]))
"""


@pytest.mark.slow
def test_every_layout_trains_the_same() -> None:
    """Eight devices, parameters replicated or spread, against one device."""
    options = dict(capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    flags = environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    run = subprocess.run([sys.executable, "-c", LAYOUTS], env=flags, **options)
    assert run.returncode == 0, run.stderr[-2000:]
    _, alone = steps(tiny(), 3)
    for losses, difference in json.loads(run.stdout.splitlines()[-1]):
        assert losses == pytest.approx([m["loss"] for m in alone], rel=1e-5)
        assert difference < 1e-6
