"""torch.export with batch and sequence dynamic; the one place that knows how export behaves.

The model is exported in training mode, so that every dropout is visible; models that branch on data while
training (layer drop, say) are exported in evaluation mode instead, and a note says so.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from moec.errors import CaptureError

from .signature import Adapted

SHORTER_SAMPLES = (9, 5, 3)


def export_tokens_to_logits(adapted: Adapted, tokens: Tensor) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The exported program and notes about how it was made; raises `CaptureError` with torch's own reason."""
    try:
        return _export(adapted, tokens, training=True), ()
    except CaptureError:
        raise
    except Exception as first:
        try:
            exported = _export(adapted, tokens, training=False)
        except Exception as second:
            raise _explained(adapted, second) from second
        reason = str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
        return exported, (f"captured in eval mode, its training mode branches on data ({reason})",)


def _export(adapted: Adapted, tokens: Tensor, *, training: bool) -> ExportedProgram:
    lengths = [n for n in SHORTER_SAMPLES if n <= tokens.shape[1]] or [tokens.shape[1]]
    with _mode(adapted, training), _quiet():
        for length in lengths:
            try:
                return _export_once(adapted, tokens[:, :length])
            except Exception:
                if length == lengths[-1]:
                    raise
    raise AssertionError("unreachable: the last length returns or raises")


def _export_once(adapted: Adapted, tokens: Tensor) -> ExportedProgram:
    dims = ({0: Dim.AUTO, 1: Dim.AUTO},)
    return export(adapted, (tokens,), dynamic_shapes=dims, strict=False)


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set every training flag below `module`, and put each back; `.train()` may be refused or overridden."""
    before = {child: child.training for child in module.modules()}
    for child in before:
        child.training = training
    try:
        yield
    finally:
        for child, flag in before.items():
            child.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's export logs and warns about details that are no business of a user of moec."""
    loggers = [logging.getLogger("torch.export"), logging.getLogger("torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explained(adapted: Adapted, error: Exception) -> CaptureError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    where = next((line for line in reversed(lines) if line.startswith("File ")), "")
    return CaptureError(
        f"capture of {type(adapted.model).__name__} as {adapted.describe}" + (f", {where}" if where else ""),
        found,
        "a forward that torch.export can trace with any batch and sequence length",
        "example_inputs=… to say how it is called, or rewrite the line that reads tensor values in Python",
    )


def require_dynamic(exported: ExportedProgram, adapted: Adapted, tokens: Tensor) -> bool:
    """Whether the logits are [B, S, V] with B and S free; raises when a size was baked in."""
    output = next(node for node in reversed(exported.graph.nodes) if node.op == "output").args[0]
    logits = output[-1].meta["val"]
    placeholder = [node for node in exported.graph.nodes if node.op == "placeholder"][-1].meta["val"]
    baked = [name for name, size in zip("BS", placeholder.shape, strict=True) if not _is_free(size)]
    if baked:
        raise CaptureError(
            f"capture of {type(adapted.model).__name__}",
            f"{' and '.join(baked)} baked in as {list(placeholder.shape)}",
            "a model that works for any batch and sequence length: not one that loops over positions in "
            "Python (a recurrent or state-space layer), reshapes to a fixed size, or was itself traced with "
            "fixed sizes",
        )  # fmt: skip
    return logits.dim() == 3 and torch.is_floating_point(logits) and logits.shape[1] == placeholder.shape[1]


def _is_free(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number
