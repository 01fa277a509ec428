"""python -m tools.faults [--mutations N] [--kills N] [--seed S]: damage files at random, and kill what writes them.

A damaged file holds if it is read after all, or refused with the exception that its reader documents and a message
that names it, within ten seconds and without a warning. A kill holds if what was being replaced is whole afterwards,
the old one or the new one, and the next write leaves nothing else in its folder; of a training, if the same command
goes on to the weights that it would have had without. The tables that are printed stand in docs/reliability.md. Exit
status: 1 if one did not hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
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
    """A kind of file: what writes an intact one (or a directory of files), and what reads it.

    `ours` are those that this project writes.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    ours: bool = True


class Kills(NamedTuple):
    """How often a process that writes was killed, how often while it wrote, and descriptions of what did not hold."""

    name: str
    tried: int
    writing: int
    failed: list[str]


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
        return convert.write(path, checkpoint, overwrite=True)

    def legacy(path: Path) -> object:
        return torch.save(state, path, _use_new_zipfile_serialization=False)

    return [
        Target("weights.pth", weights, convert.read),
        Target("weights_of_old_pytorch.pth", legacy, convert.read, ours=False),
        Target("weights.safetensors", weights, convert.read),
        Target("weights_of_orbax", weights, convert.read),
        Target("photograph.jpg", lambda path: Image.fromarray(pixels).save(path), read_image, ours=False),
        Target("photograph.png", lambda path: Image.fromarray(pixels).save(path), read_image, ours=False),
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


def rewrite(name: str, path: Path, ready: Synchronized) -> None:
    """Replace a file again and again, until killed."""
    target = next(target for target in targets() if target.name == name)
    while True:
        target.write(path)
        ready.value += 1


def kill_writers(target: Target, kills: int, seed: int) -> Kills:
    """Kill a process that replaces a file, at a random moment of its second or a later time, `kills` times."""
    spawn, writing, failed = multiprocessing.get_context("spawn"), 0, []
    with tempfile.TemporaryDirectory() as folder:
        intact = Path(folder, "intact", target.name)
        intact.parent.mkdir()
        begin = time.monotonic()
        target.write(intact)
        seconds = time.monotonic() - begin
        for number in range(kills):
            path = Path(folder, str(number), target.name)  # swept once in a process, which is at the next write in it
            shutil.copytree(intact.parent, path.parent)
            ready = spawn.Value("l", 0)
            process = spawn.Process(target=rewrite, args=(target.name, path, ready))
            process.start()
            while not ready.value and process.is_alive():
                time.sleep(0.001)
            time.sleep(np.random.default_rng((seed, number)).uniform(0, 3 * seconds))
            process.kill()
            process.join()
            writing += len(os.listdir(path.parent)) > 1
            try:
                target.write(path.with_name(f"next_{target.name}"))
                target.read(path)
                if left := set(os.listdir(path.parent)) - {path.name, f"next_{target.name}"}:
                    failed.append(f"kill {number}: {left} left")
            except Exception as error:  # whatever is raised is what is looked for
                failed.append(f"kill {number}: {type(error).__name__}: {error}")
    return Kills(target.name, kills, writing, failed)


SETTINGS = (
    "encoders.lite0.layer=[2]", "model.qk_dim=16", "model.num_heads=2", "dataset.crop_size=64", "dataset.img_size=32",
    "dtype=float32", "batch_size=2", "max_steps=6", "checkpoint.every=1", "log.pictures_every=0",
    "log.tensorboard=false",
)  # fmt: skip


def kill_trainings(kills: int, seed: int) -> Kills:
    """Kill a training that saves every step, `kills` times within its first steps, and let it end."""
    random, writing = np.random.default_rng(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        cache = dict(JAX_COMPILATION_CACHE_DIR=f"{folder}/compiled", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3")

        def train(name: str) -> subprocess.Popen:
            words = [sys.executable, "-m", "train.run", *SETTINGS, f"output_dir={folder}/{name}"]
            nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return subprocess.Popen(words, env=os.environ | cache, **nowhere)

        failed = [f"it ended with status {status}"] if (status := train("whole").wait()) else []
        checkpoints = Path(folder, "killed", "checkpoints")
        for _ in range(kills):
            process, before = train("killed"), saves(checkpoints)
            while process.poll() is None and saves(checkpoints) == before:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.15))
            process.kill()
            process.wait()
            writing += any(not name.isdigit() for name in saves(checkpoints))
        if status := train("killed").wait():
            failed.append(f"the same command ended with status {status} after the kills")
        if not failed:
            whole, killed = (convert.read(Path(folder, name)).tensors for name in ("whole", "killed"))
            failed = [f"{name} differs" for name in whole if not np.array_equal(whole[name], killed[name])]
    return Kills("train.run", kills, writing, failed)


def saves(checkpoints: Path) -> set[str]:
    return set(os.listdir(checkpoints)) if checkpoints.exists() else set()


def row(name: str, *cells: object) -> None:
    print(f"| `{name}` |", " | ".join(map(str, cells)), "|", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description="Damage files, and kill what writes.")
    parser.add_argument("--mutations", type=int, default=2000, help="of each kind of file, default 2000")
    parser.add_argument("--kills", type=int, default=20, help="of each program that writes, default 20")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    failures = []
    if args.mutations:
        print("| file | tried | read | refused | failed |\n|---|---|---|---|---|")
    for target in targets() if args.mutations else ():
        result = try_out(target, args.mutations, args.seed)
        row(target.name, args.mutations, result.read, result.refused, len(result.failed))
        failures += [f"{target.name}: {line}" for line in result.failed]
    if args.kills:
        print("\n| killed | tried | of these while writing | failed |\n|---|---|---|---|")
    for target in targets() if args.kills else ():
        if target.ours:
            result = kill_writers(target, args.kills, args.seed)
            row(target.name, *result[1:3], len(result.failed))
            failures += [f"{target.name}: {line}" for line in result.failed]
    if args.kills:
        result = kill_trainings(args.kills, args.seed)
        row(result.name, *result[1:3], len(result.failed))
        failures += [f"{result.name}: {line}" for line in result.failed]
    for line in failures[:100]:
        print(line[:300], file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
