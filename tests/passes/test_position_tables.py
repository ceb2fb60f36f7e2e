"""Tables of positions: what they look like in few numbers, and how they go on beyond what is made at once."""

from __future__ import annotations

from unittest.mock import ANY

import pytest
import torch
from torch import Tensor, fx, nn

from moec.errors import PassError
from moec.passes import position_tables
from moec.passes.position_shapes import Shown, shown
from moec.passes.position_tables import PositionTables

SMALL, LONG = 16, 64  # positions that fit the budget of these tests, and those that are asked for
aten = torch.ops.aten


def region(make: nn.Module) -> fx.GraphModule:
    """A positions region: the operators of `make`, which reads nothing of the tokens but their number."""
    tokens = torch.zeros(2, 5, dtype=torch.long)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    made = torch.export.export(make, (tokens,), dynamic_shapes=shapes).module(check_guards=False)
    graph = fx.GraphModule(made, made.graph)
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


class Mask(nn.Module):
    """A mask of comparisons of `i` and `j`."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(self, tokens: Tensor) -> Tensor:
        i = torch.arange(tokens.shape[1])
        seen = i <= i[:, None]
        return seen if self.window is None else seen & (i > i[:, None] - self.window)


class Linear(nn.Module):
    """ALiBi by key, with the mask in the same numbers."""

    def forward(self, tokens: Tensor) -> Tensor:
        i = torch.arange(tokens.shape[1])
        bias = torch.tensor([0.5, 0.1]).view(2, 1, 1) * i
        return torch.where(i <= i[:, None], bias, -1e30)


class Stored(nn.Module):
    """A mask that lies in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(LONG, LONG, dtype=torch.bool).tril())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.seen[: tokens.shape[1], : tokens.shape[1]]  # type: ignore[index]


class Curved(nn.Module):
    """A bias that is not linear."""

    def forward(self, tokens: Tensor) -> Tensor:
        i = torch.arange(tokens.shape[1])
        return torch.where(i <= i[:, None], (i + 1.0).log(), -1e30)


def tables(make: nn.Module, dims: tuple[int, ...], length: int) -> PositionTables:
    return PositionTables(region(make), [dims], length, torch.device("cpu"))


def same(a: Shown, b: Shown) -> bool:
    alike = (a.kind, a.hidden, a.fill) == (b.kind, b.hidden, b.fill)
    numbers = a.numbers is None and b.numbers is None
    return alike and (numbers or torch.equal(a.numbers, b.numbers))  # type: ignore[arg-type]


KINDS = {
    "plain": (Mask(), 3), "distance": (Mask(3), 3), "key": (Linear(), 4)
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_mask_is_continued(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made for few positions and continued, it is what it is when made for all."""
    make, rank = KINDS[kind]
    dims = (1, 2) if kind == "key" else (0, 1)
    whole = tables(make, dims, LONG).shown(0, rank)
    monkeypatch.setattr(position_tables, "BUDGET", SMALL * SMALL * (2 if kind == "key" else 1))
    made = tables(make, dims, LONG)
    assert made.side == SMALL
    assert made.shown(0, rank).kind == kind
    assert same(made.shown(0, rank), whole)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Mask(SMALL + 5), "cannot be read off some of 64 positions"),  # looks plain from up close
        (Stored(), "cannot be read off some of 16 positions"),
        (Curved(), "neither plain nor linear"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    make: nn.Module, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(position_tables, "BUDGET", SMALL * SMALL)
    with pytest.raises(PassError, match=words) as refusal:
        tables(make, (0, 1), LONG).shown(0, 3)
    assert "at most 16 positions" in str(refusal.value)


def test_a_stored_mask_of_all_positions_is_fine() -> None:
    assert tables(Stored(), (0, 1), LONG).shown(0, 3).kind == "plain"


def test_more_positions_than_are_stored() -> None:
    with pytest.raises(PassError, match="positions"):
        tables(Stored(), (0, 1), 2 * LONG)


def test_a_mask_in_few_numbers() -> None:
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    assert shown(seen[None], hides=True) == Shown("plain", None, False, True)
    near = seen.triu(-2)
    assert shown(near[None], hides=True) == Shown("distance", ANY, False)
    assert shown(near[None], hides=False).kind == "full"
    random = torch.rand(9, 9).masked_fill(~seen, -1e30)
    full = shown(random[None], hides=True)
    assert full.kind == "full"
    assert torch.equal(full.numbers, random)  # type: ignore[arg-type]
