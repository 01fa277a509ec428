"""The reference's inputs and outputs, beside the checkout in ../shared: cases, weights, photographs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, DATA = SHARED / "golden", SHARED / "data"
UPSAMPLERS = SHARED / "golden_upsamplers"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference cases: {GOLDEN} does not exist")
needs_photos = pytest.mark.skipif(not DATA.is_dir(), reason=f"no photographs: {DATA} does not exist")
needs_upsamplers = pytest.mark.skipif(
    not UPSAMPLERS.is_dir(), reason=f"no reference cases: {UPSAMPLERS} does not exist"
)
CASES: dict[str, dict] = json.loads((GOLDEN / "cases.json").read_text()) if GOLDEN.is_dir() else {}
UPSAMPLER_CASES: dict[str, dict] = json.loads((UPSAMPLERS / "cases.json").read_text()) if UPSAMPLERS.is_dir() else {}


def upsampler_settings(case: dict) -> dict:
    """Return the settings of an upsampler that its weights do not tell."""
    if case["method"] == "naf":
        return {"num_heads": case["heads_attn"], "kernel_size": case["kernel_size"]}
    return {"num_heads": case["num_heads"]} if case["method"] == "jafar" else {}
