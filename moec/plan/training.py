"""`[student]`, `[distill]` and `[train]`: what is trained, from whom, and how."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from moec.plan.fields import (
    BelowOne,
    Count,
    Direction,
    Keeping,
    Listed,
    NonNegative,
    Positive,
    Share,
    StudentInit,
    TrainDtype,
    Whole,
)
from moec.plan.section import Section, complaint


class Student(Section):
    """The `[student]` table (Mixture-of-Students): the same model with fewer layers."""

    depth: Count | None = Field(default=None, description="Layers to keep; `by` says which.")
    keep: Annotated[tuple[Whole, ...], Listed] | None = Field(
        default=None, description="The teacher's layers to keep, instead of depth."
    )
    by: Keeping = Field(
        default="even",
        description="With depth, which layers stay: spread evenly over the teacher's, first and last among "
        "them (even), or those that change the residual stream most on held-out text (importance).",
    )
    init: StudentInit = Field(
        default="teacher",
        description="Where the student's weights come from: the teacher's layers, or all drawn anew (fresh).",
    )
    seed: Whole = Field(default=0, description="Seed of fresh weights.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Student:
        if (self.depth is None) == (self.keep is None):
            found = "neither depth nor keep" if self.depth is None else "both depth and keep"
            raise complaint(found, "one of depth and keep")
        if self.keep is not None and (not self.keep or list(self.keep) != sorted(set(self.keep))):
            raise complaint(f"keep = {list(self.keep)}", "layer numbers in ascending order", at=("keep",))
        if self.keep is not None and self.by != "even":
            raise complaint(f'by = "{self.by}" with keep', "depth, or keep alone", at=("by",))
        return self


class Distill(Section):
    """The `[distill]` table: loss = task + alpha · temperature² · KL(teacher ‖ student), for a while.

    The KL term ends after the fraction `stop` of the steps, after `stop_step` steps, or once `patience`
    evaluations in a row brought no better held-out loss, whichever comes first.
    """

    alpha: NonNegative = Field(default=1.0, description="Weight of the teacher's term.")
    temperature: Positive = Field(
        default=1.0, description="Softens both distributions before they are compared."
    )
    direction: Direction = Field(
        default="forward",
        description="KL(teacher ‖ student), which covers all that the teacher says (forward), or "
        "KL(student ‖ teacher), which avoids what it does not say (reverse).",
    )
    stop: Share = Field(
        default=1.0,
        description="Fraction of the training after which only the task loss remains (staged distillation).",
    )
    stop_step: Whole | None = Field(default=None, description="The same as a number of steps.")
    patience: Count | None = Field(
        default=None,
        description="Evaluations in a row without a better held-out loss after which only the task loss "
        "remains.",
    )
    top_k: Count | None = Field(
        default=None,
        description="Compare the teacher's likeliest words and the sum of all others; left out, all words.",
    )
    hidden: NonNegative = Field(
        default=0.0, description="Weight of the distance between hidden states of student and teacher."
    )
    hidden_map: Annotated[tuple[Whole, ...], Listed] | None = Field(
        default=None,
        description="For each layer of the student, the teacher's whose output it is to have; left out, "
        "those it was made from.",
    )
    dtype: TrainDtype = Field(
        default="fp32", description="Arithmetic of the teacher: fp32, or bf16 by autocast."
    )


def _final_lr(settings: dict[str, Any]) -> float:
    return settings["lr"] / 10


def _short_warmup(settings: dict[str, Any]) -> int:
    return min(100, settings["steps"] // 10)


class Train(Section):
    """The `[train]` table: one run of the trainer."""

    steps: Count = Field(default=1000, description="Optimizer steps.")
    batch: Count = Field(default=16, description="Sequences in one optimizer step.")
    sequence: Count = Field(
        default=256,
        description="Tokens in one sequence; left out: 256, or as many as the model has positions for, if "
        "fewer.",
    )
    accumulate: Count = Field(
        default=1, description="Equal parts that a batch is computed in; divides batch."
    )
    lr: Positive = Field(default=1e-3, description="Highest learning rate.")
    min_lr: NonNegative = Field(
        default_factory=_final_lr,
        description="Learning rate that the cosine ends at; a tenth of lr when left out.",
    )
    warmup: Whole = Field(
        default_factory=_short_warmup,
        description="Steps in which the rate climbs from zero; left out: 100, or a tenth of steps if fewer.",
    )
    weight_decay: NonNegative = Field(
        default=0.1, description="AdamW's decay of matrices; vectors are not decayed."
    )
    betas: Annotated[tuple[BelowOne, BelowOne], Listed] = Field(
        default=(0.9, 0.95), description="AdamW's two averages."
    )
    clip: NonNegative = Field(
        default=1.0, description="Largest norm of the whole gradient; 0 leaves it alone."
    )
    dtype: TrainDtype = Field(
        default="fp32", description="Arithmetic: fp32, or bf16 with fp32 master weights."
    )
    recompute: bool = Field(
        default=False,
        description="Compute the insides of attention, feed-forward and expert regions again in the backward "
        "pass instead of keeping them: less memory, about a third more work.",
    )
    seed: Whole = Field(default=0, description="Seed of the batches, of dropout and of routing noise.")
    log_every: Count = Field(default=10, description="Steps between lines of the log.")
    eval_every: Whole = Field(
        default=200, description="Steps between evaluations; 0 evaluates at the end alone."
    )
    eval_batches: Count = Field(default=8, description="Held-out batches in one evaluation.")
    save_every: Whole = Field(default=200, description="Steps between checkpoints; 0 saves at the end alone.")
    keep: Count = Field(default=2, description="Newest checkpoints that stay on disk.")

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.min_lr > self.lr:
            raise complaint(f"min_lr = {self.min_lr}", f"at most lr, {self.lr}", at=("min_lr",))
        if self.warmup > self.steps:
            raise complaint(f"warmup = {self.warmup}", f"at most steps, {self.steps}", at=("warmup",))
        if self.batch % self.accumulate:
            found = f"accumulate = {self.accumulate} with batch = {self.batch}"
            raise complaint(found, "a number that divides batch", at=("accumulate",))
        return self
