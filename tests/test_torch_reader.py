"""The restricted reader and the writer of PyTorch's files, against torch itself."""

from __future__ import annotations

import collections
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from anyup_core.checkpoints import torch_file, torch_legacy_file
from parity_tests.golden import GOLDEN, needs_golden

DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32"),
)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def save(path: Path, value, **options) -> Path:
    torch.save(value, path, **options)
    return path


def assert_same(path: Path, **options) -> None:
    """Compare a saved dict of tensors as read here and by torch."""
    mine, theirs = torch_file.read(path), torch.load(path, **{"weights_only": True, **options})
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].shape == tuple(tensor.shape), name
        assert str(tensor.dtype) == f"torch.{mine[name].dtype.name}", name
        assert mine[name].tobytes() == as_bytes(tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_type(tmp_path, dtype):
    tensor = torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
    assert_same(save(tmp_path / "x.pth", {"x": tensor, "transposed": tensor.t(), "one": tensor[1, 2]}))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_strides_offsets_and_shared_storages(tmp_path, protocol):
    base = torch.arange(120.0)
    grid = base.reshape(4, 5, 6)
    tensors = {
        "whole": grid,
        "permuted": grid.permute(2, 0, 1),
        "slice": grid[1:3, ::2, 1::3],
        "scalar": grid[2, 3, 4],
        "expanded": base[7:8].expand(3, 4),
        "empty": base[:0].reshape(0, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(grid[0].t()),
        "gradient": torch.ones(2, requires_grad=True),
    }
    path = save(tmp_path / "x.pth", tensors, pickle_protocol=protocol)
    assert_same(path, weights_only=protocol == 2)  # torch's own restricted reader warns of other protocols


def test_plain_containers(tmp_path):
    value = {
        "dict": {"a": [1, -2.5, None, True, 2**80], 3: (b"", b"ab\xff", "text", ())},
        "ordered": collections.OrderedDict(b=1, a=2),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "complex": 1 + 2j,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "cpu": torch.device("cpu"),
    }
    found = torch_file.read(save(tmp_path / "x.pth", value))
    assert found == value | {"size": (2, 3), "device": "cuda:1", "cpu": "cpu"}
    assert torch_file.read(save(tmp_path / "y.pth", {"dtype": torch.float16}))["dtype"].name == "torch.float16"


def test_state_dict_of_a_module_and_of_an_optimizer(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_same(save(tmp_path / "x.pth", module.state_dict()))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    found = torch_file.read(save(tmp_path / "y.pth", {"optimizer": optimizer.state_dict(), "step": 3}))
    expected = optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    np.testing.assert_array_equal(found["optimizer"]["state"][0]["exp_avg"], expected)


@needs_golden
@pytest.mark.parametrize("file", ["weights.pth", "weights_small.pth"])
def test_golden_weights(file):
    assert_same(GOLDEN / file)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def evil(tmp_path: Path) -> dict[str, tuple]:
    import os
    import shutil

    mark = tmp_path / "executed"
    return {
        "posix.system": (os.system, (f"touch {mark}",)),
        "shutil.copy": (shutil.copy, (__file__, str(mark))),
        "builtins.eval": (eval, (f"open({str(mark)!r}, 'w')",)),
        "torch.storage._load_from_bytes": (torch.storage._load_from_bytes, (b"",)),
        "builtins.getattr": (getattr, ("a", "upper")),
        "numpy.ndarray": (np.ndarray, ((2,),)),
        "collections.Counter": (collections.Counter, ("ab",)),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", list(evil(Path("."))))
def test_other_functions_are_refused_by_name_and_never_run(tmp_path, name, protocol):
    value = {"anyup": {"x": torch.ones(2)}, "cfg": Evil(*evil(tmp_path)[name])}
    path = save(tmp_path / "x.pth", value, pickle_protocol=protocol)
    name = name.replace("builtins.", "__builtin__.") if protocol == 2 else name
    with pytest.raises(ValueError, match=rf"mentions {name}, which is not plain data, and nothing in it was executed"):
        torch_file.read(path)
    assert not (tmp_path / "executed").exists()


class DictConfig(dict):
    """Stands for a configuration object of a training framework."""


def test_a_configuration_object_is_refused_with_the_way_out(tmp_path):
    path = save(tmp_path / "x.pth", {"anyup": {"x": torch.ones(2)}, "cfg": DictConfig(a=1)})
    with pytest.raises(ValueError, match=r"\.DictConfig, which is not plain data.*keep only the weights: torch\.save"):
        torch_file.read(path)


def archive(path: Path, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in records.items():
            file.writestr(f"archive/{name.replace('__', '/').replace('_pkl', '.pkl')}", data)
    return path


def plain(value) -> bytes:
    """Return the instructions that make a value."""
    return pickle.dumps(value, 2)[2:-1]


def sparse_keys(start: bytes, value: bytes, end: bytes) -> bytes:
    """Return a pickle with 4,097 keys of one hash."""
    keys = (plain(1 + (index << 1) * sys.hash_info.modulus) for index in range(1, 4098))
    return start + b"".join(key + value for key in keys) + end


def copies() -> bytes:
    """Return a pickle of 300 kB that makes 50,000 tuples of one list of 50,000 items."""
    return b"\x80\x02](" + b"N" * 50_000 + b"eq\x000" + b"ctorch\nSize\nq\x010" + b"h\x01h\x00\x85R" * 50_000 + b"."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n(X\x01\x00\x00\x00xtR.", "mentions os.system"),
        (b"(ios\nsystem\n.", "the instruction INST"),
        (b"(cos\nsystem\no.", "mentions os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "mentions os.system"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets attributes of a Global"),
        (b"\x80\x02]}b.", "sets attributes of a list"),
        (b"\x80\x02}(]K\x01u.", "a key that is a list"),
        (b"\x80\x02}]K\x01s.", "a key that is a list"),
        (b"\x80\x02K\x01K\x01R.", "a call of something that is no function"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "a call of the constant torch.float32"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "refers to something that is no storage"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02K\x01\x87.", "damaged"),
        (b"\x80\x02N", "damaged"),
        (b"", "damaged"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "damaged"),
        (b"\x80\x02]r\xff\xff\xff\x00.", "number 16777215 after 0"),
        (b"\x80\x02Np" + b"9" * 5000 + b"\n.", "4300 digits"),
        (sparse_keys(b"}(", b"N", b"u."), "more than 4096 numbers"),
        (sparse_keys(b"(", b"N", b"d."), "more than 4096 numbers"),
        (sparse_keys(b"c__builtin__\nset\n](", b"", b"e\x85R."), "more than 4096 numbers"),
        (sparse_keys(b"ccollections\nOrderedDict\n](", b"N\x86", b"e\x85R."), "more than 4096 numbers"),
        (sparse_keys(b"\x80\x04\x8f(", b"", b"\x90."), "more than 4096 numbers"),
        (sparse_keys(b"\x80\x04(", b"", b"\x91."), "more than 4096 numbers"),
        (copies(), "copies its contents over and over"),
    ],
)
def test_hand_made_pickles(tmp_path, program, message):
    with pytest.raises(ValueError, match=message):
        torch_file.read(archive(tmp_path / "x.pth", data_pkl=program))


def tensor_program(kind="FloatStorage", key="0", count=4, offset=0, shape=(2, 2), strides=(2, 1)) -> bytes:
    data = pickle.PROTO + b"\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n(("
    data += plain("storage") + f"ctorch\n{kind}\n".encode() + plain(key) + plain("cpu") + plain(count) + b"tQ"
    return data + plain(offset) + plain(shape) + plain(strides) + plain(False) + plain(None) + b"tR."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(offset=1), "needs number 4 of storage 0, which holds 4"),
        (dict(strides=(3, 1)), "needs number 4 of storage 0"),
        (dict(shape=(2**40, 2**40), strides=(2**40, 1)), "more elements than its storage 0, which holds 4"),
        (dict(shape=(2**62, 4), strides=(0, 0)), "more elements than its storage 0, which holds 4"),
        (dict(shape=(2, 3), strides=(1, 1)), "more elements than its storage 0, which holds 4"),
        (dict(offset=-1), "impossible strides"),
        (dict(strides=(-2, 1)), "impossible strides"),
        (dict(strides=(1,)), "impossible strides"),
        (dict(count=5), "storage 0 should have 20 bytes and has 16"),
        (dict(count=-1), "storage 0 should have -4 bytes"),
        (dict(key="1"), "record archive/data/1 is missing"),
        (dict(key="../data.pkl"), "is missing"),
        (dict(kind="QInt8Storage"), "mentions torch.QInt8Storage"),
        (dict(kind="DoubleStorage"), "should have 32 bytes"),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, change, message):
    path = archive(tmp_path / "x.pth", data_pkl=tensor_program(), data__0=np.arange(4, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(torch_file.read(path), [[0, 1], [2, 3]])
    archive(path, data_pkl=tensor_program(**change), data__0=bytes(16))
    with pytest.raises(ValueError, match=message):
        torch_file.read(path)


def test_other_files(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(bytes(257) + b"ustar" + bytes(250))
    with pytest.raises(ValueError, match=r"is a tar archive.*save it again with torch\.save"):
        torch_file.read(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="is no PyTorch checkpoint"):
        torch_file.read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is no PyTorch checkpoint"):
        torch_file.read(path)
    save(path, {"x": torch.ones(200)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        torch_file.read(path)
    with pytest.raises(ValueError, match="byte order is big"):
        torch_file.read(archive(path, data_pkl=b"N.", byteorder=b"big"))
    with pytest.raises(ValueError, match=r"0 records named data\.pkl"):
        torch_file.read(archive(path, other=b""))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="compressed"):
        torch_file.read(path)
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pth")


def test_damaged_files_give_a_value_error_and_nothing_else(tmp_path):
    """Bit flips and truncations, with a fixed seed."""
    path, draw = tmp_path / "x.pth", random.Random(0)
    torch_file.write(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float16)})
    good, refused = path.read_bytes(), 0
    for trial in range(600):
        bad = bytearray(good if trial % 3 else good[: draw.randrange(len(good))])
        for _ in range(draw.randrange(1, 4) if trial % 3 else 0):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path.write_bytes(bad)
        try:
            torch_file.read(path)
        except ValueError:
            refused += 1
    assert refused > 300


def legacy(path: Path, value) -> Path:
    """Save as PyTorch did before version 1.6."""
    return save(path, value, _use_new_zipfile_serialization=False)


def test_files_of_older_versions(tmp_path):
    base = torch.arange(120.0)
    tensors = {
        "whole": base.reshape(4, 5, 6),
        "shared": base[3:33:3].reshape(2, 5).t(),
        "parameter": torch.nn.Parameter(torch.randn(3).half()),
        "empty": base[:0],
        **{dtype: torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype)).t() for dtype in DTYPES[:12]},
    }
    path = legacy(tmp_path / "x.pth", tensors)
    assert_same(path)
    assert torch_file.read(path)["bool"].base is not None  # a view
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_same(legacy(tmp_path / "y.pth", module.state_dict()))
    assert torch_file.read(legacy(tmp_path / "z.pth", {"epoch": 3, "names": ["a"]})) == {"epoch": 3, "names": ["a"]}


@pytest.mark.parametrize("name", list(evil(Path("."))))
def test_functions_in_files_of_older_versions_never_run(tmp_path, name):
    path = legacy(tmp_path / "x.pth", {"anyup": {"x": torch.ones(2)}, "cfg": Evil(*evil(tmp_path)[name])})
    name = name.replace("builtins.", "__builtin__.")
    with pytest.raises(ValueError, match=rf"mentions {name}, which is not plain data, and nothing in it was executed"):
        torch_file.read(path)
    assert not (tmp_path / "executed").exists()


def test_damaged_files_of_older_versions(tmp_path):
    """Bit flips and truncations, with a fixed seed: ValueError and nothing else."""
    path, draw = tmp_path / "x.pth", random.Random(0)
    good = legacy(path, {"a": torch.ones(2, 3), "b": torch.zeros(3).half()}).read_bytes()
    start, refused = len(torch_legacy_file.MAGIC) + 1, 0
    for trial in range(900):
        bad = bytearray(good if trial % 3 else good[: draw.randrange(start, len(good))])
        for _ in range(draw.randrange(1, 4) if trial % 3 else 0):
            bad[draw.randrange(start, len(bad))] = draw.randrange(256)
        path.write_bytes(bad)
        try:
            torch_file.read(path)
        except ValueError:
            refused += 1
    assert refused > 500
    for count in (2**62, -1, 7):  # the file ends with the element counts and memory of its two storages
        path.write_bytes(good[: -(8 + 24 + 8 + 6)] + struct.pack("<q", count) + good[-(24 + 8 + 6) :])
        with pytest.raises(ValueError, match=r"x\.pth"):
            torch_file.read(path)
    path.write_bytes(good.replace(b"little_endian", b"liddle_endian"))
    with pytest.raises(ValueError, match="byte order is big"):
        torch_file.read(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_torch_reads_what_is_written(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {
        "a.b": rng.standard_normal((3, 4, 5)).astype(dtype),
        "scalar": np.array(1, dtype),
        "none": np.zeros((0, 2), dtype),
    }
    arrays["transposed"] = arrays["a.b"].T
    torch_file.write(tmp_path / "x.pth", arrays)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert isinstance(loaded, collections.OrderedDict)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert tuple(loaded[name].shape) == array.shape
        assert loaded[name].is_contiguous()
        assert as_bytes(loaded[name]) == array.tobytes()
    assert_same(tmp_path / "x.pth")


def test_written_storages_are_aligned_and_reproducible(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.float32), "b": np.arange(5, dtype=np.float32)}
    torch_file.write(tmp_path / "x.pth", arrays)
    torch_file.write(tmp_path / "y.pt", arrays)
    content = (tmp_path / "x.pth").read_bytes()
    assert content == (tmp_path / "y.pt").read_bytes()
    assert content.index(arrays["a"].tobytes()) % 64 == 0
    assert content.index(arrays["b"].tobytes()) % 64 == 0
    assert torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)["b"].tolist() == [0, 1, 2, 3, 4]


def test_types_without_a_storage_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no storage type for x \(<U1\)"):
        torch_file.write(tmp_path / "x.pth", {"x": np.array(["a"])})
