"""How close the outputs are to the reference's, where its cases lie beside the checkout."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks.tables import table_of
from parity_tests.golden import CASES, GOLDEN


def accuracy(rounds: int) -> Table:
    """Largest error over every reference case, and the RMS against float64 in units of the reference's own."""
    import anyup_jax.attention
    import anyup_torch.attention

    if not CASES:
        raise FileNotFoundError(f"The reference cases are not there: {GOLDEN} does not exist.")
    table = table_of("against the reference's outputs", "", "max |error|", "RMS to float64 / the reference's")
    backends = {"jax": anyup_jax.attention.PORTABLE, "torch": anyup_torch.attention.PORTABLE}
    for framework, names in backends.items():
        for backend in names:
            errors = {
                name: np.abs(output(framework, backend, name) - golden(name))
                for name in CASES
                if "image" in CASES[name]
            }
            exact = load_file(GOLDEN / "square_c384_double.safetensors")["output_float64_rounded"].astype(np.float64)
            ours, theirs = output(framework, backend, "square_c384"), golden("square_c384")
            ratio = np.sqrt(np.mean((ours - exact) ** 2) / np.mean((theirs - exact) ** 2))
            largest = max(error.max() for error in errors.values())
            table.add_row(f"{framework} {backend}, {len(errors)} cases", f"{largest:.1e}", f"{ratio:.2f}")
    return table


def golden(name: str) -> np.ndarray:
    return load_file(GOLDEN / f"{name}.safetensors")["output"]


def output(framework: str, backend: str, name: str) -> np.ndarray:
    """Return the model's output for a reference case, NCHW."""
    case, arrays = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    fields = {field: case[field] for field in ("num_heads", "window_ratio")} | {
        "window": case["variant"],
        "backend": backend,
    }
    size = case["output_size"] and tuple(case["output_size"])
    if framework == "torch":
        import torch

        import anyup_torch

        model = anyup_torch.from_pretrained(GOLDEN / case["weights"], **fields)
        with torch.inference_mode():
            return model(*(torch.from_numpy(arrays[key]) for key in ("image", "features")), output_size=size).numpy()
    import anyup_jax

    model = anyup_jax.from_pretrained(GOLDEN / case["weights"], **fields)
    image, features = (arrays[key].transpose(0, 2, 3, 1) for key in ("image", "features"))
    return np.asarray(anyup_jax.upsample(model, image, features, size)).transpose(0, 3, 1, 2)
