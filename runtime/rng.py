"""The random states that dropout and routing noise draw from, saved, restored and borrowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's default generators for a program on `device`: `cpu`, and `cuda` where it is
    one.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_states` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_of(seed: int, place: int) -> int:
    """The seed of the `place`-th of several streams of draws; the first has `seed` itself."""
    return (seed + place * 0x9E3779B97F4A7C15) % 2**63


@contextmanager
def borrowed_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, torch's generators are as before afterwards."""
    before = rng_states(device)
    try:
        yield
    finally:
        set_rng_states(before, device)
