"""The picture of a run's experts in TensorBoard: after evaluations, as long as it costs next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moec.runtime.pictures.expert_run import read_run
from moec.runtime.pictures.experts import draw_experts

#: Of the time of a training, at most, that pictures may take.
SHARE = 1 / 30
#: What the first picture is taken to cost, in seconds: matplotlib is imported for it.
FIRST = 1.5


class BoardPictures:
    """Hands pictures of the run in `folder` to the summary writer `board`, as `experts`.

    One is left out when all of them together would take more than `SHARE` of the time since this was made: a
    training is never slowed down by more than that, and a short one has none (`moec plot` draws it).
    """

    def __init__(self, board: Any, folder: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._board, self._folder, self._clock = board, folder, clock
        self._began, self._spent, self._expected = clock(), 0.0, FIRST

    def show(self, step: int) -> bool:
        """Draw what was recorded so far, if there is time; whether it was drawn."""
        began = self._clock()
        if self._spent + self._expected > SHARE * (began - self._began):
            return False
        self._board.add_image("experts", pixels_of(self._folder), step, dataformats="HWC")
        self._expected = self._clock() - began
        self._spent += self._expected
        return True


def pixels_of(folder: Path) -> np.ndarray[Any, Any]:
    """The picture of the run in `folder`, u8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_experts(read_run(folder))
    figure.set_dpi(90)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
