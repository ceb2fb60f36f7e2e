"""The assertion that a program that remembers gives what recomputing gives."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moec.ir import Program
from moec.ir.feed import Steps, fed

from .tolerances import error_of, tolerance_of

# Ragged prefill, single tokens, chunks of which some rows need nothing.
RAGGED: Steps = ((3, 7, 5), (1, 1, 1), (1, 1, 1), (3, 2, 0), (2, 4, 3))
ONE_BY_ONE: Steps = ((1,),) * 5
AT_ONCE: Steps = ((6, 6),)


class Steppable(Protocol):
    """What `moec.decoder.Decoder` offers of this."""

    def new_cache(self, rows: int, length: int) -> Any:
        """Memory."""
        ...

    def step(self, tokens_Bn: Tensor, past_B: Tensor, wanted_Bm: Tensor, cache: Any, length: int) -> Tensor:
        """Logits [B, m, V]."""
        ...


def assert_decodes(decoder: Steppable, program: Program, steps: Steps = RAGGED, seed: int = 0) -> None:
    """Fed random tokens in `steps`, `decoder` gives the logits of `program(tokens)` at every position.

    `program` is run in evaluation mode; one that drops tokens for their capacity is not the same function.
    """
    length = max(map(sum, zip(*steps, strict=True))) + max(max(counts) for counts in steps)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, program.source.vocabulary, (len(steps[0]), length), generator=generator)
    program.eval()
    with torch.no_grad():
        needed = program(tokens)
    cache = decoder.new_cache(len(steps[0]), length)

    def step(new: Tensor, past: Tensor, wanted: Tensor, used: int) -> Tensor:
        return decoder.step(new, past, wanted, cache, used)

    found = fed(step, tokens, steps)
    rows = torch.cat([row[: len(given)] for row, given in zip(needed, found, strict=True)])
    error = error_of(torch.cat(found), rows)
    assert error <= tolerance_of(needed.dtype), f"decoded logits differ by {error:.1e} of their scale"
