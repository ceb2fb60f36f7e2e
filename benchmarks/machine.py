"""What a measurement was taken on, and the two limits it can be held against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.race import race

_PACKAGES = ("torch", "transformers", "deepspeed", "tutel", "moec")


def describe() -> dict[str, object]:
    """Processor, cores, threads, memory, versions, commit, and how busy the machine was at the start."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def limits(rounds: int = 9) -> dict[str, float]:
    """Measured peaks of this machine: products in GFLOP/s by library and dtype, memory in GB/s.

    `gflops_a_busy_core`: products by the time that processors were busy with them, whoever else used them.
    """
    size = 2048
    x, w, out = (torch.randn(size, size) for _ in range(3))
    products = {"mm": lambda: torch.mm(x, w.t(), out=out)}
    if torch.backends.mkldnn.is_available():
        products["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    half, half_w = x.bfloat16(), w.bfloat16()
    products["bfloat16"] = lambda: torch.mm(half, half_w.t())
    timings = race(products, rounds)
    half_peak = timings.pop("bfloat16")
    flops = {name: 2 * size**3 / timing.best / 1e9 for name, timing in timings.items()}
    busy = min(min(timing.busy) for timing in timings.values())
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    moves = race({"read": source.sum, "copy": lambda: target.copy_(source)}, rounds)
    return {
        **{f"gflops_{name}": round(value, 1) for name, value in flops.items()},
        "gflops": round(max(flops.values()), 1),
        "gflops_float32": round(max(flops.values()), 1),
        "gflops_bfloat16": round(2 * size**3 / half_peak.best / 1e9, 1),
        "gflops_a_busy_core": round(2 * size**3 / busy / 1e9, 1),
        "read_gb_per_s": round(source.nbytes / moves["read"].best / 1e9, 1),
        "copy_gb_per_s": round(2 * source.nbytes / moves["copy"].best / 1e9, 1),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
