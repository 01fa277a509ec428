"""What the README and the notebooks show runs, and the commands they name exist."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("name", ["anyup_jax", "anyup_torch"])
def test_notebook_runs_and_shows_what_it_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    stored = nbformat.read(ROOT / f"examples/{name}.ipynb", 4)
    run = nbclient.NotebookClient(copy.deepcopy(stored), timeout=600, kernel_name="python3").execute()
    assert shown(run) == shown(stored)
    pictures = [
        output for cell in run.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())
    ]
    assert len(pictures) == 1
    assert str(ROOT.parent) not in (ROOT / f"examples/{name}.ipynb").read_text()


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what the cells show as text, without rounding errors."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    texts = (output.data["text/plain"] for output in outputs if output.output_type == "execute_result")
    return [re.sub(r"'\S+ apart'", "", text) for text in texts]


def test_readme_commands_exist() -> None:
    commands = set(re.findall(r"^python -m (\S+)", README, re.MULTILINE))
    assert {"anyup_jax", "convert", "train.run", "evaluation.run"} <= commands
    for command in commands | {"benchmarks.run"}:
        run = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, cwd=ROOT, check=False)
        assert run.returncode == 0, command


def test_make_targets_of_the_readme_exist() -> None:
    listed = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert set(re.findall(r"make (demo|test|slow|check|bench|help)", README)) <= set(re.findall(r"make (\w+)", listed))
