"""The benchmarks run and measure what they say, at sizes that take no time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import anyup_torch
from anyup_core.geometry import axis_window
from anyup_core.upsamplers import catalogue
from benchmarks import (
    attention,
    bands,
    busy,
    data,
    encoders,
    export,
    many,
    plain_upsamplers,
    pod,
    probe,
    record,
    run,
    train,
    upsamplers,
    windows,
)
from benchmarks.published import with_published_attention
from benchmarks.tables import table_of
from benchmarks.worker import Job, measure


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_worker_measures(framework: str, backend: str) -> None:
    outcome = measure(Job(framework, backend, image=28, cells=2, channels=8, chunk=64, repeats=2))
    assert len(outcome.seconds) == 3
    assert min(outcome.seconds) > 0
    assert outcome.peak > 50
    assert outcome.rate > 0


def test_published_algorithm_gives_the_same_output() -> None:
    torch.manual_seed(0)
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(qk_dim=32, backend="dense")).eval()
    image, features = torch.randn(2, 3, 30, 44), torch.randn(2, 9, 5, 7)
    with torch.inference_mode():
        expected = model(image, features)
        chunks = []
        model.cross_decode.cross_attn.attention.register_forward_hook(lambda *_: chunks.append(1))
        output = with_published_attention(model)(image, features, q_chunk_size=500)
    assert len(chunks) == 3
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_busy_processes_end_with_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(image=28, cells=2, channels=8, repeats=1)
    rows = {"jax tiled": (Job("jax", **sizes), {}), "passive": (Job("torch", **sizes), {"OMP_WAIT_POLICY": "PASSIVE"})}
    monkeypatch.setattr(busy, "ROWS", rows)
    started = []
    popen = busy.subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1])
    table = busy.busy(1)
    assert table.row_count == 2
    assert len(started) >= 2
    assert all(process.poll() is not None for process in started)


def test_failed_job_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="backend='none' is unknown"):
        measure(Job("torch", "none", image=28, cells=2, channels=8))


@pytest.mark.parametrize("window", ["paper", "natten"])
def test_no_backend_does_less_than_the_minimum(window: str) -> None:
    axis = axis_window(attention.SIDE, attention.CELLS, attention.RATIO, window)
    least = attention.minimum(axis)
    names = ["dense", "tiled", "pallas_tpu", "triton"] + ["natten"] * (window == "natten")
    works = {name: attention.work(name, axis) for name in names}
    assert all(done.keys >= least.keys and done.operations >= least.operations for done in works.values())
    assert all(done.bytes >= least.bytes for done in works.values())
    assert works["tiled"].operations < works["dense"].operations
    assert attention.seconds("torch", "tiled", axis, 1) > 0


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_bands_are_measured(framework: str) -> None:
    job = bands.Job(framework, height=40, width=30, image=28, cells=2, channels=8)
    size, peak, seconds = bands.measure(job)
    assert size == 40 * 30 * 8 * 2
    assert peak > 50
    assert seconds > 0


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_many_maps_are_measured(framework: str) -> None:
    outcome = many.run(many.Job(framework, image=28, maps=((2, 8), (4, 5)), repeats=2))
    assert len(outcome.separate) == len(outcome.together) == 2
    assert min(*outcome.separate, *outcome.together) > 0
    assert outcome.difference < 1e-5


def test_windows_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(windows, "SIZES", ((64, -1),))
    columns = {column.header: list(column.cells) for column in windows.windows(1).columns}
    assert columns["cells"] == ["2 x 2"]
    assert 0 < float(columns["paper - natten"][0]) < 3
    windows.draw(tmp_path / "windows.png")
    assert [path.name for path in tmp_path.iterdir()] == ["windows.png"]


def test_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["speed"])
    assert "no benchmark named speed" in capsys.readouterr().err


def test_encoders_take_turns() -> None:
    speed = encoders.Speed(**encoders.in_process(["speed", "tf_efficientnet_lite0", "1"]))
    assert len(speed.timm) == len(speed.flax) == 3
    assert min(*speed.timm, *speed.flax) > 0
    assert speed.first > min(speed.flax)  # it compiles


def test_missing_packages_are_named_or_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "TABLES", {"encoders_tpu": encoders.encoders_tpu})
    run.main([])
    assert "encoders_tpu: left out. Compiling for a TPU needs libtpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["encoders_tpu"])
    assert 'pip install "anyup-jax[tpu]"' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_program_for_a_chip() -> None:
    program = encoders.Program(
        **encoders.in_process(["compile", "vit_tiny_patch16_224", "224"], encoders.TPU_ENVIRONMENT)
    )
    weights = 5.5e6
    assert program.arguments > 4 * weights  # float32
    assert program.flops > 2 * weights * 197 * 4  # each weight meets each token of each image
    assert program.accessed > 2 * weights


@pytest.mark.slow
def test_training_steps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(batch=1, image=28, cells=2, channels=8, size=4, crops=2)
    monkeypatch.setattr(train, "SIZES", sizes)
    monkeypatch.setattr(train, "CASES", {name: train.CASES[name] for name in ("PyTorch, as published", "JAX")})
    columns = [list(column.cells) for column in train.train(1).columns]
    assert columns[0] == ["PyTorch, as published", "JAX"]
    assert min(float(cell) for cell in columns[1]) >= 0
    assert min(float(cell) for cell in columns[3]) > 50
    assert float(columns[5][1]) < 1e-4  # the same loss, after steps too


TINY_RUN = dict(
    encoders={"tiny": {"name": "vit_tiny_patch16_224"}},
    dataset=dict(crop_size=[64, 64], img_size=[32, 32], num_local_crops=1),
    model=dict(qk_dim=16, num_heads=2, window_ratio=0.5, backend="tiled"),
    batch_size=4,
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_step_for_a_pod() -> None:
    """Four chips with whole parameters exchange gradients and four metrics, all at once."""
    step = pod.compile_apart(pod.Case("v5e:2x2", TINY_RUN))
    assert step.collectives == {"all-reduce": 1}
    assert 0.9 * step.gradients < step.exchanged <= step.gradients + 4 * 4
    assert step.arguments > 4 * 5.5e6  # the encoder
    assert step.temporary > 0


def test_cases_of_pods() -> None:
    for case in pod.cases():
        chips, batch = pod.CHIPS[case.topology], case.settings["batch_size"]
        parts = case.settings["optimizer"]["accumulate"]
        assert batch % (chips * parts) == 0
        assert batch / chips / parts <= pod.MOST[case.topology[:3]]
    assert [case.settings["mesh"] for case in pod.cases()].count(pod.FSDP) == 1


def test_bytes_of_collectives() -> None:
    text = """
  %all-reduce.1 = (f32[3,3,2]{2,1,0:T(4,128)}, bf16[8]{0}) all-reduce(%a, %b), channel_id=1
  %all-gather-start = (f32[2], f32[4]) all-gather-start(%c), channel_id=2
  %all-gather-done = f32[4]{0} all-gather-done(%all-gather-start)
  %add = f32[100]{0} add(%a, %all-reduce.1)
