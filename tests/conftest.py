"""Programs are compiled in haste here; `parity_tests` compile as users do."""

from collections.abc import Iterator

import jax
import pytest

VARIABLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_haste() -> Iterator[None]:
    """Leave the optimisation of machine code out, here and in processes: it takes longer than small programs run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        jax.config.update(VARIABLE.lower(), True)
        yield
    jax.config.update(VARIABLE.lower(), False)
