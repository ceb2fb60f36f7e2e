"""A whole training step: what is computed again, what runs once, and the work of loss and optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moec.cost import Cost
from moec.cost.reading.flop_formulas import flop_formulas
from moec.errors import PassError
from moec.runtime.recompute import recomputing
from tests.cost.whole_steps import LENGTH, VOCABULARY, compiled, settings_of

EVERY = {"experts": 2, "top_k": 2, "layers": "-1:"}  # every expert gets every token


def of_kind(cost: Cost, kind: str) -> list[str]:
    return [one.name for one in cost.operations if one.kind == kind]


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_a_step_are_those_that_torch_counts(recompute: bool) -> None:
    """Regions compute again before their gradients; the head and the router's way do not."""
    program = compiled({"moe": EVERY})
    program.train()
    tokens = torch.randint(VOCABULARY, (3, LENGTH))
    with (
        recomputing(program, recompute),
        FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter,
    ):
        program.loss(tokens, tokens).backward()
    program.zero_grad()
    cost = program.cost(train=settings_of(recompute=recompute))
    assert cost.number(cost.flops, B=3, S=LENGTH) == counter.get_total_flops()


@pytest.mark.parametrize(
    "asked", [{"phase": "trainin"}, {"attention": "flsh"}, {"rank": 3}], ids=lambda asked: next(iter(asked))
)
def test_what_there_is_no_cost_of(asked: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=str(next(iter(asked.values())))):
        compiled({}).cost(**asked)


def test_parts_of_a_batch_multiply_all_but_the_optimizer() -> None:
    program = compiled({})
    one, three = (program.cost(train=settings_of(accumulate=n, batch=6)) for n in (1, 3))
    assert three.flops == 3 * one.flops
    assert [o for o in one.operations if o.kind == "optimizer"] == [
        o for o in three.operations if o.kind == "optimizer"
    ]
    once = one.number(sum(o.forward.bytes for o in one.operations if o.kind == "optimizer"))
    at = {"B": 2, "S": 6}
    assert three.number(three.bytes, **at) == 3 * (one.number(one.bytes, **at) - once) + once


def test_adamw_reads_four_arrays_and_writes_three() -> None:
    program = compiled({})
    cost = program.cost()
    weights = sum(p.nbytes for p in program.parameters())
    updates = [one for one in cost.operations if one.operator == "aten::_fused_adamw_"]
    assert sum(one.forward.read for one in updates) == 4 * weights
    assert sum(one.forward.written for one in updates) == 3 * weights
    assert sum(one.backward.bytes for one in updates) == 0


def test_nothing_is_clipped_that_need_not_be() -> None:
    program = compiled({})
    assert "optimizer.clip" in of_kind(program.cost(), "optimizer")
    assert "optimizer.clip" not in of_kind(program.cost(train=settings_of(clip=0.0)), "optimizer")


def test_only_training_has_a_loss_and_an_optimizer() -> None:
    program = compiled({})
    for phase in ("forward", "decode"):
        cost = program.cost(phase)  # type: ignore[arg-type]
        assert not of_kind(cost, "loss") + of_kind(cost, "optimizer")
    assert of_kind(program.cost(), "loss") == ["loss.cross_entropy"]


def test_logits_of_all_words_are_gathered_for_who_asks() -> None:
    """A rank that trains never sends logits, one that answers does."""
    cost = compiled({"parallel": {"tensor": 2}}, 2).cost("forward")
    (gather,) = (one for one in cost.operations if one.operator == "moec::gather_vocabulary")
    (sent,) = gather.sends
    assert cost.number(sent.bytes, B=2, S=6) == 2 * 6 * 33 * 4


def test_a_frozen_program_has_nothing_to_update() -> None:
    program = compiled({}, 1, layers=1)
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    cost = program.cost()
    assert not of_kind(cost, "optimizer")
    assert cost.backward_flops == 0
    assert cost.memory.gradients == 0
