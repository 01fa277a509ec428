"""What the README and the examples show runs, and the commands they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(example: Path) -> None:
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_readme_commands_exist() -> None:
    commands = set(re.findall(r"^python -m (\S+)", README, re.MULTILINE))
    assert {"anyup_jax", "convert"} <= commands
    for command in commands | {"benchmarks.run"}:
        run = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, cwd=ROOT, check=False)
        assert run.returncode == 0, command


def test_make_targets_of_the_readme_exist() -> None:
    listed = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert set(re.findall(r"make (demo|test|check|bench|help)", README)) <= set(re.findall(r"make (\w+)", listed))
