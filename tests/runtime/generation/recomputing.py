"""Generation as plain as it can be: all tokens so far, recomputed for each new one.

`Recomputing` is a `Decoding` that remembers nothing but tokens; `written` is the loop, for one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers as hf
from torch import Tensor

from moec.errors import DataError
from moec.runtime.generation.cache import Cache, Slot
from moec.runtime.generation.sampling import Draws, Sampling
from moec.runtime.generation.stops import Stop

Model = Callable[[Tensor], Tensor]  # tokens [1, S] → logits [1, ., V], the last ones those of the last token


class Hashed:
    """A decoder whose logits depend on every token before, and on where it stands: one wrong token, or one
    token too many, and all that follows is another text."""

    def __init__(self, vocabulary: int, contexts: int = 1009) -> None:
        draw = torch.Generator().manual_seed(vocabulary)
        self.table = torch.randn(contexts, vocabulary, generator=draw, dtype=torch.float64)

    def __call__(self, tokens: Tensor) -> Tensor:
        state = 1
        for token in tokens[0].tolist():
            state = (state * 131 + token + 7) % len(self.table)
        return self.table[state][None, None]


class Recomputing:
    """A `Decoding` that keeps tokens and runs `model` over all of them; holds callers to the protocol."""

    device = torch.device("cpu")

    def __init__(self, model: Model, vocabulary: int, max_positions: int | None = None) -> None:
        self.model, self.vocabulary, self.max_positions = model, vocabulary, max_positions
        self.shapes: list[tuple[int, int]] = []  # of each step: rows, new positions

    def new_cache(self, rows: int, length: int) -> Cache:
        if self.max_positions is not None and length > self.max_positions:
            raise DataError("new_cache", f"{length} positions", f"at most {self.max_positions}")
        return Cache([Slot("tokens", (1, 1), 1, torch.long)], rows, length, self.device)

    def step(self, tokens_Bn: Tensor, past_B: Tensor, wanted_Bm: Tensor, cache: Cache, length: int) -> Tensor:
        (rows, size), kept_BL = tokens_Bn.shape, cache.views(len(tokens_Bn), length)[0]
        assert int(past_B.max()) + size <= length <= cache.length
        assert 0 <= int(wanted_Bm.min()) <= int(wanted_Bm.max()) < size
        self.shapes.append((rows, size))
        found = []
        for row, past in enumerate(past_B.tolist()):
            kept_BL[row, past : past + size] = tokens_Bn[row]
            ends = (past + wanted_Bm[row] + 1).tolist()
            found.append(torch.stack([self.model(kept_BL[row : row + 1, :end])[0, -1] for end in ends]))
        return torch.stack(found)


def written(
    model: Model,
    prompt: Sequence[int],
    most: int,
    *,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    row: int = 0,
    length: int | None = None,
    keep: int | None = None,
) -> list[int]:
    """The new tokens of one row, one recomputed context after the other."""
    sampling, stop = sampling or Sampling(), stop or Stop()
    draws = Draws(sampling.seed, row)
    context, everything, new = list(prompt), list(prompt), list[int]()
    while len(new) < most and not (new and stop.reached(new)):
        if length is not None and keep is not None and len(context) > length:
            context = context[-keep:]
        logits_V = model(torch.tensor([context]))[0, -1]
        token = _next(logits_V, everything, sampling, draws)
        for tokens in (context, everything, new):
            tokens.append(token)
    return new


def _next(logits_V: Tensor, before: list[int], sampling: Sampling, draws: Draws) -> int:
    scores_V = processed(logits_V, before, sampling)
    if sampling.greedy:
        return int(scores_V.argmax())
    left, shares = draws.next(), scores_V.double().softmax(-1).tolist()
    for token, share in enumerate(shares):
        left -= share
        if left < 0:
            return token
    return max(range(len(shares)), key=shares.__getitem__)


def processed(logits_V: Tensor, before: list[int], sampling: Sampling) -> Tensor:
    """The logits as Hugging Face's processors leave them, in its order."""
    scores = logits_V[None].to(torch.promote_types(logits_V.dtype, torch.float32))
    chain = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if not sampling.greedy:
        chain.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        chain.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        chain.append(hf.TopPLogitsWarper(sampling.top_p))
    left: Tensor = chain(torch.tensor([before]), scores)[0]
    return left
