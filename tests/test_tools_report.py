"""The document on training runs and their scores: every number in it is one of the folders'."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from evaluation import results
from evaluation.results import Result
from tests.training import environment
from tools import report

ABOUT = dict(task="segmentation", seed=3, limit=5, dataset=dict(size=[64, 96]), probe=dict(epochs=7, repeats=1))


def attempt(folder: Path, name: str, learning_rate: float, gain: float) -> tuple[Path, Path]:
    run, evaluation = folder / name, folder / f"{name}_scores"
    run.mkdir()
    settings = dict(optimizer=dict(learning_rate=learning_rate), output_dir=name, dataset=dict(root=name))
    settings |= dict(checkpoint=dict(every=len(name), init_from=None if name == "second" else "weights"))
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [dict(step=10 * i, loss=1 / i, time=1000.0 + 36 * i + 5000 * (i > 8)) for i in range(1, 21)]
    rows.insert(5, dict(step=30, loss=9.0, time=1108.0))  # of a start that was lost; the later line counts
    rows.append(rows.pop(2))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        Result("lite0", method, 32, dict(mIoU=0.4 + more, band_mIoU=0.3 + 2 * more, seconds=9.0), {}, ABOUT)
        for method, more in (("bilinear", 0.0), ("anyup", gain))
    ]
    (evaluation / "lite0").mkdir(parents=True)
    results.write_tables(evaluation, found)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(evaluation / "lite0" / "sheet.png")
    return run, evaluation


def test_the_document_holds_what_the_folders_say(tmp_path: Path) -> None:
    words = []
    for name, rate, gain in (("second", 1e-3, 0.05), ("early", 2e-3, -0.01)):
        words += ["--attempt", *map(str, attempt(tmp_path, name, rate, gain))]
    command = [sys.executable, "-m", "tools.report", "docs/results.md", *words, "--note", "By nobody."]
    run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "written: docs/results.md\n"), run.stderr
    text = (tmp_path / "docs/results.md").read_text()
    last = np.mean([1 / i for i in range(1, 21)])
    assert f"| `second` | 200 | 0.2 | {last:.4f} | - |" in text
    otherwise = "`checkpoint.init_from: None -> weights`; `optimizer.learning_rate: 0.001 -> 0.002`"
    assert f"| `early` | 200 | 0.2 | {last:.4f} | {otherwise} |" in text
    assert "| lite0 | 32 | anyup | 0.4500 | 0.4000 |" in text
    assert "| `second` | the first 5 images | lite0 | +0.0500 | +0.1000 |" in text
    assert "| `early` | the first 5 images | lite0 | -0.0100 | -0.0200 |" in text
    assert "segmentation at 64 x 96, 7 epochs, seed 3, the first 5 images of each split" in text
    assert text.endswith("\nBy nobody.\n")
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == ["results_curves.png", "results_lite0.png"]
    assert all((tmp_path / "docs" / name).stat().st_size > 50 for name in pictures)
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["results.json", "results.md", *pictures]


def test_attempts_stay_when_their_folders_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = [*map(str, attempt(tmp_path, "old", 2e-3, -0.01))]
    page, record = tmp_path / "page.md", tmp_path / "page.json"
    both = [str(page), "--attempt", *map(str, attempt(tmp_path, "new", 1e-3, 0.05)), "--attempt", *old]
    assert report.main(both) == 0
    wanted = page.read_text(), page.with_name("page_curves.png").read_bytes(), record.read_text()
    assert str(tmp_path) not in record.read_text()
    assert "metrics" in json.loads(record.read_text())[1]

    assert report.main([str(tmp_path / "before.md"), "--attempt", *old]) == 0
    shutil.rmtree(old[0])
    shutil.rmtree(old[1])
    assert report.main([*both[:4], "--earlier", str(tmp_path / "before.json")]) == 0
    assert (page.read_text(), page.with_name("page_curves.png").read_bytes(), record.read_text()) == wanted

    capsys.readouterr()
    (tmp_path / "none.json").write_text('{"name": 1}')
    for name in ("none.json", "not.json"):
        assert report.main([*both[:4], "--earlier", str(tmp_path / name)]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err


def test_a_run_that_was_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored, (run, _) = attempt(tmp_path, "one", 1e-3, 0.1), attempt(tmp_path, "start", 2e-3, 0.2)
    words = [str(tmp_path / "x.md"), "--attempt", *map(str, scored), "--training", str(run)]
    assert report.main(words) == 0
    text = (tmp_path / "x.md").read_text()
    assert "| `start` | 200 | 0.2 |" in text
    assert text.count("`start`") == 1  # no scores
    later = [str(tmp_path / "y.md"), "--attempt", *map(str, scored), "--earlier", str(tmp_path / "x.json")]
    assert report.main(later) == 0
    assert (tmp_path / "y.md").read_text().count("| `start` |") == 1
    capsys.readouterr()
    assert report.main([*words[:-1], str(tmp_path)]) == 2
    assert str(tmp_path / "config.yaml") in capsys.readouterr().err


def test_an_encoder_that_one_run_lacks_is_named_only(tmp_path: Path) -> None:
    folders = [attempt(tmp_path, name, 1e-3, 0.1) for name in ("one", "other")]
    for (run, _), (names, layer) in zip(folders, (("ab", 1), ("a", 2))):
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["encoders"] = {name: dict(name=f"net_{name}", layer=[layer]) for name in names}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    words = [word for pair in folders for word in ("--attempt", *map(str, pair))]
    assert report.main([str(tmp_path / "x.md"), *words]) == 0
    text = (tmp_path / "x.md").read_text()
    assert "| `encoders.a.layer: [1] -> [2]`; `encoders.b.name: net_b -> None` |" in text


def test_repeated_probes_are_called_so(tmp_path: Path) -> None:
    words = [str(tmp_path / "x.md"), "--attempt", *map(str, attempt(tmp_path, "one", 1e-3, 0.1))]
    path = tmp_path / "one_scores/results.json"
    path.write_text(path.read_text().replace('"repeats": 1', '"repeats": 4'))
    assert report.main(words) == 0
    text = (tmp_path / "x.md").read_text()
    assert (
        "7 epochs, means of 4 probes from the seed 3 on (*std*: their standard deviation), the first 5 images" in text
    )


def test_what_there_is_to_be_gained(tmp_path: Path) -> None:
    borrowed = dict(mIoU_bilinear_probe=0.45, band_bilinear_probe=0.5)
    scores = dict(bilinear=dict(mIoU=0.4, band_mIoU=0.3), label_guided=dict(mIoU=0.5, band_mIoU=0.55) | borrowed)
    found = [Result("lite0", method, 32, values, {}, ABOUT | dict(limit=None)) for method, values in scores.items()]
    (tmp_path / "reference").mkdir()
    results.write_tables(tmp_path / "reference", found)
    words = ["--attempt", *map(str, attempt(tmp_path, "one", 1e-3, 0.1)), "--reference", str(tmp_path / "reference")]
    assert report.main([str(tmp_path / "x.md"), *words]) == 0
    text = (tmp_path / "x.md").read_text()
    assert "Less bilinear, all images;" in text
    assert "| lite0 | +0.1000 | +0.2500 | +0.0500 | +0.2000 |" in text
    assert report.main([str(tmp_path / "y.md"), *words[:-1], str(tmp_path)]) == 2


def test_sheets_that_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = list(map(str, attempt(tmp_path, "one", 1e-3, 0.1)))
    for sheets, pictures in (([], []), (["lite0"], ["x_lite0.png"])):
        assert report.main([str(tmp_path / "x.md"), "--attempt", *folders, "--sheets", *sheets]) == 0
        assert [path.name for path in tmp_path.glob("x_lite*.png")] == pictures
    capsys.readouterr()
    assert report.main([str(tmp_path / "y.md"), "--attempt", *folders, "--sheets", "lite0", "lite9"]) == 2
    assert re.fullmatch(rf"error: {re.escape(folders[1])} .*\blite9\b.*\blite0\.\n", capsys.readouterr().err)
    assert not (tmp_path / "y.md").exists()


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, evaluation = attempt(tmp_path, "one", 1e-3, 0.1)
    for folders, missing, maker in (((tmp_path, evaluation), tmp_path / "config.yaml", "train.run"),
                                    ((run, run), run / "results.json", "evaluation.run")):  # fmt: skip
        assert report.main([str(tmp_path / "x.md"), "--attempt", *map(str, folders)]) == 2
        assert re.fullmatch(rf"error: {re.escape(str(missing))} .*\b{maker}\b.*\n", capsys.readouterr().err)
    assert not (tmp_path / "x.md").exists()
