"""What a running training reports: the progress line, `metrics.jsonl`, TensorBoard and `skipped.tsv`."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
from jaxtyping import UInt8
from numpy import ndarray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from anyup_core.files import replacing
from train.config import LogConfig

NOT_AVERAGED = ("learning_rate",)


class Metrics(contextlib.ExitStack):
    """Prints and writes what the steps report, until it is closed. Processes other than 0 do neither.

    On a terminal a single progress line is updated; elsewhere a plain line is printed for each line of
    `metrics.jsonl`. Lines of steps after `first_step`, which an interrupted run wrote, and damaged lines are removed,
    so that no step is there twice.

    Args:
        output_dir: folder of the run; created if it does not exist.
        config: how often to write, and whether to write TensorBoard files.
        total_steps: steps of the whole run.
        batch_size: photographs of a step, over all devices.
        main: whether this is process 0.
        first_step: the step that the run resumes from; 0 for a new run.
        console: where to print; standard output if None.

    Attributes:
        skipped_names: photographs that were left out so far, by this run or the one it resumes.

    Raises:
        ImportError: if `log.tensorboard` is set and tensorboardX is not installed.
        OSError: if the folder cannot be written to.
    """

    def __init__(
        self,
        output_dir: Path | str,
        config: LogConfig,
        total_steps: int,
        batch_size: int,
        main: bool = True,
        first_step: int = 0,
        console: Console | None = None,
    ):
        super().__init__()
        self.config, self.total_steps, self.batch_size, self.main = config, total_steps, batch_size, main
        self.console = console or Console()
        self.skipped_names: set[str] = set()
        self._mark: tuple[int, float] | None = None  # step and time at the start of the interval
        self._values: dict[str, list[float]] = {}  # by name, of the steps since the last line
        self._board = self._progress = None
        if not main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lines, skipped = folder / "metrics.jsonl", folder / "skipped.tsv"
        _keep_lines(lines, lambda line: (_step(line) or math.inf) <= first_step)
        _keep_lines(skipped, lambda line: self.skipped_names.add(line.split("\t")[0]) or True)
        if config.tensorboard:
            self._board = _summary_writer(folder / "tensorboard", first_step)
            self.callback(self._board.close)
        self._lines = self.enter_context(lines.open("a", encoding="utf-8"))
        self._skipped = self.enter_context(skipped.open("a", encoding="utf-8"))
        if self.console.is_terminal:
            columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[report]}")
            self._progress = self.enter_context(Progress(*columns, console=self.console))
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, report="compiling")

    def due(self, step: int) -> bool:
        """Return whether `log` writes a line at this step: every `log.every` steps, and at the last one."""
        return step % self.config.every == 0 or step == self.total_steps

    def log(self, step: int, scalars: Mapping[str, float | jax.Array]) -> None:
        """Report a step; call it after every step.

        A line holds means over the steps since the line before, because a single step, with its random encoder,
        photographs and crops, does not measure the model; only the learning rate is the last step's own. It also has
        `images_per_second`, from which the first step is left out because it compiles, and `memory_bytes` (see the
        function of that name). Numbers that are not finite become null.

        Args:
            step: number of the step, counted from 1.
            scalars: numbers by name; a step may lack some.
        """
        if not self.main:
            return
        for name, value in scalars.items():
            self._values.setdefault(name, []).append(float(value))
        if not self.due(step):
            self._mark = self._mark or (step, time.perf_counter())
            if self._progress:
                self._progress.update(self._task, completed=step)
            return
        values = {name: x[-1] if name in NOT_AVERAGED else fmean(x) for name, x in self._values.items()}
        self._values.clear()
        now, seconds = time.perf_counter(), None
        if self._mark and step > self._mark[0]:
            seconds = (now - self._mark[1]) / (step - self._mark[0])
            values["images_per_second"] = self.batch_size / seconds
        self._mark = step, now
        values["memory_bytes"] = memory_bytes()
        values["skipped"] = len(self.skipped_names)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._lines.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        report = self._describe(step, values, seconds)
        if self._progress:
            self._progress.update(self._task, completed=step, report=report)
        else:
            self.say(f"step {step}/{self.total_steps}  {report}")

    def skipped(self, entries: Iterable[tuple[str, str]]) -> None:
        """Append pairs (name, reason) of photographs that were left out to `skipped.tsv`, each name once."""
        for name, reason in entries if self.main else ():
            name, reason = (" ".join(text.split()) for text in (name, reason))
            if name not in self.skipped_names:
                self.skipped_names.add(name)
                self._skipped.write(f"{name}\t{reason}\n")
                self._skipped.flush()

    def image(self, step: int, tag: str, picture: UInt8[ndarray, "H W 3"]) -> None:
        """Write a picture to TensorBoard, if `log.tensorboard` is set."""
        if self._board:
            self._board.add_image(tag, picture, step, dataformats="HWC")
            self._board.flush()

    def say(self, text: str) -> None:
        """Print a line, above the progress line if there is one."""
        if self.main:
            self.console.print(Text(text), soft_wrap=True)

    def _describe(self, step: int, values: dict[str, float], seconds: float | None) -> str:
        parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
        if seconds is not None:
            left = datetime.timedelta(seconds=round(seconds * (self.total_steps - step)))
            parts += [f"{values['images_per_second']:.1f} images/s", f"ETA {left}"]
        parts += [f"{values['memory_bytes'] / 1e9:.2f} GB"]
        return "  ".join(parts + ([f"{len(self.skipped_names)} skipped"] if self.skipped_names else []))


def memory_bytes() -> int:
    """Return the peak memory of this process's fullest device; on a CPU, the memory that the process uses now."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    used = max(x.get("peak_bytes_in_use", x.get("bytes_in_use", 0)) for x in statistics)
    if used:
        return used
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # systems without /proc; macOS counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        tensorboard = importlib.import_module("tensorboardX")
    except ModuleNotFoundError as error:
        raise ImportError(
            'log.tensorboard needs tensorboardX, which is not installed: pip install "anyup-jax[train]", or set '
            "log.tensorboard=false."
        ) from error
    suffix = f".{first_step:08d}"  # a run that restarts within the same second writes another file
    return tensorboard.SummaryWriter(str(folder), purge_step=first_step + 1, filename_suffix=suffix)


def _step(line: str) -> int | None:
    """Return the step of a line of `metrics.jsonl`; None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _keep_lines(path: Path, keep: Callable[[str], Any]) -> None:
    """Remove a last line that was cut off, and all lines that `keep` refuses; the file is replaced as a whole."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line for line in text.splitlines(keepends=True) if line.endswith("\n") and keep(line))
    if kept != text:
        with replacing(path) as temporary:
            temporary.write_text(kept, encoding="utf-8")
