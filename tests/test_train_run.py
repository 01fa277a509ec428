"""`python -m train.run` as a user types it: a run, the same command again, runs that are stopped, killed or refused."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import anyup_jax
import convert
from anyup_core.settings import from_dict
from tests.training import command, configured, environment, losses, metrics, same, tiny, train, weights
from train import config as settings
from train import loop, output_dir
from train.config import ANNOUNCEMENTS, MeshConfig
from train.data.sources import SHIPPED
from train.output_dir import HOLDER, check_output, locked
from train.sharding import join


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without interruption, with an average and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, "output_dir=run", "max_steps=4", *OPTIONS)
    return folder / "run"


OPTIONS = ("optimizer.ema_decay=0.9", "checkpoint.every=1", "checkpoint.keep=2")


def test_a_run_leaves_what_it_should(whole: Path) -> None:
    assert len(losses(whole)) == 4
    first = metrics(whole)[0]
    assert {"loss", "reconstruction", "consistency", "input", "gradient_norm", "learning_rate"} <= set(first)
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["3", "4"]
    saved = from_dict(settings.Config, yaml.safe_load((whole / "config.yaml").read_text()))
    assert saved.model.qk_dim == 16
    assert saved.encoders["lite0"].layer == (2,)
    assert not (whole / ".hydra").exists()


def test_from_pretrained_takes_the_newest_or_the_average(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, average = anyup_jax.from_pretrained(whole), anyup_jax.from_pretrained(whole, ema=True)
    assert newest.config.qk_dim == 16
    assert newest.config.num_heads == 2
    assert not same(convert.load(whole).tensors, convert.load(whole, ema=True).tensors)
    assert newest.cross_decode.query.kernel.shape == average.cross_decode.query.kernel.shape
    older = anyup_jax.from_pretrained(whole / "checkpoints" / "3")
    assert (older.cross_decode.query.kernel[...] != newest.cross_decode.query.kernel[...]).any()
    assert not caplog.messages  # Orbax's warnings among them


def test_the_same_command_again_has_nothing_to_do(whole: Path) -> None:
    before = weights(whole)
    run = train(whole.parent, "output_dir=run", "max_steps=4", *OPTIONS)
    assert "resuming after step 4" in run.stdout
    assert same(weights(whole), before)


def test_sigterm_saves_and_the_same_command_goes_on(whole: Path, tmp_path: Path) -> None:
    words = command("output_dir=run", "max_steps=1000", *OPTIONS, "checkpoint.every=1000")
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    lines = tmp_path / "run" / "metrics.jsonl"
    while not (lines.exists() and lines.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = int(max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name)).name)
    assert f"stopped after step {done}" in output
    assert done >= 1
    train(tmp_path, "output_dir=run", f"max_steps={done + 1}", *OPTIONS)
    assert len(losses(tmp_path / "run")) == done + 1
    assert losses(tmp_path / "run")[:4] == losses(whole)[: done + 1]


def test_a_terminal_that_goes_away_saves(tmp_path: Path) -> None:
    """Its pipe is closed, and SIGHUP goes to the whole group, with the process that prepares batches."""
    heard = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", heard, *command("output_dir=run", "max_steps=1000", "dataset.workers=1")]  # no nohup
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), **options)
    assert process.stdout.readline().startswith(b"step 1/1000")
    process.stdout.close()
    while len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=120) == 75
    assert [int(path.name) >= 2 for path in (tmp_path / "run" / "checkpoints").iterdir()] == [True]


@pytest.mark.slow
def test_through_a_pth_of_the_published_trainer_and_back(whole: Path, tmp_path: Path) -> None:
    """Weights, moments and step survive, and the photographs go on where they were."""
    for source, destination in ((whole / "checkpoints" / "3", "there.pth"), ("there.pth", "back")):
        words = [sys.executable, "-m", "convert", str(source), destination, "--training"]
        subprocess.run(words, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    train(tmp_path, "output_dir=back", "max_steps=4", *OPTIONS)
    assert same(weights(tmp_path / "back"), weights(whole))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    """SIGKILL, often in the middle of a save, as every step is saved; then the run is finished."""
    moments, kills = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(
            command("output_dir=run", "max_steps=4", *OPTIONS), cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        checkpoints = tmp_path / "run" / "checkpoints"
        before = set(checkpoints.iterdir()) if checkpoints.exists() else set()
        while process.poll() is None and not (checkpoints.exists() and set(checkpoints.iterdir()) - before):
            time.sleep(0.002)  # a save has begun
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    train(tmp_path, "output_dir=run", "max_steps=4", *OPTIONS)
    assert same(weights(tmp_path / "run"), weights(whole))
    assert same(convert.load(tmp_path / "run", ema=True).tensors, convert.load(whole, ema=True).tensors)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "output_dir=run", "max_steps=2", *OPTIONS)
    for path in (tmp_path / "run/checkpoints/2/params").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:  # Orbax leaves copies behind that are never read
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(bytes(content))
    run = train(tmp_path, "output_dir=run", "max_steps=4", *OPTIONS)
    assert "checkpoint of step 2 is damaged" in " ".join(run.stdout.split())
    assert "resuming after step 1" in run.stdout
    assert (tmp_path / "run/damaged/2").is_dir()
    assert same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.slow
def test_a_disk_that_is_full_loses_nothing(tmp_path: Path) -> None:
    """Files may not grow beyond a limit, which for a program looks like a full disk."""
    train(tmp_path, "output_dir=run", "max_steps=1", *OPTIONS)
    before = weights(tmp_path / "run")
    words = " ".join(f"'{word}'" for word in command("output_dir=run", "max_steps=3", *OPTIONS))
    run = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 8; exec {words}"], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 74, run.stdout + run.stderr[-3000:]
    assert run.stderr == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    message = " ".join(run.stdout.split()).partition("error: ")[2]
    assert "checkpoint of step 2" in message
    assert "step 1 is intact" in message
    assert same(convert.read(tmp_path / "run").tensors, before)


def test_what_is_not_finite_ends_the_run_with_names_and_the_last_good_state(tmp_path: Path) -> None:
    run = train(tmp_path, "output_dir=run", "max_steps=9", "optimizer.learning_rate=1e30", status=3)
    message = " ".join(run.stdout.split()).partition("error: ")[2]
    (good,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"step {good + 1} is not finite" in message
    assert f"step {good} is kept" in message
    assert sum(name in message for name in SHIPPED) in (1, 2)  # the batch has two photographs


def test_another_configuration_is_refused_with_the_differences(whole: Path) -> None:
    words = ("output_dir=run", "max_steps=4", *OPTIONS, "optimizer.learning_rate=0.5", "model.window_ratio=0.2")
    run = train(whole.parent, *words, status=2)
    assert "optimizer.learning_rate: 0.002 -> 0.5" in run.stderr
    assert "model.window_ratio: 0.1 -> 0.2" in run.stderr
    assert run.stderr.count("error:") == 1


@pytest.mark.slow
def test_an_encoder_of_timm_and_a_trace_and_a_picture(tmp_path: Path) -> None:
    """The same network in PyTorch; its weights here are random."""
    encoder = ("encoders.lite0.name=timm:tf_efficientnet_lite0", "encoders.lite0.pretrained=false")
    train(
        tmp_path,
        "output_dir=run",
        "max_steps=3",
        *encoder,
        "profile.steps=2:2",
        "log.pictures_every=3",
        "log.pictures=1",
    )
    assert len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run/pictures/step_00000003.png").stat().st_size > 10_000
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (["dataset=folder", "dataset.root=nowhere"], FileNotFoundError, "dataset.root=nowhere"),
        (["dataset.crop_size=2048"], ValueError, "dataset.crop_size=(2048, 2048)"),
        (["batch_size=2000000000"], ValueError, "batch_size=2000000000"),
        (["model.qk_dim=2000000000"], ValueError, "qk_dim=2000000000"),
        (["dataset.crop_size=60"], ValueError, "dataset.crop_size=(60, 60)"),
        (["encoders.lite0.name=efficientnet_lite9"], ValueError, "efficientnet_lite9"),
        (["mesh.data=3"], ValueError, "mesh.data=3"),
        (["output_dir=taken"], FileExistsError, "output_dir=taken"),
        (["output_dir=taken/thesis.txt/run"], OSError, "output_dir=taken/thesis.txt/run"),
        ([f"output_dir={300 * 'a'}"], OSError, f"output_dir={300 * 'a'}"),
        (["output_dir=/proc/run"], OSError, "output_dir=/proc/run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_impossible_runs_are_refused(
    words: list[str], error: type[Exception], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(error, match=re.escape(named)):
        loop.run(configured(*tiny(*words)))
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "thesis.txt"]


@pytest.mark.parametrize("text", [b"", b"- 1", b"{{", b"\xff\x00", b"seed: x", b"no_setting: 1", b"12"])
def test_a_damaged_configuration_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=r"its config\.yaml is damaged"):
        check_output(tmp_path, configured())


def test_shared_memory_that_is_too_small_is_named(tmp_path: Path) -> None:
    words = shlex.join(command("output_dir=run", "max_steps=2", "dataset.workers=1"))
    mounted = "mount -t tmpfs -o size=16k none /dev/shm"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mounted], check=False).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    options = dict(cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    run = subprocess.run(["unshare", "-m", "sh", "-c", f"{mounted} && exec {words}"], **options)
    assert run.returncode == 74
    assert re.search(r"^error: .*dataset\.workers=1 .*/dev/shm.* dataset\.workers=0\.$", run.stdout.strip()), run.stdout
    assert not run.stderr


def test_announced_processes_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ("SLURM_STEP_NODELIST SLURM_PROCID", "SLURM_STEP_NODELIST SLURM_JOB_ID", *ANNOUNCEMENTS):
        with monkeypatch.context() as patch:
            for name in variables.split():
                patch.setenv(name, "0")
            with pytest.raises(ValueError, match=rf"{variables.split()[0]} .*mesh\.distributed=off"):
                join(MeshConfig())
            join(MeshConfig(distributed="off"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is refused while the first holds the folder, and starts once the first was killed."""
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        named = rf"output_dir=.*process {holder.pid} on host {socket.gethostname()}"
        with pytest.raises(FileExistsError, match=named), locked(tmp_path / "run"):
            pass
        holder.kill()
    with locked(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / HOLDER).read_text()
    check_output(tmp_path / "run", configured())


