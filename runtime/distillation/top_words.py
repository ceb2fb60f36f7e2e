"""The likeliest words of a teacher, wherever its vocabulary lies.

Legend: B batch, S sequence, N = B·S positions, V words (those of this rank), K likeliest words, R ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.distillation.lesson import TopWords
from moec.runtime.distillation.losses import Words
from moec.runtime.ops.groups import axis_size
from moec.runtime.ops.logits import largest, log_sums, over_ranks, require_own_words, row_chunks, softened
from moec.runtime.ops.registry import demand, wide
from moec.runtime.ops.vocabulary import stretch

_collectives = torch.ops._c10d_functional
_NAME = "top_words"


@torch.no_grad()
def top_words(logits_BSV: Tensor, k: int, temperature: float, words: Words) -> TopWords:
    """The `k` likeliest words of each position, likeliest first, by shares of softmax(logits / temperature).

    Of words that are equally likely the first of the vocabulary is taken, and stands first: the same words
    however they are dealt out. Every rank of `words.axis` calls it and gets all of them; K (logit, word)
    pairs a position travel, and two vectors. Raises `OperatorError` for more words than there are.
    """
    logits_NV = logits_BSV.flatten(0, -2)
    first = require_own_words(logits_NV, words.number, words.axis, _NAME)
    demand(0 < k <= words.number, _NAME, f"k = {k}", f"1 to {words.number}, the words there are")
    dtype = wide(logits_NV.dtype)
    values_NK, places_NK = _likeliest_here(logits_NV, min(k, logits_NV.shape[1]), dtype)
    if words.axis:
        values_NK, places_NK = _likeliest_of_all(values_NK, places_NK + first, k, words)
    centre_N, total_N = _totals(logits_NV, temperature, words.axis, dtype)
    log_shares_NK = (values_NK - centre_N.unsqueeze(1)) / temperature - total_N.unsqueeze(1)
    shape = (*logits_BSV.shape[:-1], k)
    # In float32 whatever the teacher's dtype: a lesson on disk is to be the lesson, bit for bit.
    return TopWords(places_NK.view(shape), log_shares_NK.float().view(shape))


def _totals(logits_NV: Tensor, temperature: float, axis: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest logit [N] of all words, and the logarithm of the sum of exponentials relative to it."""
    here_N = largest(logits_NV, dtype)
    logs_N = torch.empty_like(here_N)
    for at in row_chunks(logits_NV):
        logs_N[at] = log_sums(softened(logits_NV[at], temperature, dtype).log_softmax(1))
    if not axis:
        return here_N, logs_N
    centre_N = over_ranks(here_N, axis, "max")
    logs_N = ((here_N - centre_N) / temperature + logs_N).masked_fill(here_N == -torch.inf, -torch.inf)
    return centre_N, over_ranks(logs_N.exp(), axis).log()


def _likeliest_here(logits_NV: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest logits [N, K], in order, and their places."""
    values_NK = logits_NV.new_empty(len(logits_NV), k, dtype=dtype)
    places_NK = torch.empty_like(values_NK, dtype=torch.long)
    if k:
        for at in row_chunks(logits_NV):
            values_NK[at], places_NK[at] = _likeliest(logits_NV[at].to(dtype), k)
    return values_NK, places_NK


def _likeliest(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_NK, places_NK = logits_NV.topk(k)
    least_N1 = values_NK[:, -1:]
    crowded_N = (logits_NV >= least_N1).sum(1) > k
    if crowded_N.any():
        places_NK[crowded_N] = _first_of_equals(logits_NV[crowded_N], least_N1[crowded_N], k)
    places_NK = places_NK.sort(1).values  # of equals the first is to stand first, and topk promises nothing
    return _in_order(logits_NV.gather(1, places_NK), places_NK, k)


def _first_of_equals(logits_NV: Tensor, least_N1: Tensor, k: int) -> Tensor:
    """The places [N, K] of all words above the least that is taken, and of the first ones as likely as it."""
    above_NV, equal_NV = logits_NV > least_N1, logits_NV == least_N1
    free_N1 = k - above_NV.sum(1, keepdim=True)
    taken_NV = above_NV | (equal_NV & (equal_NV.cumsum(1) <= free_N1))
    return taken_NV.nonzero()[:, 1].view(-1, k)


def _in_order(values_NM: Tensor, words_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first `k` by value; equals stay in the order they are in."""
    order_NK = values_NM.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values_NM.gather(1, order_NK), words_NM.gather(1, order_NK)


def _likeliest_of_all(values_NK: Tensor, words_NK: Tensor, k: int, words: Words) -> tuple[Tensor, Tensor]:
    """The likeliest of those that each rank has found, [N, k]."""
    ranks = axis_size(words.axis)
    missing = min(k, stretch(words.number, ranks, 0)[1]) - values_NK.shape[1]
    # Ranks with fewer words come after those with more: what pads them stands behind every word.
    values = _gathered(F.pad(values_NK, (0, missing), value=-torch.inf), words.axis, ranks)
    return _in_order(values, _gathered(F.pad(words_NK, (0, missing)), words.axis, ranks), k)


def _gathered(rows_NK: Tensor, axis: str, ranks: int) -> Tensor:
    """Those of all ranks side by side, [N, R·K], in the order of ranks: that of the vocabulary."""
    together = _collectives.all_gather_into_tensor(rows_NK.contiguous().flatten(), ranks, axis)
    return _collectives.wait_tensor(together).view(ranks, *rows_NK.shape).movedim(0, 1).flatten(1)
