"""Models on the Hugging Face hub, and the folders that are kept there, in both frameworks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub import constants

import anyup_jax
import anyup_torch
import convert
from anyup_core.checkpoints import fetching, formats, hub_folder, model_card, names, torch_file
from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_jax.cli.convert import SETTINGS
from convert.__main__ import main
from tests.hub_server import TOKEN, Hub, serve
from tests.release_server import drip
from tests.weights import assert_same_bits, random_weights

REPOSITORY = "org/name"
FIELDS = dict(num_heads=2, window_ratio=0.2, window="natten", init_gaussian_derivatives=True)
PACKAGES = [anyup_jax, anyup_torch]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(tmp_path / "huggingface", monkeypatch) as hub:
        yield hub


def folder_of(path: Path, **fields: object) -> Path:
    """Write a small model as a folder of the hub."""
    return formats.write(path, Checkpoint(random_weights(), {**FIELDS, **fields}), kind=formats.HUB, card="# card\n")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Hub:
    hub.add(REPOSITORY, files_of(folder_of(tmp_path / "published")))
    return hub


def parameters(model: object) -> dict[str, np.ndarray]:
    """The parameters of a model of either framework by their PyTorch keys."""
    package = anyup_torch if isinstance(model, torch.nn.Module) else anyup_jax
    return package.pretrained.checkpoint(model).tensors


@pytest.mark.parametrize("package", PACKAGES)
def test_a_model_of_the_hub_in_either_framework(published: Hub, package) -> None:
    model = package.from_pretrained(REPOSITORY)
    assert {name: getattr(model.config, name) for name in FIELDS} == FIELDS
    assert model.config.backend == "auto"
    assert_same_bits(parameters(model), random_weights())
    assert package.from_pretrained(REPOSITORY, window="paper").config.window == "paper"
    assert sum(request.startswith(f"GET /{REPOSITORY}/") for request in published.requests) == 2


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_saved_loads_in_both(tmp_path: Path, package) -> None:
    model = package.from_pretrained(folder_of(tmp_path / "first"), backend="dense")
    model.save_pretrained(tmp_path / "second", license="apache-2.0")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["model_type"] == "anyup"
    assert "backend" not in config
    assert {name: config[name] for name in FIELDS} == FIELDS
    assert "license: apache-2.0" in (tmp_path / "second" / "README.md").read_text().splitlines()
    for other in PACKAGES:
        loaded = other.from_pretrained(str(tmp_path / "second"))
        assert loaded.config == model.config.replace(backend="auto")
        assert_same_bits(parameters(loaded), random_weights())
        lone = other.from_pretrained(tmp_path / "second" / "model.safetensors")
        assert lone.config.window == "natten"


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the library's own upload
@pytest.mark.parametrize("package", PACKAGES)
def test_an_upload_and_back(hub: Hub, package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = package.from_pretrained(folder_of(tmp_path / "local"))
    with pytest.raises(PermissionError, match="hf auth login"):
        model.push_to_hub(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = model.push_to_hub(REPOSITORY, private=True)
    assert address == f"{hub.url}/{REPOSITORY}/commit/{hub.branches[REPOSITORY]['main']}"
    assert set(hub.main(REPOSITORY)) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert f'from_pretrained("{REPOSITORY}")' in hub.main(REPOSITORY)["README.md"].decode()
    model.push_to_hub(REPOSITORY, message="once more")
    for other in PACKAGES:
        loaded = other.from_pretrained(REPOSITORY)
        assert {name: getattr(loaded.config, name) for name in FIELDS} == FIELDS
        assert_same_bits(parameters(loaded), random_weights())
    with pytest.raises(ValueError, match="such as org/name"):
        model.push_to_hub("name")


def test_a_revision(published: Hub, tmp_path: Path) -> None:
    old = published.branches[REPOSITORY]["main"]
    published.add(REPOSITORY, files_of(folder_of(tmp_path / "tagged", window="paper")), "v2")
    for revision, window in ((None, "natten"), (old, "natten"), ("v2", "paper")):
        assert anyup_torch.from_pretrained(REPOSITORY, revision=revision).config.window == window
    with pytest.raises(FileNotFoundError, match="no revision 'v3'"):
        anyup_jax.from_pretrained(REPOSITORY, revision="v3")


@pytest.mark.parametrize("option", ["revision", "file"])
def test_options_of_the_hub_for_something_else(option: str, tmp_path: Path) -> None:
    for source in ("anyup_efficientnet_lite", tmp_path, str(folder_of(tmp_path / "local"))):
        with pytest.raises(ValueError, match=f"{option}='x.pth' belongs to a repository of the hub"):
            anyup_torch.from_pretrained(source, **{option: "x.pth"})


def test_a_private_repository(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published.private.add(REPOSITORY)
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(FileNotFoundError, match="HF_TOKEN"):
            anyup_torch.from_pretrained(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert anyup_torch.from_pretrained(REPOSITORY).config.window == "natten"


def test_a_gated_repository(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published.gated.add(REPOSITORY)
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match=f"{published.url}/{REPOSITORY} is gated"):
            anyup_jax.from_pretrained(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert anyup_jax.from_pretrained(REPOSITORY).config.window == "natten"


def test_offline(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
            anyup_torch.from_pretrained(REPOSITORY)
    assert not published.requests
    anyup_torch.from_pretrained(REPOSITORY)
    asked = len(published.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert anyup_jax.from_pretrained(REPOSITORY).config.window == "natten"
    assert len(published.requests) == asked


def test_repositories_without_a_model(published: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"no repository .*/org/other"):
        anyup_torch.from_pretrained("org/other")
    files = published.main(REPOSITORY)
    for name in ("config.json", "model.safetensors"):
        published.add(f"org/no-{name[:5]}", {x: content for x, content in files.items() if x != name})
        with pytest.raises(FileNotFoundError, match=f"has no {name}.*file="):
            anyup_torch.from_pretrained(f"org/no-{name[:5]}")


def test_another_model_is_refused_before_its_weights_are_fetched(published: Hub) -> None:
    for config in ({"model_type": "dinov2"}, {"architecture": "resnet18", "num_classes": 1000}):
        published.add(REPOSITORY, {"config.json": json.dumps(config).encode()})
        with pytest.raises(ValueError, match=r"model of type|no field architecture"):
            anyup_torch.from_pretrained(REPOSITORY)
    assert not [request for request in published.requests if "safetensors" in request]


@pytest.mark.parametrize("file", ["model.pth", "sub/model.bin"])
@pytest.mark.parametrize("settings", ["anyup", "other", None])
def test_a_state_dict_by_name(hub: Hub, tmp_path: Path, monkeypatch, file: str, settings: str | None) -> None:
    torch_file.write(tmp_path / "x.pth", random_weights())
    files = {file: (tmp_path / "x.pth").read_bytes()}
    if settings:
        files["config.json"] = json.dumps({"model_type": settings, "window": "natten", "num_heads": 2}).encode()
    hub.add(REPOSITORY, files)
    with pytest.raises((FileNotFoundError, ValueError)):
        anyup_torch.from_pretrained(REPOSITORY)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        model = anyup_torch.from_pretrained(REPOSITORY, file=file)
        assert (model.config.window, model.config.num_heads) == (("natten", 2) if settings == "anyup" else ("paper", 4))
        assert_same_bits(parameters(model), random_weights())


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_file_is_refused_and_not_run(hub: Hub, tmp_path: Path) -> None:
    torch.save({"anyup": {}, "cfg": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    hub.add(REPOSITORY, {"pytorch_model.bin": (tmp_path / "evil.pth").read_bytes()})
    with pytest.raises(ValueError, match=r"mentions \w+\.system"):
        anyup_jax.from_pretrained(REPOSITORY, file="pytorch_model.bin")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match=r"\.safetensors"):
        anyup_jax.from_pretrained(REPOSITORY, file="model.pkl")


def test_damaged_weights_are_refused(published: Hub) -> None:
    published.add(REPOSITORY, {"model.safetensors": published.main(REPOSITORY)["model.safetensors"][:-5]})
    with pytest.raises(ValueError, match="truncated"):
        anyup_torch.from_pretrained(REPOSITORY)


def test_an_existing_path_wins(published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    folder_of(tmp_path / "org" / "name", window="paper")
    for package in PACKAGES:
        assert package.from_pretrained(REPOSITORY).config.window == "paper"
    assert not published.requests
    with pytest.raises(FileNotFoundError, match="does not exist"):
        anyup_jax.from_pretrained(Path("org/other"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        anyup_jax.from_pretrained("org/other.pth")
    assert not published.requests


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no config\.json"),
        ("[", "no JSON"),
        ("[]", "list"),
        ('{"model_type": "anyup", "heads": 2}', "no field heads"),
        ('{"num_heads": 3}', "num_heads"),
        ('{"qk_dim": 64}', "contradicts the weights"),
    ],
)
def test_a_folder_whose_configuration_does_not_hold(tmp_path: Path, config: str | None, message: str) -> None:
    file = folder_of(tmp_path / "x") / "config.json"
    file.unlink()
    if config is not None:
        file.write_text(config)
    with pytest.raises(ValueError, match=message):
        anyup_torch.from_pretrained(tmp_path / "x")


def test_what_is_there_stays(tmp_path: Path) -> None:
    model = anyup_torch.from_pretrained(folder_of(tmp_path / "x"))
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert set(files_of(tmp_path / "empty")) == {"README.md", "config.json", "model.safetensors"}
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "x")
    model.save_pretrained(tmp_path / "x", overwrite=True)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        model.save_pretrained(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="suffix"):
        model.save_pretrained(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no run of"):
        model.save_pretrained(tmp_path / "y", run=tmp_path)
    with pytest.raises(ValueError, match="license="):
        model.save_pretrained(tmp_path / "y", license="a\nb")
    assert not (tmp_path / "y").exists()


def test_convert_writes_the_folder_and_reads_the_hub(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_file.write(tmp_path / "x.pth", random_weights())
    words = ["--hub", "--num-heads", "2", "--window", "natten", "--license", "cc-by-4.0"]
    assert main([str(tmp_path / "x.pth"), str(tmp_path / "folder"), *words]) == 0
    config = hub_folder.read_config(tmp_path / "folder")
    assert (config["num_heads"], config["window"], config["window_ratio"]) == (2, "natten", 0.1)
    assert main([REPOSITORY, str(tmp_path / "orbax")]) == 0
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["window"] == "natten"
    assert main([str(tmp_path / "folder"), str(tmp_path / "back.pth")]) == 0
    assert_same_bits(convert.read(tmp_path / "back.pth").tensors, random_weights())
    capsys.readouterr()
    for words in (["x", "--hub", "--training"], ["x", "y", "--license", "mit"], ["--timm", "resnet18", "y", "--hub"]):
        assert main([str(word) for word in words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert set(SETTINGS) <= set(config)


def test_the_card_tells_what_the_run_has(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "30"
    settings = {
        "encoders": {"lite0": {"name": "efficientnet_lite0", "layer": [2], "weights": "secret/lite0.pth"}},
        "dataset": {"kind": "folder", "root": "secret/photographs", "crop_size": [64, 64], "workers": 2},
        "optimizer": {"learning_rate": 0.001},
        "batch_size": 2,
        "output_dir": "secret/run",
    }
    for name, record in (("progress", {"step": 30}), ("config", settings)):
        (step / name).mkdir(parents=True)
        (step / name / "metadata").write_text(json.dumps(record))
    (step / "params").mkdir()
    lines = [json.dumps({"step": n, "time": 1.0, "loss": 1 / n}) for n in range(1, 41)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4']))
    result = {"encoder": "lite0", "method": "anyup", "scores": {"mIoU": 0.5}, "settings": {"task": "segmentation"}}
    (tmp_path / "run" / "scores").mkdir()
    (tmp_path / "run" / "scores" / "results.json").write_text(json.dumps([result]))
    for run in (tmp_path / "run", tmp_path / "run" / "checkpoints", step):
        text = model_card.text({"window": "natten", "backend": "tiled"}, name=REPOSITORY, run=run)
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        assert {tuple(row) for row in rows} >= {
            ("window", "natten"),
            ("encoders.lite0.name", "efficientnet_lite0"),
            ("dataset.crop_size", "[64, 64]"),
            ("optimizer.learning_rate", "0.001"),
            ("1", "1"),
            ("30", "0.03333"),
            ("lite0", "anyup", "0.5"),
        }
        assert len([row for row in rows if row[0].isdecimal()]) == model_card.ROWS
        assert "secret" not in text
        assert "backend" not in text
        assert "license" not in text
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections == ["## Configuration", "## Data", "## Training", "## Curve", "## Scores: segmentation"]
    bare = model_card.text({}, name="folder")
    assert [line for line in bare.splitlines() if line.startswith("## ")] == ["## Configuration"]


def test_a_server_that_drips_is_given_up(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PERIOD", 0.5)
    published.drip = True
    before = threading.active_count()
    with pytest.raises(ConnectionError, match=r"less than 1000 bytes per second over 0\.5 seconds"):
        anyup_torch.from_pretrained(REPOSITORY)
    deadline = time.monotonic() + 5
    while threading.active_count() > before + 1 and time.monotonic() < deadline:  # the server's own may go on
        time.sleep(0.05)
    published.drip = False
    assert anyup_torch.from_pretrained(REPOSITORY).config.window == "natten"


def test_headers_that_drip_are_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PERIOD", 0.5)
    with drip(b"HTTP/1.1 200 OK\r\n") as (url, _):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        with pytest.raises(ConnectionError, match="less than 1000 bytes"):
            anyup_torch.from_pretrained(REPOSITORY)


def test_who_waits_says_for_whom(published: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    published.before = 0.7
    first = threading.Thread(target=names.locate, args=[REPOSITORY])
    first.start()
    time.sleep(0.3)
    names.locate(REPOSITORY)
    first.join()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Waiting")]
    assert lines
    assert f"process {os.getpid()} on {socket.gethostname()}" in lines[0]
    assert REPOSITORY in lines[0]


def test_the_librarys_environment_is_obeyed(published: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a process finds them."""
    published.private.add(REPOSITORY)
    program = f"from anyup_core.checkpoints import names; print(names.load({REPOSITORY!r}).config['window'])"
    home = dict(HF_ENDPOINT=published.url, HF_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT))
    for more in (dict(HF_TOKEN=TOKEN), dict(HF_HUB_OFFLINE="1")):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | home | more, capture_output=True, text=True, check=False
        )
        assert done.stdout == "natten\n", done.stderr
    assert (tmp_path / "home" / "hub" / "models--org--name").is_dir()


def test_both_frameworks_agree(published: Hub) -> None:
    random = np.random.default_rng(0)
    image, features = (random.standard_normal(shape).astype(np.float32) for shape in ((1, 12, 8, 3), (1, 6, 4, 5)))
    flax = nnx.jit(lambda model, *inputs: model(*inputs))(anyup_jax.from_pretrained(REPOSITORY), image, features)
    model = anyup_torch.from_pretrained(REPOSITORY)
    with torch.inference_mode():
        output = model(*(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, features)))
    np.testing.assert_allclose(np.asarray(flax), output.numpy().transpose(0, 2, 3, 1), atol=2e-5)
