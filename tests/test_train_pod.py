"""Several processes with several devices each, which train what one process with one device trains."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.training import command, environment, losses, train, weights

BATCH = ("batch_size=8", "checkpoint.every=1", "optimizer.clip_norm=1", "optimizer.learning_rate=1e-3")


def start(folder: Path, *words: str, processes: int = 2, devices: int = 4) -> list[subprocess.Popen[str]]:
    """Start the command in several processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    return [
        subprocess.Popen(
            command(*words, f"mesh.coordinator={address}", f"mesh.num_processes={processes}", f"mesh.process_id={i}"),
            cwd=folder, env=flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def pod(folder: Path, *words: str) -> list[str]:
    """Run the command in two processes, and return what each printed."""
    started = start(folder, *words)
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(x[-3000:] for x in outputs)
    return outputs


@pytest.mark.slow
def test_two_processes_of_four_devices_train_what_one_device_trains(tmp_path: Path) -> None:
    """Three steps alone; two in the pod, parameters spread, and one alone; the losses are the same."""
    train(tmp_path, "output_dir=alone", "max_steps=3", *BATCH)
    outputs = pod(tmp_path, "output_dir=mixed", "max_steps=2", "mesh.model=2", "mesh.parameters=fsdp", *BATCH)
    assert "step 2/2" in outputs[0]
    assert "step" not in outputs[1]  # process 0 alone speaks
    train(tmp_path, "output_dir=mixed", "max_steps=3", *BATCH)
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    ours, theirs = weights(tmp_path / "mixed"), weights(tmp_path / "alone")
    assert max(abs(ours[name] - theirs[name]).max() for name in theirs) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_dies_and_the_other_says_so(dead: int, tmp_path: Path) -> None:
    """Process 0 coordinates the others, who miss it at once. What was saved before is gone on from."""
    words = "output_dir=run", "checkpoint.every=1", "checkpoint.keep=1000"
    started = start(tmp_path, *words, "max_steps=1000", devices=1)
    checkpoints = tmp_path / "run" / "checkpoints"
    while not (checkpoints.exists() and any(path.name.isdigit() for path in checkpoints.iterdir())):
        assert all(process.poll() is None for process in started), [process.communicate() for process in started]
        time.sleep(0.05)
    started[dead].kill()
    started[dead].communicate()
    output = started[1 - dead].communicate(timeout=400)[0]
    assert started[1 - dead].returncode == 69, output
    said = [line for line in output.splitlines() if not line.startswith(("step", "[Gloo]"))]
    assert len(said) == 1, output
    assert said[0].startswith("error: another process of this run has died")
    done = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    run = train(tmp_path, *words, f"max_steps={done + 1}")
    assert f"resuming after step {done}" in run.stdout
    assert len(losses(tmp_path / "run")) == done + 1


def test_a_process_of_a_run_of_several_is_asked_to_stop(tmp_path: Path) -> None:
    """One process of one device, which is supervised as each of several is; its signals reach the child once."""
    process = start(tmp_path, "output_dir=run", "max_steps=1000", processes=1, devices=1)[0]
    assert "step 1/1000" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)  # SIGINT is ignored where the suite runs in the background
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 75, output
    assert "which is saved" in output


def test_a_run_of_several_that_is_impossible(tmp_path: Path) -> None:
    process = start(tmp_path, "output_dir=run", "mesh.data=3", processes=1, devices=1)[0]
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2, output
    assert "mesh.data=3" in output
