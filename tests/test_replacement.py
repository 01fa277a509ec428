"""What killed processes leave beside the files they were writing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from anyup_core import replacement
from anyup_core.replacement import replacing

WRITES = """
import sys, time
from anyup_core.replacement import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(flush=True)
    time.sleep(60)
"""
REPLACES = """
import os, sys, time
from pathlib import Path
from anyup_core.replacement import replacing

def die(*_):
    os.kill(os.getpid(), 9)

with replacing(sys.argv[1]) as temporary:
    temporary.mkdir()
    moves, Path.replace = Path.replace, lambda old, new: (moves(old, new), die())
"""


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    replacement._sweep.cache_clear()


def test_the_next_write_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".z-notes").mkdir()  # somebody's own
    with subprocess.Popen([sys.executable, "-c", WRITES, tmp_path / "z.npy"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        write(tmp_path / "z.npy", "while the other one lives")
        assert len(list(tmp_path.glob(".z-*/z.npy"))) == 1
        process.kill()
    replacement._sweep.cache_clear()
    write(tmp_path / "other.npy", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"z.npy", "other.npy", ".z-notes"}
    assert (tmp_path / "z.npy").read_text() == "while the other one lives"


def test_a_folder_that_was_moved_away_when_the_process_was_killed_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "weights").write_text("old")
    assert subprocess.run([sys.executable, "-c", REPLACES, tmp_path / "x"], check=False).returncode == -9
    assert not (tmp_path / "x").exists()
    write(tmp_path / "y", "new")
    assert (tmp_path / "x" / "weights").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)
