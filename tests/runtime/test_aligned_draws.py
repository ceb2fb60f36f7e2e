"""Ranks of a tensor group draw the same numbers after a layer in which they drew for other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.runtime.simulated import run_ranks
from moec.testing.parts.feed_forward import FeedForwardRecipe
from moec.testing.recipe import DecoderRecipe

MOE = {"layers": "all", "experts": 3, "init": "noise", "router_std": 1.0}
PARALLEL = {"tensor": 2, "expert": 2}


def trained_once(moe: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Logits in train mode and the generator's state afterwards, of two tensor ranks with five tokens."""
    recipe = DecoderRecipe(dropout=0.1, ffn=FeedForwardRecipe(dropout=0.1, hidden_dropout=0.2))
    plan = {"moe": {**MOE, **moe}, "parallel": PARALLEL}
    program = moec.compile(recipe.build(), plan, world=2, verify="off")
    tokens = recipe.tokens(batch=1, length=5)
    assert program.layout is not None

    def run(rank: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        local = program.partition(rank).train()
        return local(tokens).detach(), torch.get_rng_state()

    return run_ranks(program.layout.mesh, run)


@pytest.mark.parametrize(
    "moe",
    [
        {"noise": "rsample"},
        {"noise": "jitter"},
        {"capacity_factor": 0.5, "min_capacity": 0, "random_token_selection": True},
    ],
    ids=["rsample", "jitter", "random selection"],
)
def test_generators_and_logits_of_a_tensor_group_agree(moe: dict[str, Any]) -> None:
    (first, one), (second, other) = trained_once(moe)
    assert torch.equal(one, other)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_they_would_not_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.local_program.align_draws", lambda *_: None)
    (_, one), (_, other) = trained_once({"noise": "rsample"})
    assert not torch.equal(one, other)
