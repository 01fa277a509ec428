"""`python -m train.size_index ROOT [--out FILE] [--workers N]`: the size of every image in root/class/file, as a TSV.

With `--bands N`, of TIFF and NPY files of N bands instead of photographs.

Lines that start with "# " are comments; the others hold the fields of `Row`, separated by tabs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from anyup_core import command
from anyup_core.files import IMAGE_SUFFIXES, OTHER_FILES, check_output, describe, list_folder, open_image, replacing
from anyup_core.paths import user_path
from train.config import Size
from train.data import bands as band_files
from train.data.images import upright_size

LAYOUT = "it must be root/class/file, as ImageNet's train/n01440764/n01440764_10026.JPEG"
TEXT = dict(encoding="utf-8", errors="surrogateescape")  # a file name may be any bytes
CHUNK = 32  # images that a process takes at once
REPORTED = 10_000  # images between lines about the progress
Result = TypeVar("Result")


class Row(NamedTuple):
    """An image: path below the root, index of its class folder, and size once upright; sizes are -1 if unreadable."""

    rel_path: str
    label: int
    width: int
    height: int
    min_side: int


def read_index(path: str | os.PathLike) -> list[Row]:
    """Return the rows of a size index, in its order. Raises OSError, and ValueError for a damaged line."""
    rows = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(_parse(line))
            except ValueError as error:
                if line.strip() and not line.startswith(("#", f"{Row._fields[0]}\t")):
                    raise ValueError(
                        f"Line {number} of {path} is {line.rstrip()!r}, but must be {', '.join(Row._fields)}, with "
                        "tabs between; delete the file and make it again with python -m train.size_index ROOT."
                    ) from error
    return rows


def write_index(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write a size index, sorted by `rel_path`; it replaces an existing one once it is complete. Raises OSError."""
    with replacing(path) as temporary, temporary.open("w", **TEXT) as file:
        columns = "\t".join(Row._fields)
        file.write(f"# Pixels of each image once upright, -1 where it cannot be read\n# {columns}\n")
        file.writelines(map(_format, sorted(rows)))


def changed_folders(path: str | os.PathLike, root: Path, rows: Iterable[Row]) -> list[str]:
    """Return the folders below `root` that were changed since their photographs were listed, or are gone, sorted.

    Their times are compared with that of the index; no photograph is looked at. A class folder that no row is from may
    have been moved there with its old times, so that the time of the move counts.
    """
    listed = os.stat(path).st_mtime_ns
    parents = {PurePosixPath(folder) for folder in {row.rel_path.rpartition("/")[0] for row in rows}}
    known = {str(folder) for parent in parents for folder in (parent, *parent.parents)} - {"."}

    def changed(folder: str) -> bool:
        try:
            times = os.stat(root / folder).st_mtime_ns, 0 if folder in known else os.lstat(root / folder).st_ctime_ns
        except OSError:
            return True
        return max(times) > listed

    return sorted(filter(changed, known.union(list_folder(root, Counter())[1])))


def index_name(bands: int | None) -> str:
    """Return the name of the index of photographs, or of images of this many bands, in their folder."""
    return "size_index.tsv" if bands is None else f"size_index_{bands}_bands.tsv"


