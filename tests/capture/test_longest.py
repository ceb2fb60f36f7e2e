"""The longest sequence is the longest that runs, however positions are spelled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture

ROWS, WIDTH = 13, 4


class Positions(nn.Module):
    """Tokens and positions, each an embedding, and a head; `positions` gives what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, WIDTH)
        self.table = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 11)
        self.register_buffer("places", torch.arange(9)[None], persistent=False)
        self.register_buffer("fixed", torch.randn(1, ROWS, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tokens(tokens) + self.positions(tokens))

    def positions(self, tokens: Tensor) -> Tensor:
        return self.table(torch.arange(tokens.shape[1]))


class Offset(Positions):
    """Counted by summing ones, from row 2 on, as OPT does."""

    def positions(self, tokens: Tensor) -> Tensor:
        ones = torch.ones_like(tokens)
        return self.table(ones.cumsum(1) * ones - 1 + 2)


class Gathered(Positions):
    """Rows of a buffer, gathered, as GPT-J does."""

    def positions(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])[None, :, None].expand(tokens.shape[0], -1, WIDTH)
        return torch.gather(self.fixed.repeat(tokens.shape[0], 1, 1), 1, places)


class Selected(Positions):
    """Every other row."""

    def positions(self, tokens: Tensor) -> Tensor:
        return self.fixed[0].index_select(0, 2 * torch.arange(tokens.shape[1]))


class Downwards(Positions):
    """From the last row to the first."""

    def positions(self, tokens: Tensor) -> Tensor:
        return self.table(ROWS - 1 - torch.arange(tokens.shape[1]))


class Indexed(Positions):
    """The same by indexing, where what lies before the first row is the last."""

    def positions(self, tokens: Tensor) -> Tensor:
        return self.fixed[0][ROWS - 1 - torch.arange(tokens.shape[1])]


class Bucketed(Positions):
    """All positions from 5 on are alike: no sequence is too long."""

    def positions(self, tokens: Tensor) -> Tensor:
        return self.table(torch.arange(tokens.shape[1]).clamp(max=5))


class Constant(Positions):
    """One row for all."""

    def positions(self, tokens: Tensor) -> Tensor:
        return self.table(torch.zeros_like(tokens))


LIMITS = {
    Positions: ROWS, Offset: ROWS - 2, Gathered: ROWS, Selected: 7, Downwards: ROWS, Indexed: 2 * ROWS,
    Bucketed: None, Constant: None,
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS, ids=lambda kind: kind.__name__)
def test_the_limit_is_the_longest_that_runs(kind: type[Positions]) -> None:
    model, limit = kind(), LIMITS[kind]
    program = capture(model)
    assert program.source.max_positions == limit
    if limit is None:
        assert program(torch.ones(1, 99, dtype=torch.long)).shape == (1, 99, 11)
        return
    model(torch.ones(1, limit, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, limit + 1, dtype=torch.long))


@pytest.mark.parametrize(("kind", "limit"), [(Positions, ROWS), (Offset, ROWS - 2), (Bucketed, None)])
def test_a_model_without_memory_has_the_same_limit(kind: type[Positions], limit: int | None) -> None:
    """Positions that are computed from the shape alone need no weights."""
    with torch.device("meta"):
        model = kind()
    assert capture(model).source.max_positions == limit
