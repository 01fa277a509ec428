"""The key table and the formats: total both ways, bit exact, and errors that list what is off."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from flax import nnx

import anyup_jax
import anyup_torch
import convert
from anyup_core.checkpoints import key_table, orbax_directory, torch_file, unwrapping
from parity_tests.golden import GOLDEN, needs_golden
from tests.weights import EQUAL, SMALL, assert_same_bits, random_weights
from train.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
FILES = ("weights.pth", "weights_small.pth")


@pytest.mark.parametrize("sizes", [SMALL, EQUAL], ids=["small", "equal"])
def test_the_table_holds_exactly_the_leaves_of_both_models(sizes):
    config = key_table.config_of(sizes)
    rows = key_table.expand(sizes)
    torch_model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in torch_model.state_dict().items()}
    assert shapes == {row.torch: row.shape for row in rows}
    flax_config = anyup_jax.AnyUpConfig(**config)
    state = nnx.state(nnx.eval_shape(lambda: anyup_jax.AnyUp(flax_config, rngs=nnx.Rngs(0))))
    shapes = {".".join(path): variable.shape for path, variable in nnx.to_flat_state(state)}
    assert shapes == {row.flax: row.flax_shape for row in rows}
    assert len(rows) == len(shapes), "a Flax path occurs twice"


@pytest.mark.parametrize("row", key_table.expand(SMALL), ids=lambda row: row.flax)
def test_every_op_is_undone_by_its_inverse(row):
    tensor = np.arange(np.prod(row.shape)).reshape(row.shape)
    np.testing.assert_array_equal(row.op.to_torch(row.op.to_flax(tensor)), tensor)


@pytest.mark.parametrize("flax", [False, True])
def test_sizes_are_those_of_most_tensors(flax):
    checkpoint = convert.Checkpoint(random_weights())
    tensors = checkpoint.flax() if flax else dict(checkpoint.tensors)
    name = next(name for name in tensors if name.startswith("key_encoder.conv" if flax else "key_encoder.0"))
    tensors[name] = np.zeros((5, 6, 7, 8), np.float32)
    assert key_table.sizes_of(tensors, flax=flax) == SMALL


def test_attention_projection_is_split_into_query_key_and_value():
    tensors = random_weights()
    flax = convert.Checkpoint(tensors).flax()
    weight = tensors["cross_decode.cross_attn.attention.in_proj_weight"]
    for index, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(flax[f"cross_decode.{name}.kernel"], weight[16 * index : 16 * (index + 1)].T)


@pytest.mark.parametrize("sizes", [SMALL, EQUAL], ids=["small", "equal"])
def test_config_follows_from_the_shapes(sizes):
    config = convert.Checkpoint(random_weights(sizes)).config
    lfu_dim = None if sizes["M"] == sizes["D"] else sizes["M"]
    assert config == dict(qk_dim=16, input_dim=3, kernel_size=sizes["k"], kernel_size_lfu=sizes["u"], lfu_dim=lfu_dim)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("middle", ["middle.safetensors", "middle.pt", "middle"])
def test_round_trips_are_bit_exact(tmp_path, middle, dtype):
    original = convert.Checkpoint(random_weights(dtype=dtype), {"num_heads": 2, "window_ratio": 0.15})
    convert.write(tmp_path / "first.pth", original)
    convert.write(tmp_path / middle, convert.read(tmp_path / "first.pth"))
    convert.write(tmp_path / "last.pth", convert.read(tmp_path / middle))
    assert_same_bits(original.tensors, convert.read(tmp_path / "last.pth").tensors)
    assert (tmp_path / "first.pth").read_bytes() == (tmp_path / "last.pth").read_bytes()


@needs_golden
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("middle", ["middle.safetensors", "middle"])
def test_the_published_layout_makes_the_round_trip(tmp_path, file, middle):
    convert.write(tmp_path / middle, convert.read(GOLDEN / file))
    convert.write(tmp_path / "last.pth", convert.read(tmp_path / middle))
    tensors = torch_file.read(GOLDEN / file)
    assert len(tensors) == {"weights.pth": 73, "weights_small.pth": 74}[file]
    assert_same_bits(tensors, torch_file.read(tmp_path / "last.pth"))


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_the_config_travels_with_the_weights(tmp_path, name):
    checkpoint = convert.Checkpoint(random_weights(), {"num_heads": 2, "window": "natten"})
    convert.write(tmp_path / name, checkpoint)
    assert convert.read(tmp_path / name).config == checkpoint.config


def test_orbax_layout(tmp_path):
    convert.write(tmp_path / "x", convert.Checkpoint(random_weights()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["config.json", "params"]
    assert anyup_jax.AnyUpConfig.from_json(tmp_path / "x" / "config.json").lfu_dim == 24


def test_safetensors_metadata(tmp_path):
    convert.write(tmp_path / "x.safetensors", convert.Checkpoint(random_weights(), {"num_heads": 2}))
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["anyup_config"])["num_heads"] == 2


def test_one_error_lists_everything_that_is_off():
    tensors = random_weights()
    tensors["renamed"] = tensors.pop("rope.freqs")
    tensors["image_encoder.0.weight"] = np.zeros((8, 3, 3, 3), np.float32)
    tensors["aggregation.1.block.0.bias"] = np.zeros(16, np.int64)
    del tensors["key_features_encoder.1.shortcut.weight"]
    with pytest.raises(ValueError, match="5 tensors do not fit") as caught:
        convert.Checkpoint(tensors)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: key_features_encoder.1.shortcut.weight (16, 24, 1, 1)",
        "  missing: rope.freqs (2, 16)",
        "  not part of the model: renamed (2, 16)",
        "  wrong shape: image_encoder.0.weight is (8, 3, 3, 3), must be (16, 3, 3, 3)",
        "  wrong type: aggregation.1.block.0.bias holds int64, must be floating point",
    ]


def test_the_same_in_the_names_of_flax():
    flax = convert.Checkpoint(random_weights()).flax()
    flax["extra"] = flax.pop("cross_decode.value.kernel")
    flax["rope.freqs"] = flax["rope.freqs"][:1]
    with pytest.raises(ValueError, match="3 tensors do not fit") as caught:
        convert.Checkpoint.from_flax(flax)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: cross_decode.value.kernel (16, 16)",
        "  not part of the model: extra (16, 16)",
        "  wrong shape: rope.freqs is (1, 16), must be (2, 16)",
    ]


def test_a_shortcut_that_the_model_does_not_have_is_refused():
    tensors = random_weights(EQUAL) | {"key_features_encoder.1.shortcut.weight": np.zeros((16, 16, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"1 tensor does not fit.*\n.*not part of the model: .*shortcut"):
        convert.Checkpoint(tensors)


def test_parts_of_one_tensor_share_their_type():
    flax = convert.Checkpoint(random_weights()).flax()
    flax["cross_decode.key.bias"] = flax["cross_decode.key.bias"].astype(np.float16)
    with pytest.raises(ValueError, match=r"parts of .*in_proj_bias differ"):
        convert.Checkpoint.from_flax(flax)


def test_nothing_is_left_of_an_empty_checkpoint():
    with pytest.raises(ValueError, match="73 tensors do not fit"):
        convert.Checkpoint({})


def test_a_config_that_contradicts_the_shapes_is_refused():
    with pytest.raises(ValueError, match="qk_dim=64 contradicts the weights, whose shapes say qk_dim=16"):
        convert.Checkpoint(random_weights(), {"qk_dim": 64})
    checkpoint = convert.Checkpoint(random_weights(EQUAL))
    assert checkpoint.configured(lfu_dim=16)["lfu_dim"] is None
    with pytest.raises(ValueError, match="lfu_dim=24 contradicts"):
        checkpoint.configured(lfu_dim=24)


CFG = {"model": {"_target_": "AnyUp", "num_heads": 2, "window_ratio": 0.2, "qk_dim": 16, "use_natten": True}}
SETTINGS = {"num_heads": 2, "window_ratio": 0.2, "window": "natten"}


@pytest.mark.parametrize(
    ("wrap", "settings"),
    [
        (lambda state: {"anyup": state, "cfg": CFG, "step": 7, "optimizer": {"state": {}}}, SETTINGS),
        (lambda state: {"anyup": state, "cfg": {"lr": 1e-4}}, {}),
        (lambda state: {"state_dict": state, "epoch": 3}, {}),
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, {}),
        (lambda state: {"anyup": {f"module._orig_mod.{name}": x for name, x in state.items()}, "cfg": CFG}, SETTINGS),
        (lambda state: {"state_dict": {"anyup": {f"module.{n}": x for n, x in state.items()}, "cfg": CFG}}, SETTINGS),
        (lambda state: {"model": {f"module.anyup.{name}": tensor for name, tensor in state.items()}}, {}),
        (lambda state: {f"net.{name}": tensor for name, tensor in state.items()}, {}),
        (lambda state: {"n_averaged": np.array(3)} | {f"module.{name}": tensor for name, tensor in state.items()}, {}),
        (lambda state: {"model": random_weights(seed=1), "ema": state}, {}),
        (
            lambda state: {
                "state": 1,
                "model": {"model": random_weights(seed=1), "ema": {"decay": 1, "shadow": state}},
            },
            {},
        ),
        (lambda state: {"model": state, "ema": {"decay": 0.999}}, {}),
    ],
)
def test_training_checkpoints(wrap, settings):
    state = random_weights()
    found, config = unwrapping.unwrap(wrap(state), Path("run.pth"))
    assert_same_bits(found, state)
    assert config == settings


def test_what_was_chosen_or_left_out_is_logged(caplog):
    state = random_weights()
    unwrapping.unwrap({"model": state, "ema": state}, Path("run.pth"))
    unwrapping.unwrap({f"model.{name}": x for name, x in state.items()} | {"loss.weight": np.ones(2)}, Path("odd.pth"))
    lines = [record.getMessage() for record in caplog.records]
    assert [("run.pth" in line, "ema" in line, "loss.weight" in line) for line in lines] == [(1, 1, 0), (0, 0, 1)]


def contains_itself(key):
    saved = {}
    saved[key] = {"state_dict": saved}
    return saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        *((contains_itself(key), "contains itself") for key in ("model", "anyup")),
        ([1, 2], "holds a list, not a state dict"),
        ({}, "it has nothing and none of anyup"),
        ({"epoch": 3, "weights": 1}, "it has epoch, weights and none of anyup"),
        ({"anyup": {"a": 1}}, "it has anyup and none of"),
        ({3: np.zeros(2)}, "it has 3 and none of"),
    ],
)
def test_what_is_no_training_checkpoint(saved, message):
    with pytest.raises(ValueError, match=message):
        unwrapping.unwrap(saved, Path("run.pth"))


def test_paths_that_do_not_work(tmp_path):
    checkpoint = convert.Checkpoint(random_weights())
    convert.write(tmp_path / "x.pth", checkpoint)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for call, error, message in [
        (lambda: convert.read(tmp_path / "none.pth"), FileNotFoundError, "none.pth does not exist"),
        (lambda: convert.read(tmp_path / "folder"), ValueError, "no Orbax checkpoint of AnyUp"),
        (lambda: convert.read(tmp_path / "x.npz"), ValueError, "has the suffix .npz; use .pth, .pt, .safetensors"),
        (lambda: convert.write(tmp_path / "x.pth", checkpoint), FileExistsError, "exists already"),
        (lambda: convert.write(tmp_path / "no" / "x.pth", checkpoint), FileNotFoundError, "no does not exist"),
        (lambda: convert.write(tmp_path / "folder", checkpoint, overwrite=True), FileExistsError, "a directory that"),
        (lambda: convert.write(tmp_path / "x.bin", checkpoint), ValueError, "has the suffix .bin"),
    ]:
        with pytest.raises(error, match=message):
            call()
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(FileExistsError, match="plain is a file and stays as it is"):
        convert.write(tmp_path / "plain", checkpoint, overwrite=True)
    if os.geteuid():
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(PermissionError, match="is not writable"):
            convert.write(tmp_path / "folder" / "x.pth", checkpoint)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_overwriting(tmp_path, name):
    convert.write(tmp_path / name, convert.Checkpoint(random_weights(seed=1)))
    after = convert.Checkpoint(random_weights(seed=2))
    convert.write(tmp_path / name, after, overwrite=True)
    assert_same_bits(convert.read(tmp_path / name).tensors, after.tensors)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_a_failed_write_leaves_what_was_there(tmp_path, name, monkeypatch):
    before = convert.Checkpoint(random_weights())
    convert.write(tmp_path / name, before)

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        convert.write(tmp_path / name, convert.Checkpoint(random_weights(seed=1)), overwrite=True)
    monkeypatch.undo()
    assert_same_bits(convert.read(tmp_path / name).tensors, before.tensors)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_replacement_keeps_the_old_directory(tmp_path, call, monkeypatch):
    """A directory is replaced by two renames; the interrupt comes in either of them."""
    before = convert.Checkpoint(random_weights())
    convert.write(tmp_path / "x", before)
    rename, calls = os.replace, iter(range(1, 9))

    def interrupted(source, target):
        if next(calls) == call:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.write(tmp_path / "x", convert.Checkpoint(random_weights(seed=1)), overwrite=True)
    assert_same_bits(convert.read(tmp_path / "x").tensors, before.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x.pth", "x"])
def test_a_destination_that_is_a_link_stays_one(tmp_path, name):
    (tmp_path / "there").mkdir()
    convert.write(tmp_path / "there" / name, convert.Checkpoint(random_weights(seed=1)))
    (tmp_path / name).symlink_to(tmp_path / "there" / name)
    after = convert.Checkpoint(random_weights(seed=2))
    convert.write(tmp_path / name, after, overwrite=True)
    assert (tmp_path / name).is_symlink()
    assert_same_bits(convert.read(tmp_path / "there" / name).tensors, after.tensors)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [name]


def test_damaged_files_of_the_other_formats(tmp_path):
    checkpoint = convert.Checkpoint(random_weights())
    path = convert.write(tmp_path / "x.safetensors", checkpoint)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        convert.read(path)
    path = convert.write(tmp_path / "x", checkpoint)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        convert.read(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        convert.read(path)
    (path / "config.json").write_text("{}")
    (path / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="params is incomplete or damaged"):
        convert.read(path)


def nested(flat):
    """Return dot-joined path -> value as nested dictionaries."""
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[leaf] = value
    return tree


@pytest.mark.parametrize("restore", [ocp.PyTreeCheckpointer, ocp.StandardCheckpointer])
def test_orbax_restores_what_is_written(tmp_path, restore):
    arrays = {
        "a.b": np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4).T,
        "a.scalar": np.array(3, np.int32),
        "half": np.array([1, -0.0, np.nan], np.float16),
        "zeros": np.zeros(5),
        "bool": np.array([True, False]),
    }
    orbax_directory.write_tree(tmp_path / "x", arrays)
    orbax_directory.write_checkpoint_metadata(tmp_path / "x", orbax_directory.TREE)
    with restore() as reader:
        tree = reader.restore(tmp_path / "x")
    assert_same_bits(
        {"a.b": tree["a"]["b"], "a.scalar": tree["a"]["scalar"]} | {n: tree[n] for n in list(arrays)[2:]}, arrays
    )
    assert_same_bits(orbax_directory.read_tree(tmp_path / "x"), arrays)


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_every_layout_of_orbax_is_read(tmp_path, use_ocdbt, use_zarr3):
    arrays = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(3, np.int32)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)) as writer:
        writer.save(tmp_path / "x", nested(arrays) | {"nothing": {}})
    assert_same_bits(orbax_directory.read_tree(tmp_path / "x"), arrays)


@pytest.mark.parametrize("damage", ["manifest", "chunk", "metadata", "leaf"])
def test_damaged_trees(tmp_path, damage):
    path = tmp_path / "x"
    orbax_directory.write_tree(path, {"a": np.arange(1000.0), "b": np.ones(3)})
    metadata = json.loads((path / "_METADATA").read_text())
    match damage:
        case "manifest":
            (path / "manifest.ocdbt").unlink()
        case "chunk":
            largest = max((path / "d").iterdir(), key=lambda file: file.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:-500])
        case "metadata":
            (path / "_METADATA").write_text("[]")
        case "leaf":
            metadata["tree_metadata"]["('c',)"] = metadata["tree_metadata"].pop("('b',)") | {
                "key_metadata": [{"key": "c"}]
            }
            (path / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="x is incomplete or damaged") as caught:
        orbax_directory.read_tree(path)
    assert "\n" not in str(caught.value)


def test_an_orbax_checkpoint_saved_by_other_means(tmp_path):
    """A trainer that saves jax arrays in the same layout is understood."""
    checkpoint = convert.Checkpoint(random_weights())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps({"num_heads": 2}))
    with ocp.StandardCheckpointer() as writer:
        arrays = {name: jax.numpy.asarray(array) for name, array in checkpoint.flax().items()}
        writer.save(tmp_path / "x" / "params", nested(arrays))
    found = convert.read(tmp_path / "x")
    assert_same_bits(found.tensors, checkpoint.tensors)
    assert found.config["num_heads"] == 2


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import convert
convert.write(sys.argv[2], convert.read(sys.argv[1]))
convert.write(sys.argv[3], convert.read(sys.argv[2]))
assert "jax" not in sys.modules and "orbax.checkpoint" not in sys.modules
import anyup_jax.pretrained
anyup_jax.pretrained.from_pretrained(sys.argv[3], num_heads=2)
"""


