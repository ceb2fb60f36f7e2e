"""Regions whose insides are computed again before their gradients, as `moec.runtime.recompute` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from moec.cost.operation import Operation

KINDS = ("attention", "ffn", "branch", "moe", "mix")


def recomputed(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The same operations, those in regions forward a second time; what regions keep is what they read.

    An input that several regions read is kept once. Where the first half of an expert layer, which is not
    computed again, keeps one too, it is counted twice.
    """
    made, inputs = [], set[int]()
    for one in operations:
        if not _is_again(one):
            made.append(one)
            continue
        new = {index for index in one.after if operations[index].region != one.region} - inputs
        inputs |= new
        kept = sympy.Add(*(operations[index].forward.written for index in new))
        made.append(
            replace(
                one,
                backward=one.forward + one.backward,
                sends_back=(*one.sends, *one.sends_back),
                saved=kept,
                again=one.saved,
            )
        )
    return tuple(made)


def _is_again(one: Operation) -> bool:
    return one.region.rpartition("_")[0] in KINDS
