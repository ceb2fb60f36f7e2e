"""Texts that ranks wrote, put together on every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import MeshError
from moec.ir.mesh import Mesh
from moec.runtime.generation.generate_ranks import joined, own_rows
from moec.runtime.simulated import run_ranks


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 3))
def test_rows_are_dealt_out_as_torch_cuts(count: int, data: int, tensor: int) -> None:
    mesh = Mesh(data, tensor)
    cut = torch.arange(count).tensor_split(data)
    for rank in range(mesh.world):
        assert list(own_rows(count, mesh, rank)) == cut[rank // tensor].tolist()


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=9), st.integers(1, 4),
    st.integers(1, 2),
)  # fmt: skip
def test_every_rank_gets_all_texts(texts: list[list[int]], data: int, tensor: int) -> None:
    """Empty ones, none at all, and numbers of any size among them."""
    mesh = Mesh(data, tensor)

    def body(rank: int) -> list[list[int]]:
        own = own_rows(len(texts), mesh, rank)
        return joined(texts[own.start : own.stop], len(texts), mesh)

    if mesh.world > 1:  # a rank that is alone has no groups
        assert run_ranks(mesh, body) == [texts] * mesh.world


def test_ranks_of_a_group_that_wrote_different_texts_are_named() -> None:
    with pytest.raises(MeshError, match="rank 3 with other texts than rank 2"):
        run_ranks(Mesh(2, 2), lambda rank: joined([[rank // 3]], 2, Mesh(2, 2)))
