"""The run: what is checked, loaded and restored before the first step, and the loop that feeds the step and writes."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from anyup_core.checks import check_model
from anyup_core.config import AnyUpConfig
from anyup_jax.devices import prepare_devices
from anyup_jax.promotion import standard_promotion
from train import dry_run, encoders, models, pictures, pod_member, program, sharding
from train.band_statistics import with_statistics
from train.checkpoint import Checkpoints
from train.config import Config
from train.data import Batches, open_source
from train.data.sources import Source
from train.metrics import Metrics
from train.output_dir import check_output, locked, write_config
from train.profile import Trace
from train.state import TrainState, from_trees, init_state, state_specs, to_trees
from train.step import StepPlan, StepSizes, make_step
from train.stopping import stop_requests

NOT_FINITE, NOT_WRITTEN, STOPPED = 3, 74, 75  # exit statuses, see `train.run`


@standard_promotion()
def run(config: Config, *, dry: bool = False) -> int:
    """Train to `max_steps` and return the exit status; `dry` prints what would be done instead.

    Raises:
        ValueError, FileNotFoundError, ImportError, FileExistsError, ConnectionError: if the run is impossible as
            configured; before anything is fetched or compiled.
    """
    sharding.join(config.mesh)  # who is not found here has not died
    with pod_member.leaving():
        return _run(config, dry)


def _run(config: Config, dry: bool) -> int:
    prepare_devices()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.optimizer.accumulate, mesh)
    settings = models.settings(config)
    if isinstance(settings, AnyUpConfig):
        check_model(settings)
    sharding.check_memory(program.batch_shapes(config), config.batch_size, jax.process_count())
    for name, encoder in config.encoders.items():
        if (patch := encoder.stride()) is not None:
            encoders.check_sizes(name, patch, config, settings)
    output = Path(config.output_dir)
    config = check_output(output, config)
    source = shared_source(config)
    if dry:
        dry_run.show(config, mesh, source)
        return 0
    with locked(output) if jax.process_index() == 0 else contextlib.nullcontext():
        return Run(config, mesh, source, output).train()


class Run:
    """A run whose configuration has been checked."""

    def __init__(self, config: Config, mesh: Mesh, source: Source, output: Path):
        self.config, self.mesh, self.source, self.output = config, mesh, source, output
        self.held_out = pictures.held_out(config) if config.log.pictures_every and jax.process_index() == 0 else []
        self.encoders = {name: encoder.load(config.dtype) for name, encoder in config.encoders.items()}
        self.settings = settings = models.settings(config, self.encoders)
        for name, encoder in self.encoders.items():
            encoders.check_sizes(name, encoder.stride, config, settings)
        self.patches = {name: encoder.stride for name, encoder in self.encoders.items()}
        model = models.create(config, settings, initial=config.checkpoint.init_from)
        self.config = config = with_statistics(config, source)
        if jax.process_index() == 0:
            write_config(output, config)
        self.graph, state = init_state(config, model)
        self.specs = state_specs(state, config.mesh.parameters, mesh)
        self.state: TrainState = sharding.place(state, self.specs, mesh)
        self.frozen: dict[str, tuple[nnx.GraphDef | None, Any, Any]] = {}  # structure, specs and parameters on the mesh
        for name, encoder in self.encoders.items():
            graph, weights, specs = encoders.split(encoder, config.mesh.encoders, mesh)
            self.frozen[name] = graph, specs, sharding.place(weights, specs, mesh)
        self.steps: dict[tuple[str, StepSizes], jax.stages.Wrapped] = {}

    def train(self) -> int:
        """Do all steps that are left and return the exit status, NOT_WRITTEN if a file cannot be written."""
        config, process, processes, failure = self.config, jax.process_index(), jax.process_count(), None
        try:
            with contextlib.ExitStack() as opened:
                saver = Checkpoints(self.output / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_period)
                self.saver = opened.enter_context(contextlib.closing(saver))
                asked_to_stop = opened.enter_context(stop_requests())
                messages: list[str] = []
                restored = saver.restore(to_trees(self.state), messages.append)
                first = 0 if restored is None else restored.step
                batches = Batches(self.source, config, process, processes, start=first)
                self.batches = opened.enter_context(contextlib.closing(batches))
                metrics = Metrics(self.output, config.log, config.max_steps, config.batch_size, process == 0, first)
                self.metrics = opened.enter_context(metrics)
                trace = opened.enter_context(Trace(self.output, config.profile))
                opened.enter_context(pod_member.leaving())  # before anything is closed
                if restored is not None:
                    self.state = from_trees(self.state, first, restored.trees, self.mesh)
                    messages.append(f"resuming after step {first}")
                    if restored.data is not None:
                        batches.set_state(restored.data)
                for message in messages:
                    metrics.say(message)
                try:
                    return self.loop(first, trace, asked_to_stop)
                except OSError as error:
                    failure = str(error)  # closing what failed may fail again
                    raise
        except OSError as error:
            print("error:", " ".join((failure or str(error)).split()), flush=True)
            return NOT_WRITTEN

    def loop(self, first: int, trace: Trace, asked_to_stop: Callable[[int], bool]) -> int:
        """Do the steps after `first`. A step's metrics are read while the next one runs, so no device waits for it."""
        config, pending = self.config, collections.deque[tuple[int, dict[str, jax.Array], list[str]]]()
        for number in range(first + 1, config.max_steps + 1):
            batch = next(self.batches)
            self.metrics.skipped(batch["skipped"])
            trace.step(number, [metrics for _, metrics, _ in pending])
            pending.append((number, self.advance(number, batch), batch["name"]))
            stopping = asked_to_stop(number)
            saving = number % config.checkpoint.every == 0 or number == config.max_steps or stopping
            drawing = config.log.pictures_every and number % config.log.pictures_every == 0
            while pending and (len(pending) > 1 or saving or drawing):
                step, metrics, names = pending.popleft()
                if not self.report(step, metrics):
                    return self.abort(step, metrics, names)
            if saving:
                self.save()
            if drawing:
                self.draw(number)
            if stopping and number < config.max_steps:
                self.saver.wait()
                self.metrics.say(f"stopped after step {number}, which is saved; the same command goes on from there")
                return STOPPED
        self.saver.wait()
        return 0

    def advance(self, number: int, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Do step `number`, counted from 1, and return its metrics."""
        config = self.config
        name = encoders.choose(config.seed, number - 1, self.patches)
        sizes = encoders.step_sizes(config, self.patches[name], number - 1)
        graph, specs, frozen = self.frozen[name]
        arrays = {key: batch[key] for key in program.batch_shapes(config)}
        if graph is None:
            arrays |= encoders.bridge_features(self.encoders[name], arrays, sizes, config.dataset)
        if (name, sizes) not in self.steps:
            plan = StepPlan(config, self.graph, self.specs, sizes, self.mesh, graph, specs)
            self.steps[name, sizes] = make_step(plan)
        arrays = sharding.place_batch(arrays, self.mesh)
        self.state, metrics = self.steps[name, sizes](self.state, frozen, arrays)
        return metrics

    def report(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Write a step's metrics; return whether loss and gradient are finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("ok"):
            return False
        self.metrics.log(step, values)
        return True

    def abort(self, step: int, metrics: dict[str, jax.Array], names: list[str]) -> int:
        """Save the last good state, which the step has left as it was, and say which step is not finite."""
        loss, norm = (float(metrics[name]) for name in ("loss", "gradient_norm"))
        good = int(self.state.step)
        if good and good not in self.saver.steps():
            self.save()
            self.saver.wait()
        self.metrics.say(
            f"error: step {step} is not finite (loss {loss}, gradient norm {norm}) on "
            f"{', '.join(names)}; the state after step {good} is kept in "
            f"{self.output / 'checkpoints'}. Lower optimizer.learning_rate, set optimizer.clip_norm, or take these "
            "files out."
        )
        return NOT_FINITE

    def save(self) -> None:
        """Write a checkpoint of the state in the background."""
        step = int(self.state.step)
        data = self.batches.get_state() | {"step": step}
        self.saver.save(step, to_trees(self.state), data, models.record(self.config, self.settings))

    def draw(self, number: int) -> None:
        """Draw the upsampled features of held-out photographs."""
        # with fsdp a process holds only parts of the arrays
        state = multihost_utils.process_allgather((self.state.params, self.state.unused), tiled=True)
        if jax.process_index() != 0:
            return
        model = nnx.merge(self.graph, *jax.tree.map(jnp.asarray, state))
        for name, encoder in self.encoders.items():
            ending = f"_{name}" if len(self.encoders) > 1 else ""
            path = self.output / "pictures" / f"step_{number:08d}{ending}.png"
            picture = pictures.draw(path, model, encoder, self.held_out, self.config.dataset, step=number)
            self.metrics.image(number, f"upsampled{ending}", picture)


def shared_source(config: Config) -> Source:
    """Open the photographs. Process 0 comes first and makes the size index if there is none; the others wait for it."""
    main = jax.process_index() == 0
    if not main:
        multihost_utils.sync_global_devices("photographs")
    try:
        return open_source(config.dataset, print if main else lambda _: None, config.bands)
    finally:
        if main:
            multihost_utils.sync_global_devices("photographs")