@pytest.mark.parametrize("locks", ["that other hosts do not see", "that do not exist"])
def test_shared_file_systems(locks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on another host holds the folder as long as it gives signs of life."""
    monkeypatch.setattr(output_dir, "SILENCE", 1.2)
    if locks == "that do not exist":
        monkeypatch.setattr(fcntl, "flock", no_locks)
        with locked(tmp_path), pytest.raises(FileExistsError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass
    holder, ended = tmp_path / HOLDER, threading.Event()
    holder.write_text("process 7 on host elsewhere\n")
    sign = threading.Thread(target=output_dir.renew, args=(holder, ended))
    sign.start()
    with pytest.raises(FileExistsError, match="process 7 on host elsewhere"), locked(tmp_path):
        pass
    ended.set()
    sign.join()
    with locked(tmp_path):
        assert str(os.getpid()) in holder.read_text()
        before = holder.stat().st_mtime_ns
        while holder.stat().st_mtime_ns == before:
            time.sleep(0.02)
    assert not holder.exists()


def no_locks(_file: int, _operation: int) -> None:
    raise OSError(errno.ENOSYS, "not supported")


HOLDS = """
import sys, time
from pathlib import Path
from train.output_dir import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    run = train(tmp_path, "mesh.data=3", status=2)
    assert run.stderr.startswith("error: mesh.data=3 ")
    assert run.stderr.count("\n") == 1


def test_cfg_and_dry_run(tmp_path: Path) -> None:
    shown = yaml.safe_load(train(tmp_path, "--cfg", "job", "dataset.root=~/é", HOME=str(tmp_path)).stdout)
    assert shown["model"]["qk_dim"] == 16
    assert shown["dataset"]["root"] == f"{tmp_path}/é"
    dry = train(tmp_path, "--dry-run", "max_steps=4", *OPTIONS).stdout  # the step of the fixture `whole`, compiled once
    named = {words[0]: " ".join(words[1:]) for line in dry.splitlines() if (words := line.split())}
    assert {"parameters", "devices", "data", "memory", "batch"} <= named.keys()
    assert named["devices"].startswith("1 x cpu in 1 processes")
    assert named["data"].startswith("6 photographs, 3.0 steps")
    assert "image 2 x 64 x 64 x 3 uint8" in dry
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_multirun(tmp_path: Path) -> None:
    train(tmp_path, "-m", "max_steps=1", "output_dir=sweep", "seed=1,2")
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1"]
    assert losses(tmp_path / "sweep" / "0") != losses(tmp_path / "sweep" / "1")
