"""The operations of a phase: those of a graph, and what its run does besides."""

from __future__ import annotations

from dataclasses import dataclass

from moec.cost.operation import Operation
from moec.cost.rank.weights import Weights
from moec.cost.reading.read import Reading
from moec.cost.reading.recomputed import recomputed
from moec.cost.reading.value import values_of
from moec.cost.step.loss import Head, write_gather, write_loss
from moec.cost.step.update import write_update
from moec.cost.step.written import Written
from moec.ir.placement import Split
from moec.plan import Train


@dataclass(frozen=True)
class TrainingStep:
    """How a step is taken: see `moec.plan.Train`. B is the sequences of one of its `accumulate` parts."""

    accumulate: int = 1
    recompute: bool = False
    clip: float = 1.0

    @classmethod
    def of(cls, settings: Train) -> TrainingStep:
        """What of `settings` a step costs."""
        return cls(settings.accumulate, settings.recompute, settings.clip)


ONE_PART = TrainingStep()


ONE_PART = TrainingStep()


def training_operations(
    reading: Reading, head: Head, weights: Weights, step: TrainingStep
) -> tuple[Operation, ...]:
    """Of a whole step: the graph, the loss, and what the optimizer does after all gradients.

    Operations of the kind `optimizer` run once a step, the others once for each of its parts. Left out is
    what happens once a run: its first step asks whether every parameter has a gradient.
    """
    operations = recomputed(reading.operations) if step.recompute else reading.operations
    written = Written(operations, "loss")
    write_loss(written, head, weights.mesh)
    written = Written(written.operations, "optimizer")
    if weights.groups:
        terms = 4 if head.has_terms else 2  # the loss, and what it is made of
        write_update(written, weights.groups, weights.mesh, terms=terms, clips=step.clip > 0)
    return tuple(written.operations)


def inference_operations(reading: Reading, head: Head) -> tuple[Operation, ...]:
    """Of a run that gives logits over all words."""
    written = Written(reading.operations, "logits", "collective")
    write_gather(written, head)
    return tuple(written.operations)


def head_of(reading: Reading, words: Split | None = None) -> Head:
    """The end of the graph; `words`: how its vocabulary is dealt out."""
    results = reading.results
    logits = results[0] if isinstance(results, list | tuple) else results
    has_terms = isinstance(results, list | tuple) and "counts" in results[1]
    return Head(values_of(logits)[0], words, has_terms)
