"""Processes of a run that notice that another has died, on a program that is small enough to start in seconds."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import environment
from train.pod_member import LOST, SENTENCE

PROGRAM = """
import os, sys, time
import jax, numpy as np
from train import pod_member

def work(address, number, behaviour):
    if behaviour == "waits":
        print(os.getpid(), flush=True)
        time.sleep(600)
    if behaviour != "counts":
        print("W1128 10:00:00.000000 7 coordination_service.cc:1] held", file=sys.stderr, flush=True)
        if behaviour == "aborts":
            os.abort()
        if behaviour == "raises":
            raise RuntimeError("of its own")
        return 7
    jax.distributed.initialize(address, 2, number)
    mesh = jax.make_mesh((2,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    array = jax.make_array_from_process_local_data(rows, np.ones(1, np.float32))
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    with pod_member.leaving():
        for step in range(100_000):
            assert total(array) == 2
            if step == 3:
                print("ready", flush=True)
            time.sleep(0.05)

if __name__ == "__main__":
    sys.exit(pod_member.supervise(work, sys.argv[1], int(sys.argv[2]), sys.argv[3], hint="again"))
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "program.py"), address]


@pytest.mark.parametrize("dead", [0, 1])  # the process that coordinates, which the other misses at once, and the other
def test_the_survivor_says_one_sentence(dead: int, program: list[str]) -> None:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    started = [subprocess.Popen([*program, str(number), "counts"], **pipes) for number in range(2)]
    for process in started:
        while "ready" not in (line := process.stdout.readline()):
            assert line, process.communicate()
    started[dead].kill()
    started[dead].communicate()
    _, said = started[1 - dead].communicate(timeout=200)
    assert (started[1 - dead].returncode, said.splitlines()) == (LOST, [SENTENCE])


@pytest.mark.parametrize(
    ("behaviour", "status", "said"),
    [("aborts", LOST, [SENTENCE]), ("raises", 1, ["held", "of its own"]), ("returns", 7, ["held"])],
)
def test_what_a_process_says_is_kept_unless_another_has_died(
    behaviour: str, status: int, said: list[str], program: list[str]
) -> None:
    run = subprocess.run([*program, "0", behaviour], capture_output=True, text=True, check=False, env=environment())
    assert run.returncode == status, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == len(said) or behaviour == "raises", run.stderr
    assert all(any(line.endswith(part) for line in lines) for part in said), run.stderr


def test_a_child_does_not_outlive_its_parent(program: list[str]) -> None:
    with subprocess.Popen([*program, "0", "waits"], stdout=subprocess.PIPE, text=True, env=environment()) as process:
        child = Path("/proc", process.stdout.readline().strip())
        assert child.exists()
        process.kill()
    while child.exists():
        time.sleep(0.02)
