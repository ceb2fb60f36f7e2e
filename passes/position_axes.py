"""What is known of a value: which of its dims run over rows of the batch, and which over positions.

Roles of dims: `batch` (rows of the batch, each perhaps several times in a row, as with heads in the same
dim), `new` (the positions a step is fed), `held` (those a cache holds), `rows` (batch and new positions in
one dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from moec.errors import PassError
from moec.ir.patterns import is_call

BATCH, NEW, HELD, ROWS = "batch", "new", "held", "rows"
Roles = Mapping[int, str]

HIDDEN = -1e4  # a mask's numbers from here down leave nothing of a position after the softmax
HIDDEN_SCORE = HIDDEN / 2  # and with any score added to them


@dataclass(frozen=True)
class Axes:
    """A value that depends on tokens. `roles`: dim → role. `later`: its number at the positions after each
    new one, whatever the tokens say (below `HIDDEN_SCORE`: at most that number); None when nothing is
    known."""

    roles: Roles = field(default_factory=dict)
    later: float | None = None

    def dims(self, role: str) -> list[int]:
        """The dims with this role."""
        return [dim for dim, has in self.roles.items() if has == role]

    def aligned(self, rank: int, wider: int) -> dict[int, str]:
        """The roles where a value of `rank` dims is broadcast to `wider`."""
        return {dim + wider - rank: role for dim, role in self.roles.items()}

    @property
    def hides(self) -> bool:
        """Whether a softmax leaves nothing of later positions."""
        return self.later is not None and self.later <= HIDDEN_SCORE


@dataclass(frozen=True)
class Table:
    """A value that depends on positions only: result `index` of the positions region, `rank` dims, those in
    `dims` run over positions. `later`: as in `Axes`, of a table over pairs of positions."""

    index: int
    rank: int
    dims: tuple[int, ...]
    later: float | None = None


@dataclass(frozen=True)
class Read:
    """`user` (a node of the region `region`, or of the root: '') reads table `index`, broadcast to `rank`
    dims, whose dims `roles` run over positions; -1 is the causal mask of a flag. `times`: rows of dim 0 for
    each row of the batch."""

    region: str
    user: fx.Node
    value: fx.Node | None
    index: int
    rank: int
    roles: tuple[tuple[int, str], ...]
    times: int = 1

    @property
    def table(self) -> fx.Node | None:
        """The table that `value` is, or is a rank's part of."""
        taken = is_call(self.value, torch.ops.moec.part.default)
        return self.value.args[0] if taken else self.value  # type: ignore[return-value, union-attr]


@dataclass(frozen=True)
class Site:
    """`user` (in `region`) must read `value` at all held positions, which are at `dim`; `name`: of the
    cache."""

    region: str
    user: fx.Node
    value: fx.Node
    dim: int
    name: str


@dataclass
class Labels:
    """What the walk found: what is to be remembered, and where tables are read."""

    sites: list[Site] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


def refusal(where: str, found: str, needed: str = "") -> PassError:
    """The error of a program that cannot be cached."""
    usual = "attention over earlier positions; all else position by position"
    return PassError(f"derive_cache: {where}", found, needed or usual, "program(tokens) recomputes")
