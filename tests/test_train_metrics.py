"""What a training reports: metrics.jsonl, TensorBoard, skipped.tsv, the progress line, and device traces."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from train.config import LogConfig, ProfileConfig
from train.metrics import Metrics, memory_bytes
from train.profile import Trace


def run(folder: Path, steps: range, every: int = 2, total: int = 10, **options) -> str:
    """Report steps whose loss is their number, and return what was printed."""
    printed = io.StringIO()
    options = {"console": Console(file=printed, force_terminal=False, width=40), "first_step": steps[0] - 1, **options}
    with Metrics(folder, LogConfig(every=every, tensorboard=False), total, 4, **options) as metrics:
        for step in steps:
            metrics.log(step, {"loss": jnp.float32(step), "norm": 0.5})
    return printed.getvalue()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in accumulator(folder).Scalars(tag)}


def accumulator(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, about its dependencies
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_each_nth_step_and_the_last_are_written(tmp_path):
    printed = run(tmp_path / "new" / "run", range(1, 8), every=3, total=7)
    written = lines(tmp_path / "new" / "run")
    assert [line["step"] for line in written] == [3, 6, 7]
    assert [line["loss"] for line in written] == [2, 5, 7]  # means
    assert all(line["images_per_second"] > 0 and line["memory_bytes"] > 1e6 and line["norm"] == 0.5 for line in written)
    assert [line.split("  ")[:2] for line in printed.splitlines()] == [
        [f"step {step}/7", f"loss {loss}.0000"] for step, loss in ((3, 2), (6, 5), (7, 7))
    ]
    assert "images/s  ETA 0:00:00" in printed
    assert "GB" in printed


def test_images_per_second_are_those_of_the_last_interval(tmp_path, monkeypatch):
    times = iter([100.0, 101.0, 105.0])  # after the steps 1, 2 and 4
    monkeypatch.setattr("train.metrics.time.perf_counter", lambda: next(times))
    printed = run(tmp_path, range(1, 5))
    assert [line["images_per_second"] for line in lines(tmp_path)] == [4.0, 2.0]
    assert "2.0 images/s  ETA 0:00:12" in printed


def test_a_run_that_resumes_has_no_step_twice(tmp_path):
    run(tmp_path, range(1, 9))  # killed after step 8, the checkpoint is of step 4
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    run(tmp_path, range(5, 11))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == before[:2]
    run(tmp_path, range(1, 3))  # starts anew
    assert [line["step"] for line in lines(tmp_path)] == [2]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_torn_last_line_is_dropped(tmp_path):
    run(tmp_path, range(1, 5))
    for torn in '{"step": 4, "lo', '{"step": 1':
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(torn)
        run(tmp_path, range(5, 7))
        assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("damage", [b"\0" * 64, b'{"step": 3, "lo', b"7", b"null", b"\xff\xfe", b'{"loss": 1}', b""])
def test_damaged_lines_do_not_keep_a_run_from_resuming(tmp_path, damage):
    run(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n" + second)
    run(tmp_path, range(5, 7))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_a_line_is_on_the_disk_at_once_and_holds_null_for_what_is_not_finite(tmp_path):
    with Metrics(tmp_path, LogConfig(every=1, tensorboard=False), 3, 4, console=Console(file=io.StringIO())) as metrics:
        metrics.log(1, {"loss": float("nan"), "norm": float("inf")})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null, "norm": null' in text
    assert text.endswith("}\n")


def test_what_is_written_is_the_mean_since_the_last_time(tmp_path):
    with Metrics(tmp_path, LogConfig(every=2, tensorboard=False), 3, 4, console=Console(file=io.StringIO())) as metrics:
        for step, (loss, rate) in enumerate(((1.0, 0.1), (4.0, 0.2), (7.0, 0.3)), 1):
            metrics.log(step, dict(loss=jnp.float32(loss), learning_rate=rate))
            assert metrics.due(step) == (step > 1)
    assert [(line["loss"], line["learning_rate"]) for line in lines(tmp_path)] == [(2.5, 0.2), (7.0, 0.3)]


def test_other_processes_print_and_write_nothing(tmp_path, capsys):
    with Metrics(tmp_path / "run", LogConfig(every=1), 2, 4, main=False) as metrics:
        metrics.log(1, {"loss": 1.0})
        metrics.skipped([("a.png", "damaged")])
        metrics.image(1, "pictures", np.zeros((2, 2, 3), np.uint8))
        metrics.say("hello")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_a_terminal_has_one_line_that_moves(tmp_path):
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=120)
    config = LogConfig(every=1, tensorboard=False)
    with Metrics(tmp_path, config, 4, 4, first_step=2, console=console) as metrics:
        metrics.log(3, {"loss": 0.25})
        metrics.say("[checkpoint] written")
        metrics.log(4, {"loss": 0.125})
        metrics.close()
    assert "4/4" in printed.getvalue()
    assert "loss 0.1250" in printed.getvalue()
    assert "ETA 0:00:00" in printed.getvalue()
    assert "[checkpoint] written\n" in printed.getvalue()
    assert "step 3/4" not in printed.getvalue()


def test_skipped_photographs_are_listed_once(tmp_path):
    config = LogConfig(every=1, tensorboard=False)
    printed = io.StringIO()
    for first_step in 0, 1:
        with Metrics(tmp_path, config, 9, 4, first_step=first_step, console=Console(file=printed)) as metrics:
            metrics.skipped([("a b.png", "damaged:\tno\nend"), ("c.png", "smaller than 448 x 448")])
            metrics.skipped([("a b.png", "damaged")])
            metrics.log(first_step + 1, {"loss": 1.0})
            assert metrics.skipped_names == {"a b.png", "c.png"}
    assert (tmp_path / "skipped.tsv").read_text() == "a b.png\tdamaged: no end\nc.png\tsmaller than 448 x 448\n"
    assert [line["skipped"] for line in lines(tmp_path)] == [2, 2]
    assert "2 skipped" in printed.getvalue()


def test_tensorboard_reads_scalars_and_pictures_of_a_run_that_was_resumed(tmp_path):
    config, picture = LogConfig(every=1), np.full((4, 6, 3), 200, np.uint8)
    for first, last, loss in (1, 6, 1.0), (4, 5, 2.0):
        console = Console(file=io.StringIO())
        with Metrics(tmp_path, config, 9, 4, first_step=first - 1, console=console) as metrics:
            for step in range(first, last + 1):
                metrics.log(step, {"loss": loss})
            metrics.image(last, "pictures", picture)
    assert scalars(tmp_path, "loss") == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
    assert set(accumulator(tmp_path).Tags()["scalars"]) == {"loss", "images_per_second", "memory_bytes", "skipped"}
    images = accumulator(tmp_path).Images("pictures")
    assert [(image.step, image.height, image.width) for image in images] == [(5, 4, 6)]


def test_tensorboard_that_is_missing_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"anyup-jax\[train\].*log\.tensorboard"):
        Metrics(tmp_path, LogConfig(), 9, 4)


def test_memory_is_the_devices_where_they_tell(monkeypatch):
    assert memory_bytes() > 1e7

    class Device:
        def memory_stats(self):
            return {"bytes_in_use": 5, "peak_bytes_in_use": 7}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(), Device()])
    assert memory_bytes() == 7


@pytest.mark.parametrize(("first", "last"), [(1, 5), (3, 5), (1, 2)])  # whole, resumed within, ended within
def test_a_trace_of_the_steps_asked_for(tmp_path, monkeypatch, first, last):
    traced, running = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: running.clear())
    with Trace(tmp_path, ProfileConfig(steps="2:3")) as trace:
        for step in range(first, last + 1):
            trace.step(step, jnp.zeros(2))
            traced += [step] * len(running)
    assert traced == [step for step in (2, 3) if first <= step <= last]
    assert not running


def test_a_trace_is_written(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    with Trace(tmp_path, ProfileConfig(steps="1:1")) as trace:
        x = jnp.ones(3)
        for step in range(3):
            trace.step(step, x)
            x = double(x)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with Trace(tmp_path / "none", ProfileConfig()) as trace:
        trace.step(1)
    assert not (tmp_path / "none").exists()
