"""The parts of a step by themselves: rate, groups, load, nudge, accumulation, clipping."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moec.errors import TrainError
from moec.plan import LayerSettings, Train
from moec.runtime.balance import load_of, nudge_biases
from moec.runtime.evaluate import evaluate
from moec.runtime.groups import parameter_groups
from moec.runtime.schedule import learning_rate
from moec.runtime.step import OptimizerStep
from moec.runtime.trainable import LossTerms
from tests.runtime.tiny import LAYER, TinyProgram, tiny_settings, tiny_text


def gradients(program: TinyProgram) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


# the rate


@given(st.integers(1, 300), st.data())
def test_the_rate_climbs_to_lr_and_falls_to_min_lr(steps: int, data: st.DataObject) -> None:
    settings = Train(steps=steps, warmup=data.draw(st.integers(0, steps)), lr=0.5, min_lr=0.05)
    rates = [learning_rate(step, settings) for step in range(steps)]
    climb, fall = rates[: settings.warmup], rates[settings.warmup :]
    assert all(a < b for a, b in itertools.pairwise(climb))
    assert all(rate > 0 for rate in rates)
    assert all(a > b for a, b in itertools.pairwise(fall))
    if climb:
        assert climb[-1] == 0.5
    if len(fall) > 1:
        assert fall[0] == pytest.approx(0.5)
        assert fall[-1] == pytest.approx(0.05)


def test_the_middle_of_the_cosine() -> None:
    settings = Train(steps=111, warmup=10, lr=1.0, min_lr=0.0)
    assert learning_rate(60, settings) == pytest.approx(0.5)
    assert learning_rate(35, settings) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


# groups


def test_experts_have_their_own_groups_and_vectors_do_not_decay() -> None:
    program = TinyProgram()
    groups = {group["name"]: group for group in parameter_groups(program, 0.1)}
    assert {name: set(group["names"]) for name, group in groups.items()} == {
        "dense/decay": {"embedding", "router"},
        "dense/no_decay": {"norm.weight", "norm.bias"},
        "expert/decay": {"up", "down"},
        "expert/no_decay": {"up_bias"},
    }
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {
        "dense/decay": 0.1, "dense/no_decay": 0.0, "expert/decay": 0.1, "expert/no_decay": 0.0,
    }  # fmt: skip


def test_frozen_parameters_are_left_out() -> None:
    program = TinyProgram()
    program.up.requires_grad_(False)
    assert not any("up" in group["names"] for group in parameter_groups(program, 0.1))
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainError, match="at least one"):
        OptimizerStep(program, Train())


def test_weights_in_bf16_are_refused() -> None:
    with pytest.raises(TrainError, match="parameters in bfloat16"):
        OptimizerStep(TinyProgram().bfloat16(), Train())


# load


def test_load_of_even_lopsided_and_dropped_rows() -> None:
    even = load_of(torch.tensor([5, 5, 5, 5]), 20)
    assert (even.max_over_mean, even.entropy, even.dropped) == pytest.approx((1.0, 1.0, 0.0))
    one = load_of(torch.tensor([0, 6, 0]), 8)
    assert (one.max_over_mean, one.entropy, one.dropped) == pytest.approx((3.0, 0.0, 0.25))
    assert load_of(torch.tensor([7]), 7).entropy == 1.0
    assert load_of(torch.tensor([0, 0]), 4).dropped == 1.0


def test_the_nudge_moves_against_the_load() -> None:
    settings = {LAYER: LayerSettings(experts=3, balance="bias", bias_rate=0.5)}
    bias = torch.tensor([0.0, 1.0, 2.0])
    nudge_biases({LAYER: bias}, {LAYER: torch.tensor([9, 4, 2])}, settings)
    assert bias.tolist() == [-0.5, 1.5, 2.5]
    nudge_biases({LAYER: bias}, {LAYER: torch.tensor([4, 4, 4])}, settings)
    assert bias.tolist() == [-0.5, 1.5, 2.5]


def test_nudges_even_out_the_load_in_training(tmp_path: Path) -> None:
    data = tiny_text(tmp_path)
    busiest = {}
    for rate in (0.0, 0.01):
        settings = LayerSettings(experts=4, top_k=1, balance="bias", bias_rate=rate, balance_loss=0.0)
        program, settings_ = TinyProgram(settings=settings), tiny_settings(batch=8)
        step = OptimizerStep(program, settings_)
        for index in range(120):
            loss, _ = step.take(data.train_batch(0, 8 * index, 8), 1e-4)
        busiest[rate] = load_of(loss.counts[LAYER], 64).max_over_mean
    assert busiest[0.01] < 1.8 < busiest[0.0]


# gradients


def test_accumulation_gives_the_gradient_of_the_big_batch(tmp_path: Path) -> None:
    batch = tiny_text(tmp_path).train_batch(0, 0, 12)
    results = []
    for parts in (1, 2, 3, 12):
        program = TinyProgram(balance_loss=0.0).double()
        loss = OptimizerStep(program, tiny_settings(batch=12, accumulate=parts)).gradients(batch)
        results.append((loss, gradients(program)))
    (whole, expected), *others = results
    for loss, found in others:
        assert loss.loss == pytest.approx(whole.loss, rel=1e-12)
        assert torch.equal(loss.counts[LAYER], whole.counts[LAYER])
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-10, atol=1e-12 * float(gradient.abs().max())
            )


def test_clipping_scales_to_the_norm_and_only_down(tmp_path: Path) -> None:
    batch = tiny_text(tmp_path).train_batch(0, 0, 4)
    norms = {}
    for clip in (0.0, 0.05, 1e6):
        program = TinyProgram()
        step = OptimizerStep(program, tiny_settings(clip=clip))
        step.gradients(batch)
        before = step.clip()
        after = math.sqrt(sum(float(g.square().sum()) for g in gradients(program).values()))
        norms[clip] = (before, after)
    assert norms[0.05] == pytest.approx((norms[0.0][0], 0.05), rel=1e-4)
    assert norms[0.0][0] == pytest.approx(norms[0.0][1]) == pytest.approx(norms[1e6][1])
    assert norms[0.0][0] > 0.05


def test_a_step_is_adamw_on_the_mean_gradient(tmp_path: Path) -> None:
    batch = tiny_text(tmp_path).train_batch(0, 0, 4)
    settings = tiny_settings(clip=0.0, weight_decay=0.3)
    program, twin = TinyProgram().double(), TinyProgram().double()
    OptimizerStep(program, settings).take(batch, rate=0.01)
    twin.loss_terms(*batch)["loss"].backward()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        decay = 0.3 if name in {"embedding", "router", "up", "down"} else 0.0
        # the first step of Adam moves by the sign of the gradient
        moved = parameter.grad / (parameter.grad.abs() + 1e-8)
        expected = parameter.detach() * (1 - 0.01 * decay) - 0.01 * moved
        torch.testing.assert_close(program.get_parameter(name).detach(), expected, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in program.parameters())


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path: Path) -> None:
    batch = tiny_text(tmp_path).train_batch(0, 0, 4)
    losses = {}
    for dtype in ("fp32", "bf16"):
        program = TinyProgram()
        loss, _ = OptimizerStep(program, tiny_settings(dtype=dtype)).take(batch, 1e-3)
        losses[dtype] = loss.loss
        assert all(parameter.dtype == torch.float32 for parameter in program.parameters())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


@pytest.mark.parametrize("name", ["up", "norm.weight"])
def test_a_gradient_that_is_not_finite_names_its_parameter(tmp_path: Path, name: str) -> None:
    program = TinyProgram()
    step = OptimizerStep(program, tiny_settings())
    before = {key: value.clone() for key, value in program.state_dict().items()}
    program.get_parameter(name).register_hook(lambda gradient: gradient / 0.0)
    with pytest.raises(TrainError) as caught:
        step.take(tiny_text(tmp_path).train_batch(0, 0, 4), 1e-3)
    assert caught.value.where == name
    assert all(torch.equal(value, before[key]) for key, value in program.state_dict().items())
    assert all(parameter.grad is None for parameter in program.parameters())


# evaluation and sampling


def test_evaluation_is_the_mean_over_held_out_tokens(tmp_path: Path) -> None:
    data, program = tiny_text(tmp_path), TinyProgram(dropout=0.5).train()
    state = torch.get_rng_state()
    told = evaluate(program, data, tiny_settings(batch=5))
    assert program.training
    assert torch.equal(state, torch.get_rng_state())
    program.eval()
    losses = [
        float(
            nn.functional.cross_entropy(
                program(tokens).flatten(0, 1), targets.flatten(), reduction="sum"
            ).detach()
        )
        for tokens, targets in data.held_out_batches(1)
    ]
    assert told.num_tokens == 8 * len(losses)
    assert told.loss == pytest.approx(sum(losses) / told.num_tokens, rel=1e-6)
    assert told.bits == pytest.approx(told.loss / math.log(2))
    assert told.perplexity == pytest.approx(math.exp(told.loss))
    assert told.load[LAYER].dropped == 0.0
    assert sum(told.counts[LAYER]) == 2 * told.num_tokens  # top-2, nothing dropped


def test_evaluation_gives_back_what_it_draws(tmp_path: Path) -> None:
    class Drawing(TinyProgram):
        def loss_terms(self, *args: Any, **kwargs: Any) -> LossTerms:
            torch.rand(3)
            return super().loss_terms(*args, **kwargs)

    data, state = tiny_text(tmp_path), torch.get_rng_state()
    evaluate(Drawing(), data, tiny_settings())
    assert torch.equal(state, torch.get_rng_state())
