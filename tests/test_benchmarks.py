"""The benchmarks run and measure what they say, at sizes that take no time."""

from __future__ import annotations

import pytest

from benchmarks import run
from benchmarks.worker import Job, measure


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_worker_measures(framework: str, backend: str) -> None:
    outcome = measure(Job(framework, backend, image=28, cells=2, channels=8, chunk=64, repeats=2))
    assert len(outcome.seconds) == 3
    assert min(outcome.seconds) > 0
    assert outcome.peak > 50
    assert outcome.rate > 0


def test_failed_job_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="backend='none' is unknown"):
        measure(Job("torch", "none", image=28, cells=2, channels=8))


def test_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["speed"])
    assert "no benchmark named speed" in capsys.readouterr().err
