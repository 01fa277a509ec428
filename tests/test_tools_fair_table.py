"""The fair table: its commands are possible, what is complete is skipped, and the page holds what the folders say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize
from omegaconf import OmegaConf

from anyup_core.settings import from_dict, to_dict
from evaluation import presets
from evaluation.config import Config
from evaluation.results import Result, write_tables
from tests.training import ROOT, configured, environment
from tools import fair_page, fair_runs, fair_table
from train.encoders import check_sizes
from train.models import settings

DATA = Path("DATA")
MORE = dict(bilinear=0.0, anyup=0.08, naf=0.06, jafar=0.05, featup=0.02)


def finish(out: Path, run: list[str]) -> None:
    """Leave what a training run leaves."""
    config = configured(*run[1:])
    folder = Path(config.output_dir)
    (folder / "checkpoints" / str(fair_runs.STEPS)).mkdir(parents=True)
    (folder / "checkpoints" / str(fair_runs.STEPS) / "commit_success.txt").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "metrics.jsonl").write_text(json.dumps(dict(step=fair_runs.STEPS, time=1.0, loss=0.25)) + "\n")


def score(out: Path, evaluation: str, seed: int) -> None:
    """Leave what an evaluation leaves: every method gains what `MORE` says, a third of it on other encoders."""
    config = evaluated(*fair_runs.scoring(DATA, out, evaluation, seed)[1:])
    values, found = to_dict(config), []
    for encoder in config.encoders:
        for method in config.methods:
            gain = (MORE[method] + 0.01 * seed * (method != "bilinear")) / (1 if encoder == "lite0" else 3)
            means = dict(mIoU=0.3 + gain, band_mIoU=0.2 + 2 * gain + 0.1 * seed, seconds=1.0)
            found.append(Result(encoder, method, 32, means, {}, values))
    folder = fair_runs.scores_of(out, evaluation, seed)
    folder.mkdir(parents=True)
    write_tables(folder, found)


def evaluated(*words: str) -> Config:
    presets.register()
    with initialize(version_base="1.3", config_path=None):
        return from_dict(Config, OmegaConf.to_container(compose(presets.NAME, list(words)), resolve=True))


@pytest.mark.parametrize("method", fair_runs.OWN)
def test_the_runs_are_possible_and_alike(method: str, tmp_path: Path) -> None:
    config, anyup = (configured(*fair_runs.training(DATA, tmp_path, name, 1)[1:]) for name in (method, "anyup"))
    assert {name: encoder.stride() for name, encoder in config.encoders.items()} == dict(lite0=32)
    check_sizes("lite0", 32, config, settings(config))
    assert (config.optimizer, config.batch_size, config.max_steps) == (anyup.optimizer, 2, fair_runs.STEPS)
    assert (config.dataset.random_region, config.dataset.flip, config.seed) == (0.4, True, 1)
    assert config.dataset.guidance_size == anyup.dataset.guidance_size
    assert (config.loss.outlines, config.features.shuffle) == (0, False)


def test_the_evaluations_are_possible(tmp_path: Path) -> None:
    agnostic, single, shipped = (
        evaluated(*fair_runs.scoring(DATA, tmp_path, name, 2)[1:]) for name in fair_runs.EVALUATIONS
    )
    everyone = ["lite0", *fair_runs.UNSEEN]
    assert [list(x.encoders) for x in (agnostic, single, shipped)] == [everyone, ["lite0"], everyone]
    assert {x.stride() for x in agnostic.encoders.values()} == {32}
    assert {*agnostic.methods, *single.methods} == {*fair_runs.OWN, "bilinear"}
    assert {x.probe for x in (agnostic, single, shipped)} == {agnostic.probe}
    assert agnostic.upsamplers["naf"].weights["all"] == str(fair_runs.run_of(tmp_path, "naf", 2))
    assert shipped.anyup.weights == fair_runs.SHIPPED


def test_what_is_complete_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = [run for seed in (0, 1) for run in fair_runs.of_seed(DATA, tmp_path, seed)]
    trainings = [run for run in everything if run[0] == "train.run"]
    assert list(fair_runs.train(DATA, tmp_path, (0, 1))) == trainings
    assert len(trainings) == 8
    assert fair_table.main(["evaluate", "DATA", str(tmp_path), "--seeds", "0"]) == 2
    assert str(fair_runs.run_of(tmp_path, "naf", 0)) in capsys.readouterr().err
    for run in trainings[:4]:
        finish(tmp_path, run)
    (fair_runs.run_of(tmp_path, "anyup", 1) / "checkpoints/50").mkdir(parents=True)
    assert list(fair_runs.train(DATA, tmp_path, (0, 1))) == trainings[4:]

    def does(runs: Iterator[list[str]]) -> list[str]:
        done = []
        for run in runs:
            name = Path(run[-1].removeprefix("output_dir=")).name.split("_")[0]
            fair_runs.cache_of(tmp_path, name, 0).mkdir(parents=True)
            score(tmp_path, name, 0)
            done.append(name)
        return done

    score(tmp_path, "single", 0)
    assert does(fair_runs.evaluate(DATA, tmp_path, (0,))) == ["agnostic", "shipped"]
    assert list((tmp_path / "cache").iterdir()) == []
    assert does(fair_runs.evaluate(DATA, tmp_path, (0,))) == []


def test_the_page_holds_what_the_folders_say(tmp_path: Path) -> None:
    words = ["report", "DATA", str(tmp_path), "--page", str(tmp_path / "docs/page.md")]
    assert fair_table.main(words) == 2
    for seed in (0, 1):
        for run in fair_runs.of_seed(DATA, tmp_path, seed)[:4]:
            finish(tmp_path, run)
        for evaluation in fair_runs.EVALUATIONS if seed == 0 else ("agnostic",):
            score(tmp_path, evaluation, seed)
    (tmp_path / "scores/single_1").mkdir()  # it has begun
    assert fair_table.main(words) == 0
    text = (tmp_path / "docs/page.md").read_text()
    assert str(tmp_path) not in text
    assert "700 steps of 2 photographs" in text
    half = 12.7062 * 0.005  # Student's, of two seeds whose scores are 0.01 apart
    assert f"| lite0 | anyup | 2 | 0.3850 ± {half:.4f} | 0.4200 ± " in text
    assert f" | +0.0850 ± {half:.4f} | +0.1700 ± {2 * half:.4f} |" in text  # what both have more in seed 1 is no gain
    assert "| lite0 | jafar | 1 | 0.3500 | 0.3000 | +0.0500 | +0.1000 |" in text
    assert "| lite1 | AnyUp, shipped | 1 |" in text
    assert "| lite2, unseen | AnyUp, shipped | 1 |" in text
    assert "| lite1, unseen | naf | 2 |" in text
    assert "| lite1, unseen | jafar" not in text
    kept = [line.split(" | ")[-1] for line in text.splitlines() if line.startswith(("| anyup | +", "| naf | +"))]
    assert kept == ["0.33 |", "0.33 |"]
    assert "| featup | 1 | 700 | 0.2500 |" in text
    assert "python -m train.run model=naf " in text


SLOW = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), pathlib.Path("saved").touch(), exit(75)))
pathlib.Path("started").touch()
time.sleep(60)
"""


def test_an_interrupted_run_has_the_time_to_save(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    code = "import sys; from anyup_core import command; from tools.fair_table import execute; "
    code += "sys.exit(command.execute(lambda: execute([['slow'], ['never']])))"
    paths = os.pathsep.join((str(ROOT), str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=paths))
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


def test_runs_end_with_the_first_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, status in (("good", 0), ("bad", 3)):
        (tmp_path / f"{name}.py").write_text(f"open('{name}', 'a').write('x'); raise SystemExit({status})")
    monkeypatch.chdir(tmp_path)
    assert fair_table.execute([["good"], ["good"]]) == 0
    assert fair_table.execute([["bad"], ["good"]]) == 3
    assert (Path("good").read_text(), Path("bad").read_text()) == ("xx", "x")


def test_an_interval_is_students() -> None:
    values = [0.1, 0.2, 0.4]
    assert fair_page.interval(values) == f"0.2333 ± {4.302653 * np.std(values, ddof=1) / 3**0.5:.4f}"
    assert fair_page.interval([0.25], "+") == "+0.2500"
