"""Every script in examples/ runs as a user runs it; each compares its result with the plain call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*/*.py"))
FLAGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs_and_prints_a_line(script: str) -> None:
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | FLAGS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 1, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short(script: str) -> None:
    assert len((ROOT / script).read_text().splitlines()) <= 40
