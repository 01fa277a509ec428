"""Device traces of some steps, to be opened in TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from train.config import ProfileConfig


class Trace:
    """Traces the steps that `profile.steps` names; a context manager, whose end also ends a trace.

    Args:
        output_dir: of the run; traces are written to its folder `profile`.
        config: which steps.
    """

    def __init__(self, output_dir: Path | str, config: ProfileConfig):
        self.folder = Path(output_dir) / "profile"
        self.range = config.range()
        self.running = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, step: int, pending: Any = None) -> None:
        """Start or stop the trace; call it before every step.

        A run that resumes within the range traces what is left of it.

        Args:
            step: the step that begins now.
            pending: arrays the step before computes; they are waited for where a trace starts or stops, so that it
                holds whole steps.
        """
        if self.range is None:
            return
        wanted = self.range[0] <= step <= self.range[1]
        if wanted and not self.running:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif self.running and not wanted:
            jax.block_until_ready(pending)
            self.close()

    def close(self) -> None:
        """Stop a trace that is running and write it."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
