"""What experts start from: copies, noisy copies, partly redrawn copies, slices, fresh weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import PassError
from moec.testing import DecoderRecipe
from moec.testing.parts.feed_forward import FUSED, FeedForwardRecipe

D, F, E = 12, 60, 4
FFN = FeedForwardRecipe(hidden=F, gating="separate", activation="silu")
GATED = DecoderRecipe(d_model=D, num_layers=1, ffn=FFN)


def _experts(init: str, recipe: DecoderRecipe = GATED, **settings: Any) -> tuple[moec.Program, nn.Module]:
    model = recipe.build(0, torch.float64)
    chosen = {"layers": "all", "experts": E, "init": init, **settings}
    return moec.compile(model, {"moe": chosen}, verify="full" if init == "split" else "off"), model


def _weights(program: moec.Program) -> dict[str, Tensor]:
    prefix = "moe_0."
    return {
        name.removeprefix(prefix): value.detach()
        for name, value in program.graph.named_parameters()
        if name.startswith(prefix) and "router" not in name
    }


def _dense(program: moec.Program, model: nn.Module) -> dict[str, Tensor]:
    return {
        leaf: model.get_parameter(program.origins[f"moe_0.{leaf}"].source or "").detach()
        for leaf in _weights(program)
    }


def test_copies_are_the_source() -> None:
    program, model = _experts("copy")
    dense = _dense(program, model)
    for leaf, value in _weights(program).items():
        assert value.shape[0] == E
        assert all(torch.equal(expert, dense[leaf]) for expert in value), leaf


def test_noise_has_the_stated_spread_and_differs_between_experts() -> None:
    program, model = _experts("noise", init_noise=0.25)
    dense = _dense(program, model)
    for leaf, value in _weights(program).items():
        noise = value - dense[leaf]
        assert len({float(expert.flatten()[0]) for expert in noise}) == E
        if value.dim() == 3:  # E·F·D numbers: a standard error of 1.4 %
            assert float(noise.std() / dense[leaf].std()) == pytest.approx(0.25, rel=0.06), leaf
            assert abs(float(noise.mean())) < 0.25 * float(dense[leaf].std()) * 4 / noise.numel() ** 0.5


@pytest.mark.parametrize("fused", [None, *FUSED])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_partial_redraws_the_same_units_everywhere(ratio: float, fused: str | None) -> None:
    """Drop-upcycling: an expert's redrawn hidden units are the same in up, gate and down, and its own."""
    ffn = FFN if fused is None else FeedForwardRecipe(F, gating="fused", activation="silu", fused=fused)  # type: ignore[arg-type]
    program, model = _experts("partial", DecoderRecipe(d_model=D, num_layers=1, ffn=ffn), init_ratio=ratio)
    redrawn = _redrawn_units(program, model, fused)
    first = next(iter(redrawn.values()))
    for leaf, units in redrawn.items():
        assert units == first, leaf
    assert all(len(units) == round(ratio * F) for units in first)
    assert len(set(map(frozenset, first))) == (1 if ratio == 1.0 else E)
    assert torch.equal(_weights(program)["down.bias"][0], _dense(program, model)["down.bias"])


def _redrawn_units(program: moec.Program, model: nn.Module, fused: str | None) -> dict[str, list[set[int]]]:
    """For each tensor with hidden units, those that differ from the source, expert by expert."""
    found, dense = {}, _dense(program, model)
    for leaf, value in _weights(program).items():
        if leaf == "down.bias":
            continue
        changed = value != dense[leaf]
        along = changed.any(1) if leaf == "down.weight" else changed.reshape(E, changed.shape[1], -1).any(2)
        units = torch.arange(F)
        if along.shape[1] == 2 * F:
            units = units.repeat_interleave(2) if fused == "stride" else units.repeat(2)
        found[leaf] = [set(units[row].tolist()) for row in along]
        assert all(
            int(row.sum()) == len(u) * along.shape[1] // F for row, u in zip(along, found[leaf], strict=True)
        )
    return found


def test_fresh_has_mean_and_spread_of_the_source_and_nothing_else() -> None:
    program, model = _experts("fresh")
    dense = _dense(program, model)
    for leaf, value in _weights(program).items():
        if value.dim() == 3:
            assert float(value.std() / dense[leaf].std()) == pytest.approx(1.0, rel=0.06), leaf
            error = float(dense[leaf].std()) * 4 / value.numel() ** 0.5
            assert float(value.mean()) == pytest.approx(float(dense[leaf].mean()), abs=error), leaf
        assert not bool((value == dense[leaf]).any()), leaf


