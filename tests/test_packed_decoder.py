"""A decoder with packed weights: the same logits, kept and found again."""

from __future__ import annotations

import torch

import moec
from examples import gpt
from moec.decoder import Decoder
from moec.program import Program
from moec.runtime.ops.packed import PACKED
from moec.testing.tolerances import error_of, tolerance_of

MOE = {"layers": "1::2", "experts": 4, "top_k": 2, "init": "fresh", "residual": "learned"}


def _logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    rows, size = tokens.shape
    past, wanted = torch.zeros(rows, dtype=torch.int64), torch.arange(size).expand(rows, size)
    return decoder.step(tokens, past, wanted, decoder.new_cache(rows, size), size)


def _close(found: torch.Tensor, needed: torch.Tensor) -> bool:
    return error_of(found, needed) < tolerance_of(found.dtype)


def _program() -> Program:
    torch.manual_seed(0)
    return moec.compile(gpt.small(), {"moe": MOE}, verify="off").eval()


def test_packed_weights_give_the_same_logits_until_they_are_written_to() -> None:
    program, before = _program(), PACKED.num_bytes()
    tokens = torch.randint(256, (3, 5), generator=torch.Generator().manual_seed(0))
    packed = program.decoder(32, packed=True)
    assert PACKED.num_bytes() > before
    assert _close(_logits(packed, tokens), program(tokens))
    with torch.no_grad():
        for weight in program.parameters():
            weight.mul_(1.1)
    assert _close(_logits(program.decoder(32, packed=True), tokens), program(tokens))


def test_a_packed_decoder_will_do_where_none_was_asked_for() -> None:
    program = _program()
    plain = program.decoder(32)
    packed = program.decoder(32, packed=True)
    assert packed is not plain
    assert packed.packed
    assert not plain.packed
    assert program.decoder(32, packed=True) is packed
    assert program.decoder(32) in (plain, packed)
