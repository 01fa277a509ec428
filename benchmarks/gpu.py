"""What the Triton kernels need on a GPU, by compiling them for one that is not there."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import subprocess
import tempfile

import torch
from rich.table import Table

from anyup_core.geometry import axis_window, plan_tiles
from anyup_torch.attention.triton import MAX_QUERIES
from benchmarks.tables import table_of

SIZES = {448: (32, 384), 896: (64, 768), 2048: (128, 1024)}  # side: keys a side, channels
TARGETS = {80: 163 << 10, 90: 227 << 10}  # compute capability: bytes of shared memory a block may have
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HEADS, HEAD_DIM = 4, 32


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes: bytes of shared memory a block, registers a thread, bytes spilled a thread."""

    kernel: str
    shared: int
    registers: int
    spills: int


def compile_size(side: int, dtype: torch.dtype, capability: int) -> list[Resources]:
    """Compile both kernels with the blocks used at one of SIZES."""
    from anyup_torch.attention.triton_kernels import blocks

    keys, channels = SIZES[side]
    axis = axis_window(side, keys, 0.1)
    tall, wide = plan_tiles(axis, axis, MAX_QUERIES)
    shape = blocks(tall.size * wide.size, HEAD_DIM, channels, dtype) | {"HEADS": HEADS, "HEAD_DIM": HEAD_DIM}
    return [_compile(name, TYPES[dtype], capability, tuple(shape.items())) for name in ("log_sum_exp", "average")]


@functools.cache
def _compile(name: str, dtype: str, capability: int, shape: tuple[tuple[str, int], ...]) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anyup_torch.attention import triton_kernels

    kernel = getattr(triton_kernels, name)
    types = {"sums": "*fp32", "row_bias": "*fp32", "col_bias": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("query", "key", "values", "out"), f"*{dtype}")
    types |= dict.fromkeys(("first_row", "first_col", "start_row", "start_col"), "*i32")
    constants = {key: value for key, value in shape if key in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*") or arg == "channels"
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_kernels.WARPS[name]}
    )
    assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        command = [assembler, "-v", f"-arch={arch}", path, "-o", path.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return Resources(name, compiled.metadata.shared, int(re.search(r"Used (\d+) registers", report)[1]), spills)


def gpu(rounds: int) -> Table:
    """Shared memory, registers and spills of the Triton kernels, compiled for sm_80 and sm_90 (nothing is timed)."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("Compiling the Triton kernels needs the package triton: pip install triton (Linux only).")
    title = "Triton kernels compiled ahead of time, on no GPU"
    table = table_of(title, "size", "dtype", "target", "kernel", "shared KB", "registers", "spilled bytes")
    for side in SIZES:
        for dtype, name in TYPES.items():
            for capability in TARGETS:
                for used in compile_size(side, dtype, capability):
                    row = (side, name, f"sm_{capability}", used.kernel, f"{used.shared / 1024:.1f}")
                    table.add_row(*map(str, (*row, used.registers, used.spills)))
    return table