def test_seeds_are_the_plans_and_layers_differ() -> None:
    recipe = DecoderRecipe(num_layers=2)

    def router(seed: int, layer: int) -> Tensor:
        program = moec.compile(
            recipe.build(), {"moe": {"layers": "all", "experts": 3, "seed": seed}}, verify="off"
        )
        return program.graph.get_parameter(f"moe_{layer}.router.weight").detach()

    assert torch.equal(router(1, 0), router(1, 0))
    assert not torch.equal(router(1, 0), router(2, 0))
    assert not torch.equal(router(1, 0), router(1, 1))


# slices


@pytest.mark.parametrize("fused", [None, *FUSED])
def test_slices_are_disjoint_and_together_the_source(fused: str | None) -> None:
    ffn = FFN if fused is None else FeedForwardRecipe(F, gating="fused", activation="silu", fused=fused)  # type: ignore[arg-type]
    program, model = _experts("split", DecoderRecipe(d_model=D, num_layers=1, ffn=ffn), top_k=E)
    assert {c.verdict for c in program.certificates if c.contract == "exact"} == {"proved"}
    dense = _dense(program, model)
    for leaf, value in _weights(program).items():
        if leaf != "down.bias":
            assert value.numel() == dense[leaf].numel(), leaf
            assert torch.equal(value.flatten().sort().values, dense[leaf].flatten().sort().values), leaf


def test_slices_of_seven_experts_are_the_very_numbers() -> None:
    """No power of two, in bf16: a factor in the weights would have rounded them."""
    recipe = DecoderRecipe(num_layers=1, ffn=FeedForwardRecipe(hidden=49))
    model = recipe.build(0, torch.bfloat16)
    plan = {"moe": {"layers": "all", "experts": 7, "top_k": 7, "init": "split"}, "compile": {"dtype": "bf16"}}
    program = moec.compile(model, plan, verify="off")
    again = program.to_dense_state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_split_that_does_not_divide() -> None:
    with pytest.raises(PassError, match=r"60 hidden units into 7(.|\n)*divides(.|\n)*experts = 6"):
        _experts("split", experts=7)


class _Shuffled(nn.Module):
    """A fused pair whose halves run in opposite directions: unit u meets unit F - 1 - u."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(torch.relu(gate) * up.flip(-1))


class _Scaled(nn.Module):
    """A learned slope for each hidden unit."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, F), nn.Linear(F, D)
        self.slope = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(torch.where(h > 0, h, h * self.slope))


def _substituted(make: Any) -> nn.Module:
    return GATED.build(0, torch.float64, substitutes={0: lambda recipe: make()})


@pytest.mark.parametrize("init", ["split", "partial"])
def test_units_out_of_order_are_refused(init: str) -> None:
    with pytest.raises(PassError, match=r"(hidden unit|feed-forward)"):
        moec.compile(_substituted(_Shuffled), {"moe": {"layers": "all", "experts": E, "init": init}})


@pytest.mark.parametrize("shape", [(F,), (1, F), (1, 1, F), (1,), ()])
@pytest.mark.parametrize("init", ["copy", "noise", "partial", "fresh"])
def test_a_learned_slope_is_shared_by_all_experts(init: str, shape: tuple[int, ...]) -> None:
    model = _substituted(lambda: _Scaled(*shape))
    program = moec.compile(model, {"moe": {"layers": "all", "experts": E, "init": init}}, verify="full")
    name = next(name for name, _ in model.named_parameters() if name.endswith("slope"))
    assert dict(program.named_parameters())[name].shape == shape


def test_a_slope_for_each_unit_cannot_be_dealt_out() -> None:
    with pytest.raises(PassError, match=r"slope \[60\](.|\n)*single numbers"):
        moec.compile(
            _substituted(lambda: _Scaled(F)), {"moe": {"layers": "all", "experts": E, "init": "split"}}
        )
    chosen = {"layers": "all", "experts": E, "top_k": E, "init": "split"}
    moec.compile(_substituted(_Scaled), {"moe": chosen}, verify="full")
