"""Several processes with several devices each, which train what one process with one device trains."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.training import command, environment, losses, train, weights

BATCH = ("batch_size=8", "checkpoint.every=1", "optimizer.clip_norm=1", "optimizer.learning_rate=1e-3")


def pod(folder: Path, *words: str, processes: int = 2, devices: int = 4) -> list[str]:
    """Run the command in several processes that find each other, and return what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    started = [
        subprocess.Popen(
            command(*words, f"mesh.coordinator={address}", f"mesh.num_processes={processes}", f"mesh.process_id={i}"),
            cwd=folder, env=flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(x[-3000:] for x in outputs)
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
