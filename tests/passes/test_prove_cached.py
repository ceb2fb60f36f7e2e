"""Derivations that were broken on purpose: each is caught by the certificate, which names the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import moec
from moec.errors import VerifyError
from moec.passes.derive_cache import _Rewrite
from moec.passes.pick_positions import PickPositions
from moec.passes.pipeline import cached
from moec.passes.position_axes import Read, Site
from moec.passes.position_lookups import Lookups
from moec.passes.position_tables import PositionTables
from moec.passes.runner import Runner
from moec.testing import NAMED

aten = torch.ops.aten
Patch = pytest.MonkeyPatch


def wrong_positions(patch: Patch) -> None:
    """Every row is taken to begin at position 0."""
    right = Lookups._at

    def at(self: Lookups) -> fx.Node:
        made = right(self)
        first, steps = made.args
        with self.graph.inserting_before(made):
            start = self.graph.call_function(aten.mul.Tensor, (first, 0))
        made.args = (start, steps)
        return made

    patch.setattr(Lookups, "_at", at)


def forgotten(patch: Patch) -> None:
    """Values are read from the cache and never written to it."""
    right = _Rewrite._remember

    def remember(self: _Rewrite, site: Site, inner: str) -> None:
        right(self, site, inner)
        if site.name == "values":
            written = [n for n in site.value.users if n.target is torch.ops.moec.remember.default]
            site.value.graph.erase_node(written[0])

    patch.setattr(_Rewrite, "_remember", remember)


def shifted_table(patch: Patch) -> None:
    """One of two rotary tables begins one position late (both would be the same attention)."""
    right = PositionTables.rows

    def rows(self: PositionTables, index: int, rank: int, dim: int) -> Tensor:
        return right(self, index, rank, dim).roll(-1 if index == 0 else 0, 0)

    patch.setattr(PositionTables, "rows", rows)


def mask_off_by_one(patch: Patch) -> None:
    """A position does not see itself, or sees the next one."""
    right = Lookups._seen

    def seen(self: Lookups, read: Read) -> fx.Node:
        made = right(self, read)
        compared = self.made["seen"]
        keys, rows = compared.args
        with self.graph.inserting_before(compared):
            further = self.graph.call_function(aten.add.Tensor, (rows, 1))
        compared.args = (keys, further)
        return made

    patch.setattr(Lookups, "_seen", seen)


def keys_before_rotary(patch: Patch) -> None:
    """What is kept of a key is not yet turned."""
    right = _Rewrite._remember

    def remember(self: _Rewrite, site: Site, inner: str) -> None:
        right(self, site, inner)
        if site.name == "keys":
            written = next(n for n in site.value.users if n.target is torch.ops.moec.remember.default)
            written.update_arg(1, site.value.args[0])

    patch.setattr(_Rewrite, "_remember", remember)


def wrong_position_wanted(patch: Patch) -> None:
    """Logits of the first position wanted, for all."""
    right = PickPositions.apply

    def apply(self: PickPositions, program: moec.Program) -> moec.Program:
        right(self, program)
        graph = program.graph.graph
        column = next(node for node in graph.nodes if node.name == "column")
        with graph.inserting_after(column):
            first = graph.call_function(aten.mul.Tensor, (column, 0))
        column.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
        program.graph.recompile()
        return program

    patch.setattr(PickPositions, "apply", apply)


BROKEN = {
    "derive_cache": (wrong_positions, forgotten, shifted_table, mask_off_by_one, keys_before_rotary),
    "pick_positions": (wrong_position_wanted,),
}


@pytest.fixture(scope="module")
def program() -> moec.Program:
    """Two dense layers with rotary positions."""
    return moec.compile(NAMED["llama_like"].build(seed=0), verify="off").eval()


@pytest.mark.parametrize(
    ("name", "broken"), [(name, broken) for name, several in BROKEN.items() for broken in several]
)
def test_a_broken_derivation_is_caught(
    program: moec.Program, monkeypatch: Patch, name: str, broken: Callable[[Patch], None]
) -> None:
    broken(monkeypatch)
    with pytest.raises(VerifyError, match=f"pass {name}"):
        Runner(verify="full").run(program.fork(), cached(32))


def test_the_derivation_is_proved(program: moec.Program) -> None:
    derived = Runner(verify="full").run(program.fork(), cached(32))
    assert [c.verdict for c in derived.certificates[-3:]] == ["proved"] * 3


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_decoders_are_proved(program: moec.Program, length: int) -> None:
    derived = Runner(verify="full").run(program.fork(), cached(length))
    assert all(c.verdict == "proved" for c in derived.certificates[-3:])
