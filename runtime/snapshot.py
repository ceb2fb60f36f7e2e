"""The state of a training run as tensors by name, and back into a live program and optimizer, bit for bit.

Of several ranks each hands in its share, in terms of whole tensors, so a snapshot fits any mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moec.errors import ArtifactError, TrainError, nearest
from moec.runtime.holding import Holding, Part
from moec.runtime.optimizer import STEPS, Optimizer
from moec.runtime.parts import PartReader
from moec.runtime.rng import rng_states, set_rng_states
from moec.runtime.trainable import Trainable

#: The files of a training checkpoint.
PARAMETERS, BUFFERS, OPTIMIZER, RANDOM = "parameters", "buffers", "optimizer", "random"


def take_snapshot(program: Trainable, optimizer: Optimizer, holding: Holding) -> dict[str, dict[str, Part]]:
    """Everything that the next step depends on, apart from data and settings; weights are not copied.

    Raises `TrainError`, naming the tensor, on every rank when a weight is infinite or not a number.
    """
    weights: dict[str, dict[str, Tensor]] = {
        PARAMETERS: dict(program.named_parameters()),
        BUFFERS: dict(program.named_buffers()),
    }
    with holding.ranks.together():
        _require_finite(weights[PARAMETERS])
    saved_here = {name for group in weights.values() for name in group if holding.is_saved_here(name)}
    parts = {
        stem: {name: holding.part(name, tensor) for name, tensor in group.items() if name in saved_here}
        for stem, group in weights.items()
    }
    states = {
        f"{name}/{key}": Part.whole(value) if key == STEPS else holding.part(name, value)
        for name, key, value in optimizer.state(saved_here)
        if key != STEPS or holding.is_first_part(name)
    }
    random = {kind: Part.whole(state) for kind, state in rng_states(holding.ranks.device).items()}
    return {**parts, OPTIMIZER: states, RANDOM: random}


def restore_snapshot(path: Path, program: Trainable, optimizer: Optimizer, holding: Holding) -> None:
    """Put a snapshot back, in place, from the files in `path`, which must be whole; random states aside.

    Raises `ArtifactError` before changing anything when it does not fit.
    """
    reader = PartReader(path)
    live: dict[str, Mapping[str, Tensor]] = {
        PARAMETERS: dict(program.named_parameters()),
        BUFFERS: dict(program.named_buffers()),
    }
    parts = {
        stem: {name: holding.part(name, tensor.detach()) for name, tensor in group.items()}
        for stem, group in live.items()
    }
    for stem, group in parts.items():
        _require_same_tensors(path, stem, group, reader.tensors(stem))
    for group in parts.values():
        reader.read(group)
    _restore_optimizer(reader, live[PARAMETERS], optimizer, holding)


def restore_random(path: Path, holding: Holding) -> None:
    """Put back the random states that this rank saved in `path`, on the same mesh."""
    ranks = holding.ranks
    name = RANDOM if ranks.world == 1 else f"{RANDOM}-{ranks.rank:05d}"
    set_rng_states(load_file(path / f"{name}.safetensors"), ranks.device)


def _restore_optimizer(
    reader: PartReader, parameters: Mapping[str, Tensor], optimizer: Optimizer, holding: Holding
) -> None:
    saved = reader.tensors(OPTIMIZER)
    keys: dict[str, list[str]] = {}
    for path in saved:
        name, key = path.rsplit("/", 1)
        keys.setdefault(name, []).append(key)

    def read(name: str, key: str) -> Tensor:
        shape, dtype = saved[f"{name}/{key}"]
        like = parameters[name]
        made = torch.empty(shape if key == STEPS else like.shape, dtype=dtype, device=like.device)
        part = Part.whole(made) if key == STEPS else holding.part(name, made)
        reader.read({f"{name}/{key}": part})
        return made

    optimizer.restore(keys, read)


def _require_finite(parameters: Mapping[str, Tensor]) -> None:
    for name, tensor in parameters.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainError(name, "weights that are infinite or not numbers", "finite weights to save")


def _require_same_tensors(
    path: Path, stem: str, live: Mapping[str, Part], saved: Mapping[str, tuple[Any, torch.dtype]]
) -> None:
    where = str(path / f"{stem}.safetensors")
    for name in sorted(live.keys() ^ saved.keys()):
        found, others = (f"no tensor '{name}'", saved) if name in live else (f"a tensor '{name}'", live)
        raise ArtifactError(where, found, "the program's own tensors", nearest(name, others))
    for name, part in live.items():
        shape, dtype = saved[name]
        if (part.shape, part.tensor.dtype) != (tuple(shape), dtype):
            found = f"{name}: {dtype} {list(shape)}"
            raise ArtifactError(where, found, f"{part.tensor.dtype} {list(part.shape)}")
