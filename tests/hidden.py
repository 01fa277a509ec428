"""Programs in which packages are not installed."""

PROGRAM = """
import sys

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden)
"""


def hide(*names: str) -> str:
    """Return a program that begins without these top-level packages.

    `sys.modules[name] = None` would do for an import statement, but einops looks for the frameworks' names in there.
    """
    return PROGRAM.format(names=names)
