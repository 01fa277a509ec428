"""The run: what is checked, loaded and restored before the first step, and the loop that feeds the step and writes."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from anyup_core.files import replacing
from anyup_core.settings import from_dict, to_dict
from anyup_jax.encoders.encoder import Encoder
from anyup_jax.model import AnyUp
from train import config as settings
from train import encoders, pictures, sharding
from train.checkpoint import Checkpoints
from train.config import Config
from train.data import ARRAYS, Batches, open_source
from train.data.sources import Source
from train.metrics import Metrics
from train.profile import Trace
from train.step import TrainState, init_state, make_step, state_specs

NOT_FINITE, NOT_WRITTEN, STOPPED = 3, 74, 75  # exit statuses, see `train.run`


def run(config: Config, *, dry: bool = False) -> int:
    """Train to `max_steps` and return the exit status; `dry` prints what would be done instead.

    Raises:
        ValueError, FileNotFoundError, ImportError, FileExistsError, ConnectionError: if the run is impossible as
            configured; before anything is fetched or compiled.
    """
    sharding.join(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.optimizer.accumulate, mesh)
    for name, encoder in config.encoders.items():
        if (patch := encoder.stride()) is not None:
            encoders.check_sizes(name, patch, config)
    output = Path(config.output_dir)
    check_output(output, config)
    source = shared_source(config)
    if dry:
        from train import dry_run

        dry_run.show(config, mesh, source)
        return 0
    main = jax.process_index() == 0
    if main:
        output.mkdir(parents=True, exist_ok=True)
        write_config(output, config)
    return Run(config, mesh, source, output).train()


class Run:
    """A run whose configuration has been checked."""

    def __init__(self, config: Config, mesh: Mesh, source: Source, output: Path):
        self.config, self.mesh, self.source, self.output = config, mesh, source, output
        self.held_out = pictures.held_out(config) if config.log.pictures_every and jax.process_index() == 0 else []
        self.encoders = {name: encoder.load(config.dtype) for name, encoder in config.encoders.items()}
        for name, encoder in self.encoders.items():
            encoders.check_sizes(name, encoder.stride, config)
        self.patches = {name: encoder.stride for name, encoder in self.encoders.items()}
        self.graph, state = init_state(config, initial_model(config))
        self.specs = state_specs(state, config.mesh.parameters, mesh)
        self.state: TrainState = sharding.place(state, self.specs, mesh)
        self.frozen = {name: self._freeze(encoder) for name, encoder in self.encoders.items()}
        self.steps: dict[Any, Any] = {}

    def _freeze(self, encoder: Any) -> tuple[Any, Any]:
        """Return a Flax encoder's (structure, specs) and its parameters on the mesh; (None, nothing) for PyTorch."""
        if not isinstance(encoder, Encoder):
            return None, ()
        graph, state = nnx.split(encoder)
        specs = sharding.specs(state, self.config.mesh.encoders, self.mesh)
        return (graph, specs), sharding.place(state, specs, self.mesh)

    def train(self) -> int:
        """Do all steps that are left and return the exit status."""
        config = self.config
        checkpoint = config.checkpoint
        index, count = jax.process_index(), jax.process_count()
        saver = Checkpoints(self.output / "checkpoints", checkpoint.keep, checkpoint.keep_period)
        with contextlib.closing(saver), stop_requests() as stop:
            said: list[str] = []
            first, data = self.restore(saver, said.append)
            with (
                contextlib.closing(Batches(self.source, config, index, count, start=first)) as batches,
                Metrics(self.output, config.log, config.max_steps, config.batch_size, index == 0, first) as metrics,
                contextlib.closing(Trace(self.output, config.profile)) as trace,
            ):
                if data is not None:
                    batches.set_state(data)
                for line in said:
                    metrics.say(line)
                try:
                    return self.loop(first, batches, metrics, trace, saver, stop)
                except OSError as error:
                    metrics.say(f"error: {error}")
                    return NOT_WRITTEN

    def loop(self, first: int, batches: Any, metrics: Metrics, trace: Trace, saver: Checkpoints, stop: Any) -> int:
        """Steps run ahead of their metrics by one, so that the device never waits for the host."""
        config, pending = self.config, None
        for number in range(first + 1, config.max_steps + 1):
            batch = next(batches)
            metrics.skipped(batch["skipped"])
            trace.step(number, pending and pending[1])
            results = self.advance(number, batch)
            if pending is not None and not self.report(metrics, *pending):
                return self.abort(metrics, saver, batches, *pending)
            pending = number, results, batch["name"]
            stopping = asked_to_stop(stop, number)
            due = number % config.checkpoint.every == 0 or number == config.max_steps or stopping
            drawing = config.log.pictures_every and number % config.log.pictures_every == 0
            if due or drawing:
                if not self.report(metrics, *pending):
                    return self.abort(metrics, saver, batches, *pending)
                pending = None
            if due:
                self.save(saver, batches)
            if drawing:
                self.draw(metrics, number)
            if stopping and number < config.max_steps:
                saver.wait()
                metrics.say(f"stopped after step {number}, which is saved; the same command goes on from there")
                return STOPPED
        saver.wait()
        return 0

    def advance(self, number: int, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Do step `number`, counted from 1."""
        name = encoders.choose(self.config.seed, number - 1, self.patches)
        sizes = encoders.geometry(self.config, self.patches[name], number - 1)
        structure, frozen = self.frozen[name]
        arrays = {key: batch[key] for key in ARRAYS if key in batch}
        if structure is None:
            arrays |= encoders.bridge_features(self.encoders[name], arrays, sizes)
        if (name, sizes) not in self.steps:
            self.steps[name, sizes] = make_step(self.config, self.graph, self.specs, sizes, self.mesh, structure)
        self.state, results = self.steps[name, sizes](self.state, frozen, sharding.place_batch(arrays, self.mesh))
        return results

    def report(self, metrics: Metrics, number: int, results: dict[str, jax.Array], _names: list[str]) -> bool:
        """Write a step's metrics; return whether they are finite."""
        values = {name: float(value) for name, value in jax.device_get(results).items()}
        if not values.pop("ok"):
            return False
        metrics.log(number, values)
        return True

    def abort(
        self, metrics: Metrics, saver: Checkpoints, batches: Any, number: int, results: Any, names: list[str]
    ) -> int:
        """Save the last good state, which the step has kept, and say what happened."""
        loss, norm = (float(results[name]) for name in ("loss", "gradient_norm"))
        good = int(self.state.step)
        if good and good not in saver.steps():
            self.save(saver, batches)
            saver.wait()
        metrics.say(
            f"error: step {number} is not finite (loss {loss}, gradient norm {norm}) on {', '.join(map(str, names))}; "
            f"the state after step {good} is kept in {self.output / 'checkpoints'}. Lower optimizer.learning_rate, set "
            "optimizer.clip_norm, or take these files out."
        )
        return NOT_FINITE

    def save(self, saver: Checkpoints, batches: Any) -> None:
        """Write a checkpoint of the state in the background."""
        state = self.state
        step = int(state.step)
        data = batches.get_state() | {"step": step}
        params, optimizer, ema = pure(state)
        saver.save(step, params, optimizer, ema, data, to_dict(self.config))

    def restore(self, saver: Checkpoints, say: Any) -> tuple[int, dict[str, Any] | None]:
        """Take the newest good checkpoint, if there is one; return its step and the position in the data."""
        params, optimizer, ema = pure(self.state)
        found = saver.restore(dict(params=params, optimizer=optimizer, ema=ema), say=say)
        if found is None:
            return 0, None
        state = self.state
        moments = state.optimizer
        self.state = dataclasses.replace(
            state,
            step=replicated(found.step, self.mesh),
            params=filled(state.params, found.params),
            carried=filled(state.carried, found.params),
            optimizer=moments._replace(
                count=found.optimizer["count"],
                mu=filled(moments.mu, found.optimizer["mu"]), nu=filled(moments.nu, found.optimizer["nu"]),
            ),
            ema=None if state.ema is None else filled(state.ema, found.ema),
        )  # fmt: skip
        say(f"resuming after step {found.step}")
        return found.step, found.data

    def draw(self, metrics: Metrics, number: int) -> None:
        """Draw what the model makes of held-out photographs."""
        state = self.state.params, self.state.carried
        if jax.process_count() > 1:  # every process may hold a part only
            state = multihost_utils.process_allgather(state, tiled=True)
        if jax.process_index() != 0:
            return
        model = nnx.merge(self.graph, *jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), state))
        for name, encoder in self.encoders.items():
            ending = f"_{name}" if len(self.encoders) > 1 else ""
            path = self.output / "pictures" / f"step_{number:08d}{ending}.png"
            picture = pictures.draw(path, model, encoder, self.held_out, self.config.dataset.img_size, step=number)
            metrics.image(number, f"upsampled{ending}", picture)


