"""The tasks: every encoder with every method, one after the other, going on where an earlier start was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from anyup_core import figure
from anyup_core.settings import to_dict
from anyup_jax.encoders.settings import check_cells
from evaluation import depth_normals, fidelity, methods, results, segmentation, sheet
from evaluation.config import Config
from evaluation.data import open_nyu, open_segmentation
from evaluation.fitting import restore
from evaluation.frozen import Live, Split, Views, keep
from evaluation.methods import Method
from evaluation.results import Result

Say = Callable[[str], None]
Key = tuple[str, str]  # an encoder and a method
BORROWED = "bilinear"  # its probe is tried on what the other methods upsample, without training it again


def run(config: Config, say: Say = print) -> list[Result]:
    """Evaluate, write every result as soon as it is there, and return all of them.

    Raises:
        ValueError, OSError, ImportError: for what is impossible as configured; before anything is computed.
    """
    return TASKS[config.task](config, say)


def probe_segmentation(config: Config, say: Say) -> list[Result]:
    """Train and score linear probes for segmentation."""
    folder, probe = Path(config.output_dir), config.probe
    train = _split(config, "train", mirrored=probe.flip, pixel_stride=probe.pixel_stride, seed=config.seed)
    val = _split(config, "val")
    shown = sheet.shown(len(val), config.pictures)
    ready, about, found = _begin(config, folder, len(shown))
    for name in sorted(config.methods, key=lambda name: name != BORROWED):  # whose probes the others try too
        wanted = {key: config.encoders[key].load() for key in config.encoders if (key, name) not in found}
        if not wanted:
            continue
        views = [_views(config, split, wanted, ready[name], about, say) for split in (train, val)]
        for key, encoder in wanted.items():
            started = time.perf_counter()
            probes = segmentation.train(
                views[0][key], train, encoder.channels, config, _probe(folder, key, name), about[key, name],
                lambda epoch, loss, key=key, name=name: say(f"{key}, {name}: epoch {epoch}, loss {loss:.4f}"),
            )  # fmt: skip
            heads = {name: probes}
            if BORROWED in config.methods:
                _, state = restore(_probe(folder, key, BORROWED), dict(head=probes), about[key, BORROWED])
                heads[BORROWED] = state["head"]
            scores, predictions = segmentation.score(views[1][key], val, heads, shown)
            own = scores[name]
            table = dict(mIoU=own.mean_iou, band_mIoU=own.band_iou, accuracy=own.accuracy)
            if name != BORROWED in scores:
                table |= {f"mIoU_{BORROWED}_probe": scores[BORROWED].mean_iou}
                table |= {f"band_{BORROWED}_probe": scores[BORROWED].band_iou}
            if probe.repeats > 1:
                table |= dict(mIoU_std=own.mean_iou_std, band_mIoU_std=own.band_iou_std)
            table["seconds"] = time.perf_counter() - started
            details = dict(class_names=val.examples.classes, iou=own.classes, band_iou=own.band_classes)
            if shown:
                sheet.write(results.path_of(folder, key, name).parent, predictions[name])
            found[key, name] = Result(key, name, encoder.stride, table, details, about[key, name])
            results.save(folder, found[key, name])
            say(f"{key}, {name}: mIoU {own.mean_iou:.4f}, band {own.band_iou:.4f}")
    images = [(val.examples.name(i), *val.view(i, False)) for i in shown]
    _draw(config, folder, images, sheet.paint_classes(val.examples.ignore), "label")
    return _finish(config, folder, found)


def probe_geometry(config: Config, say: Say) -> list[Result]:
    """Train and score probes for depth or surface normals."""
    folder, kind = Path(config.output_dir), depth_normals.KINDS[config.task]
    train, val = (dataclasses.replace(open_nyu(config.dataset, part), limit=config.limit) for part in ("train", "val"))
    shown = sheet.shown(len(val), config.pictures)
    ready, about, found = _begin(config, folder, len(shown))
    for key, name in about:
        if (key, name) in found:
            continue
        started, encoder = time.perf_counter(), config.encoders[key].load(class_token=config.probe.class_token)
        check_cells("dataset.size", config.dataset.size, key, encoder.stride)
        probe, head = depth_normals.Probe.create(encoder, ready[name], config)
        head = depth_normals.train(
            probe, head, train, _probe(folder, key, name), about[key, name],
            lambda epoch, loss, key=key, name=name: say(f"{key}, {name}: epoch {epoch}, loss {loss:.4f}"),
        )  # fmt: skip
        table, predictions = depth_normals.score(probe, head, val, shown)
        if predictions is not None:
            sheet.write(results.path_of(folder, key, name).parent, predictions)
        table["seconds"] = time.perf_counter() - started
        found[key, name] = Result(key, name, encoder.stride, table, {}, about[key, name])
        results.save(folder, found[key, name])
        say(f"{key}, {name}: RMSE {table['rmse']:.4f}")
    scenes = [val.read(i) for i in shown]
    images = [(val.name(i), scene.image, kind.truth(scene)) for i, scene in zip(shown, scenes)]
    _draw(config, folder, images, kind.paint, config.task)
    return _finish(config, folder, found)


def compare_features(config: Config, say: Say) -> list[Result]:
    """Score the fidelity of every method to every encoder on the validation split."""
    folder, val, factor = Path(config.output_dir), _split(config, "val"), config.high_resolution
    ready, about, found = _begin(config, folder)
    for key, name in about:
        if (key, name) not in found:
            encoder, images = config.encoders[key].load(), (val.view(i, False)[0] for i in range(len(val)))
            table = fidelity.scores(encoder, ready[name], images, factor)
            found[key, name] = Result(key, name, encoder.stride, table, {}, about[key, name])
            results.save(folder, found[key, name])
            say(f"{key}, {name}: cosine {table['cosine_high']:.4f} at {factor} times the size")
    return _finish(config, folder, found)


TASKS = {
    "segmentation": probe_segmentation,
    "depth": probe_geometry,
    "normals": probe_geometry,
    "fidelity": compare_features,
}


def _begin(
    config: Config, folder: Path, shown: int = 0
) -> tuple[dict[str, Method], dict[Key, dict[str, Any]], dict[Key, Result]]:
    """Check what can be checked, and return the methods, what the results depend on, and the results that are there.

    A result without the predictions that are to be `shown` is not there; its probe, which is, is scored again.
    """
    if shown:
        figure.load_figure_class()
    for name, encoder in config.encoders.items():
        if (patch := encoder.stride()) is not None:
            check_cells("dataset.size", config.dataset.size, name, patch)
    ready = {name: methods.create(name, config) for name in config.methods}
    about = {(key, name): _settings(config, key, ready[name]) for key in config.encoders for name in config.methods}
    there = {key: results.load(folder, *key, settings) for key, settings in about.items()}
    complete = {key for key in there if not shown or sheet.count(results.path_of(folder, *key).parent) == shown}
    return ready, about, {key: result for key, result in there.items() if result is not None and key in complete}


def _draw(config: Config, folder: Path, images: list[Any], paint: sheet.Paint, truth: str) -> None:
    """Draw the sheet of every encoder."""
    for key in config.encoders if images else ():
        chosen = {name: results.path_of(folder, key, name).parent for name in config.methods}
        encoder, said = config.encoders[key], ""
        if "anyup" in config.methods:
            said = f" AnyUp weights: {Path(config.anyup.weights).name}."
        subtitle = f"Encoder: {encoder.name}, layer {', '.join(map(str, encoder.layer))}.{said}"
        sheet.draw(folder / key / "sheet.png", images, chosen, paint, truth, f"{key}: {config.task}", subtitle)


def _finish(config: Config, folder: Path, found: dict[Key, Result]) -> list[Result]:
    everything = [found[key, name] for key in config.encoders for name in config.methods]
    results.write_tables(folder, everything)
    return everything


def _split(config: Config, part: Literal["train", "val"], **options: Any) -> Split:
    data = config.dataset
    origin = data.kind, str(data.name), str(data.root and Path(data.root).resolve()), str(getattr(data, part)), part
    return Split(open_segmentation(data, part), origin, data.size, config.limit, **options)


def _probe(folder: Path, encoder: str, method: str) -> Path:
    return results.path_of(folder, encoder, method).with_name("probe.safetensors")


def _views(config: Config, split: Split, encoders: dict[str, Any], method: Method, about: dict[Key, dict[str, Any]],
           say: Say) -> dict[str, Views]:  # fmt: skip
    for name, encoder in encoders.items():
        check_cells("dataset.size", split.size, name, encoder.stride)
    if config.cache is None:
        return {key: Live(split, encoder, method) for key, encoder in encoders.items()}
    chosen = {key: {name: about[key, method.name][name] for name in ("encoder", "method")} for key in encoders}
    return dict(keep(split, encoders, method, Path(config.cache), chosen, say))


def _settings(config: Config, encoder: str, method: Method) -> dict[str, Any]:
    """All that the scores of an encoder with a method depend on."""
    values = to_dict(config)
    chosen = {name: values[name] for name in ("task", "probe", "seed", "limit", "high_resolution")}
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