def test_everything_but_the_torch_model_works_without_torch(tmp_path):
    convert.write(tmp_path / "x.pth", convert.Checkpoint(random_weights()))
    paths = [str(tmp_path / name) for name in ("x.pth", "orbax", "y.pth")]
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *paths], check=True, cwd=ROOT)
    assert (tmp_path / "x.pth").read_bytes() == (tmp_path / "y.pth").read_bytes()


WITHOUT_JAX = """
import sys
for name in ("jax", "flax", "orbax"):
    sys.modules[name] = None
import numpy as np
import anyup_torch
models = [anyup_torch.from_pretrained(path, num_heads=2) for path in sys.argv[1:]]
averaged = anyup_torch.from_pretrained(sys.argv[-1], num_heads=2, ema=True)
for model in models:
    print(float(model.rope.freqs.detach().sum()))
print(float(averaged.rope.freqs.detach().sum()))
"""


def test_the_torch_model_loads_every_format_without_jax(tmp_path):
    """Among them a run as the trainer writes it: with Orbax's own manager, of jax arrays, with an average."""
    checkpoint = convert.Checkpoint(random_weights(), {"num_heads": 2})
    paths = [str(convert.write(tmp_path / name, checkpoint)) for name in ("x.pth", "x.safetensors", "orbax")]
    params = nested({name: jax.numpy.asarray(array) for name, array in checkpoint.flax().items()})
    saved = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    average = jax.tree.map(lambda x: 2 * x, params)
    trees = {"params": params, "optimizer": {"count": jax.numpy.int32(5)}, "ema": average}
    saved.save(5, trees, {"step": 5}, {"model": {"num_heads": 2}})
    saved.close()
    command = [sys.executable, "-W", "error", "-c", WITHOUT_JAX, *paths, str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    total = float(checkpoint.tensors["rope.freqs"].sum())
    np.testing.assert_allclose([float(line) for line in run.stdout.split()], [total] * 4 + [2 * total], rtol=1e-5)
