"""The reference's inputs and outputs, beside the checkout in ../shared: cases, weights, photographs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, DATA = SHARED / "golden", SHARED / "data"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference cases: {GOLDEN} does not exist")
needs_photos = pytest.mark.skipif(not DATA.is_dir(), reason=f"no photographs: {DATA} does not exist")
CASES: dict[str, dict] = json.loads((GOLDEN / "cases.json").read_text()) if GOLDEN.is_dir() else {}
