"""What an operator makes of positions after its own: the same number whatever the tokens say, or not.

A mask is known by what it does. The operator is run on single numbers: what is known of later positions in
the place of masks and masked scores, and several others in the place of everything that tokens decide. If
the result is one number, or always low enough for a softmax to leave nothing of it, that is what is known
of the result.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir.patterns import tensor

from .position_axes import HIDDEN_SCORE, Axes, Table
from .position_scope import Scope

NUMBERS = (-3.0, 0.0, 5.0)
MOST_UNKNOWN = 4


def later_of(scope: Scope, node: fx.Node) -> float | None:
    """The number of a pointwise result at later positions, at most that where it is hidden; None: unknown."""
    operands = [n for n in node.all_input_nodes if tensor(n) is not None]
    choices = [_choices(scope, operand) for operand in operands]
    if sum(len(values) > 1 for values in choices) > MOST_UNKNOWN or any(not values for values in choices):
        return None
    found = []
    for values in itertools.product(*choices):
        made = _number(node, dict(zip(operands, values, strict=True)))
        if made is None:
            return None
        if made == made:  # what is no number here is none when recomputing either
            found.append(made)
    if not found:
        return None
    if max(found) <= HIDDEN_SCORE or min(found) == max(found):
        return max(found)
    return None


def _choices(scope: Scope, operand: fx.Node) -> list[Tensor]:
    """The numbers to try in the place of a value."""
    value, known = tensor(operand), scope.known.get(operand)
    assert value is not None
    if isinstance(known, Axes | Table) and known.later is not None:
        return [torch.tensor(known.later).to(_wide(value.dtype))]
    if value.dtype.is_complex:
        return []
    if value.dtype == torch.bool:
        return [torch.tensor(False), torch.tensor(True)]
    return [torch.tensor(number).to(_wide(value.dtype)) for number in NUMBERS]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _number(node: fx.Node, numbers: dict[fx.Node, Tensor]) -> float | None:
    def concrete(source: fx.Node) -> Any:
        return numbers[source] if source in numbers else _plain(source)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete)
    try:
        made = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return None  # it reads more than numbers: nothing is known
    known = isinstance(made, Tensor) and made.numel() == 1 and not made.dtype.is_complex
    return float(made) if known else None


def _plain(source: fx.Node) -> Any:
    value = source.meta.get("val")
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    return False if source.target == "training" else value
