"""The tasks: every encoder with every method, one after the other, going on where an earlier start was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from anyup_jax.settings import to_dict
from evaluate import fidelity, methods, results, segmentation
from evaluate.config import Config
from evaluate.data import open_segmentation
from evaluate.frozen import Live, Split, Views, keep
from evaluate.methods import Method
from evaluate.results import Result

Say = Callable[[str], None]


def run(config: Config, say: Say = print) -> list[Result]:
    """Evaluate, write every result as soon as it is there, and return all of them.

    Raises:
        ValueError, OSError, ImportError: for what is impossible as configured; before anything is computed.
    """
    return {"segmentation": probe_segmentation, "fidelity": compare_features}[config.task](config, say)


def probe_segmentation(config: Config, say: Say) -> list[Result]:
    """Train and score linear probes for segmentation."""
    folder, data, probe = Path(config.output_dir), config.dataset, config.probe
    examples = {name: _limited(open_segmentation(data, name), config.limit) for name in ("train", "val")}
    train = Split(examples["train"], data.size, probe.flip, probe.pixel_stride, config.seed)
    val = Split(examples["val"], data.size)
    classes = examples["train"].classes
    found: dict[tuple[str, str], Result] = {}
    order = sorted(config.methods, key=lambda name: name != "bilinear")  # whose probe the others borrow
    ready = {name: methods.create(name, config) for name in order}
    settings = {
        (encoder, method): _settings(config, encoder, ready[method]) for encoder in config.encoders for method in order
    }
    for key, about in settings.items():
        if (result := results.load(folder, *key, about)) is not None:
            found[key] = result
    encoders = {name: encoder.load() for name, encoder in config.encoders.items()}
    heads: dict[str, Any] = {}
    for name in order:
        method = ready[name]
        wanted = {key: encoder for key, encoder in encoders.items() if (key, name) not in found}
        if name == "bilinear":
            wanted = encoders if any((key, other) not in found for key in encoders for other in order) else {}
        views = {
            part: _views(config, split, wanted, method, settings, say)
            for part, split in (("train", train), ("val", val))
        } if wanted else {}  # fmt: skip
        for key, encoder in wanted.items():
            started, channels = time.perf_counter(), encoder.channels
            saved = results.path_of(folder, key, name).with_name("probe.safetensors")
            head = segmentation.train(
                views["train"][key], len(examples["train"]), channels, len(classes), data.ignore, config, saved,
                lambda epoch, loss, key=key, name=name: say(f"{key}, {name}: epoch {epoch}, loss {loss:.4f}"),
            )  # fmt: skip
            if name == "bilinear":
                heads[key] = head
                if (key, name) in found:
                    continue
            labels = lambda i: val.examples.read(i)[1]  # noqa: E731

            def scores(head, key=key, views=views, labels=labels):
                predict = segmentation.predictor(views["val"][key], head)
                return segmentation.score(predict, labels, len(examples["val"]), len(classes), data.ignore)

            own = scores(head)
            table = dict(mIoU=own.mean_iou, band_mIoU=own.band_iou, accuracy=own.accuracy)
            if name != "bilinear" and key in heads:
                borrowed = scores(heads[key])
                table |= dict(mIoU_bilinear_probe=borrowed.mean_iou, band_bilinear_probe=borrowed.band_iou)
            table["seconds"] = time.perf_counter() - started
            details = dict(class_names=classes, iou=own.classes, band_iou=own.band_classes)
            found[key, name] = Result(key, name, encoder.stride, table, details, settings[key, name])
            results.save(folder, found[key, name])
            say(f"{key}, {name}: mIoU {own.mean_iou:.4f}, band {own.band_iou:.4f}")
    everything = [found[encoder, name] for encoder in config.encoders for name in config.methods]
    results.write_tables(folder, everything)
    return everything


def compare_features(config: Config, say: Say) -> list[Result]:
    """Score the fidelity of every method to every encoder on the validation split."""
    folder, found = Path(config.output_dir), []
    examples = _limited(open_segmentation(config.dataset, "val"), config.limit)
    ready = {name: methods.create(name, config) for name in config.methods}
    for key, settings in config.encoders.items():
        encoder = settings.load()
        for name, method in ready.items():
            about = _settings(config, key, method) | dict(factor=config.high_resolution)
            result = results.load(folder, key, name, about)
            if result is None:
                images = (examples.read(i)[0] for i in range(len(examples)))
                table = fidelity.scores(encoder, method, images, config.high_resolution)
                result = Result(key, name, encoder.stride, table, {}, about)
                results.save(folder, result)
                say(f"{key}, {name}: cosine {table['cosine_high']:.4f} at {config.high_resolution} times the size")
            found.append(result)
    results.write_tables(folder, found)
    return found


def _views(config: Config, split: Split, encoders: dict[str, Any], method: Method, settings: dict[Any, Any],
           say: Say) -> dict[str, Views]:  # fmt: skip
    if config.cache is None:
        return {key: Live(split, encoder, method) for key, encoder in encoders.items()}
    about = {key: {name: settings[key, method.name][name] for name in ("encoder", "method")} for key in encoders}
    return dict(keep(split, encoders, method, Path(config.cache), about, say))


def _settings(config: Config, encoder: str, method: Method) -> dict[str, Any]:
    """All that the scores of an encoder with a method depend on."""
    values = to_dict(config)
    chosen = {name: values[name] for name in ("task", "probe", "seed", "limit")}
    data = {name: value for name, value in values["dataset"].items() if name != "root"}
    about: dict[str, Any] = dict(name=method.name, enlarge=method.enlarge)
    if isinstance(method, methods.Upsampler):
        about |= dict(weights=digest(method.model), window=method.model.config.window, dtype=config.anyup.dtype)
    elif isinstance(method, methods.JointBilateral):
        about |= dataclasses.asdict(method)
    return chosen | dict(dataset=data, encoder=values["encoders"][encoder], method=about)


def digest(model: nnx.Module) -> str:
    """The same for the same weights."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _First:
    """The first images of a split."""

    examples: Any
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.examples))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.examples, name)


def _limited(examples: Any, limit: int | None) -> Any:
    return examples if limit is None else _First(examples, limit)
