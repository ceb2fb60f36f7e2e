"""Decoders by hand: what a cache can follow is decoded exactly, what it cannot is refused with its reason."""

from __future__ import annotations

import pytest
from torch import nn

import moec
from moec.decoder import Decoder
from moec.errors import PassError
from moec.testing.decoding import AT_ONCE, ONE_BY_ONE, RAGGED, assert_decodes

from .cached_models import CACHED, REFUSED, N


def program_of(model: nn.Module) -> moec.Program:
    """The dense program of a model in fp64; its passes are proved elsewhere."""
    return moec.compile(model.double().eval(), verify="off")


@pytest.mark.parametrize("name", CACHED)
def test_decoding_is_recomputing(name: str) -> None:
    program = program_of(CACHED[name]())
    decoder = Decoder(program, N, verify="full")
    for steps in (RAGGED, ONE_BY_ONE, AT_ONCE):
        assert_decodes(decoder, program, steps)
    assert [c.verdict for c in decoder.program.certificates[-3:]] == ["proved"] * 3


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_positions_is_refused(name: str) -> None:
    model, words = REFUSED[name]
    program = program_of(model())
    with pytest.raises(PassError) as refusal:
        Decoder(program, N)
    error = refusal.value
    assert error.where.startswith("derive_cache: ")
    assert words in error.found, error
    assert error.needed
    assert error.nearest
