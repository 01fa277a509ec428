"""The devices that jax computes on."""

from __future__ import annotations

import jax


def check_devices() -> None:
    """Raise OSError unless jax finds a device of the platforms that it may use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of CUDA without its plugin, jax asserts without a message
        platforms = getattr(jax.config, "jax_platforms", None) or ""
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        raise OSError(
            f"jax finds no device with JAX_PLATFORMS={platforms}{reason}; unset it to compute on what there is, or "
            "install jax for that platform."
        ) from error
