"""python -m tools.faults [--mutations N] [--seed S]: damage files at random, and see what their readers make of them.

A damaged file holds if it is read after all, or refused with the exception that its reader documents and a message
that names it, within ten seconds and without a warning. The table that is printed stands in docs/reliability.md. Exit
status: 1 if one did not hold.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import anyup_torch
import convert
from anyup_core.files import read_features, read_image, write_features
from train.size_index import Row, read_index, write_index

SECONDS = 10.0  # that a reader may take
DAMAGE = ("bits flipped", "cut off", "zeroed", "inserted", "moved")


class Target(NamedTuple):
    """A kind of file: what writes an intact one (or a directory of files), and what reads it."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


class Result(NamedTuple):
    """How many damaged files of a kind were tried, and what came out; `failed` describes those that did not hold."""

    name: str
    read: int
    refused: int
    failed: list[str]


def targets() -> list[Target]:
    torch.manual_seed(0)
    state = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(qk_dim=8, num_heads=2, kernel_size_lfu=3)).state_dict()
    checkpoint = convert.Checkpoint({name: tensor.numpy() for name, tensor in state.items()}, dict(num_heads=2))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
    maps = random.standard_normal((3, 4, 5), np.float32)
    rows = [Row(f"class/{number}.jpg", 0, 32 + number, 24, 24) for number in range(20)]

    def weights(path: Path) -> object:
        return convert.write(path, checkpoint)

    def legacy(path: Path) -> object:
        return torch.save(state, path, _use_new_zipfile_serialization=False)

    return [
        Target("weights.pth", weights, convert.read),
        Target("weights_of_old_pytorch.pth", legacy, convert.read),
        Target("weights.safetensors", weights, convert.read),
        Target("weights_of_orbax", weights, convert.read),
        Target("photograph.jpg", lambda path: Image.fromarray(pixels).save(path), read_image),
        Target("photograph.png", lambda path: Image.fromarray(pixels).save(path), read_image),
        Target("features.npy", lambda path: write_features(path, maps, {}), read_features),
        Target("size_index.tsv", lambda path: write_index(path, rows), read_index),
    ]


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Return a file's content with one kind of damage at a random place."""
    data = bytearray(content)
    start, stop = sorted(int(place) for place in random.integers(0, len(data) + 1, 2))
    stop = min(stop, start + 64)
    match random.choice(DAMAGE):
        case "bits flipped":
            for place in random.integers(0, len(data), random.integers(1, 9)):
                data[place] ^= 1 << int(random.integers(8))
        case "cut off":
            del data[start:]
        case "zeroed":
            data[start:stop] = bytes(stop - start)
        case "inserted":
            data[start:start] = random.bytes(int(random.integers(1, 64)))
        case "moved":
            data[start:start] = data[-(stop - start) or len(data) :]
    return bytes(data)


def attempt(target: Target, path: Path) -> str | None:
    """Read a damaged file. Return "read" or "refused", or else what went wrong."""
    begin = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target.read(path)
        outcome = "read"
    except (ValueError, OSError) as error:
        outcome = "refused" if target.name in str(error) else f"refused without its name: {error}"
    except Exception as error:  # whatever else is raised is what is looked for
        return f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begin
    return outcome if seconds <= SECONDS else f"{outcome} after {seconds:.0f} s"


def try_out(target: Target, mutations: int, seed: int) -> Result:
    """Damage an intact file `mutations` times, of a directory one of its files each time."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        intact, copy = Path(folder, "intact", target.name), Path(folder, "damaged", target.name)
        intact.parent.mkdir()
        target.write(intact)
        target.read(intact)
        files = sorted(file for file in (intact.rglob("*") if intact.is_dir() else [intact]) if file.is_file())
        for number in range(mutations):
            random = np.random.default_rng((seed, number))
            shutil.rmtree(copy.parent, ignore_errors=True)
            shutil.copytree(intact.parent, copy.parent)
            chosen = files[random.integers(len(files))].relative_to(intact.parent)
            (copy.parent / chosen).write_bytes(damaged((intact.parent / chosen).read_bytes(), random))
            outcomes.append(attempt(target, copy))
    failed = [f"mutation {number}: {x}" for number, x in enumerate(outcomes) if x not in ("read", "refused")]
    return Result(target.name, outcomes.count("read"), outcomes.count("refused"), failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description="Damage files and read them.")
    parser.add_argument("--mutations", type=int, default=2000, help="of each kind of file, default 2000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    print("| file | tried | read | refused | failed |\n|---|---|---|---|---|")
    status = 0
    for target in targets():
        result = try_out(target, args.mutations, args.seed)
        cells = f"`{result.name}`", args.mutations, result.read, result.refused, len(result.failed)
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        for line in result.failed[:20]:
            print(f"{result.name}: {line[:300]}", file=sys.stderr)
        status |= bool(result.failed)
    return status


if __name__ == "__main__":
    sys.exit(main())
