"""The order of the photographs and the batches made of them, on grain.

Everything follows from the seed and the position: element i of a run is the same photograph with the same views,
whichever process prepares it. The batch of a process is a contiguous share of the global batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Float32, UInt8

from anyup_core import command
from train.augment import augment, augment_bands
from train.config import Config, DatasetConfig
from train.data.bands import read_band_crop
from train.data.images import Region, read_crop
from train.data.sources import Source
from train.pasted_regions import paste_regions

ENDLESS = 1 << 48  # photographs of a run at most; grain cannot slice a data set of infinite length
GIVE_UP = 1000  # photographs in a row that cannot be used before the run ends
ARRAYS = ("image", "augmented", "crops", "regions")
"""The arrays of a batch; "regions" only with `dataset.pasted_regions`."""


@dataclasses.dataclass(frozen=True)
class Prepare(grain.transforms.MapWithIndex):
    """Reads the photograph with an index and makes its views; with a number of `bands`, an image of these."""

    source: Source
    config: DatasetConfig
    seed: int
    bands: int | None = None

    def map_with_index(self, position: int, index: int) -> dict[str, Any]:
        """Return the element at a position of the run; a photograph that cannot be used is replaced by the next one."""
        random = np.random.default_rng((self.seed, position))
        crops = random.random((self.config.num_local_crops, 2), np.float32)
        skipped: list[tuple[str, str]] = []
        image, name = self._view(index, np.random.default_rng((self.seed, position, 1)), skipped)
        element = dict(crops=crops, name=name, skipped=skipped)
        if self.config.pasted_regions:
            draws = np.random.default_rng((self.seed, position, 2))
            chosen = draws.integers(len(self.source), size=self.config.pasted_regions)
            others = [self._view(int(index), draws, skipped)[0] for index in chosen]
            image, element["regions"] = paste_regions(image, others, draws)
        if self.bands is None:
            augmented = augment(image, self.config.augmentation_strength, random)
        else:
            augmented = augment_bands(image, self.config, random)
        return element | dict(image=image, augmented=augmented)

    def _view(
        self, index: int, draws: np.random.Generator, skipped: list[tuple[str, str]]
    ) -> tuple[UInt8[np.ndarray, "H W 3"] | Float32[np.ndarray, "H W bands"], str]:
        """Return the crop of a photograph, or of the next one that can be used, and its name."""
        views = draws.random(4)
        region = Region(*views[:3], self.config.random_region) if self.config.random_region else None
        read = read_crop if self.bands is None else functools.partial(read_band_crop, bands=self.bands)
        attempts = min(GIVE_UP, len(self.source))
        for attempt in range(attempts):
            number = (index + attempt) % len(self.source)
            name = self.source.name(number)
            try:
                with self.source.open(number) as file:
                    image = read(file, name, self.config.crop_size, region, self.config.max_enlargement)
            except (OSError, ValueError) as error:
                skipped.append((name, " ".join(str(error).split())))
                continue
            flipped = self.config.flip and views[3] < 0.5
            return np.ascontiguousarray(image[:, ::-1]) if flipped else image, name
        raise ValueError(f"{attempts} photographs in a row cannot be used, the last because: {skipped[-1][1]}")


def collate(elements: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the arrays of elements; names and skipped files become lists."""
    names = [name for name in ARRAYS if name in elements[0]]
    batch: dict[str, Any] = {name: np.stack([x[name] for x in elements]) for name in names}
    return batch | dict(name=[x["name"] for x in elements], skipped=[pair for x in elements for pair in x["skipped"]])


class Batches(Iterator[dict[str, Any]]):
    """The endless batches of one process.

    Each has `image` and `augmented` (b, Hc, Wc, 3) uint8, or (b, Hc, Wc, bands) float32 of images of bands, `crops`
    (b, n, 2) float32 in [0, 1), the `name` of every photograph, and `skipped`, pairs of a name and a reason; with
    `dataset.pasted_regions` also `regions` (b, Hc, Wc) uint8: 0 for the photograph itself and k for the k-th region.

    Args:
        source: the photographs.
        config: the run.
        process_index, process_count: this process and how many there are; each reads only its own share.
        start: how many batches of the run come before the first one.
    """

    def __init__(self, source: Source, config: Config, process_index: int = 0, process_count: int = 1, start: int = 0):
        self.source, self.config = source, config
        self.process_index, self.process_count = process_index, process_count
        self._begin(start)

    def _begin(self, start: int) -> None:
        data, seed = self.config.views, self.config.seed
        share, photographs = self.config.batch_size // self.process_count, len(self.source)
        order = grain.MapDataset.range(photographs).seed(seed).shuffle().repeat(-(-ENDLESS // photographs))
        shares = order.map_with_index(Prepare(self.source, data, seed, self.config.bands)).batch(
            share, batch_fn=collate
        )
        batches = shares[start * self.process_count + self.process_index :: self.process_count]
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.threads, data.prefetch))
        stream = batches.to_iter_dataset(options)
        if data.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's processes inherit its flags, which keep their defaults
            command.start_tracker()
            options = grain.MultiprocessingOptions(data.workers, data.prefetch)
            stream = stream.mp_prefetch(options, command.start_worker)
        with self._workers_named():
            self.position, self.iterator = start, iter(stream)

    def __next__(self) -> dict[str, Any]:
        with self._workers_named():
            batch = next(self.iterator)
        self.position += 1
        return batch

    @contextlib.contextmanager
    def _workers_named(self) -> Iterator[None]:
        """Say of a failure between the processes what they share, and how to do without them."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not (workers := self.config.dataset.workers):
                raise
            raise OSError(
                f"The processes of dataset.workers={workers} failed ({error}); they share batches in /dev/shm, which "
                "may be too small, and memory. Enlarge it, or give dataset.workers=0."
            ) from error

    def get_state(self) -> dict[str, Any]:
        """Return the position in the run, and what identifies the photographs; both the same for any process count."""
        return dict(step=self.position, images=len(self.source), digest=self.source.digest)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position of `get_state`. Raises ValueError if that was with other photographs."""
        here = self.get_state()
        if (state["images"], state["digest"]) != (here["images"], here["digest"]):
            raise ValueError(
                f"The run was trained on {state['images']} photographs and there are {here['images']} now, or others; "
                "restore the data set, or start anew in another output_dir."
            )
        if state["step"] != self.position:
            self._begin(state["step"])

    def close(self) -> None:
        """Stop preparing batches."""
        close = getattr(self.iterator, "close", None)
        if close is not None:
            close()
        self.iterator = iter(())
