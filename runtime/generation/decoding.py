"""What generation needs of a program that remembers: a protocol, so that `generate` knows no compiler."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moec.runtime.generation.cache import Cache


class Decoding(Protocol):
    """A program that is fed the next tokens of each row and remembers those before.

    `vocabulary`: number of tokens. `max_positions`: the longest row it can hold.
    """

    vocabulary: int
    max_positions: int

    @property
    def device(self) -> torch.device:
        """Where tokens are expected and logits come from."""
        ...

    def new_cache(self, rows: int, length: int) -> Cache:
        """Memory for `rows` rows of up to `length` positions; the caller owns it.

        Raises `DataError` when `length` is beyond `max_positions`.
        """
        ...

    def step(self, tokens_Bn: Tensor, past_B: Tensor, wanted_Bm: Tensor, cache: Cache, length: int) -> Tensor:
        """Logits `[B, m, V]` of the positions `wanted_Bm` (i64, each below n) among the n new ones.

        Row b of `tokens_Bn` (i64) are its tokens at positions `past_B[b] … past_B[b] + n - 1`; the first B
        rows of `cache` hold those before and are written in place. `length`: positions of the cache to look
        at, at least max(past) + n. A row shorter than n is padded on the right with any token: what it writes
        there is never seen, as long as its next step begins at its true length.
        """
        ...
