"""What holds for all tests: the checkout is importable, no chip is looked for, and a program is compiled once.

Compiled programs are kept on disk, for all workers and the processes that they start, but not in memory.
"""

import atexit
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from tests import annotations

annotations.install(Path(__file__).parent)

# for processes that tests start in other folders: `train`, `convert` and `evaluation` are not installed
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)

if "ANYUP_COMPILATION_CACHE" not in os.environ:  # workers of pytest-xdist find that of the process that starts them
    os.environ["ANYUP_COMPILATION_CACHE"] = tempfile.mkdtemp(prefix="anyup-compiled-")
    atexit.register(shutil.rmtree, os.environ["ANYUP_COMPILATION_CACHE"], ignore_errors=True)

# where the TPU's compiler is installed but no TPU is, looking for one takes time and writes to stderr
if not Path("/dev/accel0").exists() and not Path("/dev/vfio/0").exists():
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as for users: the function itself has to refuse what does not fit."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _refusals_are_unchecked(request: pytest.FixtureRequest) -> None:
    if "pytest.raises(" in inspect.getsource(request.function):
        request.getfixturevalue("unchecked")


@pytest.fixture(autouse=True, scope="session")
def _programs_are_kept_on_disk() -> None:
    from anyup_jax import devices  # now that its annotations are checked, too

    devices.keep_compiled()


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go() -> Iterator[None]:
    """The programs of one file are of no use to the next, and take gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
