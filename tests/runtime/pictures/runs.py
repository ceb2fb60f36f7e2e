"""Records of runs that never were, written as the trainer writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moec.runtime.balance import Load
from moec.runtime.evaluate import Evaluation
from moec.runtime.observed import Observed, Sending
from moec.runtime.records import EvaluationRecord, RecordBook, StepRecord

TRAFFIC = {"data": Sending(12, 3_000), "expert_4": Sending(40, 1_200_000)}


def write_run(
    folder: Path, experts: Mapping[str, int], steps: Sequence[int], *,
    traffic: Mapping[str, Sending] = TRAFFIC, observed: bool = True, evaluations: Sequence[int] = (),
) -> Path:  # fmt: skip
    """A run whose experts are loaded at random, the first of each layer never; gives its folder.

    `observed`: whether it is of a moec that recorded that.
    """
    draw = np.random.default_rng(0)
    with RecordBook(folder, 0) as book:
        for step in steps:
            counts = {layer: _counts(draw, number) for layer, number in experts.items()}
            load = {layer: Load(1.5, 0.9, step / 1000) for layer in experts}
            book.write(StepRecord(step, 2.0, 1.9, 0.1, 0.0, 1e-3, 1.0, 99.0, load))
            if observed:
                entropy = {layer: float(np.log(number)) / 2 for layer, number in experts.items()}
                book.write(Observed(step, counts, entropy, traffic))
            if step in evaluations:
                book.write(EvaluationRecord(step, Evaluation(2.0, 99, load, counts)))
    return folder


def _counts(draw: np.random.Generator, experts: int) -> tuple[int, ...]:
    return (0, *draw.multinomial(64, [1 / (experts - 1)] * (experts - 1)).tolist()) if experts > 1 else (64,)