"""
    assert pod.exchanged(text) == 18 * 4 + 8 * 2 + 4 * 4


def test_a_probe_takes_the_same_step_at_low_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(batch=1, image=32, cells=4, channels=24)
    plain, *others = (
        probe.run(probe.Job(kept, plain, 5, **small, steps=1))
        for kept, plain in ((False, True), (False, False), (True, True), (True, False))
    )
    for ours in others:
        assert plain.loss == pytest.approx(ours.loss, abs=1e-5)
        np.testing.assert_allclose(plain.gradient, ours.gradient, atol=1e-5 * np.abs(plain.gradient).max())
    monkeypatch.setattr(probe, "measure", probe.run)
    monkeypatch.setattr(probe, "SIZES", small)
    monkeypatch.setattr(probe, "CLASSES", (5,))
    columns = [list(column.cells) for column in probe.probe(1).columns]
    where = "to upsampled features", "to features"
    assert columns[0] == [f"5, {kept}, {it}" for kept in ("computed", "kept") for it in where]
    assert max(float(columns[6][row]) for row in (1, 3)) < 1e-4


def test_data_pipelines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(files=(60, 70), crop=48, view=32, crops=2, images=8)
    monkeypatch.setattr(data, "SIZES", sizes)
    threads = torch.get_num_threads()
    columns = [list(column.cells) for column in data.data(1).columns]
    assert columns[0] == ["torchvision, DataLoader", "the same, without views", "train.data"]
    assert columns[2][0] == "1.00 x"
    assert min(float(cell) for cell in columns[1] + columns[3]) > 0
    assert torch.get_num_threads() == threads


def test_the_onnx_file_is_timed_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "measure", export.run)
    monkeypatch.setattr(export, "SIZES", ((32, 4, 8),))
    columns = {column.header: list(column.cells) for column in export.export(1).columns}
    assert len(columns["error"]) == 2
    assert float(columns["error"][0]) <= 2e-4 <= float(columns["error"][1]) <= 1e-2
    assert float(columns["MB"][1]) < 0.55 * float(columns["MB"][0])


def test_upsamplers_are_timed_against_the_plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsamplers, "measure", upsamplers.run)
    monkeypatch.setattr(upsamplers, "SIZES", dict(image=36, cells=9, channels=8))
    monkeypatch.setattr(upsamplers, "TRAINED", ("naf",))
    columns = {column.header: list(column.cells) for column in upsamplers.upsamplers(1).columns}
    assert columns[""][0].startswith("naf, chunk ")
    for framework in ("torch", "jax"):
        assert min(float(ratio.split()[0]) for ratio in columns[f"plain / {framework}"]) > 0
    assert max(float(x) for pair in columns["outputs differ by"] for x in pair.split(",")) < 1e-4


@pytest.mark.parametrize("method", ["jafar", "featup", "loftup", "naf"])
def test_plain_formulas_give_the_same_output(method: str) -> None:
    model, (image, features) = upsamplers.torch_model(method, 9, 8), upsamplers.inputs(36, 9, 8)
    ours = upsamplers.torch_call(model, image, features)()
    given = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (image, features)]
    with torch.inference_mode():
        plain = plain_upsamplers.PLAIN[method](model, *given, (36, 36), 100)
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-5 * float(plain.abs().max()))


def test_upsamplers_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plain_upsamplers.PLAIN, "naf", lambda model, image, features, size, chunk: 2 * image)
    monkeypatch.setattr(upsamplers, "jax_call", lambda model, image, features: lambda: image)
    monkeypatch.setattr(
        upsamplers, "torch_call", lambda model, image, features: torch.from_numpy(image).movedim(3, 1).clone
    )
    with pytest.raises(RuntimeError, match="naf"):
        upsamplers.run(upsamplers.Duel("naf", 18, 9, 8, 1))


def test_upsamplers_at_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsamplers, "measure", upsamplers.run)
    monkeypatch.setattr(upsamplers, "SIDES", ((28, 4), (36, 9)))
    monkeypatch.setattr(upsamplers, "NARROW", 3)
    monkeypatch.setattr(upsamplers, "SIZES", dict(channels=8))
    monkeypatch.setattr(upsamplers.catalogue, "NAMES", ("naf", "bilinear"))
    columns = {column.header: list(column.cells) for column in upsamplers.upsampler_sizes(1).columns}
    assert columns[""] == ["naf", "bilinear"]
    assert columns["parameters"] == ["662,528", "0"]
    assert min(float(x) for framework in ("torch", "jax") for x in columns[f"{framework} peak MB"]) > 50
    assert all(upsamplers.gflop(method, 36, 9, 8) >= 0 for method in catalogue.METHODS)


@pytest.mark.parametrize("method", ["jafar", "loftup", "naf"])
def test_arithmetic_of_upsamplers_is_that_of_the_plain_formulas(method: str) -> None:
    side, cells, channels = 36, 9, 16
    model = upsamplers.torch_model(method, cells, channels)
    image, features = torch.randn(1, 3, side, side), torch.randn(1, channels, cells, cells)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        plain_upsamplers.PLAIN[method](model, image, features, (side, side), 1 << 20)
    counted = upsamplers.gflop(method, side, cells, channels) * 1e9
    if method == "jafar":  # the angles; values and outputs of the heads, of which only the weights are used
        dim = upsamplers.DIM
        counted += 2 * (side**2 * (2 + cells**2 + dim) + cells**2 * channels) * dim
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-6)


def table_of_two(ratio: str) -> Table:
    table = table_of("a title", "", "seconds", "ours / theirs")
    table.add_row("one", "3.14", ratio)
    table.add_row("two", "2.72", "none")
    return table


def test_tables_are_written_and_their_ratios_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, kept = tmp_path / "new.json", tmp_path / "ratios.json"
    for ratio, keep, changed, printed in (
        ("2.00", True, 0, "0 of 0 ratios"),
        ("2.40", False, 0, "0 of 1 ratios"),
        ("1.50", False, 1, "table: one, ours / theirs: 2 before, 1.5 now"),
        ("2.60", True, 1, "table: one, ours / theirs: 2 before, 2.6 now"),
        ("2.60", False, 0, "0 of 1 ratios"),
    ):
        monkeypatch.setattr(run, "TABLES", {"table": lambda rounds, ratio=ratio: table_of_two(ratio)})
        run.main(["table", "--rounds", "2", "--json", str(written)])
        content = json.loads(written.read_text())
        assert content["rounds"] == 2
        assert content["machine"]["processors"] >= 1
        assert content["machine"]["packages"]["jax"]
        assert content["tables"]["table"]["columns"] == ["", "seconds", "ours / theirs"]
        assert content["tables"]["table"]["rows"][0] == ["one", "3.14", ratio]
        capsys.readouterr()
        assert record.main([str(kept), str(written), *(["--keep"] if keep else [])]) == changed
        assert printed in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run.main(["forward", "--json", str(tmp_path / "none" / "x.json")])
