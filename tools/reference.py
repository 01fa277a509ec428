"""python -m tools.reference: build the API reference of the wheel's packages in outputs/reference, as HTML.

Every module is imported and every public name resolved; a warning, of a name or an annotation that leads nowhere, is an
error.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

PACKAGES = ("anyup_core", "anyup_jax", "anyup_torch")
LEFT_OUT = ("__main__", "triton_kernels")  # the command; needs Triton, which is there on Linux only


def main(folder: str = "outputs/reference") -> int:
    warnings.simplefilter("error")
    for package in PACKAGES:
        found = [
            package,
            *(x.name for x in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")),
        ]
        for name in found:
            if name.rpartition(".")[2] in LEFT_OUT:
                continue
            module = importlib.import_module(name)
            for public in getattr(module, "__all__", ()):
                setattr(module, public, getattr(module, public))  # pdoc does not ask a module's __getattr__
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*PACKAGES, *(f"!.*{name}" for name in LEFT_OUT), output_directory=Path(folder))
    print(f"{folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
