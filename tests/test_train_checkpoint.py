"""Checkpoints: which are kept, damage of every item, another layout of devices, another model."""

from __future__ import annotations

import gc
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import ROOT, environment
from train.checkpoint import AnotherModel, Checkpoints, digests

DATA, CONFIG = dict(images=6, digest="x"), dict(model=dict(qk_dim=16))


def state(step: int) -> dict[str, Any]:
    params = {"a": {"kernel": jnp.arange(96.0).reshape(8, 12) * step}, "b": jnp.full(3, float(step))}
    return dict(params=params, optimizer=dict(count=jnp.int32(step), mu=params, nu=params), ema=params)


def saved(folder: Path, steps: int = 3, ema: bool = True, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints", **dict(keep=10) | options)
    for step in range(1, steps + 1):
        checkpoints.save(step, state(step) | ({} if ema else dict(ema=None)), DATA | dict(step=step), CONFIG)
    checkpoints.wait()
    return checkpoints


def equal(left: Any, right: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_round_trip(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    restored = checkpoints.restore(state(1))
    checkpoints.close()
    assert restored.step == 3
    assert equal(restored.trees, state(3))
    assert (restored.data, restored.config) == (DATA | dict(step=3), CONFIG)


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, steps=1)
    restored = checkpoints.restore(state(1) | dict(ema=None))
    checkpoints.close()
    assert restored.trees.keys() == {"params", "optimizer"}


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", 1).restore(state(1)) is None


def test_newest_and_periods_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, steps=7, keep=2, keep_period=3)
    assert checkpoints.steps() == [3, 6, 7]
    checkpoints.close()


def test_a_first_average_is_the_parameters(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, ema=False)
    assert equal(checkpoints.restore(state(1)).trees["ema"], state(3)["params"])


def remove(item: str) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        (step / item).rename(step.parents[1] / "removed")

    return damage


def cut(item: str) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        for file in (x for x in (step / item).rglob("*") if x.is_file()):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


@pytest.mark.parametrize("item", ["params", "optimizer", "ema", "data", "progress"])
@pytest.mark.parametrize("kind", [remove, cut])
def test_damage_is_reported_and_moved_away(item: str, kind: Callable, tmp_path: Path) -> None:
    checkpoints, messages = saved(tmp_path, steps=2), []
    kind(item)(tmp_path / "checkpoints" / "2")
    restored = checkpoints.restore(state(1), messages.append)
    assert restored.step == 1
    assert equal(restored.trees, state(1))
    (message,) = messages
    assert "step 2 is damaged" in message
    assert "step 1" in message
    assert checkpoints.steps() == [1]
    assert (tmp_path / "damaged" / "2").is_dir()
    checkpoints.save(2, state(2), DATA | dict(step=2), CONFIG)
    checkpoints.close()
    assert checkpoints.restore(state(1)).step == 2


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """Files may not grow beyond a limit, which for a program looks like a full disk."""
    checkpoints, limits = saved(tmp_path, steps=1), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = state(2) | dict(params={"a": jnp.asarray(np.random.default_rng(0).standard_normal(9000, np.float32))})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        checkpoints.save(2, large, DATA | dict(step=2), CONFIG)
        with pytest.raises(OSError, match=r"step 2 .*step 1 "):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    checkpoints.close()
    assert saved(tmp_path, steps=0).restore(state(1)).step == 1


@pytest.mark.parametrize("item", ["data", "config", "progress"])
@pytest.mark.parametrize("field", ["step", "digest", "images", "digests", "items", "model"])
def test_a_changed_record_is_damage(item: str, field: str, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, steps=2)
    path = tmp_path / "checkpoints" / "2" / item / "metadata"
    record = json.loads(path.read_text())
    if field in record:
        record[field] = {"step": 7, "digest": "y", "images": 5, "digests": {}, "items": [], "model": {}}[field]
    else:
        record["more"] = 1
    path.write_text(json.dumps(record))
    restored = checkpoints.restore(state(1), lambda _: None)
    checkpoints.close()
    assert (restored.step, restored.data["step"]) == (1, 1)


@pytest.mark.parametrize("item", ["data", "progress"])
def test_a_checkpoint_without_a_digest_of_its_records_must_have_the_right_step(item: str, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, steps=2)
    for name in ("progress", item):
        path = tmp_path / "checkpoints" / "2" / name / "metadata"
        record = json.loads(path.read_text())
        record.pop("records", None)
        path.write_text(json.dumps(record | (dict(step=7) if name == item else {})))
    assert checkpoints.restore(state(1), lambda _: None).step == 1
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax drops the reads beside a failed one
def test_a_flipped_bit_in_any_file_never_gives_other_numbers(tmp_path: Path) -> None:
    """Some bits are of no use to anybody; every other one is damage."""
    saved(tmp_path / "whole").close()
    files = [x.relative_to(tmp_path / "whole") for x in (tmp_path / "whole/checkpoints/3").rglob("*") if x.is_file()]
    steps = []
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        content = bytearray((folder / file).read_bytes())
        if not content:
            continue
        content[len(content) // 2] ^= 0x40
        (folder / file).write_bytes(bytes(content))
        checkpoints = Checkpoints(folder / "checkpoints", 10)
        restored = checkpoints.restore(state(1), lambda _: None)
        checkpoints.close()
        assert equal(restored.trees, state(restored.step)), file
        steps.append(restored.step)
    gc.collect()  # while the warnings of what was dropped are ignored
    assert set(steps) == {2, 3}


def test_all_damaged(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, steps=1)
    remove("params")(tmp_path / "checkpoints" / "1")
    with pytest.raises(ValueError, match="damaged") as error:
        checkpoints.restore(state(1), lambda _: None)
    assert str(tmp_path / "damaged") in str(error.value)


def test_a_good_checkpoint_of_another_model_stays_where_it_is(tmp_path: Path) -> None:
    checkpoints, other = saved(tmp_path), state(1)
    other["params"]["b"] = jnp.zeros(4)
    with pytest.raises(AnotherModel, match=r"b: \(3,\) -> \(4,\)"):
        checkpoints.restore(other)
    assert checkpoints.steps() == [1, 2, 3]


def test_faults_of_the_machine_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path)

    def fail(_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("train.checkpoint.digests", fail)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoints.restore(state(1))
    assert checkpoints.steps() == [1, 2, 3]


def test_digests_notice_every_small_change() -> None:
    x = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    changed = [x.copy() for _ in range(3)]
    changed[0][3] = np.nextafter(x[3], 9)
    changed[1][[3, 4]] *= -1
    changed[2][[3, 4]] = x[[4, 3]]
    numbers = [digests({"x": array})["x"] for array in [x, *changed, x.copy()]]
    assert len(set(numbers)) == 4
    assert numbers[0] == numbers[4]


LAYOUT = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.test_train_checkpoint import equal, state
from train.checkpoint import Checkpoints
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("model") if x.ndim == 2 else P()))
restored = Checkpoints(Path(sys.argv[1]), 3).restore(jax.tree.map(spread, state(1)))
assert restored.trees["params"]["a"]["kernel"].sharding.spec == P("model")
assert equal(restored.trees, state(3))
print(restored.step)
"""


def test_restored_on_other_devices(tmp_path: Path) -> None:
    saved(tmp_path).close()
    flags = environment(XLA_FLAGS="--xla_force_host_platform_device_count=4")
    words = [sys.executable, "-c", LAYOUT, str(tmp_path / "checkpoints")]
    run = subprocess.run(words, env=flags, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "3", run.stderr[-2000:]
