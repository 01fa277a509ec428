"""The configuration of an evaluation: frozen dataclasses that refuse impossible values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from anyup_core.paths import PathText
from anyup_core.settings import require
from anyup_jax.encoders.settings import EncoderConfig
from train.config import CROWD, GREATEST, Size, at_least

GEOMETRY = ("depth", "normals")  # tasks
LEVELS = 4  # feature maps of the DPT head
TRAINED = ("featup", "jafar", "loftup", "naf")  # methods whose weights `upsamplers` names
METHODS = ("nearest", "bilinear", "bicubic", "joint_bilateral", *TRAINED, "anyup", "high_resolution", "label_guided")
EVERY = "all"  # instead of an encoder's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Images and their labels, or their depth and normals.

    Attributes:
        kind: the layout of the files: "folder" (`root/SPLIT/images/NAME.jpg` and `root/SPLIT/labels/NAME.png`), the
            published layout of "voc", "ade20k", "cityscapes", "cocostuff27" or "nyu", or "tfds" (TensorFlow Datasets).
        root: the folder; for tfds its `data_dir`.
        name: of a TFDS data set; of any data set, its name in printed tables.
        train, val: the splits for training and scoring; None for the usual ones.
        classes: number of classes, from 2 to 256; None to take it from the layout or from `root/classes.json`.
        ignore: label of pixels that are neither trained on nor scored.
        image, label: names of the features of a TFDS data set.
        size: height and width; image and label are resized to cover it and centre cropped.
    """

    kind: Literal["folder", "voc", "ade20k", "cityscapes", "cocostuff27", "nyu", "tfds"] = "folder"
    root: PathText | None = None
    name: str | None = None
    train: str | None = None
    val: str | None = None
    classes: int | None = None
    ignore: int = 255
    image: str = "image"
    label: str = "segmentation_label"
    size: Size = (448, 448)

    def __post_init__(self) -> None:
        require(self.root or self.kind == "tfds", "dataset.root", self.root,
                "name the folder with images and labels, dataset.root=FOLDER")  # fmt: skip
        require(self.kind != "tfds" or self.name, "dataset.name", self.name,
                "name a TFDS data set, dataset.name=NAME")  # fmt: skip
        possible = self.classes is None or 2 <= self.classes <= 256
        require(possible, "dataset.classes", self.classes, "give a number from 2 to 256, or null")
        require(0 <= self.ignore <= 255, "dataset.ignore", self.ignore, "labels are from 0 to 255")
        possible = 1 <= min(self.size) <= max(self.size) <= GREATEST
        require(possible, "dataset.size", self.size, f"give a height and width from 1 to {GREATEST}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A head that is trained on frozen features.

    Attributes:
        head: "linear"; or "dpt", for depth and normals, which takes one layer of the encoder or four.
        class_token: concatenate the encoder's class token to the features of every position; for depth and normals.
        augment: change colours and crop, as Probe3D does; for depth and normals.
        learning_rate, weight_decay: of AdamW.
        schedule: "cosine_per_epoch" (AnyUp's), "cosine_per_iteration", "warmup_cosine" (Probe3D's: linear from 0.01 of
            the rate over `warmup_epochs`, then cosine to 0.01 of it), "constant", or "per_iteration_bug": a cosine with
            a period of twice the number of epochs that is stepped with every iteration, as in JAFAR's published code.
        epochs: passes over the training split.
        batch_size: images per step.
        flip: mirror whole batches, each with probability 1/2; for segmentation.
        warmup_epochs: of "warmup_cosine".
        pixel_stride: of every square of this many pixels a side, one is trained on, drawn once for each image; 1 for
            all pixels. Scores are over all pixels either way. For segmentation.
        repeats: number of probes trained on the same batches, each from initial weights of its own; scores are means
            over them and are given with their standard deviations. For segmentation.
    """

    head: Literal["linear", "dpt"] = "linear"
    class_token: bool = False
    augment: bool = False
    learning_rate: float = 5e-4
    weight_decay: float = 1e-5
    schedule: Literal["cosine_per_epoch", "cosine_per_iteration", "warmup_cosine", "constant", "per_iteration_bug"] = (
        "cosine_per_epoch"
    )
    epochs: int = 20
    batch_size: int = 4
    flip: bool = True
    warmup_epochs: float = 1.5
    pixel_stride: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "probe.learning_rate", self.learning_rate, "give a positive rate")
        require(self.repeats <= CROWD, "probe.repeats", self.repeats, f"give at most {CROWD}")
        at_least(self, "probe.", weight_decay=0, epochs=1, batch_size=1, warmup_epochs=0, pixel_stride=1, repeats=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """AnyUp, as a method.

    Attributes:
        weights: a published name, a file, a folder or a training run, as for `anyup_jax.from_pretrained`.
        ema: use the moving average of a training run's parameters.
        window: "paper" or "natten"; None for that of the checkpoint.
        dtype: type of the computation.
    """

    weights: PathText = "anyup_multi_backbone"
    ema: bool = False
    window: Literal["paper", "natten"] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedConfig:
    """Another upsampler, as a method.

    Attributes:
        weights: for each encoder, by its name in `encoders`, a published name of the method, a file or a training run;
            "all" for the encoders that are not named.
        num_heads: of JAFAR and NAF; None for that of the weights' file, or 4.
        kernel_size: cells along a side of NAF's window; None for that of the weights' file, or 9.
    """

    weights: Mapping[str, PathText]
    num_heads: int | None = None
    kernel_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An evaluation: every encoder with every method.

    Attributes:
        task: "segmentation", "depth" and "normals" train and score probes; "fidelity" compares upsampled features with
            those of an enlarged image, and with the features themselves, on images of the validation split.
        encoders: the encoders, by names of your choice.
        methods: of `METHODS`. "label_guided" uses the labels and shows how much an upsampler could gain that knows
            every edge; for segmentation.
        anyup: the upsampler behind "anyup".
        upsamplers: those behind "featup", "jafar", "loftup" and "naf", by these names.
        high_resolution: factor by which "high_resolution" and "fidelity" enlarge the image that the encoder sees.
        cache: folder for the upsampling weights of every image, so that a method runs once and not in every epoch; of
            the methods in `upsamplers` for the features of the pixels that are trained on, which `probe.pixel_stride`
            makes fewer. None computes them anew, which large data sets need. For segmentation.
        limit: use only this many images of each split; None for all.
        pictures: images of the validation split, evenly spread, in the sheet of predictions of each encoder.
        seed: of the probes' initial weights, the order of images and the flips.
        output_dir: folder for everything that the evaluation writes; the same command with the same folder resumes.
    """

    task: Literal["segmentation", "depth", "normals", "fidelity"] = "segmentation"
    encoders: Mapping[str, EncoderConfig]
    methods: tuple[str, ...] = ("bilinear", "anyup")
    dataset: DatasetConfig
    probe: ProbeConfig = ProbeConfig()
    anyup: UpsamplerConfig = UpsamplerConfig()
    upsamplers: Mapping[str, TrainedConfig] = dataclasses.field(default_factory=dict)
    high_resolution: int = 2
    cache: PathText | None = None
    limit: int | None = None
    pictures: int = 6
    seed: int = 0
    output_dir: PathText = "outputs/evaluation"

    def __post_init__(self) -> None:
        require(len(self.encoders) >= 1, "encoders", dict(self.encoders), "name at least one encoder")
        unknown = [name for name in self.methods if name not in METHODS]
        require(not unknown, "methods", list(self.methods), f"choose of {', '.join(METHODS)}")
        require(len(set(self.methods)) == len(self.methods) > 0, "methods", list(self.methods), "name each once")
        at_least(self, "", high_resolution=2, limit=1, seed=0, pictures=0)
        enlarged = self.task == "fidelity" and "high_resolution" in self.methods
        require(not enlarged, "methods", list(self.methods), "fidelity compares the others with high_resolution")
        unknown = [name for name in self.upsamplers if name not in TRAINED]
        require(not unknown, "upsamplers", list(self.upsamplers), f"choose of {', '.join(TRAINED)}")
        for method in (name for name in self.methods if name in TRAINED):
            named = self.upsamplers[method].weights if method in self.upsamplers else {}
            missing = [] if EVERY in named else [encoder for encoder in self.encoders if encoder not in named]
            setting = f"+upsamplers.{method}.weights.{(missing or [EVERY])[0]}=FILE"
            remedy = f"{method} has no weights for {', '.join(missing)}; name them, {setting}"
            require(not missing, "methods", list(self.methods), remedy)
            foreign = [encoder for encoder in named if encoder not in (EVERY, *self.encoders)]
            require(not foreign, f"upsamplers.{method}.weights", dict(named), f"no encoder is called {foreign}")
        labelled = self.task == "segmentation"
        guided = labelled or "label_guided" not in self.methods
        require(guided, "methods", list(self.methods), f"{self.task} has no labels to be guided by")
        require(labelled or self.cache is None, "cache", self.cache, f"{self.task} keeps nothing; leave it out")
        self._check_geometry() if self.task in GEOMETRY else self._check_flat()

    def _check_geometry(self) -> None:
        probe, task = self.probe, self.task
        require(self.dataset.kind == "nyu", "dataset.kind", self.dataset.kind, f"{task} needs nyu")
        require(not probe.flip, "probe.flip", True, f"{task} does not mirror; give probe=geometry")
        for name in ("pixel_stride", "repeats"):
            value = getattr(probe, name)
            require(value == 1, f"probe.{name}", value, f"{task} trains one probe on all pixels; give 1")
        layers = {name: len(encoder.layer) for name, encoder in self.encoders.items()}
        possible = probe.head == "linear" or set(layers.values()) <= {1, LEVELS}
        require(possible, "encoders", layers, f"probe.head=dpt takes 1 layer or {LEVELS}")

    def _check_flat(self) -> None:
        probe, task = self.probe, self.task
        require(self.dataset.kind != "nyu", "dataset.kind", "nyu", f"it has no labels for {task}")
        require(probe.head == "linear", "probe.head", probe.head, f"{task} has linear probes")
        for name in ("class_token", "augment"):
            require(not getattr(probe, name), f"probe.{name}", True, "it is for depth and normals")
