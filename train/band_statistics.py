"""The mean and the deviation of each band over all pixels of the images that are trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float64

from train.config import Config
from train.data.bands import read_bands
from train.data.sources import Files, Source
from train.size_index import in_processes

Moments = tuple[int, Float64[np.ndarray, "bands"], Float64[np.ndarray, "bands"]]
"""Number of pixels; of each band, the mean and the sum of squared distances from it."""


def with_statistics(config: Config, source: Source, say: Callable[[str], None] = print) -> Config:
    """Return the configuration with `dataset.mean` and `dataset.std`, which process 0 measures unless they are given.

    Raises:
        ValueError: if no image can be read.
    """
    if config.bands is None or config.dataset.mean is not None:
        return config
    assert isinstance(source, Files)  # which dataset.kind=folder is
    measured = np.zeros((2, config.bands))
    if jax.process_index() == 0:
        say(f"measuring mean and deviation of {config.bands} bands in {len(source)} images, once for this run")
        measured = np.stack(measure(source, config.bands, config.dataset.workers, say))
    words = multihost_utils.broadcast_one_to_all(measured.view(np.uint32))  # jax would round float64
    mean, std = np.asarray(words).view(np.float64).tolist()
    return dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, mean=tuple(mean), std=tuple(std)))


def measure(
    source: Files, bands: int, workers: int, say: Callable[[str], None]
) -> tuple[Float64[np.ndarray, "bands"], Float64[np.ndarray, "bands"]]:
    """Return mean and standard deviation of each band; the deviation is 1 where a band is the same everywhere.

    The result does not depend on the number of processes. Images that cannot be read are left out, as in training.

    Raises:
        ValueError: if no image can be read.
    """
    count, mean, squares = 0, np.zeros(bands), np.zeros(bands)
    skipped: list[str] = []
    paths = [str(source.root / path) for path in source.paths]
    for moments in in_processes(functools.partial(image_moments, bands=bands), paths, workers):
        if isinstance(moments, str):
            skipped.append(moments)
            continue
        pixels, its_mean, its_squares = moments
        distance, total = its_mean - mean, count + pixels  # two sets of pixels merged, as by Chan, Golub and LeVeque
        mean = mean + distance * (pixels / total)
        squares = squares + its_squares + distance**2 * (count * pixels / total)
        count = total
    if not count:
        raise ValueError(
            f"None of the {len(paths)} images in {source.root} can be read, the last because: {skipped[-1]}"
        )
    if skipped:
        say(f"{len(skipped)} of {len(paths)} images cannot be read and are left out, the first because: {skipped[0]}")
    if constant := np.flatnonzero(squares == 0).tolist():
        say(f"bands {constant} (counted from 0) are the same in all images; their deviation is taken as 1")
    return mean, np.where(squares > 0, np.sqrt(squares / count), 1.0)


def image_moments(path: str, bands: int) -> Moments | str:
    """Return the moments of an image, or why it cannot be used."""
    try:
        pixels = read_bands(path, path, bands)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    planes = (pixels[..., band].astype(np.float64) for band in range(bands))
    moments = [((mean := plane.mean()), np.square(plane - mean).sum()) for plane in planes]
    mean, squares = np.array(moments).T
    return pixels[..., 0].size, mean, squares
