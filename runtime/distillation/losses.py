"""What a lesson costs the student: DeepSpeed-MoE, section 4.2.1, equation 1.

    loss = task + alpha · temperature² · KL(teacher ‖ student) + hidden · distance

The KL and the distance are means over the positions that have a target, those of the task loss. The square of
the temperature keeps the size of the gradient, which softening both distributions divides by it (Hinton et
al., arXiv 1503.02531, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.errors import TrainError
from moec.ir.placement import Split
from moec.runtime.distillation.lesson import Lesson, TopWords
from moec.runtime.ops.registry import wide
from moec.runtime.trainable import LocalTrainable


@dataclass(frozen=True)
class Words:
    """How the words of logits lie: `number` in all, dealt out to the ranks of `axis` ("" : all are here)."""

    number: int
    axis: str = ""

    @classmethod
    def of(cls, width: int, split: Split | None) -> Words:
        """Those of logits `[…, width]` here, dealt out as `split` says; None: not dealt out."""
        return cls(width) if split is None else cls(sum(split.blocks), split.axis)


def words_of(program: object, logits: Tensor) -> Words:
    """How the words of the logits `[…, V]` that `program.run` gives lie on its ranks.

    `program`: a trainable one, which deals words out where it is one rank's part (a `LocalTrainable`).
    """
    return Words.of(logits.shape[-1], program.words if isinstance(program, LocalTrainable) else None)


def kl_loss(logits_BSV: Tensor, lesson: Lesson, counted_BS: Tensor, count: Tensor, words: Words) -> Tensor:
    """The sum of the KL over the counted positions (bool `[B, S]`), over `count`; `[]`, in fp32 at least.

    Where the vocabulary is dealt out, every rank of `words.axis` gets the whole sum.
    """
    distill, told = lesson.distill, lesson.told
    # Positions that do not count are left out before anything is computed of them.
    how = (words.number, distill.temperature, distill.direction == "reverse", words.axis)
    if isinstance(told, TopWords):
        chosen = told.words[counted_BS], told.log_shares[counted_BS]
        rows_N = torch.ops.moec.divergence_top(logits_BSV[counted_BS], *chosen, *how)
    else:
        rows_N = torch.ops.moec.divergence(logits_BSV[counted_BS], told[counted_BS], *how)
    return rows_N.sum() / count


def hidden_loss(states: Mapping[int, Tensor], lesson: Lesson, counted_BS: Tensor, count: Tensor) -> Tensor:
    """Mean over layers of the distance |student - teacher|² / |teacher|², summed over counted positions, over
    `count`; `[]`, in fp32 at least.

    `states`: the student's hidden states `[B, S, D]`, of the layers that `lesson.hidden` speaks of. Where the
    teacher's vector is zero there is no such distance: the position adds nothing. Raises `TrainError` for
    states of another shape than the teacher's.
    """
    layers = [_distance(layer, states[layer], said, counted_BS) for layer, said in lesson.hidden.items()]
    return torch.stack(layers).mean() / count


def _distance(layer: int, student_BSD: Tensor, teacher_BSD: Tensor, counted_BS: Tensor) -> Tensor:
    """The sum over counted positions; both sides in the wider of their dtypes."""
    if student_BSD.shape != teacher_BSD.shape:
        found = f"{list(student_BSD.shape)} of the student, {list(teacher_BSD.shape)} of the teacher"
        raise TrainError(f"hidden states of layer {layer}", found, "the same shape")
    dtype = torch.promote_types(wide(student_BSD.dtype), teacher_BSD.dtype)
    ours_ND, theirs_ND = (side[counted_BS].to(dtype) for side in (student_BSD, teacher_BSD))
    # In units of the teacher's largest number, so that squares neither overflow nor vanish.
    largest_N1 = theirs_ND.abs().amax(-1, keepdim=True)
    unit_N1 = largest_N1.masked_fill(largest_N1 == 0, 1.0)
    apart_N = ((ours_ND - theirs_ND) / unit_N1).square().sum(-1)
    size_N = (theirs_ND / unit_N1).square().sum(-1)
    return (apart_N / size_N.clamp_min(1.0)).masked_fill(largest_N1.squeeze(-1) == 0, 0.0).sum()


def weighted(lesson: Lesson, kl: Tensor, hidden: Tensor | None) -> Tensor:
    """What is added to the task loss."""
    distill = lesson.distill
    total = distill.alpha * distill.temperature**2 * kl
    return total if hidden is None else total + distill.hidden * hidden
