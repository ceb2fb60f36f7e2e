"""Masks over more positions than fit: the pattern of fewer, continued, and compared with a sample of all.

A region that makes its positions with `arange` can be run on any of them: `arange(S)` gives a few chosen
numbers in the place of 0, 1, 2, …, and the result is the part of the whole mask at these rows and columns.
It is first tried where the whole is known; a region that is not of this kind (a buffer that is sliced, a
`tril`) cannot be continued, and neither can a pattern that is not plain, linear, or constant from some
distance on.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir.graphs import fork
from moec.ir.patterns import tensor

from .position_shapes import Shown

aten = torch.ops.aten
COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
SAMPLE, SEED = 192, 0


def continued(region: fx.GraphModule, index: int, known: Shown, side: int, length: int) -> Shown:
    """`known`, a mask over `side` positions, for `length`; raises `PassError` where that is not certain."""
    made = _longer(known, side, length)
    if made is None:
        raise _refusal(
            index, side, length, "a mask that is neither plain nor linear nor constant from some distance"
        )
    for size in (side, length):
        chosen = _chosen_positions(size)
        found = _sampled(region, index, chosen)
        if found is None or not _agrees(made, found, chosen):
            raise _refusal(index, side, length, f"a mask that cannot be read off some of {size} positions")
    return made


def _refusal(index: int, side: int, length: int, found: str) -> PassError:
    return PassError(
        f"derive_cache: positions, result {index}", f"{found}, over {length} positions",
        f"at most {side} positions, or a mask made of comparisons of positions", f"decoder({side})",
    )  # fmt: skip


def _longer(known: Shown, side: int, length: int) -> Shown | None:
    if known.kind == "plain":
        return known
    if known.numbers is None or known.kind == "full":
        return None
    dim = 0 if known.kind == "distance" else known.numbers.dim() - 1
    numbers = _linear(known.numbers, dim, side, length)
    if numbers is None and known.kind == "distance":
        numbers = _constant_tail(known.numbers, side, length)
    return None if numbers is None else Shown(known.kind, numbers, known.hidden, known.fill)


def _linear(numbers: Tensor, dim: int, side: int, length: int) -> Tensor | None:
    """`numbers` along `dim` are a slope times 0, 1, 2, …: more of them."""
    if not numbers.is_floating_point():
        return None
    slope = numbers.narrow(dim, 1, 1)
    shape = [-1 if i == dim else 1 for i in range(numbers.dim())]
    more = slope * torch.arange(length, device=numbers.device).to(numbers.dtype).view(shape)
    return more if torch.equal(more.narrow(dim, 0, side), numbers) else None


def _constant_tail(numbers: Tensor, side: int, length: int) -> Tensor | None:
    """From half of `side` on one number: more of it."""
    tail = numbers[side // 2 :]
    if not torch.equal(tail, tail[:1].expand_as(tail)):
        return None
    return torch.cat([numbers, tail[:1].expand(length - side, *tail.shape[1:])])


def _chosen_positions(size: int) -> Tensor:
    """Positions near the start and the end, and some between, in order."""
    generator = torch.Generator().manual_seed(SEED)
    between = torch.randint(0, size, (SAMPLE,), generator=generator)
    near = torch.arange(min(16, size))
    return torch.cat([near, between, size - 1 - near]).unique()


def _sampled(region: fx.GraphModule, index: int, chosen: Tensor) -> Tensor | None:
    """Result `index` at the rows and columns `chosen`; None where the region is not made of `arange`."""
    copied = fork(region)
    counts = [node for node in copied.graph.nodes if _counts_positions(node)]
    device = next((node.kwargs["device"] for node in counts if "device" in node.kwargs), "cpu")
    copied.register_buffer("chosen_positions", chosen.to(device), persistent=False)
    for node in counts:
        with copied.graph.inserting_before(node):
            positions = copied.graph.get_attr("chosen_positions")
            made = copied.graph.call_function(aten.to.dtype, (positions, node.meta["val"].dtype))
        node.replace_all_uses_with(made)
        copied.graph.erase_node(node)
    copied.recompile()
    tokens = torch.zeros(1, chosen.numel(), dtype=torch.long, device=device)
    try:
        found = copied(tokens) if counts else None
    except (IndexError, RuntimeError):
        return None
    value = found[index] if isinstance(found, tuple | list) else found
    return value if isinstance(value, Tensor) else None


def _counts_positions(node: fx.Node) -> bool:
    """Whether a call gives 0, 1, 2, … up to the length of the sequence."""
    value = tensor(node)
    if value is None or value.dim() != 1 or isinstance(value.shape[0], int):
        return False
    start = node.args[0] if node.target is not aten.arange.default else 0
    step = node.args[2] if len(node.args) > 2 else 1
    return node.target in COUNTS and start == 0 and step == 1


def _agrees(made: Shown, found: Tensor, chosen: Tensor) -> bool:
    """Whether what `made` says of the positions `chosen` is what the region gave."""
    chosen = chosen.to(found.device)
    seen = chosen[None, :] <= chosen[:, None]
    if made.numbers is None:
        expected = torch.full_like(found, made.fill)
    elif made.kind == "key":
        expected = made.numbers.index_select(-1, chosen).unsqueeze(-2)
    else:
        back = made.numbers[(chosen[:, None] - chosen[None, :]).clamp(min=0)]
        expected = back.movedim((0, 1), (-2, -1))
    expected, found = torch.broadcast_tensors(expected, found)
    hidden = torch.full_like(found, made.hidden)
    return torch.equal(torch.where(seen, expected, hidden), found)
