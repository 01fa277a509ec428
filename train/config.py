"""The configuration of a training run: frozen dataclasses, in which an impossible run cannot be written down.

`presets` puts hydra's groups and command line on top; nothing else in `train` knows of hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from anyup_core import settings
from anyup_core.config import AnyUpConfig
from anyup_core.settings import require
from anyup_jax.encoders.settings import EncoderConfig

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The photographs, and the views that are cut from them.

    Attributes:
        kind: "skimage" (what scikit-image ships), "folder" (`root/class/file`) or "tfds" (TensorFlow Datasets).
        root: the folder of images; for tfds its `data_dir`. Buckets (gs://) are for tfds.
        name, split: of a TFDS data set.
        index: the size index of a folder; `root/size_index.tsv` if None.
        crop_size: height and width that the photograph is resized and centre cropped to.
        img_size: height and width of every view: the crops, and the whole crop resized to be guidance and input.
        guidance_size: height and width of the guidance; None for those of the view the encoder sees of the whole crop.
        num_local_crops: crops of `img_size` for each photograph.
        global_view_random_resize: least and greatest scale of the view the encoder sees of the whole crop, in units of
            `crop_size`, drawn for each batch; None leaves it at `img_size`. Every size drawn is compiled once.
        random_region: least share of the photograph's area that the crop is cut from, at a random place and with the
            crop's proportions; None for the largest region, in the centre. `max_enlargement` limits it.
        max_enlargement: the greatest factor that a photograph may be enlarged by to cover the crop. At 1 those that are
            smaller than the crop are left out.
        flip: mirror every other photograph, drawn at random.
        pasted_regions: irregular regions of other photographs that are pasted onto each, for `loss.outlines`.
        augmentation_strength: 0 for none, 1 for the published recipe.
        workers: processes that prepare batches; 0 for threads of this one.
        threads: threads of each of these.
        prefetch: batches prepared ahead by each process.
    """

    kind: Literal["skimage", "folder", "tfds"] = "skimage"
    root: str | None = None
    name: str | None = None
    split: str = "train"
    index: str | None = None
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
            require(size is None or min(size) >= 1, f"dataset.{field}", size, "give positive sizes")
        fits = all(view <= crop for view, crop in zip(self.img_size, self.crop_size))
        require(fits, "dataset.img_size", self.img_size, f"it must fit into dataset.crop_size={self.crop_size}")
        require(self.num_local_crops >= 1, "dataset.num_local_crops", self.num_local_crops, "give at least 1")
        require(0 <= self.pasted_regions <= 15, "dataset.pasted_regions", self.pasted_regions, "give 0 to 15")
        require(self.augmentation_strength >= 0, "dataset.augmentation_strength", self.augmentation_strength,
                 "give 0 for none, 1 for the published recipe")  # fmt: skip
        require(self.workers >= 0, "dataset.workers", self.workers, "give 0 or more processes")
        require(self.threads >= 1, "dataset.threads", self.threads, "give at least one thread")
        require(self.prefetch >= 1, "dataset.prefetch", self.prefetch, "give at least one batch")
        region = self.random_region
        require(region is None or 0 < region <= 1, "dataset.random_region", region,
                 "give a share of the area above 0 and at most 1, or null for the centre")  # fmt: skip
        require(self.max_enlargement >= 1, "dataset.max_enlargement", self.max_enlargement,
                 "give 1 to leave out photographs that are smaller than the crop, or a greater factor")  # fmt: skip
        if (scales := self.global_view_random_resize) is not None:
            require(0 < scales[0] <= scales[1] <= 1, "dataset.global_view_random_resize", scales,
                     "give two scales with 0 < least <= greatest <= 1")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """What is done to the channels of all features of a step, so that the model does not get used to an encoder's.

    The feature unification depends on the order and the number of the channels (see `layers.FeatureUnification`): from
    few encoders it learns what single channels of theirs mean, which says nothing of another encoder's.

    Attributes:
        shuffle: take the channels in another order in every step.
        shares: shares of the channels, one of which is drawn for each step and that many channels kept, drawn as well.
            Every share is compiled once for each encoder.
    """

    shuffle: bool = False
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        valid = len(self.shares) >= 1 and all(0 < share <= 1 for share in self.shares)
        require(valid, "features.shares", self.shares, "give shares above 0 and at most 1, [1] for all channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; see `train.loss`.

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
        require(
            min(weights) >= 0 < max(weights), "loss", weights, "no weight may be negative, and one must be positive"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        learning_rate, betas, eps, weight_decay: as PyTorch's AdamW names them; the decay is multiplied with the rate.
        schedule: "constant", or "cosine" to `final_learning_rate` at the last step.
        warmup_steps: linear from 0.
        clip_norm: greatest norm of the whole gradient; None for no clipping.
        accumulate: parts a batch is worked on in, one after the other: memory for time, the same gradient.
        ema_decay: keep an exponential moving average of the parameters; None for none.
    """

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    final_learning_rate: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "give a positive rate")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "give two numbers in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "give a positive number")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "give 0 or more")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "give 0 or more steps")
        require(self.accumulate >= 1, "optimizer.accumulate", self.accumulate, "give at least 1")
        clip, ema = self.clip_norm, self.ema_decay
        require(clip is None or clip > 0, "optimizer.clip_norm", clip, "give a positive norm, or null for none")
        require(ema is None or 0 < ema < 1, "optimizer.ema_decay", ema, "give a number between 0 and 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices, and processes where there are several; the batch is spread over all devices.

    Attributes:
        data: devices along the axis `data`, over which parameters are copied; -1 for all that `model` leaves.
        model: devices along the axis `model`, over which "fsdp" spreads parameters; -1 for all that `data` leaves.
        slices: TPU slices; each holds whole rows of `data`, so that only gradients travel between slices.
        parameters, encoders: "replicated", or "fsdp": each device of the axis `model` keeps a part.
        distributed: "auto" joins the pod where a TPU pod, SLURM or GKE announces one, or where `coordinator` is given;
            "off" never does.
        coordinator, num_processes, process_id: of `jax.distributed.initialize`, where nothing announces them.
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
        require(self.data == -1 or self.data >= 1, "mesh.data", self.data, "give a number of devices, or -1 for all")
        require(
            self.model == -1 or self.model >= 1, "mesh.model", self.model, "give a number of devices, or -1 for all"
        )
        require((self.data, self.model) != (-1, -1), "mesh.model", -1, "only one of mesh.data and mesh.model can be -1")
        require(self.slices >= 1, "mesh.slices", self.slices, "give a number of slices")
        given = [x is not None for x in (self.coordinator, self.num_processes, self.process_id)]
        require(all(given) or not any(given), "mesh.coordinator", self.coordinator,
                 "mesh.coordinator, mesh.num_processes and mesh.process_id go together")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept in `output_dir/checkpoints`.

    Attributes:
        every: steps between checkpoints; the last step always has one.
        keep: newest checkpoints that are kept.
        keep_period: steps whose multiples are kept for ever; None for none.
        init_from: weights to start from: what `anyup_jax.from_pretrained` takes.
    """

    every: int = 1000
    keep: int = 3
    keep_period: int | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "give at least one step")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "keep at least one")
        period = self.keep_period
        require(period is None or period >= 1, "checkpoint.keep_period", period, "give at least one step, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a person sees.

    Attributes:
        every: steps between lines of `metrics.jsonl` and TensorBoard scalars, which are means over these steps.
        pictures_every: steps between pictures of held-out photographs; 0 for none.
        pictures: how many photographs.
        pictures_root: a folder of held-out photographs; None for those of the data set's kind (see `train.pictures`).
        tensorboard: write TensorBoard files.
    """

    every: int = 10
    pictures_every: int = 1000
    pictures: int = 2
    pictures_root: str | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 1, "log.every", self.every, "give at least one step")
        require(self.pictures_every >= 0, "log.pictures_every", self.pictures_every, "give 0 for no pictures")
        require(self.pictures >= 1, "log.pictures", self.pictures, "give at least one; log.pictures_every=0 for none")


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
        """First and last step to trace."""
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
        encoders: a name of one's own for each -> the encoder.
        batch_size: photographs of a step, over all devices.
        max_steps: optimizer steps.
        seed: of the initial weights, the order of the data, the views and the choice of encoders.
        dtype: type of the computation; parameters, moments and the loss are float32 either way.
        remat: compute the augmented branch again in the gradient instead of keeping what it needs.
        output_dir: everything the run writes; starting again with the same one resumes.
    """

    model: AnyUpConfig = AnyUpConfig()  # noqa: RUF009 - a frozen one
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
    output_dir: str = "outputs/train"

    def __post_init__(self) -> None:
        require(len(self.encoders) >= 1, "encoders", dict(self.encoders), "name at least one encoder")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")
        require(self.batch_size % self.optimizer.accumulate == 0, "optimizer.accumulate", self.optimizer.accumulate,
                 f"it must divide batch_size={self.batch_size}")  # fmt: skip
        require(self.max_steps >= 1, "max_steps", self.max_steps, "give at least 1")
        require(self.seed >= 0, "seed", self.seed, "give a whole number of at least 0")
        warmup = self.optimizer.warmup_steps
        require(
            warmup < self.max_steps, "optimizer.warmup_steps", warmup, f"it must be below max_steps={self.max_steps}"
        )
        require(not self.loss.outlines or self.dataset.pasted_regions, "loss.outlines", self.loss.outlines,
                 "only pasted regions have known outlines, set dataset.pasted_regions=2")  # fmt: skip
        require(self.model.input_dim == 3, "model.input_dim", self.model.input_dim, "photographs have 3 channels")

    @property
    def consistency_size(self) -> Size:
        """Where the consistency term is measured."""
        return self.loss.consistency_size or self.dataset.img_size


FREE_TO_CHANGE = (
    "max_steps", "mesh", "checkpoint", "log", "profile", "output_dir", "remat", "dataset.root", "dataset.index",
    "dataset.workers", "dataset.threads", "dataset.prefetch", "optimizer.accumulate", "encoders.*.weights",
    "model.backend",
)  # fmt: skip
"""What a run may change when it resumes: how and how long it is computed, never what."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "name: old -> new" for every setting that differs and that a resumed run must not change."""
    changed = settings.changes(old, new)
    return [text for name, text in changed.items() if not any(_matches(name, free) for free in FREE_TO_CHANGE)]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(p in ("*", part) for part, p in zip(parts, wanted))
