"""`python -m anyup_jax` is the command `anyup`; see `anyup_jax.cli`."""

import sys

from anyup_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m anyup_jax"))
