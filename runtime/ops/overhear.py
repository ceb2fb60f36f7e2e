"""What routers say, for whoever wants to know: the scores of each layer, as experts are chosen by them.

    with overheard(note):       # note(scores [T,E], gate) of every expert layer, in the order they run in
        program.loss(tokens)

Kernels tell it, so it is heard of programs that are compiled too. Where nobody listens it costs one look at
a variable. Heard is this thread alone: simulated ranks are threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

Note = Callable[[Tensor, str], None]
_HERE = threading.local()


@contextmanager
def overheard(note: Note) -> Iterator[None]:
    """Call `note(scores [T,E], gate)` whenever experts are chosen inside; who listened before hears nothing
    meanwhile."""
    before: Note | None = getattr(_HERE, "note", None)
    _HERE.note = note
    try:
        yield
    finally:
        _HERE.note = before


def tell(scores: Tensor, gate: str) -> None:
    """Called by kernels that choose experts, with the scores before any noise is added to them."""
    note: Note | None = getattr(_HERE, "note", None)
    if note is not None:
        note(scores, gate)
