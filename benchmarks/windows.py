"""How far apart the two windows' outputs are, and a picture of what one query sees: `python -m benchmarks.windows`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.table import Table

from anyup_core.geometry import axis_window
from benchmarks.tables import table_of

RATIO = 0.1
SIZES = ((448, -1), (448, 3), (300, 3))  # side of the photograph, layer of the encoder
QUERIES = ((0.5, 0.5), (0.1, 0.85))  # of the picture, as shares of the output's height and width
OUTPUT, CELLS = (24, 24), (14, 14)  # of the picture: no whole ratio, so that natten sees some keys several times


def windows(rounds: int) -> Table:
    """Distance between the two windows' outputs on a photograph's features, next to their distance to bilinear."""
    import jax
    from flax import nnx

    import anyup_jax

    title = "the two windows on EfficientNet-Lite0 features of a photograph, AnyUp initialised with seed 0"
    columns = "image", "cells", "channels", "paper - natten", "paper - bilinear", "natten - bilinear", "cosine"
    table = table_of(title, *columns)
    for side, layer in SIZES:
        image, features = photograph_features(side, layer)
        outputs = []
        for window in ("paper", "natten"):
            model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(window=window), rngs=nnx.Rngs(0))
            outputs.append(np.asarray(anyup_jax.upsample(model, image, features), np.float64))
        blurred = np.asarray(jax.image.resize(features, outputs[0].shape, "bilinear"), np.float64)
        paper, natten = outputs
        cosine = (paper * natten).sum(-1) / np.linalg.norm(paper, axis=-1) / np.linalg.norm(natten, axis=-1)
        spread = (paper - paper.mean((0, 1, 2))).std()
        pairs = (paper, natten), (paper, blurred), (natten, blurred)
        distances = (f"{np.sqrt(np.mean((a - b) ** 2)) / spread:.3f}" for a, b in pairs)
        shape = features.shape
        table.add_row(f"{side}²", f"{shape[1]} x {shape[2]}", str(shape[3]), *distances, f"{cosine.mean():.4f}")
    table.caption = (
        "distances: root mean square, in units of the paper window's standard deviation over the picture; cosine: mean "
        "over the pixels, of paper with natten"
    )
    return table


def photograph_features(side: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The guidance image and an encoder's features of a square photograph."""
    import jax
    import skimage.data

    from anyup_jax import encoders

    photograph = jax.image.resize(skimage.data.astronaut() / np.float32(255), (1, side, side, 3)[1:], "linear")[None]
    encoder = encoders.create("efficientnet_lite0", layer=layer)
    features = encoder(encoder.normalize(photograph))
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return (photograph - mean) / std, features


def draw(path: Path) -> None:
    """Draw how often two queries see each cell, in either window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(QUERIES), 2, figsize=(8.2, 8), constrained_layout=True)
    for row, place in zip(axes, QUERIES):
        index = [int(share * size) for share, size in zip(place, OUTPUT)]
        for axis, window in zip(row, ("paper", "natten")):
            tables = (axis_window(n, m, RATIO, window).dense()[i] for n, m, i in zip(OUTPUT, CELLS, index))
            counts = np.outer(*tables)
            axis.imshow(counts, cmap="Blues", vmin=0, vmax=max(7, counts.max()), extent=(0, CELLS[1], CELLS[0], 0))
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    axis.text(j + 0.5, i + 0.5, str(count), ha="center", va="center", fontsize=8)
            y, x = ((i + 0.5) / size * cells for i, size, cells in zip(index, OUTPUT, CELLS))
            axis.plot(x, y, "o", color="crimson", markersize=5, label="query")
            axis.set(xticks=range(CELLS[1] + 1), yticks=range(CELLS[0] + 1))
            axis.tick_params(labelbottom=False, labelleft=False, length=0)
            axis.grid(color="0.8", linewidth=0.6)
            axis.set_axisbelow(False)
            title = f'window="{window}", query at row {index[0]}, column {index[1]}: {(counts > 0).sum()} cells'
            axis.set_title(title, fontsize=9)
    axes[0, 0].legend(loc="upper left", fontsize=8)
    figure.suptitle(
        f"How often a query of a {OUTPUT[0]} x {OUTPUT[1]} output sees each of {CELLS[0]} x {CELLS[1]} cells "
        f"(window_ratio={RATIO})",
        fontsize=10,
    )
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.windows", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/windows.png"), help="default: %(default)s")
    draw(parser.parse_args().out)
