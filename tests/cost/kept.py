"""What autograd holds on to between forward and backward, storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Held:
    """A saved tensor; nothing but autograd's graph refers to this."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(run: Callable[[], Any], without: Iterable[Tensor]) -> tuple[int, Any]:
    """Bytes of the storages that autograd keeps after `run`, those of `without` left out; and its result.

    A storage that many operators keep counts once, a view counts its whole storage, and what was kept for
    results that are gone counts no more. Not to be pulled on: nothing that comes back knows its gradient.
    """
    held: list[weakref.ref[_Held]] = []
    left_out = {tensor.untyped_storage()._cdata for tensor in without}

    def pack(tensor: Tensor) -> _Held:
        box = _Held(tensor.detach())  # with its graph, a saved result would keep itself alive
        held.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        result = run()
    alive = [box.tensor.untyped_storage() for box in (ref() for ref in held) if box is not None]
    storages = {storage._cdata: storage.nbytes() for storage in alive}
    return sum(size for name, size in storages.items() if name not in left_out), result
