"""Photographs for training, prepared by the host: by ours, and by torchvision and PyTorch's DataLoader."""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.tables import table_of

BATCH = 4
SIZES = dict(files=(500, 600), crop=448, view=224, crops=4, images=48)
"""Height and width of the files; sides of the crop and of the views; local crops; and images a measurement takes."""


def data(rounds: int) -> Table:
    """Images for training a second and core: ours, and torchvision with PyTorch's DataLoader at the same work."""
    work = "JPEGs of {files[0]}x{files[1]}: {crop}² and augmented, {crops} crops and views of {view}²".format(**SIZES)
    title = f"images for training from {work}; medians of {rounds} turns"
    table = table_of(title, "", "images / s and core", "ratio", "ms / image")
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        write_photographs(Path(folder))
        cases = {
            "torchvision, DataLoader": torch_batches(Path(folder), views=True),
            "the same, without views": torch_batches(Path(folder), views=False),
            "train.data": our_batches(Path(folder)),
        }
        with contextlib.ExitStack() as stack:
            for batches in cases.values():
                stack.callback(batches.close)
                seconds_per_image(batches)  # the first one imports and allocates
            turns = [{name: seconds_per_image(batches) for name, batches in cases.items()} for _ in range(rounds)]
    for name in cases:
        seconds = np.median([turn[name] for turn in turns])
        ratio = np.median([turn["torchvision, DataLoader"] / turn[name] for turn in turns])
        table.add_row(name, f"{1 / seconds:.1f}", f"{ratio:.2f} x", f"{1e3 * seconds:.1f}")
    table.caption = (
        "seconds of the processor, over all threads. Wanted of train.data: 1.5 x or more. It leaves cutting, resizing "
        "and normalising views to the device, and hands over 8-bit pixels; the second row leaves them out too."
    )
    return table


def seconds_per_image(batches: Iterator[Any]) -> float:
    """Take batches and return the processor's seconds that each image cost, whichever thread spent them."""
    count = -(-SIZES["images"] // BATCH)
    start = time.process_time()
    for _ in range(count):
        next(batches)
    return (time.process_time() - start) / (count * BATCH)


def write_photographs(folder: Path) -> None:
    """Write scikit-image's photographs as root/class/file."""
    from PIL import Image

    from train.config import DatasetConfig
    from train.data import open_source

    source = open_source(DatasetConfig(crop_size=(1, 1), img_size=(1, 1)))
    (folder / "photographs").mkdir()
    for index in range(len(source)):
        with source.open(index) as file, Image.open(file) as image:
            resized = image.convert("RGB").resize(SIZES["files"][::-1])
        resized.save(folder / "photographs" / f"{index}.jpg", quality=90)


def our_batches(folder: Path) -> Iterator[Any]:
    """One thread reads ahead, by a batch."""
    from train.config import Config, DatasetConfig, EncoderConfig
    from train.data import Batches, open_source

    crop, view = SIZES["crop"], SIZES["view"]
    dataset = DatasetConfig(
        kind="folder", root=str(folder), crop_size=(crop, crop), img_size=(view, view),
        num_local_crops=SIZES["crops"], threads=1, prefetch=1,
    )  # fmt: skip
    config = Config(encoders={"any": EncoderConfig(name="any")}, dataset=dataset, batch_size=BATCH)
    return Batches(open_source(dataset, say=lambda line: None), config)


def torch_batches(folder: Path, views: bool) -> Iterator[Any]:
    """The recipe in torchvision's transforms on 8-bit tensors, its fast way; in this process, without end."""
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    crop, view = (2 * (SIZES[name],) for name in ("crop", "view"))
    fit = v2.Compose([v2.Resize(crop[0], antialias=True), v2.CenterCrop(crop)])
    augment = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.3, 0.05), v2.RandomPhotometricDistort()], 0.5),
            v2.RandomGrayscale(0.1),
            v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.5))], 0.35),
            v2.RandomChoice([v2.JPEG(quality) for quality in (95, 80, 60, 40)], [0.25, 0.35, 0.25, 0.15]),
            v2.RandomAutocontrast(0.2),
            v2.RandomEqualize(0.15),
            v2.RandomAdjustSharpness(1.5, 0.2),
            v2.RandomPosterize(5, 0.1),
            v2.RandomSolarize(0.9 * 255, 0.05),
            v2.RandomInvert(0.02),
            v2.RandomApply([v2.GaussianNoise(0, 0.03)], 0.6),
        ]
    )
    cut, shrink = v2.RandomCrop(view), v2.Resize(view, antialias=True)
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), normalize])

    class Photographs(torch.utils.data.Dataset):
        paths = sorted(folder.glob("*/*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            image = fit(decode_image(str(self.paths[index]), ImageReadMode.RGB))
            augmented = augment(image)
            if not views:
                return [image, augmented]
            crops = [finish(cut(image)) for _ in range(SIZES["crops"])]
            return [finish(shrink(image)), finish(shrink(augmented)), torch.stack(crops)]

    loader = torch.utils.data.DataLoader(Photographs(), BATCH, shuffle=True, drop_last=True)
    return _for_ever(loader)


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread, and torchvision from saying that its JPEG coder has a successor."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            yield
    finally:
        torch.set_num_threads(threads)
