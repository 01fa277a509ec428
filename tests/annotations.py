"""How tests check annotations: by beartype, at every call of the product, where an int is a float too."""

from collections.abc import Iterator
from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = ("anyup_core", "anyup_jax", "anyup_torch", "convert", "train", "evaluation", "tools")
LEFT_OUT = "anyup_torch.attention.triton_kernels"  # Triton compiles the functions' text

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def modules(root: Path) -> Iterator[str]:
    """Yield the modules to check; naming a package checks all that is in it, so those around LEFT_OUT are not named."""
    for path in (path for package in PACKAGES for path in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if not f"{LEFT_OUT}.".startswith(f"{name}."):
            yield name


def install(root: Path) -> None:
    install_import_hook(list(modules(root)), f"{__name__}.check")
