"""What comes after the logits: the loss of a training step, or the words of all ranks put together.

As `moec.objective` and `moec.local_program` compute them.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from moec.cost.reading.value import Value
from moec.cost.step.written import Written, sending
from moec.cost.symbols import symbol
from moec.ir.mesh import DATA, Mesh
from moec.ir.placement import Split
from moec.runtime.ops.sent import all_gather_cost, all_reduce_cost
from moec.runtime.ops.work import Amount, Work


@dataclass(frozen=True)
class Head:
    """What a graph ends with. `words`: how the vocabulary is dealt out, None where it is whole; `has_terms`:
    the layers have loss terms too."""

    logits: Value
    words: Split | None = None
    has_terms: bool = False


def write_loss(written: Written, head: Head, mesh: Mesh) -> None:
    """Add the operations of the loss: it is computed in float32 at least, over all words."""
    sizes = _Sizes.of(head.logits)
    last = _cast(written, head, sizes)
    last = _parts(written, sizes, head.words.axis, last) if head.words else _whole(written, sizes, last)
    if mesh.data > 1:
        written.add_sum("count", mesh.axis(DATA), 1, torch.int64, (last,))


def write_gather(written: Written, head: Head) -> None:
    """Add `moec.gather_vocabulary`, where logits are wanted whole and the words are dealt out."""
    if head.words is None:
        return
    logits, ranks = head.logits, symbol(head.words.axis)
    assert logits.sizes is not None
    words = sympy.Integer(sum(head.words.blocks))
    longest = logits.bytes / logits.sizes[-1] * sympy.ceiling(words / ranks)
    sent = sending(head.words.axis, "moec.gather_vocabulary", all_gather_cost(ranks, longest))
    whole = logits.bytes / logits.sizes[-1] * words
    work = Work((), logits.bytes + ranks * longest, longest + ranks * longest + whole, 3)
    written.add(
        "gather_vocabulary",
        "moec::gather_vocabulary",
        logits.dtype,
        work,
        sends=(sent,),
        after=tuple(logits.made),
    )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the logits [N, V] as the loss sees them, of a vector [N] like them, and of the targets."""

    dtype: torch.dtype
    logits: Amount
    vector: Amount
    targets: Amount

    @classmethod
    def of(cls, logits: Value) -> _Sizes:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        assert logits.sizes is not None
        elements = logits.bytes / logits.dtype.itemsize
        positions = elements / logits.sizes[-1]
        return cls(dtype, dtype.itemsize * elements, dtype.itemsize * positions, 8 * positions)


def _cast(written: Written, head: Head, sizes: _Sizes) -> int:
    """Wider logits, where they are not as wide already."""
    logits = head.logits
    if logits.dtype == sizes.dtype:
        return max(logits.made, default=0)
    there, back = Work((), logits.bytes, sizes.logits), Work((), sizes.logits, logits.bytes)
    return written.add("cast", "aten::to", sizes.dtype, there, back, after=tuple(logits.made))


def _whole(written: Written, sizes: _Sizes, after: int) -> int:
    """Logarithms of shares, which are kept; the gradient of these, and of the logits."""
    there = Work((), sizes.logits + sizes.targets + sizes.vector, sizes.logits + sizes.dtype.itemsize, 2)
    back = Work((), 2 * sizes.logits + sizes.targets, 2 * sizes.logits, 2)
    saved = sizes.logits + sizes.targets + sizes.dtype.itemsize  # and how many count
    return written.add(
        "cross_entropy", "aten::cross_entropy_loss", sizes.dtype, there, back, saved=saved, after=(after,)
    )


def _parts(written: Written, sizes: _Sizes, axis: str, after: int) -> int:
    """Passes over this rank's words, and three vectors added up over ranks (`runtime/ops/vocabulary.py`)."""
    logits, vector = sizes.logits, sizes.vector
    there = Work((), 4 * logits + sizes.targets + 6 * vector, 2 * logits + 5 * vector, 12)
    back = Work((), 3 * logits + sizes.targets + 2 * vector, 3 * logits + vector, 8)
    one = all_reduce_cost(symbol(axis), vector)
    return written.add(
        "cross_entropy", "moec::cross_entropy_part", sizes.dtype, there, back,
        sends=(sending(axis, "moec.cross_entropy_part_totals", one + one + one),),
        sends_back=(sending(axis, "moec.cross_entropy_part_back", one),),
        saved=logits + sizes.targets + vector, after=(after,),
    )  # fmt: skip
