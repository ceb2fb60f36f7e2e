"""Rows that are written side by side in one cache, joining and leaving at any time (continuous batching).

    rows of the cache   0 … writing … joining … free
                        decoded together    prompts being read, shortest first

A step decodes one token of every writing row, then reads the prompts that join: all at once, or one chunk of
them. A row that ends gives its place to the last writing one, so the rows in use are always the first ones.

B rows, n new positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from moec.errors import DataError
from moec.runtime.generation.decoding import Decoding
from moec.runtime.generation.rows import Event, Row
from moec.runtime.generation.sampling import Draws, Sampling, choose
from moec.runtime.generation.stops import Stop

#: Positions looked at are a multiple of this, so that a step seldom has other shapes than the one before.
STRIDE = 32


class Batch:
    """Up to `rows` texts at a time, of up to `length` tokens each; more wait until a row is free.

    `chunk`: prompts are read this many positions at a time (left out: at once), which bounds the memory and
    the time of a step. `keep`: a text that comes to more than `length` tokens goes on from its last `keep`
    ones, as though they were its prompt; left out, `add` refuses it. The cache is allocated here, once. One
    thread at a time may use a batch.
    """

    def __init__(
        self, decoding: Decoding, rows: int, length: int, *, chunk: int | None = None, keep: int | None = None
    ) -> None:
        self.decoding, self.rows, self.length, self.chunk, self.keep = decoding, rows, length, chunk, keep
        self.cache = decoding.new_cache(rows, length)
        self._waiting: deque[Row] = deque()
        self._writing: list[Row] = []
        self._joining: list[Row] = []  # at the rows of the cache from `_first` on
        self._first = 0
        self._added = 0

    def __len__(self) -> int:
        """Texts that have not ended."""
        return len(self._waiting) + len(self._writing) + len(self._joining)

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        row: int = 0,
    ) -> int:
        """Queue a text; gives the id that its events carry. `row`: which stream of draws of the seed is its.

        Raises `DataError` for an empty prompt, a token outside of the vocabulary, a text that does not fit.
        """
        self._require_fit(prompt, max_new_tokens)
        sampling = sampling or Sampling()
        draws = Draws(sampling.seed, row)
        made = Row(self._added, list(prompt), max_new_tokens, sampling, stop or Stop(), draws)
        made.mark_seen(self.decoding.vocabulary, self.decoding.device)
        self._waiting.append(made)
        self._added += 1
        return made.id

    def cancel(self, id: int) -> bool:
        """End a text where it is: it has no more events. False when it had ended already."""
        for number, row in enumerate(self._writing):
            if row.id == id:
                self._leave(number)
                return True
        for number, row in enumerate(self._joining):
            if row.id == id:
                self._withdraw(number)
                return True
        waiting = [row for row in self._waiting if row.id == id]
        for row in waiting:
            self._waiting.remove(row)
        return bool(waiting)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Write at most one token more of every text, and tell of them.

        Raises `DataError` when logits are no numbers, and whatever a caller's `stop` function raises; the
        batch is of no use then.
        """
        return self._decode() + self._read_prompts()

    # writing

    def _decode(self) -> list[Event]:
        rows = self._writing
        if not rows:
            return []
        tokens_B1 = self._tensor([[row.context[row.past]] for row in rows])
        past_B = self._tensor([row.past for row in rows])
        needed = 1 + max(row.past for row in rows)
        logits_BV = self._run(0, tokens_B1, past_B, torch.zeros_like(tokens_B1), needed)
        for row in rows:
            row.past += 1
        return self._write(logits_BV, 0)

    def _write(self, logits_BV: Tensor, first: int) -> list[Event]:
        """Choose a token for each writing row from `first` on; those that ended, or are full, leave."""
        rows = self._writing[first:]
        tokens = choose(
            logits_BV, [row.sampling for row in rows], [row.seen for row in rows], [row.draws for row in rows]
        )
        events = [row.write(token) for row, token in zip(rows, tokens, strict=True)]
        for number in reversed(range(len(rows))):  # from the back, so that numbers stay true
            if events[number].ended:
                self._leave(first + number)
            elif rows[number].past == self.length:
                self._begin_again(first + number)
        return events

    def _leave(self, number: int) -> None:
        """The last writing row takes the place of this one."""
        last = self._writing.pop()
        if number < len(self._writing):
            self.cache.move(len(self._writing), number, last.past)
            self._writing[number] = last

    def _begin_again(self, number: int) -> None:
        row = self._writing[number]
        assert self.keep is not None, "a text that does not fit is refused when it is added"
        row.cut(self.keep)
        self._leave(number)
        self._waiting.appendleft(row)

    # reading prompts

    def _read_prompts(self) -> list[Event]:
        if not self._joining:
            self._admit()
        if not self._joining:
            return []
        logits_BV = self._read_chunk()
        read = [row for row in self._joining if row.past == len(row.context)]
        first = len(self._writing)
        for number, row in enumerate(read):
            self.cache.move(self._first + number, first + number, row.past)
        self._writing += read
        self._joining, self._first = self._joining[len(read) :], self._first + len(read)
        return self._write(logits_BV[: len(read)], first) if read else []

    def _admit(self) -> None:
        """As many of those that wait as there are free rows, the shortest first: they are read to the end
        first, and the rest of a chunk is no work for them."""
        free = min(self.rows - len(self._writing), len(self._waiting))
        self._joining = sorted((self._waiting.popleft() for _ in range(free)), key=lambda r: len(r.context))
        self._first = len(self._writing)

    def _read_chunk(self) -> Tensor:
        """Read the next chunk of all joining rows; logits of the last position each has come to."""
        rows, done = self._joining, self._joining[0].past
        most = max(len(row.context) for row in rows) - done
        size = most if self.chunk is None else min(self.chunk, most)
        chunks = [row.context[done : done + size] for row in rows]
        tokens_Bn = self._tensor([[*chunk, *[0] * (size - len(chunk))] for chunk in chunks])
        last_B1 = self._tensor([[len(chunk) - 1] for chunk in chunks])
        past_B = self._tensor([done] * len(rows))
        logits_BV = self._run(self._first, tokens_Bn, past_B, last_B1, done + size)
        for row, chunk in zip(rows, chunks, strict=True):
            row.past += len(chunk)
        return logits_BV

    def _withdraw(self, number: int) -> None:
        """A row whose prompt is being read goes; those behind it move up."""
        for later in range(number + 1, len(self._joining)):
            self.cache.move(self._first + later, self._first + later - 1, self._joining[later].past)
        del self._joining[number]

    # the program

    def _run(self, first: int, tokens_Bn: Tensor, past_B: Tensor, wanted_B1: Tensor, needed: int) -> Tensor:
        """Logits `[B, V]` of one step over the cache's rows from `first` on."""
        cache = self.cache if first == 0 else self.cache.part(first, len(past_B))
        length = min(self.length, -(-needed // STRIDE) * STRIDE)
        return self.decoding.step(tokens_Bn, past_B, wanted_B1, cache, length)[:, 0]

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.decoding.device)

    def _require_fit(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        size = self.decoding.vocabulary
        if not prompt:
            raise DataError("generate", "an empty prompt", "at least one token")
        wrong = [token for token in prompt if not 0 <= token < size]
        if wrong:
            raise DataError("generate", f"token {wrong[0]}", f"tokens from 0 to {size - 1}")
        if max_new_tokens < 1:
            raise DataError("generate", f"max_new_tokens {max_new_tokens}", "1 or more")
        require_room(len(prompt), max_new_tokens, self.length, self.keep)


def require_room(prompt: int, new: int, length: int, keep: int | None, where: str = "generate") -> None:
    """Refuse (`DataError`) a text of so many tokens that does not fit into `length` positions."""
    if prompt > length:
        raise DataError(where, f"a prompt of {prompt} tokens", f"at most {length} positions")
    if keep is None and prompt + new > length:
        found = f"a prompt of {prompt} tokens and {new} new ones: {prompt + new} positions"
        better = f"max_new_tokens {length - prompt}" if prompt < length else "a shorter prompt"
        raise DataError(where, found, f"at most {length} positions", better)
