"""Texts from a program that remembers: all prompts of one request, to their ends.

The loop of a `Batch`, with rows numbered as in the request, results in the shape of the prompts, and tokens
handed out as they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias, Unpack

from torch import Tensor

from moec.runtime.generation.batch import Batch
from moec.runtime.generation.decoding import Decoding
from moec.runtime.generation.prompts import PromptsLike
from moec.runtime.generation.request import Options, Request
from moec.runtime.generation.rows import Ended, Event

#: Called with (row, token) for every token as it comes; what returns False ends that row.
Stream: TypeAlias = Callable[[int, int], object]


class Generation(Iterator[Event]):
    """The tokens of a request as they come: an iterator of events (`id`: the row's number, `token`, `ended`).

    Work is done as events are asked for; whoever stops asking stops the work. Raises nothing of its own:
    a request was checked when it was made. `numbers`: the rows that are written here; left out, all.
    """

    def __init__(self, decoding: Decoding, request: Request, numbers: range | None = None) -> None:
        prompts = request.prompts.rows
        self.request, self.numbers = request, range(len(prompts)) if numbers is None else numbers
        rows = min(request.rows, len(self.numbers))
        self.batch = Batch(decoding, rows, request.length, chunk=request.chunk, keep=request.keep)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.ended: list[Ended | None] = [None for _ in prompts]
        self._events: deque[Event] = deque()
        for number in self.numbers:
            self.batch.add(
                prompts[number],
                request.max_new_tokens,
                sampling=request.sampling,
                stop=request.stop,
                row=number,
            )

    def __next__(self) -> Event:
        """The next token of any row; `StopIteration` when all rows have ended."""
        while not self._events:
            if not len(self.batch):
                raise StopIteration
            self._events.extend(self.batch.step())
        written = self._events.popleft()
        event = written._replace(id=self.numbers[written.id])
        self.new[event.id].append(event.token)
        self.ended[event.id] = event.ended
        return event

    def cancel(self, row: int) -> None:
        """End a row after the tokens that were handed out; nothing happens when it has ended."""
        if row in self.numbers and self.ended[row] is None:
            written = self.numbers.index(row)
            self.batch.cancel(written)
            self.ended[row] = "cancelled"
            self._events = deque(event for event in self._events if event.id != written)

    def close(self) -> None:
        """End all rows."""
        for row in self.numbers:
            self.cancel(row)

    def result(self) -> Tensor | list[Tensor]:
        """The prompts and what was handed out so far, as `generate` returns them."""
        return self.request.prompts.with_new(self.new, self.request.pad)


def generate(
    decoding: Decoding,
    tokens: PromptsLike,
    max_new_tokens: int,
    *,
    stream: Stream | None = None,
    **options: Unpack[Options],
) -> Tensor | list[Tensor]:
    """Go on from `tokens` (i64 `[B, S]`, or a list of prompts of any lengths); see `Options`.

    Gives prompts and new tokens, `[B, S + n]` with n the most that any row wrote, or a list of tensors.
    Raises `DataError` before any work for what cannot be done, texts longer than the program among it.
    """
    request = Request.of(
        tokens,
        max_new_tokens,
        vocabulary=decoding.vocabulary,
        max_positions=decoding.max_positions,
        **options,
    )
    return finished(Generation(decoding, request), stream)


def finished(generation: Generation, stream: Stream | None = None) -> Tensor | list[Tensor]:
    """Run a generation to its end, telling `stream` of every token; gives its result."""
    for event in generation:
        if stream is not None and stream(event.id, event.token) is False:
            generation.cancel(event.id)
    return generation.result()
