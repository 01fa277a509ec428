"""How commands end: stopped, refused, or with nobody to talk to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from anyup_core import command

def work():
    try:
        for number in range(3):
            print("bad\\udcff", number, flush=True)
            Console().print("line", number)
            print("line", file=sys.stderr)
        Path("started").touch()
        while "wait" in sys.argv and not Path("go").exists():
            time.sleep(0.01)
        return 7
    finally:
        Path("tidied").touch()

sys.exit(command.execute(work, hint="try again"))
"""


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-", "| true"])
def test_talking_is_no_part_of_the_work(redirection: str, tmp_path: Path) -> None:
    shell = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell, sys.executable, PROGRAM], cwd=tmp_path, check=False)
    assert done.returncode == 7
    assert (tmp_path / "tidied").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_tidies_up_and_is_one_line(number: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path) as process:
        process.send_signal(number)
        output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.splitlines() == ["line", "line", "line", "interrupted; try again"]
    assert output.startswith("bad\\udcff 0\nline 0\n")
    assert (tmp_path / "tidied").exists()


def test_nohup_is_obeyed(tmp_path: Path) -> None:
    with started(tmp_path, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        process.communicate(timeout=60)
    assert process.returncode == 7


def started(folder: Path, *before: str) -> subprocess.Popen[str]:
    heard = (  # where the tests themselves run in the background, these signals are ignored
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    words = [sys.executable, "-c", heard, *before, sys.executable, "-c", PROGRAM, "wait"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "started").exists():
        assert process.poll() is None
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_training_is_asked_to_stop(number: signal.Signals) -> None:
    from train.stopping import stop_requests

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    there = {n: signal.getsignal(n) for n in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the suite runs in the background
    before = {n: signal.getsignal(n) for n in numbers}
    with stop_requests() as asked_to_stop:
        assert not asked_to_stop(1)
        os.kill(os.getpid(), number)
        assert asked_to_stop(2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {n: signal.getsignal(n) for n in numbers} == before
    signal.signal(signal.SIGINT, there[signal.SIGINT])
