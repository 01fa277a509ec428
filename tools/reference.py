"""python -m tools.reference: build the API reference of the wheel's packages in outputs/reference, as HTML.

Every module is imported and every public name resolved; a warning, of a name or an annotation that leads nowhere, is an
error.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

SPECIFICATIONS = (
    *("anyup_core", "anyup_jax", "anyup_torch"),
    *("!.*__main__", "!.*triton_kernels"),  # the command; what needs Triton, which is there on Linux only
)


def main(folder: str = "outputs/reference") -> int:
    warnings.simplefilter("error")
    for name in pdoc.extract.walk_specs(SPECIFICATIONS):
        module = pdoc.extract.load_module(name)
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))  # pdoc does not ask a module's __getattr__
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*SPECIFICATIONS, output_directory=Path(folder))
    print(f"{folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
