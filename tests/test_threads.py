"""Blocks on threads of their own: the same outputs, PyTorch's settings as they were, errors raised, no thread left."""

from __future__ import annotations

import math
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import anyup_torch
from anyup_torch import threads, upsamplers


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch has two threads, and the machine two processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "processors", lambda: 2)
    yield
    torch.set_num_threads(before)


class Module(torch.nn.Linear):
    """Something with parameters."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    @threads.on_own_threads
    def divided(self, number: int) -> tuple[int, set[str], list[int]]:
        """Return PyTorch's number of threads here, the names of the threads that worked, and what they worked on."""
        names, done, both = set(), [], threading.Barrier(2, timeout=60)

        def work(index: int) -> None:
            if index < 2:
                both.wait()  # each of two threads takes one of the first
            names.add(threading.current_thread().name)
            done.append(index)
            assert torch.get_num_threads() == 1

        threads.each(work, number)
        return torch.get_num_threads(), names, done


@pytest.mark.usefixtures("two")
def test_blocks_are_divided_and_operations_are_not() -> None:
    divided, names, done = Module().divided(50)
    assert divided == 1
    assert len(names) == 2
    assert threading.current_thread().name not in names
    assert sorted(done) == list(range(50))
    assert torch.get_num_threads() == 2
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()  # one that PyTorch has not seen before
    other.join()
    assert seen == [2]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", ["anyup", "jafar", "naf"])
@pytest.mark.usefixtures("two")
def test_outputs_are_those_of_one_thread(name: str, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    models: Any = dict(anyup=anyup_torch.AnyUp, jafar=upsamplers.JAFAR, naf=upsamplers.NAF)
    model = models[name]().eval()
    image, features = torch.randn(2, 3, 160, 144), torch.randn(2, model.channels or 24, 10, 9)
    with torch.inference_mode() if inference else torch.no_grad():
        ours = model(image, features)
        monkeypatch.setattr(threads, "count", lambda device: 1)
        expected = model(image, features)
    assert ours.is_inference() == inference
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("two")
def test_an_error_is_raised_and_the_next_call_works() -> None:
    class Failing(Module):
        @threads.on_own_threads
        def fail(self, at: int) -> None:
            def work(index: int) -> None:
                if index == at:
                    raise ValueError(f"block {index}")

            threads.each(work, 20)

    module = Failing()
    for at in (0, 7, 19):
        with pytest.raises(ValueError, match=f"block {at}"):
            module.fail(at)
    assert module.divided(4)[0] == 1


@pytest.mark.usefixtures("two")
def test_blocks_of_blocks() -> None:
    class Nested(Module):
        @threads.on_own_threads
        def count(self) -> int:
            done: list[int] = []
            threads.each(lambda _: threads.each(done.append, 7), 30)
            return len(done)

    assert Nested().count() == 210


@pytest.mark.usefixtures("two")
def test_threads_end_with_the_one_they_work_for() -> None:
    def run() -> None:
        Module().divided(3)

    before = threading.active_count()
    for _ in range(3):
        caller = threading.Thread(target=run)
        caller.start()
        caller.join()
    for thread in threading.enumerate():
        if thread.name.startswith("anyup") and thread is not threading.current_thread():
            thread.join(5)
            if threading.active_count() <= before:
                break
    assert threading.active_count() <= before + 2  # this thread's own may be there


@pytest.mark.usefixtures("two")
def test_several_callers_at_once() -> None:
    model = anyup_torch.AnyUp().eval()
    image, features = torch.randn(1, 3, 64, 64), torch.randn(1, 8, 4, 4)
    with torch.inference_mode():
        expected = model(image, features)
    outputs: list[Any] = [None] * 4

    def call(index: int) -> None:
        with torch.inference_mode():
            outputs[index] = model(image, features)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def forked(queue: Any) -> None:
    queue.put(Module().divided(4)[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
@pytest.mark.usefixtures("two")
def test_a_forked_process_has_threads_of_its_own() -> None:
    Module().divided(4)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=forked, args=(queue,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == 1


@pytest.mark.usefixtures("two")
def test_watched_operations_stay_on_their_thread() -> None:
    model, image, features = anyup_torch.AnyUp().eval(), torch.randn(1, 3, 64, 64), torch.randn(1, 8, 4, 4)
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image, features)
    assert counter.get_total_flops() > 2 * 64 * 64 * 128 * 128 * 22


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu.max": "nonsense"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_share_of_a_container(
    files: dict[str, str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads.quota() == expected
    assert threads.processors.__wrapped__() >= 1
