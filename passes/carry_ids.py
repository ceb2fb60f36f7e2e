"""How the identities of channels go through the operators of a region.

Every output feature of a product that reads the region's input gets a number, its *id*. Here the rest of the
region is evaluated on tensors of ids (i64, -1: made of no channel): views are executed by torch itself,
everything else says which ids meet in one element of its result. Ids that meet belong to one channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.ir.overloads import candidates

aten = torch.ops.aten
NONE = -1

VIEWS = {
    aten.unflatten.int, aten.flatten.using_ints, aten.reshape.default, aten.transpose.int,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten.broadcast_to.default,
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, aten.cat.default, aten.stack.default, aten.repeat_interleave.self_int,
    aten.repeat.default, aten.flip.default, aten.roll.default, aten.t.default, aten.movedim.int,
    aten.view_as.default, aten.expand_as.default,
}  # fmt: skip
ALONG_DIM = {aten.softmax.int, aten.log_softmax.int, aten.cumsum.default}
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default}
# Composites that act on each element by itself, and are not tagged as such.
POINTWISE = {aten.to.dtype, aten.dropout.default, aten.clone.default, aten.type_as.default}


class MixedError(Exception):
    """Ids can no longer be told apart; the message is the reason, for the ledger."""


class Meetings:
    """Ids handed out so far, and which of them met."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def fresh(self, num_ids: int) -> Tensor:
        """`num_ids` ids that nobody has, i64 [num_ids]."""
        self.count += num_ids
        return torch.arange(self.count - num_ids, self.count)

    def meet(self, one: Tensor, other: Tensor) -> None:
        """Remember that the ids at equal places of the two tensors (of one shape) belong together."""
        apart = (one != other) & (one != NONE) & (other != NONE)
        if bool(apart.any()):
            self._pairs.append((one[apart], other[apart]))

    def channels(self) -> Tensor:
        """id → the smallest id of its channel, i64 [count]: components by spreading the smallest label."""
        label = np.arange(self.count)
        if not self._pairs:
            return torch.from_numpy(label)
        one, other = (np.concatenate([pair[i].numpy() for pair in self._pairs]) for i in (0, 1))
        while True:
            least = np.minimum(label[one], label[other])
            spread = label.copy()
            for ends in (one, other):
                np.minimum.at(spread, label[ends], least)
                np.minimum.at(spread, ends, least)
            spread = spread[spread]
            if np.array_equal(spread, label):
                return torch.from_numpy(label)
            label = spread


def has_ids(value: Any) -> bool:
    """Whether some element of a tensor, or of a list of tensors, is made of a channel."""
    if isinstance(value, list | tuple):
        return any(map(has_ids, value))
    return isinstance(value, Tensor) and bool((value != NONE).any())


def is_pointwise(target: Any) -> bool:
    """Whether the element of the result at a place is made of the operands' elements at that place alone."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    kin = candidates(target.overloadpacket)  # torch tags some overloads of an operator and forgets others
    return target in POINTWISE or any(torch.Tag.pointwise in one.tags for one in kin)


def carry(target: Any, arguments: dict[str, Any], shape: Sequence[int], meetings: Meetings) -> Any:
    """The ids of what `target` gives for `arguments` (by the schema's names; tensors are tensors of ids).

    `shape`: that of the result. Raises `MixedError` for an operator that has no rule.
    """
    rule = _rule_of(target)
    if rule is not None:
        return rule(arguments, meetings).expand(tuple(shape))
    if is_pointwise(target):
        return _merged(_tensors(arguments), meetings)
    if target in VIEWS:
        found = target(**arguments)
        return list(found) if isinstance(found, tuple | list) else found
    raise MixedError(f"{target} may mix the channels in any way")


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    return [value for value in arguments.values() if isinstance(value, Tensor)]


def _merged(values: Sequence[Tensor], meetings: Meetings) -> Tensor:
    """The ids of elements computed from these, place by place."""
    first, *others = torch.broadcast_tensors(*values)
    for other in others:
        meetings.meet(first, other)
        first = torch.where(first == NONE, other, first)
    return first


def _gathered(x: Tensor, dims: Sequence[int], meetings: Meetings) -> Tensor:
    """One id for all that meet along `dims`, which stay as dims of one."""
    largest = x.amax(tuple(dims), keepdim=True)
    meetings.meet(x, largest.expand_as(x))
    return largest


def _along_dim(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    return _gathered(arguments["self"], [arguments["dim"]], meetings)


def _norm(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    return _gathered(arguments["input"], range(-len(arguments["normalized_shape"]), 0), meetings)


def _product(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    one, other = arguments["self"], arguments["other"] if "other" in arguments else arguments["mat2"]
    if one.dim() < 2 or other.dim() < 2:
        raise MixedError("a product with a vector")
    return _merged([_gathered(one, [-1], meetings), _gathered(other, [-2], meetings)], meetings)


def _attention(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    """Queries, keys, values (and mask) of one head meet, whatever stands where in it."""
    q, k, v = (_gathered(arguments[name], [-2, -1], meetings) for name in ("query", "key", "value"))
    if arguments.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    mask = arguments.get("attn_mask")
    masks = [] if mask is None else [_gathered(mask, [-2, -1], meetings)]
    return _merged([q, k, v, *masks], meetings)


def _halves(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    return _merged(arguments["self"].chunk(2, arguments.get("dim", -1)), meetings)


def _complex(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    return _gathered(arguments["self"], [-1], meetings).squeeze(-1)


def _real(arguments: dict[str, Any], meetings: Meetings) -> Tensor:
    return arguments["self"].unsqueeze(-1)


Rule = Callable[[dict[str, Any], Meetings], Tensor]


def _rule_of(target: Any) -> Rule | None:
    if target in ALONG_DIM:
        return _along_dim
    if target in NORMS:
        return _norm
    if target in PRODUCTS:
        return _product
    return {
        aten.scaled_dot_product_attention.default: _attention,
        aten.glu.default: _halves,
        aten.view_as_complex.default: _complex,
        aten.view_as_real.default: _real,
    }.get(target)
