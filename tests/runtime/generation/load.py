"""A load on a batch: texts of random lengths that come over time, some cancelled, some too long."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from moec.errors import DataError
from moec.runtime.generation.batch import Batch
from moec.runtime.generation.sampling import Sampling


@dataclass
class Text:
    """One request, what was heard of it, and how it ended; `cancel_at`: after so many tokens."""

    prompt: list[int]
    most: int
    sampling: Sampling
    row: int
    cancel_at: int | None
    new: list[int] = field(default_factory=list)
    ended: str | None = None


@dataclass
class Load:
    """`texts`: those that were let in; `refused`: how many were too long."""

    texts: list[Text]
    refused: int
    most_at_once: int = 0


def requests(count: int, vocabulary: int, length: int, seed: int) -> list[Text]:
    """Prompts of 1 to `length` tokens, most of them short; a tenth asks for more than fits."""
    draw = random.Random(seed)
    made = []
    for row in range(count):
        prompt = [
            draw.randrange(vocabulary) for _ in range(min(length, 1 + int(draw.expovariate(6 / length))))
        ]
        room = length - len(prompt)
        most = (
            room + draw.randint(1, 9) if draw.random() < 0.1 or not room else draw.randint(1, min(room, 30))
        )
        sampling = Sampling(temperature=0.9, top_k=5, seed=seed) if draw.random() < 0.3 else Sampling()
        cancel_at = draw.randint(0, most) if draw.random() < 0.2 else None
        made.append(Text(prompt, most, sampling, row, cancel_at))
    return made


def run(batch: Batch, texts: list[Text], seed: int, each_step: Callable[[], None] = lambda: None) -> Load:
    """Let texts come, in bursts, while the batch works, until all have ended."""
    draw, coming, running = random.Random(seed), list(reversed(texts)), dict[int, Text]()
    load = Load([], 0)
    while coming or len(batch):
        for _ in range(min(len(coming), draw.choice((0, 0, 1, 2, 7)))):
            text = coming.pop()
            if len(text.prompt) + text.most > batch.length:
                with pytest.raises(DataError, match=f"at most {batch.length} positions"):
                    batch.add(text.prompt, text.most)
                load.refused += 1
                continue
            name = batch.add(text.prompt, text.most, sampling=text.sampling, row=text.row)
            running[name] = text
            load.texts.append(text)
            if text.cancel_at == 0:
                _cancel(batch, name, text)
        for event in batch.step():
            text = running[event.id]
            assert text.ended is None, "a text that has ended was written on"
            text.new.append(event.token)
            text.ended = event.ended
            if len(text.new) == text.cancel_at and text.ended is None:
                _cancel(batch, event.id, text)
        load.most_at_once = max(load.most_at_once, len(batch))
        each_step()
    return load


def bytes_of_tensors() -> int:
    """Memory of all tensors that anybody holds, less packed weights, which have no storage to ask."""
    gc.collect()
    things = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [thing for thing in things if thing.layout is torch.strided]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _cancel(batch: Batch, name: int, text: Text) -> None:
    assert batch.cancel(name)
    assert not batch.cancel(name)
    text.ended = "cancelled"
