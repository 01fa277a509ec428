"""The tasks: every encoder with every method, one after the other; a run that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from anyup_core import figure
from anyup_core.checks import check_memory
from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.settings import to_dict
from anyup_jax.devices import prepare_devices
from anyup_jax.encoders.settings import check_cells
from anyup_jax.encoders.timm_bridge import Bridge
from anyup_jax.promotion import standard_promotion
from evaluation import depth_normals, fidelity, methods, results, segmentation, sheet
from evaluation.config import Config
from evaluation.data import Examples, Scenes, open_nyu, open_segmentation
from evaluation.fitting import ProbeFile
from evaluation.frozen import Live, Views, keep
from evaluation.methods import Method
from evaluation.results import Result

Log = Callable[[str], None]
BORROWED = "bilinear"  # its probe is also scored on the features of the other methods, without retraining


@standard_promotion()
def run(config: Config, log: Log = print) -> list[Result]:
    """Evaluate, write every result as soon as it is complete, and return all of them.

    Raises:
        ValueError, OSError, ImportError: for what is impossible as configured; before anything is computed.
    """
    prepare_devices()
    size, factor = config.dataset.size, config.high_resolution
    check_memory(f"dataset.size={size}", 12 * math.prod(size))  # bytes of an image in float32
    if config.task == "fidelity" or "high_resolution" in config.methods:
        check_memory(f"high_resolution={factor} of dataset.size={size}", 12 * factor**2 * math.prod(size))
    return TASKS[config.task](config, log)


class Run:
    """An evaluation in progress: its encoders and methods, and the results so far.

    Args:
        config: the evaluation.
        log: receives a line on every epoch and result.
        splits: the data, by the name of the split.
        shown: the images of the validation split whose predictions are drawn. A result without them is not complete;
            its probe is scored again.

    Raises:
        ValueError, OSError, ImportError: for what is impossible as configured.
    """

    def __init__(self, config: Config, log: Log, splits: Mapping[str, Examples | Scenes], shown: Sequence[int] = ()):
        if shown:
            figure.load_figure_class()
        self.config, self.log, self.shown, self.folder = config, log, shown, Path(config.output_dir)
        for name, encoder in config.encoders.items():
            if (stride := encoder.stride()) is not None:
                check_cells("dataset.size", config.dataset.size, name, stride)
        self.methods: dict[str, Method] = {name: methods.create(name, config) for name in config.methods}
        self.encoders: dict[str, FrozenEncoder] = {
            name: encoder.load(class_token=config.probe.class_token) for name, encoder in config.encoders.items()
        }
        for name, encoder in self.encoders.items():
            check_cells("dataset.size", config.dataset.size, name, encoder.stride)
            for method in (x for x in self.methods.values() if isinstance(x, methods.Trained)):
                method.check(name, encoder.channels)
        contents = {name: split.contents for name, split in splits.items()}
        self.settings: dict[tuple[str, str], dict[str, Any]] = {
            (key, name): self._settings(key, method, contents | dict(encoder=digest(encoder)))
            for key, encoder in self.encoders.items()
            for name, method in self.methods.items()
        }
        self.results: dict[tuple[str, str], Result] = {}
        for (key, name), settings in self.settings.items():
            result = results.load(self.folder_of(key, name), settings)
            if result and (not shown or len(sheet.read(self.folder_of(key, name))) == len(shown)):
                self.results[key, name] = result

    def _settings(self, encoder: str, method: Method, contents: Mapping[str, str]) -> dict[str, Any]:
        """Return all that the scores of an encoder with a method depend on."""
        values = to_dict(self.config)
        chosen = {name: values[name] for name in ("task", "probe", "seed", "limit", "high_resolution")}
        data = {name: value for name, value in values["dataset"].items() if name != "root"}
        options: dict[str, Any] = dict(name=method.name, enlarge=method.enlarge)
        if isinstance(method, methods.Upsampler):
            window, dtype = method.model.config.window, self.config.anyup.dtype
            options |= dict(weights=digest(method.model), window=window, dtype=dtype)
        elif isinstance(method, methods.Trained):
            model: Any = method.models[encoder]
            options |= dict(weights=digest(model), settings=to_dict(model.config))
        elif isinstance(method, methods.JointBilateral):
            options |= dataclasses.asdict(method.config)
        return chosen | dict(dataset=data, encoder=values["encoders"][encoder], method=options, contents=contents)

    def missing(self, method: str) -> dict[str, FrozenEncoder]:
        """Return the encoders whose result with a method is not complete."""
        return {key: encoder for key, encoder in self.encoders.items() if (key, method) not in self.results}

    def folder_of(self, encoder: str, method: str) -> Path:
        """Return the folder with the result, the probe and the predictions of an encoder with a method."""
        return self.folder / encoder / method

    def probe_file(self, encoder: str, method: str) -> ProbeFile:
        """Return the file of the probe of an encoder with a method, which also logs its epochs."""
        path, start = self.folder_of(encoder, method) / "probe.safetensors", f"{encoder}, {method}: "
        return ProbeFile(path, self.settings[encoder, method], lambda line: self.log(start + line))

    def add(
        self,
        encoder: str,
        method: str,
        scores: Mapping[str, float],
        summary: str,
        predictions: np.ndarray | None = None,
        **details: Any,
    ) -> None:
        """Write the scores of an encoder with a method, details and the predictions to be drawn; log a summary."""
        if predictions is not None:
            sheet.write(self.folder_of(encoder, method), predictions)
        key = encoder, method
        self.results[key] = Result(*key, self.encoders[encoder].stride, scores, details, self.settings[key])
        results.save(self.folder_of(*key), self.results[key])
        self.log(f"{encoder}, {method}: {summary}")

    def draw(self, images: Sequence[sheet.Example], paint: sheet.Paint, truth: str) -> None:
        """Draw the sheet of every encoder: a row for each image, its truth and the predictions of every method."""
        config = self.config
        weights = f" AnyUp weights: {Path(config.anyup.weights).name}." if "anyup" in config.methods else ""
        for key, encoder in config.encoders.items() if images else ():
            predictions = {name: sheet.read(self.folder_of(key, name)) for name in config.methods}
            panels: list[tuple[str, np.ndarray]] = []
            for row, (name, image, target) in enumerate(images):
                panels += [(name, image), (truth, paint(target))]
                panels += [(method, paint(predicted[row])) for method, predicted in predictions.items()]
            subtitle = f"Encoder: {encoder.name}, layer {', '.join(map(str, encoder.layer))}.{weights}"
            options = dict(columns=2 + len(predictions), title=f"{key}: {config.task}", subtitle=subtitle)
            figure.draw_panels(self.folder / key / "sheet.png", panels, **options)

    def finish(self) -> list[Result]:
        """Write the tables and return all results."""
        everything = [self.results[key] for key in self.settings]
        results.write_tables(self.folder, everything)
        return everything


def check_targets(splits: Mapping[str, Examples | Scenes], targets: Callable[[Any, int], np.ndarray]) -> None:
    """Check that every split has something to learn or to score; read up to the first example that has.

    Args:
        splits: the data, by the name of the split.
        targets: (split, index) -> an array that is zero or False wherever there is nothing.

    Raises:
        ValueError: if a split has nothing, whose loss would be 0 and whose scores would come from nothing.
    """
    for name, split in splits.items():
        if not any(targets(split, index).any() for index in range(len(split))):
            raise ValueError(
                f"None of the {len(split)} images of the {name} split ({split.name(0)}, ...) has a pixel to learn or "
                f"to score: all are ignored or unknown; choose another dataset.{name}, dataset.ignore or limit."
            )


def probe_segmentation(config: Config, log: Log) -> list[Result]:
    """Train and score linear probes for segmentation."""
    probe, options = config.probe, dict(limit=config.limit, seed=config.seed)
    options |= dict(mirrored=probe.flip, pixel_stride=probe.pixel_stride)
    train = open_segmentation(config.dataset, "train", log, **options)
    val = open_segmentation(config.dataset, "val", log, limit=config.limit)
    check_targets(dict(train=train, val=val), Examples.targets)
    run = Run(config, log, dict(train=train, val=val), sheet.shown(len(val), config.pictures))
    for name in sorted(config.methods, key=lambda name: name != BORROWED):  # whose probes the others need
        encoders = run.missing(name)
        heads = {key: {} for key in encoders}
        if name != BORROWED and BORROWED in config.methods:
            for key, encoder in encoders.items():
                initial = segmentation.init_heads(encoder.channels, len(train.classes), config)
                heads[key][BORROWED] = run.probe_file(key, BORROWED).load(initial, probe.epochs)
        views = [_views(run, split, name, once=split is val) for split in (train, val)] if encoders else []
        for key, encoder in encoders.items():
            started = time.perf_counter()
            own = segmentation.train(views[0][key], train, encoder.channels, config, run.probe_file(key, name))
            scores, predictions = segmentation.score(views[1][key], val, {name: own} | heads[key], run.shown)
            best, table = scores[name], dict(scores[name].means)
            if name != BORROWED in scores:
                borrowed = scores[BORROWED].means
                table[f"mIoU_{BORROWED}_probe"] = borrowed["mIoU"]
                table[f"band_{BORROWED}_probe"] = borrowed["band_mIoU"]
            if probe.repeats > 1:
                table |= {f"{score}_std": best.deviations[score] for score in ("mIoU", "band_mIoU")}
            table["seconds"] = time.perf_counter() - started
            summary = f"mIoU {table['mIoU']:.4f}, band {table['band_mIoU']:.4f}"
            run.add(key, name, table, summary, predictions.get(name), class_names=val.classes, **best.classes)
    images = [(val.name(i), *val.read(i)) for i in run.shown]
    run.draw(images, sheet.paint_classes(val.ignore), "label")
    return run.finish()


def probe_geometry(config: Config, log: Log) -> list[Result]:
    """Train and score probes for depth or surface normals."""
    train, val = (open_nyu(config.dataset, part, config.limit) for part in ("train", "val"))
    check_targets(dict(train=train, val=val), lambda scenes, index: getattr(scenes.read(index), config.task))
    run = Run(config, log, dict(train=train, val=val), sheet.shown(len(val), config.pictures))
    for name in config.methods:
        for key, encoder in run.missing(name).items():
            started = time.perf_counter()
            probe, head = depth_normals.Probe.create(encoder, run.methods[name].of(key), config)
            head = depth_normals.train(probe, head, train, run.probe_file(key, name))
            scores, predictions = depth_normals.score(probe, head, val, run.shown)
            scores["seconds"] = time.perf_counter() - started
            run.add(key, name, scores, f"RMSE {scores['rmse']:.4f}", predictions)
    scenes = [(val.name(i), val.read(i)) for i in run.shown]
    images = [(name, scene.image, getattr(scene, config.task)) for name, scene in scenes]
    run.draw(images, sheet.PAINT[config.task], config.task)
    return run.finish()


def compare_features(config: Config, log: Log) -> list[Result]:
    """Score the fidelity of every method to every encoder on the validation split."""
    val, factor = open_segmentation(config.dataset, "val", log, limit=config.limit), config.high_resolution
    run = Run(config, log, dict(val=val))
    for name, method in run.methods.items():
        for key, encoder in run.missing(name).items():
            scores = fidelity.scores(encoder, method.of(key), (val.read(i)[0] for i in range(len(val))), factor)
            run.add(key, name, scores, f"cosine {scores['cosine_high']:.4f} at {factor} times the size")
    return run.finish()


TASKS = dict(segmentation=probe_segmentation, depth=probe_geometry, normals=probe_geometry, fidelity=compare_features)


def _views(run: Run, split: Examples, method: str, once: bool) -> Mapping[str, Views]:
    """Return the views of a split for the encoders whose result with a method is not complete.

    A split that is read only `once` is not kept where this means features of every pixel.
    """
    encoders, cache = run.missing(method), run.config.cache
    if cache is None or (once and not run.methods[method].linear):
        return {key: Live(split, encoder, run.methods[method].of(key)) for key, encoder in encoders.items()}
    settings = {key: run.settings[key, method] for key in encoders}
    settings = {key: [s["encoder"], s["contents"]["encoder"], s["method"]] for key, s in settings.items()}
    return keep(split, encoders, run.methods[method], Path(cache), settings, run.log)


def digest(model: nnx.Module | Bridge) -> str:
    """Return a digest of the weights."""
    if isinstance(model, Bridge):
        arrays = [tensor.cpu().numpy() for tensor in model.encoder.state_dict().values()]
    else:
        arrays = jax.tree.leaves(nnx.state(model))
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:16]
