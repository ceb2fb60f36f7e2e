"""Decoders of whole models: every family against recomputing, plans, lengths, tables that follow weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import moec
from moec.decoder import Decoder
from moec.errors import DataError, PassError
from moec.ir.inputs import inputs_of
from moec.testing import NAMED, DecoderRecipe, assert_golden, decoders, decoys
from moec.testing.decoding import AT_ONCE, ONE_BY_ONE, RAGGED, assert_decodes
from moec.testing.decoys import DecoyRecipe
from tests.capture.families import FAMILIES

EXPERTS: dict[str, Any] = {"experts": 4, "top_k": 2, "layers": "1"}
EXAMPLES = max(6, settings().max_examples // 8)
LENGTH = 32
GOLDEN = Path(__file__).parent / "golden"


def sparse(recipe: DecoderRecipe, **moe: Any) -> moec.Program:
    """The program of a recipe in fp64 with experts in its second layer."""
    model = recipe.without_dropout().build(seed=0, dtype=torch.float64)
    return moec.compile(model, plan={"moe": {**EXPERTS, **moe}}, verify="off").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes(family: str) -> None:
    """A dense layer and one with experts beside the feed-forward, in fp64, parameters far from zero."""
    model = FAMILIES[family]().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    plan = {"moe": {**EXPERTS, "residual": "learned"}}
    program = moec.compile(model, plan=plan, verify="off").to_dtype(torch.float64).eval()
    decoder = Decoder(program, LENGTH, verify="off")
    for steps in (RAGGED, ONE_BY_ONE):
        assert_decodes(decoder, program, steps)


def _scaled(**scaling: Any) -> Any:
    return {"rope_parameters": {"rope_theta": 10000.0, **scaling}, "max_position_embeddings": 64}


SCALINGS = {
    "linear": _scaled(rope_type="linear", factor=2.0),
    "yarn": _scaled(rope_type="yarn", factor=2.0, original_max_position_embeddings=16),
    "llama3": _scaled(
        rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rotary_positions_decode(scaling: str) -> None:
    model = FAMILIES["llama"](**SCALINGS[scaling]).eval()
    program = moec.compile(model, verify="off").to_dtype(torch.float64).eval()
    assert_decodes(Decoder(program, LENGTH, verify="off"), program)


@pytest.mark.timeout(900)  # several programs, compiled and derived
@settings(max_examples=EXAMPLES)
@given(decoders(max_layers=2, interfaces=("logits",)))
def test_random_decoders_decode(recipe: DecoderRecipe) -> None:
    """Learned, rotary, ALiBi or no positions, windows, grouped heads, fused projections, parallel blocks."""
    model = recipe.without_dropout().build(seed=0)
    program = moec.compile(model, verify="off").to_dtype(torch.float64).eval()
    assert_decodes(Decoder(program, LENGTH, verify="off"), program)


@pytest.mark.timeout(900)  # several programs, compiled and derived
@settings(max_examples=EXAMPLES)
@given(decoys())
def test_strange_layers_decode_or_are_refused(decoy: DecoyRecipe) -> None:
    """What only looks like a feed-forward is decoded exactly, or refused with a reason; nothing else."""
    program = moec.compile(decoy.build(seed=0), verify="off").to_dtype(torch.float64).eval()
    try:
        decoder = Decoder(program, LENGTH, verify="off")
    except PassError as error:
        reason = error
    else:
        assert_decodes(decoder, program)
        return
    assert reason.where.startswith("derive_cache: ")
    assert reason.found
    assert reason.needed


def test_capacity_is_dropped() -> None:
    """A decoder sees one token of a batch at a time, so it is compared with the program that drops none."""
    recipe = NAMED["llama_like"]
    tight = sparse(recipe, capacity_factor=0.5, eval_capacity_factor=0.5, min_capacity=1, noise="rsample")
    loose = sparse(recipe)
    loose.load_state_dict(tight.state_dict())
    tokens = recipe.tokens(batch=3, length=20)
    assert not torch.allclose(tight(tokens), loose(tokens))
    assert_decodes(Decoder(tight, LENGTH), loose)


def test_a_single_position_wanted_of_many() -> None:
    program = sparse(NAMED["gpt2_like"])
    decoder, tokens = program.decoder(LENGTH), NAMED["gpt2_like"].tokens(batch=2, length=7)
    cache, past = decoder.new_cache(2, LENGTH), torch.zeros(2, dtype=torch.long)
    last = torch.tensor([[6], [3]])
    found = decoder.step(tokens, past, last, cache, 7)[:, 0]
    needed = program(tokens)
    torch.testing.assert_close(found, torch.stack([needed[0, 6], needed[1, 3]]), rtol=0, atol=1e-12)


def test_the_derivation_is_certified() -> None:
    decoder = Decoder(sparse(NAMED["bloom_like"]), LENGTH)
    found = {c.rewrite: c for c in decoder.program.certificates}
    for name in ("derive_cache", "trim_outputs", "pick_positions"):
        assert found[name].verdict == "proved"
        assert all(check.holds for check in found[name].checks)
        assert found[name].checks
    assert decoder.program.stage == "cached"


@pytest.mark.golden
def test_the_program_that_decodes_prints() -> None:
    """Tables, caches, one row of names; what changed against the sparse program can be read."""
    decoder = Decoder(sparse(NAMED["llama_like"], residual="learned"), LENGTH, verify="off")
    assert_golden(decoder.program.text(), GOLDEN / "text_cached.txt")
    changed = decoder.program.diff("sparse", "cached")
    assert "kept_keys = moec.remember(keys, k_9, at, dim=2)" in changed
    assert not any(word in decoder.program.text() for word in ("_default", "_tensor"))
    assert len(inputs_of(decoder.program.graph.graph)) == 7


def test_tables_follow_the_weights() -> None:
    """A learned position table is copied into a decoder; writing to it makes the next decoder anew."""
    recipe = NAMED["gpt2_like"]
    program = sparse(recipe)
    decoder = program.decoder(LENGTH)
    assert program.decoder(LENGTH) is decoder
    other = sparse(replace(recipe))
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight))
    program.load_state_dict(other.state_dict())
    assert program.decoder(LENGTH) is not decoder
    assert_decodes(program.decoder(LENGTH), program)


def test_training_between_decoding() -> None:
    program = sparse(NAMED["gpt2_like"])
    tokens = NAMED["gpt2_like"].tokens(batch=2, length=9)
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.1)
    for _ in range(2):
        assert_decodes(program.decoder(LENGTH), program, AT_ONCE)
        program.train()
        program.loss(tokens).backward()
        optimizer.step()
    assert_decodes(program.decoder(LENGTH), program)


def test_weights_that_are_moved_are_the_weights_that_decode() -> None:
    """A decoder joins weights that are read together; whoever gives a parameter other memory is followed."""
    program = sparse(NAMED["llama_like"])
    tokens = torch.randint(program.source.vocabulary, (2, 5))
    decoder = program.decoder(16)
    assert program.decoder(16) is decoder  # joining them moved weights, and that alone makes no new one
    program.generate(tokens, 4)
    for weight in program.parameters():
        weight.data = weight.detach() * 1.3
    found = program.generate(tokens, 4)
    for _ in range(4):
        tokens = torch.cat([tokens, program(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)


def test_another_dtype_has_tables_of_its_own() -> None:
    program = sparse(NAMED["gpt2_like"])
    program.decoder(LENGTH)
    narrow = program.to_dtype(torch.float32).eval()
    assert_decodes(narrow.decoder(LENGTH), narrow)
    program.to(torch.float32)
    assert_decodes(program.decoder(LENGTH), program)


def test_more_positions_than_the_model_has() -> None:
    program = sparse(NAMED["gpt2_like"])
    with pytest.raises(DataError, match="at most 64"):
        program.decoder(65)
    with pytest.raises(DataError, match="at most 16"):
        Decoder(program, 16).new_cache(1, 17)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_program_without_numbers_has_a_decoder_of_the_same_text(family: str) -> None:
    """What a program on meta costs to decode can be read off it: learned positions, rotary, ALiBi."""
    plan = {"moe": EXPERTS}
    decoder = moec.compile(FAMILIES[family](), plan=plan, verify="off").decoder(LENGTH)
    with torch.device("meta"):
        model = FAMILIES[family]()
    hollow = moec.compile(model, plan=plan, verify="off").decoder(LENGTH)
    assert words(hollow.program).replace('device="meta"', 'device="cpu"') == words(decoder.program)
    weights = [*hollow.fused.parameters(), *hollow.fused.buffers(), *hollow.program.buffers()]
    assert {value.device.type for value in weights} == {"meta"}


def words(program: object) -> str:
    """A program's text without its columns."""
    return " ".join(str(program).split())
