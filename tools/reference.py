"""python -m tools.reference: build the API reference of the wheel's packages in outputs/reference, as HTML.

Every module is imported and every public name resolved; a warning, of a name or an annotation that leads nowhere, is an
error.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("anyup_core", "anyup_jax", "anyup_torch")
LEFT_OUT = ("__main__", "triton_kernels")  # the command; what needs Triton, which is there on Linux only


def specifications() -> list[str]:
    """Return what pdoc is to document: it leaves out the modules that a package's `__all__` does not name."""
    chosen, reached = [], set()
    for package in PACKAGES:
        below = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        for name in (package, *(module.name for module in below)):
            if name not in reached and not name.endswith(LEFT_OUT):
                chosen.append(name)
                reached.update(pdoc.extract.walk_specs([name]))
    return [*chosen, *(f"!.*{name}" for name in LEFT_OUT)]


def main(folder: str = "outputs/reference") -> int:
    warnings.simplefilter("error")
    # pdoc evaluates the types of a NamedTuple's fields outside of its module
    warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef")
    chosen = specifications()
    for name in pdoc.extract.walk_specs(chosen):
        module = pdoc.extract.load_module(name)
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))  # pdoc does not ask a module's __getattr__
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*chosen, output_directory=Path(folder))
    print(f"{folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
