"""Logits [N, V_l] whose words may be dealt out to the ranks of an axis: what operators over them share.

`axis` "" means that all words are here. Rows are worked on a few at a time: what is made of them on the way
stays in the processor's cache, and no second array as large as the logits is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moec.runtime.ops.groups import axis_rank, axis_size
from moec.runtime.ops.registry import demand
from moec.runtime.ops.vocabulary import all_reduced, stretch

# Elements of a chunk. On a CPU a few arrays of this size lie in a core's own cache (measured: of 2^14 to 2^20
# the fastest at 256 and at 50257 words); on a GPU it bounds the memory, and every chunk costs launches.
_CHUNK_ON_CPU, _CHUNK = 2**17, 2**26


def own_words(num_words: int, axis: str) -> tuple[int, int]:
    """(first word, number of words) that this rank holds."""
    return stretch(num_words, axis_size(axis), axis_rank(axis)) if axis else (0, num_words)


def require_own_words(logits: Tensor, num_words: int, axis: str, operator: str) -> int:
    """The first word of this rank; `OperatorError` unless the logits [N, V_l] are those of its words."""
    first, count = own_words(num_words, axis)
    demand(logits.dim() == 2, operator, f"logits {list(logits.shape)}", "[N, V_l]")
    found = f"{logits.shape[1]} words of {num_words}"
    demand(logits.shape[1] == count, operator, found, f"{count}, the part of this rank")
    return first


def over_ranks(x: Tensor, axis: str, how: str = "sum") -> Tensor:
    """The sum (or `max`) of `x` over the ranks that share the words; `x` itself where there are no others."""
    return all_reduced(x, axis, how) if axis else x


def largest(logits_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest logit [N] of the words here, in `dtype`; -inf where there are none."""
    if not logits_NV.shape[1]:
        return logits_NV.new_full(logits_NV.shape[:1], -torch.inf, dtype=dtype)
    return logits_NV.amax(1).to(dtype)


def log_sums(log_shares_NV: Tensor) -> Tensor:
    """The logarithm [N] of the sum of exponentials of logits relative to the largest one, told by the
    logarithms of their shares: that of the largest word is 1 / sum."""
    return -largest(log_shares_NV, log_shares_NV.dtype)


def row_chunks(logits_NV: Tensor) -> Iterator[slice]:
    """Stretches of rows, each small enough to be worked on at once."""
    rows, words = logits_NV.shape
    elements = _CHUNK_ON_CPU if logits_NV.device.type == "cpu" else _CHUNK
    size = max(1, elements // max(words, 1))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def softened(logits_NV: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """logits / temperature but for a number that is the same for all words of a row; in `dtype`.

    Centred before they are divided: what large logits have in common costs no digits.
    """
    if temperature == 1.0 or not logits_NV.shape[1]:
        return logits_NV.to(dtype)
    return (logits_NV.to(dtype) - largest(logits_NV, dtype).unsqueeze(1)).div_(temperature)
