"""How tests check annotations (`--jaxtyping-packages` in pyproject.toml): by beartype, where an int is a float too."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
