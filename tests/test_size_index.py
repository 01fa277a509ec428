"""The size index: rows for every kind of file, its text, restarts, processes, and the command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from train import size_index
from train.size_index import Row, build, main, read_index, write_index

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    Row("ant/broken.jpg", 0, -1, -1, -1),
    Row("ant/deep/gray.PNG", 0, 5, 9, 5),
    Row("ant/photo.jpg", 0, 30, 20, 20),
    Row("bee/turned.jpg", 1, 20, 30, 20),
    Row("dog/a\ttab.png", 3, 7, 7, 7),
]


def save(path: Path, width: int, height: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width), np.uint8)).save(path, **options)


def command(*args: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "train.size_index", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "photographs"
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    save(root / "ant/photo.jpg", 30, 20)
    save(root / "ant/deep/gray.PNG", 5, 9)
    save(root / "bee/turned.jpg", 30, 20, exif=turned)
    save(root / "dog/a\ttab.png", 7, 7)
    save(root / ".cache/hidden.png", 7, 7)
    save(root / "loose.png", 7, 7)
    (root / "ant/broken.jpg").write_bytes(b"no image")
    (root / "ant/notes.txt").write_text("no image")
    (root / "cow").mkdir()  # a class without images still counts
    return root


@pytest.fixture
def many(tmp_path):
    root = tmp_path / "many"
    for i in range(3 * size_index.CHUNK):
        save(root / f"class{i % 3}" / f"{i}.png", 1 + i, 50)
    return root


def test_values(root):
    messages = []
    assert build(root, None, 1, messages.append) == ROWS
    assert read_index(root / "size_index.tsv") == ROWS
    (message,) = messages
    assert message == (
        f"{root / 'size_index.tsv'}: 5 images, 1 of them unreadable; 3 left out: hidden files and "
        "folders (1), images outside the class folders (1), files that are no images (1)"
    )
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == ["loose.png", "size_index.tsv"]


def test_text(tmp_path):
    path = tmp_path / "index.tsv"
    write_index(path, reversed(ROWS))
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("# ")] == lines[:2]
    assert lines[1] == "# rel_path\tlabel\twidth\theight\tmin_side"
    assert lines[2] == "ant/broken.jpg\t0\t-1\t-1\t-1"
    assert lines[4] == "ant/photo.jpg\t0\t30\t20\t20"
    assert read_index(path) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == ["index.tsv"]


@pytest.mark.parametrize("columns", ["", "# rel_path\tlabel\twidth\theight\tmin_side\n", "\t".join(Row._fields) + "\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_reads_the_format_of_the_reference(tmp_path, columns, newline):
    path = tmp_path / "index.tsv"
    text = f"# dataset: ImageNet\n# split: train\n{columns}n02/b.JPEG\t1\t500\t375\t375\n\nn01/a.JPEG\t0\t-1\t-1\t-1\n"
    path.write_bytes(text.replace("\n", newline).encode())
    assert read_index(path) == [Row("n02/b.JPEG", 1, 500, 375, 375), Row("n01/a.JPEG", 0, -1, -1, -1)]


@pytest.mark.parametrize(
    "line", ["a/b.png\t0\t5\t6", "a/b.png\t0\t50\t60\t5", "a/b.png 0 5 6 5", "a\tx\t5\t6\t5", "\t0\t5\t6\t5"]
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "index.tsv"
    path.write_text(f"# size index\na/a.png\t0\t5\t6\t5\n{line}")
    with pytest.raises(ValueError, match=r"^Line 3 of .*index\.tsv "):
        read_index(path)


def test_file_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"latin\xe9.png")
    with contextlib.suppress(OSError):
        save(tmp_path / "a" / name, 4, 3)
    if not (tmp_path / "a" / name).exists():
        pytest.skip("the file system takes UTF-8 names only")
    rows = build(tmp_path, None, 1, print)
    assert rows == read_index(tmp_path / "size_index.tsv") == [Row(f"a/{name}", 0, 4, 3, 3)]


def test_every_real_folder_is_visited_once(root, tmp_path):
    (root / "ant/loop").symlink_to(".")
    (root / "ant/other").symlink_to(root / "bee")
    (root / "bee/loop").symlink_to(root)
    (root / "gnu").symlink_to(root / "ant")  # a class without images
    save(tmp_path / "elsewhere/7.png", 7, 7)
    (root / "dog/linked").symlink_to(tmp_path / "elsewhere")
    assert build(root, None, 1, print) == [*ROWS, Row("dog/linked/7.png", 3, 7, 7, 7)]


def test_hidden_photographs_are_left_out(root):
    for name in (".ipynb_checkpoints/photo.jpg", "._photo.jpg", "__MACOSX/photo.jpg", ".git/photo.jpg"):
        save(root / "ant" / name, 7, 7)
    save(root / "__MACOSX/ant/photo.jpg", 7, 7)  # no class either
    messages = []
    assert build(root, None, 1, messages.append) == ROWS
    assert "hidden files and folders (6)" in messages[0]


def test_pipes_and_devices_are_unreadable(root):
    os.mkfifo(root / "bee/pipe.png")
    (root / "bee/zero.png").symlink_to("/dev/zero")
    rows = build(root, None, 1, print)
    assert [row for row in rows if row not in ROWS] == [
        Row("bee/pipe.png", 1, -1, -1, -1), Row("bee/zero.png", 1, -1, -1, -1)
    ]  # fmt: skip


def test_goes_on_after_an_interruption(root, tmp_path, monkeypatch):
    out = tmp_path / "index.tsv"
    partial = tmp_path / "index.tsv.partial"
    measured = []
    measure = size_index._measure

    def stop_at_the_fourth(path):
        measured.append(Path(path).name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(path)

    monkeypatch.setattr(size_index, "_measure", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        build(root, out, 1, print)
    assert not out.exists()
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as file:
        file.write("bee/turned.jpg\t1\t2")  # torn in the middle of the width
    messages = []
    measured[:] = [""] * 4
    assert build(root, out, 1, messages.append) == read_index(out) == ROWS
    assert measured[4:] == ["broken.jpg", "turned.jpg", "a\ttab.png"]  # the unreadable one is tried again
    assert "2 of 5" in messages[0]
    assert not partial.exists()


def test_a_partial_file_of_another_folder_or_class_is_not_used(root, tmp_path):
    partial = tmp_path / "index.tsv.partial"
    lines = "ant/photo.jpg\t0\t1\t1\t1\n"
    partial.write_text(f"# {tmp_path}\n{lines}")
    assert build(root, tmp_path / "index.tsv", 1, print) == ROWS
    partial.write_text(f"# {root}\nant/photo.jpg\t2\t1\t1\t1\ngone/photo.jpg\t0\t1\t1\t1\n\0\0\n")
    assert build(root, tmp_path / "index.tsv", 1, print) == ROWS


def test_parallel_equals_serial(many, tmp_path):
    serial = build(many, tmp_path / "serial.tsv", 1, print)
    assert len(serial) == 3 * size_index.CHUNK
    assert build(many, tmp_path / "parallel.tsv", 2, print) == serial
    assert (tmp_path / "parallel.tsv").read_bytes() == (tmp_path / "serial.tsv").read_bytes()


def test_command(many):
    done = command(many, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{many / 'size_index.tsv'}: 96 images, 0 of them unreadable\n"
    assert read_index(many / "size_index.tsv")[1] == Row("class0/12.png", 0, 13, 50, 13)


WAITS_FOR_98 = """
import time
import PIL.Image
def wait(file, open=PIL.Image.open):
    time.sleep(60 * str(file).endswith("98.png"))
    return open(file)
