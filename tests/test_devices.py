"""Compiled programs are kept on disk by commands, unless that is switched off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from anyup_jax import devices

PROGRAM = """
import logging, sys
import jax, jax.numpy as jnp
from anyup_jax import devices
devices.SHORTEST = 0
folder = devices.keep_compiled()
print(folder)
logging.getLogger("jax._src.compiler").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(8)).sum())
"""


def run(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANYUP", "JAX"))}
    command = [sys.executable, "-c", PROGRAM]
    environment |= variables | dict(JAX_PLATFORMS="cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    first, second = run(ANYUP_CACHE=str(tmp_path)), run(ANYUP_CACHE=str(tmp_path))
    folder = tmp_path / "compiled" / devices.processor()
    assert first[0] == second[0] == str(folder)
    assert folder.stat().st_mode & 0o77 == 0  # what is run from there, nobody else may write
    assert first[-1] == second[-1]
    assert not any("cache hit" in line for line in first)
    assert any(re.search("cache hit for 'jit__?lambda", line) for line in second)


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    assert run(ANYUP_COMPILATION_CACHE=str(tmp_path / "a"))[0] == str(tmp_path / "a" / devices.processor())
    assert list(tmp_path.glob("a/*/*-cache"))


@pytest.mark.parametrize(
    "name", ["ANYUP_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"]
)
def test_it_is_switched_off(name: str, tmp_path: Path) -> None:
    value = {"ANYUP_COMPILATION_CACHE": "off", "JAX_ENABLE_COMPILATION_CACHE": "false"}.get(name, str(tmp_path / "jax"))
    assert run(ANYUP_CACHE=str(tmp_path / "ours"), **{name: value})[0] == "None"
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(devices.VARIABLE, str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with pytest.warns(UserWarning, match="not kept"):
            assert devices.keep_compiled() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
