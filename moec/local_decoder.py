"""`LocalDecoder`: the part of a decoder that one rank of a placed program runs."""

from __future__ import annotations

import torch
from torch import Tensor

from moec import ir
from moec.decoder import Decoder
from moec.passes.place_dense import logits_split
from moec.runtime.generation.cache import Cache


class LocalDecoder(Decoder):
    """Runs the *cached* program of one rank; its caches hold the keys and values of the rank's own heads.

    It runs inside `moec.runtime.mesh.connected(mesh)`, and a step is one step of every rank: those without
    rows take part with none, B = 0. Rows may have other lengths on other data ranks; the ranks of a tensor
    group are given the same.
    """

    def __init__(
        self, program: ir.Program, length: int, *, packed: bool = False, verify: str = "auto"
    ) -> None:
        super().__init__(program, length, packed=packed, verify=verify)
        self._words = logits_split(program)

    def step(self, tokens_Bn: Tensor, past_B: Tensor, wanted_Bm: Tensor, cache: Cache, length: int) -> Tensor:
        """Logits [B, m, V] over the whole vocabulary, gathered where it is dealt out."""
        logits = super().step(tokens_Bn, past_B, wanted_Bm, cache, length)
        if self._words is None:
            return logits
        return torch.ops.moec.gather_vocabulary(logits, sum(self._words.blocks), self._words.axis)
