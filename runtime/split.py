"""Which stretches of a token stream are trained on and which are held out.

The stream is cut into equal periods, and the end of each is held out. So the held-out text comes from all
over the corpus, does not move when training settings do, and no training window ever touches it.

Legend: N tokens in the stream, S sequence; a *window* is S + 1 neighbouring tokens: S inputs and, one
further, S targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.errors import DataError

#: Tokens between the starts of two held-out stretches, where the text is long enough for several.
PERIOD = 65536

Stretch = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Stretches `[start, stop)` of the stream; each holds at least one window."""

    train: tuple[Stretch, ...]
    held_out: tuple[Stretch, ...]


def split_stream(num_tokens: int, sequence: int, fraction: float, where: str = "text") -> Split:
    """Hold out about `fraction` of the stream, and never less than one window.

    Raises `DataError` when the stream is shorter than two windows, or `fraction` is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError("held-out fraction", str(fraction), "a number between 0 and 1", "0.05")
    window = sequence + 1
    if num_tokens < 2 * window:
        needed = f"{2 * window} tokens: one sequence of {sequence} to train on and one to hold out"
        raise DataError(where, f"{num_tokens} tokens", needed, "a longer text, or a shorter `sequence`")
    period = min(num_tokens, max(PERIOD, math.ceil(window / min(fraction, 1.0 - fraction))))
    held = min(max(window, int(fraction * period)), period - window)
    starts = range(0, num_tokens - period + 1, period)
    train = [(start, start + period - held) for start in starts]
    tail = (starts[-1] + period, num_tokens)
    if tail[1] - tail[0] >= window:
        train.append(tail)
    return Split(tuple(train), tuple((start + period - held, start + period) for start in starts))


def window_starts(stretches: tuple[Stretch, ...], sequence: int, offset: int = 0) -> NDArray[np.int64]:
    """Where windows begin when each stretch is tiled with them from `offset` on, i64, in stream order.

    Neighbouring windows share one token: the last target of one is the first input of the next.
    """
    tiles: list[NDArray[Any]] = [np.arange(a + offset, b - sequence, sequence) for a, b in stretches]
    return np.concatenate(tiles).astype(np.int64)
