"""`moec calibrate`: this machine as a hardware file."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console

from moec.calibration.calibrate import FULL, QUICK, calibrate
from moec.calibration.written import write
from moec.cost.machine.hardware import Hardware
from moec.errors import MoecError

BUSY = 1.1


def run_calibrate(out: str, threads: int, ranks: int, quick: bool) -> None:
    """Measure, write the file, and say what was found and how far it can be trusted."""
    path, console = Path(out), Console(stderr=True)
    _require_place(path, threads)
    words = f"moec calibrate --threads {threads} --ranks {ranks}" + " --quick" * quick
    begin = time.perf_counter()
    hardware = calibrate(
        threads=threads,
        ranks=ranks,
        effort=QUICK if quick else FULL,
        command=words,
        told=lambda what: console.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/]  {what}"),
    )
    write(hardware, path)
    print(summary(hardware, path, time.perf_counter() - begin))


def summary(hardware: Hardware, path: Path, seconds: float) -> str:
    """What a calibration found, in a few lines."""
    device = hardware.device
    assert device.measured is not None
    about = device.measured.about
    lines = [
        f"{path}: {about.machine}, {about.threads} thread{'s' * (about.threads > 1)}, in {seconds:.0f} s",
        f"products   {device.peak['float32'] / 1e9:.0f} GFLOP/s in float32",
        f"memory     {device.bandwidth / 1e9:.1f} GB/s read and written",
        f"operators  {len(device.measured.operators)} kinds",
    ]
    if hardware.per_node > 1:
        link = hardware.inside
        lines.append(f"gloo       {link.latency * 1e6:.0f} µs, {link.bandwidth / 1e9:.2f} GB/s")
    if about.wall_over_busy > BUSY:
        lines.append(
            f"The machine was busy: the clock went {about.wall_over_busy:.2f} times as fast as this process. "
            "Messages and times of several threads are too long; run it again when nothing else runs."
        )
    return "\n".join(lines)


def _require_place(path: Path, threads: int) -> None:
    if path.suffix != ".toml":
        raise MoecError("--out", f"{path}", "a file that ends in .toml", f"{path}.toml")
    if path.is_dir():
        raise MoecError("--out", f"the folder {path}", "a file that ends in .toml")
    cores = os.cpu_count() or 1
    if threads > cores:
        raise MoecError("--threads", f"{threads} threads", f"at most {cores}, the cores here", str(cores))
