"""Capture: an ordinary dense decoder becomes a Program at stage *captured*."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from moec.errors import CaptureError
from moec.ir import Origins, Program, Source
from moec.ir.graphs import drop_unused, output
from moec.ir.identity import identified
from moec.ir.shapes import propagate

from .dropout import follow_training
from .exported import export_tokens_to_logits, require_dynamic
from .flatten import flatten, source_lines
from .longest import longest_sequence
from .signature import Adapted, adaptations, sample_tokens


def capture(
    model: nn.Module | ExportedProgram, *, example_inputs: Any = None, dtype: torch.dtype | None = None
) -> Program:
    """Turn `model` (tokens [B, S] → logits [B, S, V]) into a flat graph over its own, copied weights.

    `model`: any nn.Module decoder, a Hugging Face causal LM, an `fx.GraphModule`, or an `ExportedProgram`;
    it is not changed. `example_inputs`: tokens [B, S] and constants, where they cannot be inferred. `dtype`:
    capture in this floating dtype (casts and masks follow it). Raises `CaptureError`, saying what was found.
    """
    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    if not isinstance(module, nn.Module):
        raise CaptureError(
            "compile(model)", f"{type(module).__name__}", "an nn.Module, fx.GraphModule or ExportedProgram"
        )
    module = _own_copy(module, dtype)
    _, exported, notes = _export(module, example_inputs)
    graph, origins = flatten(exported, module)
    graph.meta["lines"] = source_lines(exported)
    follow_training(graph.graph)
    drop_unused(graph)
    propagate(graph)
    identified(graph, 0)
    source = _source(module, graph, origins, exported, notes)
    return Program(graph, source=source, origins=_present(origins, graph)).with_snapshot("captured")


def _own_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The caller's model is never changed and shares no memory with the program."""
    own = copy.deepcopy(model)
    return own.to(dtype) if dtype is not None else own


def _export(model: nn.Module, example_inputs: Any) -> tuple[Adapted, ExportedProgram, tuple[str, ...]]:
    tokens = sample_tokens(example_inputs, model)
    seen, failure = "", None
    for adapted in adaptations(model, example_inputs):
        try:
            exported, notes = export_tokens_to_logits(adapted, tokens)
        except CaptureError as error:
            failure = error
            continue
        if require_dynamic(exported, adapted, tokens):
            return adapted, exported, notes
        seen = f"{adapted.describe} returns {_logits_shape(exported)}"
    if failure is not None:
        raise failure
    raise CaptureError(
        f"capture of {type(model).__name__}", seen, "logits [B, S, V] for every position",
        "an argument `targets` that makes forward return all positions",
    )  # fmt: skip


def _logits_shape(exported: ExportedProgram) -> list[str]:
    return [str(size) for size in output(exported.graph).args[0][-1].meta["val"].shape]  # type: ignore[index,union-attr]


def _present(origins: Origins, graph: fx.GraphModule) -> Origins:
    """Origins of the weights the graph still reads."""
    names = {name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]}
    return Origins({name: origin for name, origin in origins.items() if name in names})


def _source(
    model: nn.Module,
    graph: fx.GraphModule,
    origins: Origins,
    exported: ExportedProgram,
    notes: tuple[str, ...],
) -> Source:
    logits = output(graph.graph).args[0].meta["val"]  # type: ignore[union-attr]
    used = {origin.source for origin in _present(origins, graph).values()}
    aliases, unused = _the_rest(model, {name for name in used if name})
    return Source(
        name=type(model).__name__, vocabulary=int(logits.shape[-1]), dtype=logits.dtype,
        max_positions=longest_sequence(graph, exported), aliases=aliases, unused=unused, notes=notes,
    )  # fmt: skip


def _the_rest(model: nn.Module, used: set[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Tied names, and state the forward never reads, so that the dense state dict can be complete again."""
    state = model.state_dict(keep_vars=True)
    kept = {id(state[name]): name for name in state if name in used}
    aliases = {
        name: kept[id(value)] for name, value in state.items() if name not in used and id(value) in kept
    }
    unused = {
        n: v.detach()
        for n, v in state.items()
        if n not in used and n not in aliases and isinstance(v, Tensor)
    }
    return aliases, unused
