"""The configuration of a training run: frozen dataclasses that refuse impossible values.

`presets` adds hydra's groups and command line; nothing else in `train` uses hydra.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from anyup_core import settings
from anyup_core.config import AnyUpConfig
from anyup_core.paths import PathText
from anyup_core.settings import require
from anyup_jax.encoders.settings import EncoderConfig
from train.upsamplers import FeatUpModel, JAFARModel, LoftUpModel, NAFModel, OtherModel

Size = tuple[int, int]
GREATEST = 2**31 - 1  # of whole numbers, which arrays of int32 hold
ANNOUNCEMENTS = ("SLURM_STEP_NODELIST", "MEGASCALE_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX")
"""Environment variables of SLURM, of several TPU slices and of GKE, by which jax finds the other processes."""
TPU_DEVICES = (Path("/dev/accel0"), Path("/dev/vfio/0"))  # on a TPU host jax asks the metadata server
CROWD = 1024  # more processes, threads of one, or probes at once are of no use


def at_least(config: Any, group: str, **least: int) -> None:
    """Raise ValueError that names a setting of a group, unless each is None or between this number and GREATEST."""
    for name, number in least.items():
        value = getattr(config, name)
        valid = value is None or number <= value <= GREATEST
        require(valid, group + name, value, f"give at least {number} and at most {GREATEST}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The photographs and the views that are made of them.

    With `encoder_bands` they are images of `model.input_dim` bands, TIFF (tifffile reads them) or NPY (H, W, bands) of
    whole or floating-point numbers in a folder: all bands are the guidance.

    Attributes:
        kind: "skimage" (what scikit-image ships), "folder" (`root/class/file`) or "tfds" (TensorFlow Datasets).
        root: the folder of images; for tfds its `data_dir`, which may be a bucket (gs://).
        name, split: of a TFDS data set.
        index: the size index of a folder; `root/size_index.tsv` if None.
        crop_size: height and width that the photograph is resized and centre cropped to.
        img_size: height and width of every view: the crops, and the whole crop resized to be guidance and input.
        guidance_size: height and width of the guidance; None for the size at which the encoder sees the whole crop, and
            of another upsampler than AnyUp for its recipe's share of `crop_size`.
        num_local_crops: crops of `img_size` for each photograph.
        global_view_random_resize: least and greatest scale at which the encoder sees the whole crop, in units of
            `crop_size`, drawn for each batch; None for `img_size`, and of another upsampler than AnyUp for its
            recipe's scales. Every size that is drawn is compiled once.
        random_region: least share of the photograph's area that the crop is cut from, at a random place and with the
            crop's proportions; None for the largest region, in the centre. `max_enlargement` limits it.
        max_enlargement: the greatest factor by which a photograph may be enlarged to cover the crop. At 1, photographs
            smaller than the crop are left out.
        flip: mirror photographs at random, half of them.
        pasted_regions: how many irregular regions of other photographs are pasted onto each, for `loss.outlines`.
        augmentation_strength: 0 for none, 1 for the published recipe; of images of bands, see `augment.augment_bands`.
        encoder_bands: the three bands, counted from 0, that the encoder gets as red, green and blue, [3, 2, 1] of
            Sentinel-2's 13; None for photographs.
        encoder_range: values of the files that are 0 (black) and 1 (white) for the encoder, before its own
            normalisation, [0, 3000] for Sentinel-2's reflectance times 10000; None to stretch each band from two
            deviations below its mean to two above.
        mean, std: of each band, in units of the files, with which the guidance is normalised; None to measure them in
            the files that are trained on, before the first step. `config.yaml` and checkpoints hold what was measured.
        workers: processes that prepare batches; 0 to prepare them in threads of the main process.
        threads: threads of each of these processes.
        prefetch: batches that each process prepares in advance.
    """

    kind: Literal["skimage", "folder", "tfds"] = "skimage"
    root: PathText | None = None
    name: str | None = None
    split: str = "train"
    index: PathText | None = None
    crop_size: Size = (448, 448)
    img_size: Size = (224, 224)
    guidance_size: Size | None = None
    num_local_crops: int = 4
    global_view_random_resize: tuple[float, float] | None = None
    random_region: float | None = None
    max_enlargement: float = 1.0
    flip: bool = False
    pasted_regions: int = 0
    augmentation_strength: float = 1.0
    encoder_bands: tuple[int, ...] | None = None
    encoder_range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    workers: int = 0
    threads: int = 4
    prefetch: int = 2

    def __post_init__(self) -> None:
        require(self.kind != "folder" or self.root, "dataset.root", self.root,
                 "name the folder whose subfolders hold the images, dataset.root=FOLDER")  # fmt: skip
        require(self.kind != "tfds" or self.name, "dataset.name", self.name,
                 "name a TFDS data set, dataset.name=imagenet2012")  # fmt: skip
        for field in ("crop_size", "img_size", "guidance_size"):
            size = getattr(self, field)
            valid = size is None or 1 <= min(size) <= max(size) <= GREATEST
            require(valid, f"dataset.{field}", size, f"give sizes from 1 to {GREATEST}")
        fits = all(view <= crop for view, crop in zip(self.img_size, self.crop_size))
        require(fits, "dataset.img_size", self.img_size, f"it must fit into dataset.crop_size={self.crop_size}")
        at_least(self, "dataset.", num_local_crops=1, workers=0, threads=1, prefetch=1)
        for field in ("workers", "threads"):
            require(getattr(self, field) <= CROWD, f"dataset.{field}", getattr(self, field), f"give at most {CROWD}")
        require(0 <= self.pasted_regions <= 15, "dataset.pasted_regions", self.pasted_regions, "give 0 to 15")
        require(self.augmentation_strength >= 0, "dataset.augmentation_strength", self.augmentation_strength,
                 "give 0 for none, 1 for the published recipe")  # fmt: skip
        region = self.random_region
        require(region is None or 0 < region <= 1, "dataset.random_region", region,
                 "give a share of the area above 0 and at most 1, or null for the centre")  # fmt: skip
        require(self.max_enlargement >= 1, "dataset.max_enlargement", self.max_enlargement,
                 "give 1 to leave out photographs that are smaller than the crop, or a greater factor")  # fmt: skip
        if (scales := self.global_view_random_resize) is not None:
            require(0 < scales[0] <= scales[1] <= 1, "dataset.global_view_random_resize", scales,
                     "give two scales with 0 < least <= greatest <= 1")  # fmt: skip
        self._check_bands()

    def _check_bands(self) -> None:
        if self.encoder_bands is None:
            for field in ("encoder_range", "mean", "std"):
                value = getattr(self, field)
                require(value is None, f"dataset.{field}", value,
                         "it is for images of bands; name those that encoders get, dataset.encoder_bands")  # fmt: skip
            return
        require(len(self.encoder_bands) == 3, "dataset.encoder_bands", self.encoder_bands,
                 "give the three bands that encoders get as red, green and blue, such as [3,2,1]")  # fmt: skip
        require(self.kind == "folder", "dataset.kind", self.kind,
                 "images of bands are files in a folder, dataset=folder dataset.root=FOLDER")  # fmt: skip
        levels, std = self.encoder_range, self.std
        require(levels is None or levels[0] < levels[1], "dataset.encoder_range", levels,
                 "give the value that is black and a greater one that is white, such as [0,3000]")  # fmt: skip
        require((self.mean is None) == (std is None), "dataset.std", std, "dataset.mean and dataset.std go together")
        require(std is None or min(std, default=0) > 0, "dataset.std", std,
                 "give positive numbers, 1 for a band that is the same everywhere")  # fmt: skip

    def limits(self) -> tuple[list[float], list[float]]:
        """Return, of every band, the values that are black and white: `encoder_range`, or two deviations from the mean.

        The bands that no encoder gets are always stretched by their deviations. Needs `mean` and `std`.
        """
        low, high = ([m + side * s for m, s in zip(self.mean or (), self.std or ())] for side in (-2, 2))
        if self.encoder_range is not None:
            for band in self.encoder_bands or ():
                low[band], high[band] = self.encoder_range
        return low, high


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Random choice and order of the feature channels in each step, so that the model does not overfit to an encoder.

    The feature unification depends on the order and the number of the channels (see `layers.FeatureUnification`). With
    few encoders the model learns what their individual channels mean, which does not carry over to other encoders.

    Attributes:
        shuffle: permute the channels at random in every step.
        shares: shares of the channels. Each step draws one of them, and keeps that share of the channels, at random.
            Every share is compiled once for each encoder.
    """

    shuffle: bool = False
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        valid = len(self.shares) >= 1 and all(0 < share <= 1 for share in self.shares)
        require(valid, "features.shares", self.shares, "give shares above 0 and at most 1, [1] for all channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of the objective; see `train.loss`.

    Attributes:
        reconstruction: upsampled features against those of the crops.
        consistency: upsampled with augmented guidance against clean guidance.
        input: the downsampled prediction against the low-resolution features.
        outlines: upsampled shares of pasted regions against the regions; 0 in the published recipe. Needs
            `dataset.pasted_regions`.
        consistency_size: height and width at which consistency is measured; `dataset.img_size` if None.
    """

    reconstruction: float = 1.0
    consistency: float = 0.1
    input: float = 0.1
    outlines: float = 0.0
    consistency_size: Size | None = None

    def __post_init__(self) -> None:
        weights = self.reconstruction, self.consistency, self.input, self.outlines
        valid = min(weights) >= 0 < max(weights)
        require(valid, "loss", weights, "no weight may be negative, and one must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or NAdam with the same decay.

    Attributes:
        kind: "adamw" or "nadam", both as in PyTorch.
        learning_rate, betas, eps, weight_decay: as in PyTorch's AdamW; the decay is multiplied by the rate.
        schedule: "constant", or "cosine" to `final_learning_rate` at the last step.
        warmup_steps: steps of a linear rise from 0.
        clip_norm: greatest norm of the whole gradient; None for no clipping.
        clip_steps: how many of the first steps are clipped; None for all.
        accumulate: parts that a batch is divided into and that are computed one after the other: less memory, more
            time, the same gradient.
        ema_decay: decay of an exponential moving average of the parameters; None for no average.
    """

    kind: Literal["adamw", "nadam"] = "adamw"
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    final_learning_rate: float = 0.0
    clip_norm: float | None = None
    clip_steps: int | None = None
    accumulate: int = 1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "give a positive rate")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "give two numbers in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "give a positive number")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "give 0 or more")
        at_least(self, "optimizer.", warmup_steps=0, accumulate=1, clip_steps=1)
        clip, ema = self.clip_norm, self.ema_decay
        require(clip is None or clip > 0, "optimizer.clip_norm", clip, "give a positive norm, or null for none")
        require(ema is None or 0 < ema < 1, "optimizer.ema_decay", ema, "give a number between 0 and 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The mesh of devices and, in a pod, the processes. The batch is sharded over all devices.

    Attributes:
        data: devices along the axis `data`, over which parameters are replicated; -1 for all that `model` leaves.
        model: devices along the axis `model`, over which "fsdp" shards parameters; -1 for all that `data` leaves.
        slices: TPU slices; each holds whole rows of `data`, so that only gradients travel between slices.
        parameters, encoders: "replicated", or "fsdp": each device of the axis `model` keeps a shard.
        distributed: "auto" joins the pod if a TPU pod, SLURM or GKE announces one, or if `coordinator` is given; "off"
            never does.
        coordinator, num_processes, process_id: arguments of `jax.distributed.initialize`, if nothing announces them.
    """

    data: int = -1
    model: int = 1
    slices: int = 1
    parameters: Literal["replicated", "fsdp"] = "replicated"
    encoders: Literal["replicated", "fsdp"] = "replicated"
    distributed: Literal["auto", "off"] = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        for axis, count in (("data", self.data), ("model", self.model)):
            require(count == -1 or count >= 1, f"mesh.{axis}", count, "give a number of devices, or -1 for all")
        require((self.data, self.model) != (-1, -1), "mesh.model", -1, "only one of mesh.data and mesh.model can be -1")
        at_least(self, "mesh.", slices=1)
        given = [x is not None for x in (self.coordinator, self.num_processes, self.process_id)]
        require(all(given) or not any(given), "mesh.coordinator", self.coordinator,
                 "mesh.coordinator, mesh.num_processes and mesh.process_id go together")  # fmt: skip

    def announcement(self) -> str | None:
        """Return what names or announces other processes of the run; None if this one trains alone."""
        if self.distributed == "off":
            return None
        if self.coordinator is not None:
            return f"mesh.coordinator={self.coordinator}"
        variables = ", ".join(name for name in ANNOUNCEMENTS if name in os.environ)
        return variables or ("A TPU" if any(path.exists() for path in TPU_DEVICES) else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept in `output_dir/checkpoints`.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: how many of the newest checkpoints are kept.
        keep_period: checkpoints whose step is a multiple of it are never removed; None to keep only the newest.
        init_from: weights to start from, as `anyup_jax.from_pretrained` takes them.
    """

    every: int = 1000
    keep: int = 3
    keep_period: int | None = None
    init_from: PathText | None = None

    def __post_init__(self) -> None:
        at_least(self, "checkpoint.", every=1, keep=1, keep_period=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports.

    Attributes:
        every: steps between lines of `metrics.jsonl` and TensorBoard scalars, which are means over these steps.
        pictures_every: steps between pictures of held-out photographs; 0 for none.
        pictures: how many photographs are drawn.
        pictures_root: a folder of held-out photographs; None for the default of `dataset.kind` (see `train.pictures`).
        tensorboard: whether to write TensorBoard files.
    """

    every: int = 10
    pictures_every: int = 1000
    pictures: int = 2
    pictures_root: PathText | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        at_least(self, "log.", every=1, pictures_every=0, pictures=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Device traces.

    Attributes:
        steps: "first:last", the steps to trace, written to `output_dir/profile`; None for none.
    """

    steps: str | None = None

    def __post_init__(self) -> None:
        self.range()

    def range(self) -> tuple[int, int] | None:
        """Return the first and the last step to trace."""
        if self.steps is None:
            return None
        first, colon, last = self.steps.partition(":")
        valid = colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)
        require(valid, "profile.steps", self.steps, "give first:last, such as 10:15")
        return int(first), int(last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run.

    Attributes:
        model: AnyUp's settings, or those of another upsampler, which `model.upsampler` names; see `train.upsamplers`.
        encoders: the encoders by names of the user's choice.
        batch_size: photographs of a step, over all devices.
        max_steps: optimizer steps.
        seed: seed of the initial weights, the order of the data, the views and the choice of encoders.
        dtype: type of the computation; parameters, moments and the loss are float32 either way.
        remat: recompute the augmented branch in the backward pass instead of storing its activations.
        output_dir: folder that everything is written to; a run that starts again with the same folder resumes.
    """

    model: AnyUpConfig | JAFARModel | NAFModel | FeatUpModel | LoftUpModel = AnyUpConfig()  # noqa: RUF009 - a frozen one
    encoders: Mapping[str, EncoderConfig]
    dataset: DatasetConfig = DatasetConfig()
    features: FeaturesConfig = FeaturesConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    batch_size: int = 4
    max_steps: int = 100_000
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = False
    output_dir: PathText = "outputs/train"

    def __post_init__(self) -> None:
        require(len(self.encoders) >= 1, "encoders", dict(self.encoders), "name at least one encoder")
        at_least(self, "", batch_size=1, max_steps=1)
        if isinstance(self.model, OtherModel):
            self._check_other(self.model)
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a whole number of at least 0 and below 2**63")
        require(self.batch_size % self.optimizer.accumulate == 0, "optimizer.accumulate", self.optimizer.accumulate,
                 f"it must divide batch_size={self.batch_size}")  # fmt: skip
        warmup, steps = self.optimizer.warmup_steps, self.max_steps
        require(warmup < steps, "optimizer.warmup_steps", warmup, f"it must be below max_steps={steps}")
        require(not self.loss.outlines or self.dataset.pasted_regions, "loss.outlines", self.loss.outlines,
                 "only pasted regions have known outlines, set dataset.pasted_regions=2")  # fmt: skip
        dim, chosen = self.model.input_dim, self.dataset.encoder_bands
        require(dim == 3 or chosen, "model.input_dim", dim,
                 "photographs have 3 channels; for images of more bands, say which ones encoders get as red, green and "
                 "blue, dataset.encoder_bands=[3,2,1]")  # fmt: skip
        require(all(0 <= band < dim for band in chosen or ()), "dataset.encoder_bands", chosen,
                 f"the bands of model.input_dim={dim} count from 0 to {dim - 1}")  # fmt: skip
        for field in ("mean", "std"):
            value = getattr(self.dataset, field)
            require(value is None or len(value) == dim, f"dataset.{field}", value,
                     f"give a number for each band of model.input_dim={dim}")  # fmt: skip

    def _check_other(self, model: OtherModel) -> None:
        """Refuse what is set of AnyUp's recipe and does nothing in that of another upsampler."""
        plain = dict(loss=LossConfig(), features=FeaturesConfig(), dataset=DatasetConfig())
        chosen = [
            *((f"{group}.{field.name}", getattr(getattr(self, group), field.name), getattr(default, field.name))
              for group, default in plain.items() for field in dataclasses.fields(default)
              if group != "dataset" or field.name in OF_ANYUP),
            ("remat", self.remat, False),
        ]  # fmt: skip
        if model.scales is None:
            chosen.append(("dataset.global_view_random_resize", self.dataset.global_view_random_resize, None))
        for name, value, default in chosen:
            require(value == default, name, value, f"the recipe of {model.upsampler} has no such thing; leave it out")

    @property
    def views(self) -> DatasetConfig:
        """The data set as its batches are made: of another upsampler, without AnyUp's crops and augmentations."""
        if not isinstance(self.model, OtherModel):
            return self.dataset
        return dataclasses.replace(self.dataset, num_local_crops=1, augmentation_strength=0.0)

    @property
    def bands(self) -> int | None:
        """Bands of the images; None for photographs."""
        return None if self.dataset.encoder_bands is None else self.model.input_dim


OF_ANYUP = ("num_local_crops", "pasted_regions", "augmentation_strength", "encoder_bands")
"""Settings of the data set that only AnyUp's recipe has."""

FREE_TO_CHANGE = (
    "max_steps", "mesh", "checkpoint", "log", "profile", "output_dir", "remat", "dataset.root", "dataset.index",
    "dataset.workers", "dataset.threads", "dataset.prefetch", "optimizer.accumulate", "encoders.*.weights",
    "model.backend",
)  # fmt: skip
"""Settings that may change when a run resumes: they say how and how long to train, not what is computed."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "name: old -> new" for every setting that differs and must not change when a run resumes."""
    changed = settings.changes(old, new)
    free = {name for name in changed for pattern in FREE_TO_CHANGE if fnmatch.fnmatchcase(f"{name}.", f"{pattern}.*")}
    return [text for name, text in changed.items() if name not in free]