def build(
    root: Path, out: Path | None, workers: int, say: Callable[[str], None], bands: int | None = None
) -> list[Row]:
    """Measure every image below `root`, write the index and return its rows.

    Rows are appended to `out`.partial as they are measured. The next call after an interruption continues from there
    and tries unreadable images again. The time of the finished file is that at which the folders were listed.

    Args:
        root: the folder whose subfolders are the classes.
        out: the index; `index_name(bands)` in `root` if None.
        workers: number of processes.
        say: prints a line.
        bands: of the images, TIFF and NPY files; None for photographs.

    Raises:
        FileNotFoundError: if `root` does not exist or holds no images in subfolders.
        ValueError: if `workers` is below 1, a file name contains a line break, or an image has other bands.
        OSError: if the index cannot be written.
        BrokenProcessPool: if a process was killed, for example for lack of memory.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    started, left_out = time.time_ns(), Counter[str]()
    labels = list_images(root, left_out, IMAGE_SUFFIXES if bands is None else band_files.SUFFIXES)
    out = check_output(out, (Path(out).suffix,)) if out else check_output(root / index_name(bands), (".tsv",))
    measure = _measure if bands is None else functools.partial(band_files.band_size, bands=bands)
    partial = out.with_name(out.name + ".partial")
    rows = {row.rel_path: row for row in _resume(partial, root) if labels.get(row.rel_path) == row.label}
    if rows:
        say(f"{partial}: going on after {len(rows)} of {len(labels)} images")
    todo = [path for path in labels if path not in rows]
    with partial.open("a", buffering=1, **TEXT) as file:
        for path, (height, width) in zip(todo, in_processes(measure, [str(root / path) for path in todo], workers)):
            rows[path] = Row(path, labels[path], width, height, min(height, width))
            file.write(_format(rows[path]))
            if len(rows) % REPORTED == 0:
                say(f"{len(rows)} of {len(labels)} images")
    done = sorted(rows.values())
    write_index(out, done)
    os.utime(out, ns=(started, started))
    partial.unlink(missing_ok=True)
    unreadable = sum(row.min_side < 0 for row in done)
    say(f"{out}: {len(done)} images, {unreadable} of them unreadable{describe(left_out)}")
    return done


def list_images(root: Path, left_out: Counter[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, int]:
    """Return path -> class of every photograph (see `list_folder`), at any depth below its class folder, sorted.

    Every real folder is visited once, whatever links lead to it; its own path comes before that of a link. What is no
    photograph, and folders that may not be read, are counted in `left_out`.

    Raises:
        FileNotFoundError: if `root` does not exist or holds no images in subfolders.
        ValueError: if a file name contains a line break.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"ROOT={root} is no folder; {LAYOUT}.")
    outside, classes = list_folder(root, left_out, suffixes)
    left_out["images outside the class folders"] += len(outside)
    del left_out[OTHER_FILES]  # the index itself, notes
    labels, visited = {}, {root.resolve()}
    folders, links = [], []
    for label, name in enumerate(classes):
        (links if (root / name).is_symlink() else folders).append((label, name))
    while folders or links:
        label, folder = (folders or links).pop(0)
        if (real := (root / folder).resolve()) in visited:
            continue
        visited.add(real)
        try:
            images, subfolders = list_folder(root / folder, left_out, suffixes)
        except PermissionError:
            left_out["folders that may not be read"] += 1
            continue
        labels |= {f"{folder}/{name}": label for name in images}
        for path in (f"{folder}/{name}" for name in subfolders):
            (links if (root / path).is_symlink() else folders).append((label, path))
    if not labels:
        raise FileNotFoundError(f"ROOT={root} holds no images in subfolders{describe(left_out)}; {LAYOUT}.")
    if broken := [path for path in labels if "\n" in path or "\r" in path]:
        raise ValueError(f"{broken[0]!r} in {root} has a line break in its name; rename it.")
    return dict(sorted(labels.items()))


def _resume(partial: Path, root: Path) -> list[Row]:
    """Return the readable rows of an interrupted run, and leave `partial` so that lines can be appended to it."""
    first = f"# {root.resolve()}"
    text = partial.read_bytes() if partial.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    lines = whole.decode(**TEXT).split("\n")
    if lines[0] != first:  # there is no such file, or it is of another folder
        partial.write_text(f"{first}\n", **TEXT)
        return []
    os.truncate(partial, len(whole))
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the first and the last line; images of damaged lines are measured again
            rows.append(_parse(line))
    return [row for row in rows if row.min_side > 0]


def in_processes(function: Callable[[str], Result], paths: Sequence[str], workers: int) -> Iterator[Result]:
    """Yield the function's result for each path, in their order, computed by this many processes."""
    workers = min(workers, -(-len(paths) // CHUNK))
    if workers <= 1:
        return (yield from map(function, paths))
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), command.start_worker)
    try:
        yield from executor.map(function, paths, chunksize=CHUNK)
    finally:
        executor.shutdown(cancel_futures=True)


def _measure(path: str) -> Size:
    if os.path.isfile(path):  # opening a pipe or a device could wait for ever
        # damaged EXIF makes Pillow raise nearly any error; one file must not end the run
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"), open_image(path, path) as image:
            return upright_size(image)
    return -1, -1


def _format(row: Row) -> str:
    return "\t".join(map(str, row)) + "\n"


def _parse(line: str) -> Row:
    """Return the row of a line. Raises ValueError for anything else."""
    rel_path, *numbers = line.rstrip("\n").rsplit("\t", 4)
    label, width, height, min_side = map(int, numbers)
    if min_side < 0:
        return Row(rel_path, label, -1, -1, -1)
    if not rel_path or min_side != min(width, height):
        raise ValueError(line)
    return Row(rel_path, label, width, height, min_side)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status, see `anyup_core.command`."""
    parser = argparse.ArgumentParser(prog="python -m train.size_index", description="Measure every image of a folder.")
    parser.add_argument("root", metavar="ROOT", type=user_path, help="root/class/file")
    parser.add_argument("--out", metavar="FILE", type=user_path, help="default: ROOT/size_index.tsv")
    parser.add_argument("--bands", metavar="N", type=int, help="TIFF and NPY files of N bands, instead of photographs")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="default: %(default)s")

    def work() -> None:
        args = parser.parse_args(arguments)
        build(args.root, args.out, args.workers, print, args.bands)

    return command.execute(work, RuntimeError, hint="the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
