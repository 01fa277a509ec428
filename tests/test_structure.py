"""The layout's promises: nothing imports what stands above it (the table of CONTRIBUTING.md), no path of a machine."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def table(heading: str) -> dict[str, list[str]]:
    """Return a table of CONTRIBUTING.md, the one whose first column is `heading`: first cell -> the other cells."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


FLOORS = table("package")
OURS = {package: cells[1].split() for package, cells in FLOORS.items()}
FORBIDDEN = {package: cells[2].split() for package, cells in FLOORS.items()}
BY_NAME = {module: cells[0].split() for module, cells in table("module").items()}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules(package: str) -> dict[str, Path]:
    return {module_of(path): path for path in sorted((ROOT / package).rglob("*.py"))}


MODULES = {name: path for package in FLOORS for name, path in modules(package).items()}


@functools.cache
def imports(module: str) -> set[str]:
    """Return the modules that a module imports, anywhere in it; a package's names count where they are modules.

    `import_module` takes a literal, or an entry or the values of a literal dictionary or tuple of the same file.
    """
    tree = ast.parse(MODULES[module].read_text())
    literals = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            names.add(node.module or "")
            names |= {full for alias in node.names if (full := f"{node.module}.{alias.name}") in MODULES}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= set(dynamic(node.args[0], literals, f"{module}:{node.lineno}"))
    return names


def dynamic(argument: ast.expr, literals: dict[str, ast.expr], place: str) -> Iterator[str]:
    """Yield what a dynamic import may name."""
    match argument:
        case ast.Constant(value=str() as name):
            yield name
        case ast.Subscript(value=ast.Name(id=name)) if isinstance(values := literals.get(name), ast.Dict):
            for value in values.values:
                assert isinstance(value, ast.Constant), f"{place}: {name} must map to literal names"
                yield str(value.value)
        case _:
            pytest.fail(f"{place} imports {ast.unparse(argument)}; give a literal, or an entry of a literal table.")


def reached(module: str) -> dict[str, list[str]]:
    """Return every module that importing one of ours can lead to -> the way there, but for the named exceptions."""
    ways = {module: [module]}
    queue = [module]
    while queue:
        current = queue.pop()
        parents = (".".join(current.split(".")[:n]) for n in range(1, current.count(".") + 1))
        for name in sorted({*imports(current), *parents} - set(BY_NAME.get(current, ()))):
            if name not in ways:
                ways[name] = [*ways[current], name]
                if name in MODULES:
                    queue.append(name)
    return ways


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("package", FLOORS)
def test_nothing_imports_what_stands_above(package: str) -> None:
    allowed = {package, *OURS[package]}
    found = {module: reached(module) for module in modules(package)}
    assert found
    upward = {
        " -> ".join(way)
        for ways in found.values()
        for name, way in ways.items()
        if top(name) in {*FLOORS, "tests", "parity_tests", "examples", "hubconf"} - allowed
    }
    assert upward == set()
    forbidden = {
        " -> ".join(way) for ways in found.values() for name, way in ways.items() if top(name) in FORBIDDEN[package]
    }
    assert forbidden == set()


def test_what_users_ask_for_by_name_is_imported_there() -> None:
    assert BY_NAME
    for module, names in BY_NAME.items():
        assert set(names) <= imports(module), module


def test_the_floors_of_the_table_are_all_there_are() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "parity_tests"} == set(FLOORS)


BLOCKED = """
import importlib, sys
for name in sys.argv[1].split():
    sys.modules[name] = None
for name in sys.argv[2].split():
    importlib.import_module(name)
"""


@pytest.mark.parametrize("package", ["anyup_core", "anyup_jax", "anyup_torch"])
def test_every_module_is_imported_with_the_forbidden_ones_blocked(package: str) -> None:
    names = [name for name in modules(package) if not name.endswith("__main__")]
    blocked = {*FORBIDDEN[package], *FLOORS} - {package, *OURS[package]}
    command = [sys.executable, "-c", BLOCKED, " ".join(sorted(blocked)), " ".join(names)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr


AT_ONCE = {"anyup_core", "numpy", "jaxtyping", "ml_dtypes", "safetensors", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", modules("anyup_core"))
def test_the_core_imports_little_at_once(module: str) -> None:
    """Pillow, rich, TensorStore and their like are imported by the functions that need them."""
    tree = ast.parse(MODULES[module].read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {top(name) for name in names} <= AT_ONCE


def test_mirrored_classes_stand_in_the_same_order() -> None:
    for name in ("layers", "model"):
        jax_side, torch_side = (
            re.findall(r"^class (\w+)", (ROOT / package / f"{name}.py").read_text(), re.MULTILINE)
            for package in ("anyup_jax", "anyup_torch")
        )
        shared = set(jax_side) & set(torch_side)
        assert len(shared) >= 3
        assert [c for c in jax_side if c in shared] == [c for c in torch_side if c in shared]


def test_no_machine_path() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(rb"/(work|root|home)/[a-z]")
    tracked = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(tracked) > 40
    assert [name for name in tracked if pattern.search((ROOT / name).read_bytes())] == []


@pytest.mark.parametrize(("package", "module"), [("anyup_jax", "visualize"), ("anyup_torch", "encoders")])
def test_modules_are_attributes(package: str, module: str) -> None:
    program = f"import {package}; print({package}.{module}.__name__); {package}.nothing"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip().endswith(f".{module}")
    assert "AttributeError" in run.stderr
    assert "nothing" in run.stderr


HELPS = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, name
    print("helped", name)
"""


def test_every_command_helps_where_docstrings_are_left_out() -> None:
    commands = [
        name.removesuffix(".__main__")
        for name, path in MODULES.items()
        if name.endswith("__main__")
        or ('"__main__"' in (text := path.read_text()) and ("argparse" in text or "@hydra" in text))
    ]
    assert {"anyup_jax", "convert", "train.run", "evaluation.run", "train.size_index"} <= set(commands)
    words = [sys.executable, "-OO", "-c", HELPS, *commands]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("helped")] == [f"helped {x}" for x in commands]