PIL.Image.open = wait
"""


def test_a_killed_command_goes_on(many, tmp_path):
    """Its processes end with it, which closes the pipe that they share with it."""
    save(many / "class2" / "98.png", 5, 5)
    (tmp_path / "sitecustomize.py").write_text(WAITS_FOR_98)
    out = tmp_path / "index.tsv"
    argv = [sys.executable, "-m", "train.size_index", str(many), "--workers", "2", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    partial, deadline = tmp_path / "index.tsv.partial", time.monotonic() + 40
    while not (partial.exists() and partial.read_text().count("\n") > 64) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    assert run.communicate(timeout=20) == ("", None)
    (many / "class2" / "98.png").unlink()
    done = command(many, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout
    assert len(read_index(out)) == 96


def test_refusals(root, tmp_path, capsys):
    def refused(*args: object) -> str:
        assert main([*map(str, args)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    empty = tmp_path / "empty"
    save(empty / "loose.png", 7, 7)
    for args, named in (
        ([tmp_path / "absent"], f"ROOT={tmp_path / 'absent'}"),
        ([empty], f"ROOT={empty}"),
        ([root, "--workers", 0], "workers=0"),
        ([root, "--out", tmp_path / "absent" / "index.tsv"], str(tmp_path / "absent")),
        ([root, "--out", root], str(root)),
    ):
        assert named in refused(*args)
    save(root / "ant" / "two\nlines.png", 7, 7)
    assert "two\\nlines.png" in refused(root)


def test_refusal_as_a_user_sees_it(tmp_path):
    done = command(tmp_path / "absent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: ROOT={tmp_path / 'absent'} is no folder")
    assert done.stderr.count("\n") == 1
