"""Files that are damaged at random are read or refused; `python -m tools.faults` tries more of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools import faults

TARGETS = {target.name: target for target in faults.targets()}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("mutations", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(unchecked: None, name: str, mutations: int) -> None:
    result = faults.try_out(TARGETS[name], mutations, seed=mutations)
    assert result.failed == []
    assert result.read + result.refused == mutations
    assert result.refused > 0


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.ours])
@pytest.mark.slow
def test_whoever_writes_may_be_killed(name: str) -> None:
    result = faults.kill_writers(TARGETS[name], 20, seed=1)
    assert result.failed == []
    assert result.writing > 0


def test_a_process_that_writes_is_killed() -> None:
    result = faults.kill_writers(TARGETS["features.npy"], 3, seed=2)
    assert result.failed == []
    assert result.writing > 0


def test_kills_that_do_not_hold_are_told(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    result = faults.Kills("train.run", 5, 2, ["kernel differs"])
    monkeypatch.setattr(faults, "targets", list)
    monkeypatch.setattr(faults, "kill_trainings", lambda kills, seed: result)
    assert faults.main(["--mutations", "0", "--kills", "5"]) == 1
    printed = capsys.readouterr()
    assert "| `train.run` | 5 | 2 | 1 |" in printed.out
    assert printed.err == "train.run: kernel differs\n"


def test_what_does_not_hold_is_told(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def read(path: Path) -> None:
        if path.read_bytes() != b"intact":
            raise KeyError("surprise")

    monkeypatch.setattr(faults, "targets", lambda: [faults.Target("x", lambda path: path.write_bytes(b"intact"), read)])
    assert faults.main(["--mutations", "20", "--kills", "0"]) == 1
    printed = capsys.readouterr()
    assert "KeyError: 'surprise'" in printed.err
    assert "| `x` | 20 | " in printed.out


def test_damage_is_seeded() -> None:
    content = bytes(range(256))
    first, again, other = (faults.damaged(content, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert content not in (first, other)
    assert first != other