def initial_model(config: Config) -> AnyUp:
    """Return the model before the first step."""
    dtype = jax.numpy.dtype(config.dtype)
    if config.checkpoint.init_from is not None:
        from anyup_jax.pretrained import from_pretrained

        return from_pretrained(config.checkpoint.init_from, dtype=dtype, backend=config.model.backend)
    return AnyUp(config.model, rngs=nnx.Rngs(config.seed), dtype=dtype)


def pure(state: TrainState) -> tuple[dict, dict, dict | None]:
    """Return the parameters, the optimizer and the average as nested dictionaries, as they are in a checkpoint."""
    carried = nnx.to_pure_dict(state.carried)
    joined = lambda x: nest(nnx.to_pure_dict(x), carried)  # noqa: E731
    moments = {name: nnx.to_pure_dict(getattr(state.optimizer, name)) for name in ("mu", "nu")}
    ema = None if state.ema is None else joined(state.ema)
    return joined(state.params), moments | dict(count=state.optimizer.count), ema


def nest(*trees: dict[str, Any]) -> dict[str, Any]:
    """Join nested dictionaries that have no leaf in common."""
    joined: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            joined[name] = nest(joined.get(name, {}), value) if isinstance(value, dict) else value
    return joined


def filled(state: nnx.State, values: dict[str, Any]) -> nnx.State:
    """Return a state with the values of the same names, of which there may be more."""

    def value(path):
        node = values
        for name in path:
            node = node[name]
        return node

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, variable.replace(value(path))) for path, variable in flat])


