"""Compile every kernel for an H100, on any machine: ``python -m tests.runtime.ops.compile_for_hopper``.

Prints one line of JSON a kernel: its name, the bytes it spills, its shared memory, and which instructions of
Hopper are in it. No GPU is needed: a driver that only says what the target is stands in for the real one.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import moec.runtime.ops  # noqa: F401
from moec.runtime.ops.triton.gate import gate
from moec.runtime.ops.triton.launch import compile_only
from moec.runtime.ops.triton.moe_ffn import backward, forward

PACKED = "lambda h: silu(h[..., :256]) * h[..., 256:]"
GELU = "lambda h: gelu(h)"


class _Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def layer(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, formula: str, packed: int,
    dtype: torch.dtype, train: bool, bias: bool = False,
) -> None:  # fmt: skip
    """Start all kernels of one layer, forward and, to `train`, backward."""
    x = torch.empty(tokens, width, dtype=dtype)
    _, weights, _, order, counts = gate(
        x, torch.empty(experts, width, dtype=dtype), None, top_k, "normalized"
    )
    matrices = [
        torch.empty(experts, packed * hidden, width, dtype=dtype),
        torch.empty(experts, width, hidden, dtype=dtype),
    ]
    biases = [torch.empty(m.shape[:2], dtype=dtype) if bias else None for m in matrices]
    arguments = (x, weights, order, counts, matrices, biases, formula)
    _, ups = forward(*arguments, None, None, train)
    if train:
        backward(x, *arguments, ups, [True] * 4)


def describe(kernel: Any) -> dict[str, Any]:
    """What ended up in the machine code."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    text = kernel.asm["ptx"]
    return {
        "name": kernel.name,
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": kernel.metadata.shared,
        "wgmma": "wgmma.mma" in text,
        "mma": "mma.sync" in text,
        "ahead": "cp.async" in text,
        "wide": "ld.global.v4" in text or ".v4.b32" in text,
    }


def main() -> None:
    """Compile two layers for training, and decoding of one token and of eight."""
    driver.set_active(_Hopper())
    with compile_only() as kernels:
        layer(40960, 768, 256, 128, 8, PACKED, 2, torch.bfloat16, train=True)
        layer(8192, 1024, 4096, 32, 1, GELU, 1, torch.bfloat16, train=True, bias=True)
        layer(1, 1024, 4096, 64, 1, GELU, 1, torch.bfloat16, train=False, bias=True)
        layer(8, 1024, 4096, 64, 1, GELU, 1, torch.float16, train=False)
    for kernel in kernels:
        print(json.dumps(describe(kernel)))


if __name__ == "__main__":
    main()
