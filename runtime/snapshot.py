"""The state of a training run as tensors by name, and back into a live program and optimizer, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moec.errors import ArtifactError, TrainError, nearest
from moec.runtime.checkpoint import Checkpoint, Tensors
from moec.runtime.rng import rng_states, set_rng_states
from moec.runtime.trainable import Trainable

#: The files of a training checkpoint.
PARAMETERS, BUFFERS, OPTIMIZER, RANDOM = "parameters", "buffers", "optimizer", "random"


def take_snapshot(
    program: Trainable, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Tensors]:
    """Everything that the next step depends on, apart from data and settings; the tensors are not copied.

    Raises `TrainError`, naming the tensor, when a weight is infinite or not a number.
    """
    parameters = dict(program.named_parameters())
    for name, tensor in parameters.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainError(name, "weights that are infinite or not numbers", "finite weights to save")
    optimizer_state = {
        f"{name}/{key}": value
        for name, parameter in _optimized(optimizer)
        for key, value in optimizer.state[parameter].items()
    }
    return {
        PARAMETERS: parameters,
        BUFFERS: dict(program.named_buffers()),
        OPTIMIZER: optimizer_state,
        RANDOM: rng_states(device),
    }


def restore_snapshot(
    checkpoint: Checkpoint, program: Trainable, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Put a snapshot back, in place. Raises `ArtifactError` before changing anything when it does not fit."""
    live: dict[str, Mapping[str, Tensor]] = {
        PARAMETERS: dict(program.named_parameters()),
        BUFFERS: dict(program.named_buffers()),
    }
    for stem, tensors in live.items():
        _require_same_tensors(checkpoint, stem, tensors)
    with torch.no_grad():
        for stem, tensors in live.items():
            for name, tensor in tensors.items():
                tensor.copy_(checkpoint.tensors[stem][name])
    _restore_optimizer(checkpoint.tensors[OPTIMIZER], optimizer)
    set_rng_states(checkpoint.tensors[RANDOM], device)


def _optimized(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _restore_optimizer(saved: Tensors, optimizer: torch.optim.Optimizer) -> None:
    state: dict[str, dict[str, Tensor]] = {}
    for path, value in saved.items():
        name, key = path.rsplit("/", 1)
        state.setdefault(name, {})[key] = value
    optimizer.state.clear()
    for name, parameter in _optimized(optimizer):
        if name in state:  # a parameter that never had a gradient has no state
            # a copy: loaded tensors may be views of one mapped file
            optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in state[name].items()
            }


def _require_same_tensors(checkpoint: Checkpoint, stem: str, live: Mapping[str, Tensor]) -> None:
    where = str(checkpoint.path / f"{stem}.safetensors")
    saved = checkpoint.tensors.get(stem, {})
    for name in sorted(live.keys() ^ saved.keys()):
        found, others = (f"no tensor '{name}'", saved) if name in live else (f"a tensor '{name}'", live)
        raise ArtifactError(where, found, "the program's own tensors", nearest(name, others))
    for name, tensor in live.items():
        if (tensor.shape, tensor.dtype) != (saved[name].shape, saved[name].dtype):
            found = f"{name}: {saved[name].dtype} {list(saved[name].shape)}"
            raise ArtifactError(where, found, f"{tensor.dtype} {list(tensor.shape)}")