def replicated(number: int, mesh: Mesh) -> jax.Array:
    return sharding.place(np.int32(number), PartitionSpec(), mesh)


def shared_source(config: Config) -> Source:
    """Open the photographs, process 0 first, which makes the size index where there is none."""
    if jax.process_count() == 1:
        return open_source(config.dataset)
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("photographs")
        return open_source(config.dataset, say=lambda _: None)
    try:
        return open_source(config.dataset)
    finally:
        multihost_utils.sync_global_devices("photographs")


def check_output(output: Path, config: Config) -> None:
    """Refuse a folder that holds something else, or a run with other settings.

    Raises:
        FileExistsError: for a file, or a folder that is no run.
        ValueError: for a run of another configuration; the differences are listed.
    """
    saved = output / "config.yaml"
    if not saved.is_file():
        if output.is_file() or (output.is_dir() and any(path.name != "checkpoints" for path in output.iterdir())):
            raise FileExistsError(f"output_dir={output} holds something that is no training run; name another folder.")
        return
    before = from_dict(Config, yaml.safe_load(saved.read_text()))  # whose defaults stand for settings that came later
    changed = settings.differences(to_dict(before), to_dict(config))
    if changed:
        raise ValueError(
            f"output_dir={output} holds a run with other settings ({'; '.join(changed)}): undo them to resume it, or "
            "name another output_dir."
        )


def write_config(output: Path, config: Config) -> None:
    with replacing(output / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Give a list that SIGTERM and SIGINT append to; a second SIGINT ends the process."""
    received: list[int] = []
    if jax.process_count() > 1:  # jax listens for SIGTERM itself and agrees on a step with the other processes
        yield received
        return

    def note(number, _frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def asked_to_stop(received: list[int], step: int) -> bool:
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return bool(received)
