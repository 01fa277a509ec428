"""Device traces of some steps, to be opened in TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax

from train.config import ProfileConfig


class Trace(contextlib.ExitStack):
    """Traces the steps that `profile.steps` names; leaving the context ends a running trace.

    Args:
        output_dir: folder of the run; traces are written to its subfolder `profile`.
        config: which steps to trace.
    """

    def __init__(self, output_dir: Path | str, config: ProfileConfig):
        super().__init__()
        self.folder = Path(output_dir) / "profile"
        self.range = config.range()
        self.running = False

    def step(self, step: int, pending: Any = None) -> None:
        """Start or stop the trace; call it before every step.

        A run that resumes within the range traces the rest of it.

        Args:
            step: number of the step that begins now.
            pending: arrays that the step before computes. A trace starts and stops once they are ready, so that it
                holds whole steps.
        """
        wanted = self.range is not None and self.range[0] <= step <= self.range[1]
        if wanted == self.running:
            return
        jax.block_until_ready(pending)
        self.running = wanted
        if wanted:
            jax.profiler.start_trace(self.folder)
            self.callback(jax.profiler.stop_trace)
        else:
            self.close()
