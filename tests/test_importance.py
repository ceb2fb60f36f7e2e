"""Block influence against hooks on the plain model, and what is chosen by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import DataError, PassError
from moec.importance import block_influence, influence_table, influences
from moec.testing import DecoderRecipe, decoders
from tests.capture.families import FAMILIES

EXACT = {"moe": {"layers": "1::2", "experts": 3, "top_k": 2, "gate": "normalized", "init": "copy"}}


def gpt(layers: int = 4, dropout: float = 0.1) -> GPT:
    """The example, small, its layers unlike each other."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=61, seq=16, layers=layers, width=16, heads=2, dropout=dropout))
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            for value in block.parameters():
                value.mul_(1 + 3 * ((layer * 5) % 7))
    return model


def tokens_of(vocabulary: int, batch: int = 5, length: int = 9) -> Tensor:
    """Random tokens."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(2))


def by_hooks(model: nn.Module, modules: list[nn.Module], tokens: Tensor, run: object = None) -> list[float]:
    """1 - mean cosine of the first input and the output of each module, in the order they are called."""
    found: list[float] = []

    def note(_: nn.Module, given: tuple[Tensor, ...], kept: dict[str, Tensor], out: object) -> None:
        x = given[0] if given else kept["hidden_states"]
        y = out[0] if isinstance(out, tuple) else out
        assert isinstance(y, Tensor)
        dots = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        found.append(1 - float(dots.mean()))

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in dict.fromkeys(modules)]
    with torch.no_grad():
        run(model.eval(), tokens) if callable(run) else model.eval()(tokens)
    for handle in handles:
        handle.remove()
    return found


@given(decoders(float32=False))
@settings(max_examples=settings.default.max_examples // 8)
def test_random_decoders_against_hooks(recipe: DecoderRecipe) -> None:
    """Pre, post, sandwiched and parallel blocks, shared ones too: what enters and leaves the module."""
    model = recipe.build(seed=1, dtype=torch.float64)
    tokens = recipe.tokens(batch=3)
    blocks = list(model.get_submodule(recipe.names.blocks).children())
    program = moec.compile(model, verify="off")
    needed = by_hooks(model, blocks, tokens, recipe.logits)
    assert block_influence(program, tokens, rows=2) == pytest.approx(needed, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_families_against_hooks(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    layers = list(model.get_decoder().layers if name != "falcon" else model.transformer.h)
    tokens = tokens_of(96)
    needed = by_hooks(model, layers, tokens, lambda m, t: m(input_ids=t, use_cache=False))
    assert block_influence(moec.compile(model, verify="off"), tokens) == pytest.approx(needed, abs=2e-6)


def test_experts_that_change_nothing_change_no_influence(tmp_path: Path) -> None:
    """Sparse, loaded and fused programs, whatever the size of a batch; mode and random state as before."""
    tokens = tokens_of(61)
    dense = moec.compile(gpt(), verify="off")
    needed = block_influence(dense, tokens)
    sparse = moec.compile(gpt(), EXACT, verify="off").train()
    state = torch.get_rng_state()
    found = block_influence(sparse, tokens, rows=3)
    assert sparse.training
    assert torch.equal(torch.get_rng_state(), state)
    assert found == pytest.approx(needed, abs=1e-5)
    assert block_influence(moec.load(sparse.save(tmp_path / "saved")), tokens, rows=3) == found
    fused = moec.compile(gpt(), EXACT, verify="off", backend="fused")
    assert block_influence(fused, tokens, rows=1) == pytest.approx(needed, abs=1e-5)


def test_a_layer_that_does_nothing_has_none_and_leaves_first() -> None:
    model = gpt()
    with torch.no_grad():
        for linear in (model.blocks[2].attention.out, model.blocks[2].mlp.down):
            linear.weight.zero_()
            linear.bias.zero_()
    program, tokens = moec.compile(model, verify="off"), tokens_of(61)
    rows = influences(program, tokens)
    assert rows[2].value == pytest.approx(0, abs=1e-6)
    assert rows[2].rank == 3
    assert [row.path for row in rows] == [f"blocks.{i}" for i in range(4)]
    assert influence_table(rows).splitlines()[0].split() == ["layer", "influence", "rank"]
    assert influence_table(rows).splitlines()[3].split()[2:] == ["3", "blocks.2"]
    student = program.student({"student": {"depth": 3, "by": "importance"}}, tokens=tokens)
    with torch.no_grad():
        assert torch.allclose(student.eval()(tokens), program.eval()(tokens), atol=1e-5)


def test_what_cannot_be_measured_is_refused() -> None:
    program, tokens = moec.compile(gpt(), verify="off"), tokens_of(61)
    with pytest.raises(DataError, match="tokens from 0 to 60"):
        block_influence(program, tokens + 10)
    with pytest.raises(DataError, match="at least one sequence"):
        block_influence(program, tokens, rows=0)
    with pytest.raises(DataError, match=r"integers \[B, S\]"):
        block_influence(program, tokens[0])
    placed = moec.compile(gpt(), {"parallel": {"data": 2}}, verify="off", world=2)
    assert block_influence(placed, tokens) == block_influence(program, tokens)
    with pytest.raises(PassError, match="the program of rank 1"):
        block_influence(placed.partition(1), tokens)
