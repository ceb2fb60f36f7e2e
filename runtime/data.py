"""Batches of text, each a pure function of (seed, position).

Sample `i` of a run is the same window whatever the batch size, the number of micro-batches, or how often the
run was stopped and resumed. That is the whole mechanism behind exact resumption, and the door to several
ranks: rank r of R asks for its own slice of positions. An epoch visits the windows of the training text in a
random order; the next one cuts the text at another offset.

Legend: B batch, S sequence, N tokens of the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moec.errors import DataError
from moec.runtime.corpus import Corpus, find_texts
from moec.runtime.split import Split, split_stream, window_starts
from moec.runtime.vocabulary import Vocabulary, open_vocabulary

Batch = tuple[Tensor, Tensor]
IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class TextSpan:
    """The tokens `[start, stop)` of the stream come from `path`."""

    path: Path
    start: int
    stop: int


@dataclass(eq=False)
class TextData:
    """A corpus as one stream of tokens, with a part held out.

    `tokens_N` (u8 or i32) is only ever read; batches are copies, i64, on the CPU.
    """

    tokens_N: NDArray[Any] = field(repr=False)
    spans: tuple[TextSpan, ...] = field(repr=False)
    vocabulary: Vocabulary
    sequence: int
    split: Split
    _epochs: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def train_batch(self, seed: int, position: int, size: int) -> Batch:
        """Samples `position … position+size-1` of the run with `seed`: tokens, targets, i64 `[size, S]`."""
        starts = [self._train_start(seed, index) for index in range(position, position + size)]
        return self._windows(np.array(starts))

    def held_out_batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out windows in order, `size` at a time (the last batch may be smaller).

        With `limit`, at most that many batches, their windows spread evenly over all of the held-out text.
        """
        starts = self.held_out_starts
        if limit is not None and limit * size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit * size).astype(np.int64)]
        for first in range(0, len(starts), size):
            yield self._windows(starts[first : first + size])

    def require_vocabulary(self, size: int) -> None:
        """Raise `DataError`, naming token and file, unless every token is below `size`."""
        largest = int(self.tokens_N.max())
        if largest < size:
            return
        words = self.vocabulary
        raise DataError(
            str(self.file_of(int(self.tokens_N.argmax()))),
            f"token {largest}, and a model with {size} token values (0 to {size - 1})",
            f"a model with at least {largest + 1}; the vocabulary {words.name!r} has {words.size}",
        )

    def file_of(self, index: int) -> Path:
        """The file that token `index` was read from (a separator belongs to the file before it)."""
        starts = [span.start for span in self.spans]
        return self.spans[int(np.searchsorted(starts, index, side="right")) - 1].path

    @cached_property
    def held_out_starts(self) -> NDArray[np.int64]:
        """Where the held-out windows begin."""
        return window_starts(self.split.held_out, self.sequence)

    @cached_property
    def windows_per_epoch(self) -> int:
        """Samples until every training window was drawn once; the same in every epoch."""
        return len(window_starts(self.split.train, self.sequence, self._num_offsets - 1))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the tokens and of how they are cut: equal digests give equal batches."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens_N).data)
        digest.update(f"{self.tokens_N.dtype} {self.sequence} {self.split}".encode())
        return digest.hexdigest()

    @cached_property
    def _num_offsets(self) -> int:
        """In how many places an epoch may begin to tile, so that some stretch still holds a window."""
        longest = max(stop - start for start, stop in self.split.train)
        return min(self.sequence, longest - self.sequence)

    def _train_start(self, seed: int, index: int) -> int:
        epoch, place = divmod(index, self.windows_per_epoch)
        if (seed, epoch) not in self._epochs:
            while len(self._epochs) > 1:  # a batch may straddle two epochs, never more than it has to
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[seed, epoch] = self._order_of_epoch(seed, epoch)
        return int(self._epochs[seed, epoch][place])

    def _order_of_epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        draw = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        offset = int(draw.integers(self._num_offsets))
        return draw.permutation(window_starts(self.split.train, self.sequence, offset))

    def _windows(self, starts_B: NDArray[np.int64]) -> Batch:
        windows = self.tokens_N[starts_B[:, None] + np.arange(self.sequence + 1)]
        stream_BS1 = torch.from_numpy(windows.astype(np.int64))
        return stream_BS1[:, :-1].contiguous(), stream_BS1[:, 1:].contiguous()


def load_text(
    *sources: str | Path,
    sequence: int,
    vocabulary: str | Path | Vocabulary = "bytes",
    held_out: float = 0.05,
) -> TextData:
    """Read files, folders and globs into a `TextData`; without sources, Python's standard library.

    `vocabulary` is `"bytes"`, the path of a `tokenizer.json`, or a `Vocabulary`; between two files stands its
    separator token, where it has one. Raises `DataError` for missing, binary, undecodable, empty or too short
    text. The whole corpus is held in memory: one byte a token for bytes, four otherwise.
    """
    corpus, words = find_texts(*sources), open_vocabulary(vocabulary)
    tokens_N, spans = _read_stream(corpus, words)
    more = f" and {len(corpus.files) - 1} more" if len(corpus.files) > 1 else ""
    where = f"{corpus.files[0]}{more}"
    if not len(tokens_N):
        raise DataError(where, "empty text", "text to train on")
    split = split_stream(len(tokens_N), sequence, held_out, where)
    return TextData(tokens_N, spans, words, sequence, split)


def _read_stream(corpus: Corpus, words: Vocabulary) -> tuple[NDArray[Any], tuple[TextSpan, ...]]:
    parts: list[NDArray[Any]] = []
    spans: list[TextSpan] = []
    length = 0
    for path in corpus.files:
        tokens = words.encode(path.read_bytes(), str(path))
        if parts and words.separator is not None:
            parts.append(np.array([words.separator], dtype=tokens.dtype))
            length += 1
        parts.append(tokens)
        spans.append(TextSpan(path, length, length + len(tokens)))
        length += len(tokens)
    return np.concatenate(parts), tuple(spans)
