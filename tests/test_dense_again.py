"""`to_dense_state_dict`: from a sparse program back to the source model's own state dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import moec
from moec.errors import VerifyError
from moec.testing import NAMED, DecoderRecipe, decoders
from moec.testing.parts.feed_forward import FeedForwardRecipe

RECIPE = DecoderRecipe(num_layers=2, tied="module", ffn=FeedForwardRecipe(hidden=12))
COPIES = {"layers": "all", "experts": 3}


class WithLeftovers(nn.Module):
    """A decoder with state that its forward never reads, and one buffer that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = RECIPE.build(0)
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("scale", torch.tensor([0.5]))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens) * self.scale


def _assert_same_state(model: nn.Module, dense: dict[str, Tensor]) -> None:
    needed = model.state_dict()
    assert list(needed) == [name for name in needed if name in dense]
    assert set(dense) == set(needed)
    for name, value in needed.items():
        assert dense[name].dtype == value.dtype, name
        assert dense[name].shape == value.shape, name
        assert torch.equal(dense[name], value), name


@pytest.mark.parametrize(
    "settings",
    [
        COPIES,
        {**COPIES, "residual": "learned", "balance": "bias"},
        {**COPIES, "residual": "sum", "gate": "probability", "capacity_factor": 1.0},
        {**COPIES, "init": "split"},
        {"layers": "1", "experts": 4, "init": "split", "residual": "learned"},
    ],
)
def test_bit_for_bit(settings: dict[str, Any]) -> None:
    model = WithLeftovers()
    program = moec.compile(model, {"moe": settings}, verify="off")
    dense = program.to_dense_state_dict()
    _assert_same_state(model, dense)
    other = WithLeftovers()
    nn.init.zeros_(other.unused)
    other.load_state_dict(dense, strict=True)
    assert torch.equal(other(RECIPE.tokens()), model(RECIPE.tokens()))


@settings(max_examples=settings.default.max_examples // 5)
@given(decoders())
def test_any_decoder(recipe: DecoderRecipe) -> None:
    """Every storage of every weight: transposed, fused, tied, shared, on the block itself."""
    model = recipe.build(0)
    dense = moec.compile(model, {"moe": COPIES}, verify="off").to_dense_state_dict()
    _assert_same_state(model, dense)


@pytest.mark.parametrize("name", ["gpt2_like", "phi3_like", "albert_like"])
def test_known_families(name: str) -> None:
    model = NAMED[name].build(0)
    experts = {"layers": "all", "experts": 2, "init": "split"}
    _assert_same_state(model, moec.compile(model, {"moe": experts}, verify="off").to_dense_state_dict())


def _nudge(program: moec.Program, name: str) -> None:
    """What a step of training does: one number of one expert."""
    with torch.no_grad():
        dict(program.graph.named_parameters())[name].view(-1)[0] += 1


def test_copies_that_drifted_are_named_and_left_out() -> None:
    program = moec.compile(RECIPE.build(0), {"moe": COPIES}, verify="off")
    _nudge(program, "moe_0.up.weight")
    source = program.origins["moe_0.up.weight"].source
    assert source is not None
    with pytest.raises(VerifyError, match=rf"{source} \(now moe_0\.up\.weight\)(.|\n)*strict=False"):
        program.to_dense_state_dict()
    dense = program.to_dense_state_dict(strict=False)
    assert set(RECIPE.build(0).state_dict()) - set(dense) == {source}


def test_the_dense_part_does_not_stand_for_experts_that_drifted() -> None:
    """Beside a residual branch the dense weights are still there, but they are no longer the whole layer."""
    program = moec.compile(RECIPE.build(0), {"moe": {**COPIES, "residual": "learned"}}, verify="off")
    _nudge(program, "moe_0.up.weight")
    with pytest.raises(VerifyError, match=r"moe_0\.up\.weight"):
        program.to_dense_state_dict()


def test_slices_stay_reversible_after_training() -> None:
    """A trained slice is still a part of one dense feed-forward: the layer with all experts active."""
    chosen = {"layers": "all", "experts": 3, "top_k": 3, "init": "split"}
    program = moec.compile(RECIPE.build(0, torch.float64), {"moe": chosen}, verify="off").eval()
    for name in ("moe_0.up.weight", "moe_1.down.weight", "moe_0.up.bias"):
        _nudge(program, name)
    model = RECIPE.build(1, torch.float64).eval()
    model.load_state_dict(program.to_dense_state_dict(), strict=True)
    torch.testing.assert_close(program(RECIPE.tokens()), model(RECIPE.tokens()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", ["noise", "partial", "fresh"])
def test_what_was_drawn_anew_cannot_be_undone(init: str) -> None:
    program = moec.compile(RECIPE.build(0), {"moe": {**COPIES, "init": init}}, verify="off")
    with pytest.raises(VerifyError, match=r"now moe_0\.up\.weight"):
        program.to_dense_state_dict()
    left = program.to_dense_state_dict(strict=False)
    missing = set(RECIPE.build(0).state_dict()) - set(left)
    assert missing == {o.source for n, o in program.origins.items() if o.experts}


def test_a_dense_program_is_the_source() -> None:
    model = WithLeftovers()
    _assert_same_state(model, moec.compile(model, verify="off").to_dense_state_dict())
