"""Weights in the order in which the CPU's products read them, beside the weights themselves.

A product of few rows is a reading of its weights, and oneDNN reads them fastest in an order of its own. In
training the weights change with every step and putting them in order costs as much as it saves; a decoder
reads the same ones again and again. Measured with torch 2.13 on one core of an AMD EPYC with AVX-512, weights
1024 x 4096 that are in no cache, GB/s for 1, 4 and 16 rows: float32 34, 31, 17 packed and 23, 16, 12 as they
are; bfloat16 33, 27, 16 and 14, 13, 10; `sum` reads 35.

`keep(weight)` packs a `[F, D]` or an `[E, F, D]` weight, one product each, and takes as much memory again;
`find(weight)` is what the products ask. A packed weight lives as long as the tensor it was made of and is
forgotten once that is written to. Torch counts the writes to a tensor and its views. Where one memory has
several tensors that torch knows nothing common of, `consists_of` says so; who writes to weights by another
way (a flat buffer behind them) calls `clear`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.runtime.ops.registry import demand

DTYPES = (torch.float32, torch.bfloat16)
_ROWS = 128  # oneDNN chooses an order by the number of rows; that for many is the best for few as well


State = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Entry:
    source: weakref.ref[Tensor]
    state: State
    parts: tuple[Tensor, ...]


class PackedWeights:
    """Packed copies of weights, found by the tensor object they were made of."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._pieces: dict[int, tuple[weakref.ref[Tensor], ...]] = {}

    def keep(self, weight: Tensor) -> bool:
        """Pack a weight `[F, D]` or `[E, F, D]`; False where packing does not apply (device, dtype).

        Raises `OperatorError` for a weight of other dimensions, and for one made in inference mode: torch
        does not count what is written to it.
        """
        demand(weight.dim() in (2, 3), "packed", f"a weight {list(weight.shape)}", "[F, D] or [E, F, D]")
        demand(not weight.is_inference(), "packed", "a weight made in inference mode", "an ordinary tensor")
        if not can_pack(weight):
            return False
        key, plain = id(weight), weight.detach()
        parts = tuple(_pack(part) for part in (plain.unbind() if plain.dim() == 3 else (plain,)))
        source = weakref.ref(weight, lambda _: self._entries.pop(key, None))
        self._entries[key] = _Entry(source, self._state(weight), parts)
        return True

    def consists_of(self, weight: Tensor, pieces: Sequence[Tensor]) -> None:
        """The memory of `weight` is that of `pieces`: writing to one of them is writing to it."""
        key = id(weight)
        weakref.finalize(weight, self._pieces.pop, key, None)
        self._pieces[key] = tuple(weakref.ref(piece) for piece in pieces)

    def _state(self, weight: Tensor) -> State:
        """What changes when the weight is written to or moved, or one of its pieces is, or is gone."""
        pieces = [piece() for piece in self._pieces.get(id(weight), ())]
        return tuple((0, -1) if t is None else (t.data_ptr(), t._version) for t in (weight, *pieces))

    def find(self, weight: Tensor) -> Sequence[Tensor] | None:
        """What `keep` made of this very tensor, one for each product; None when it was written to since."""
        entry = self._entries.get(id(weight))
        if entry is None or entry.source() is not weight:
            return None
        if entry.state != self._state(weight):
            del self._entries[id(weight)]
            return None
        return entry.parts

    def forget(self, weight: Tensor) -> None:
        """Free the packed copy of a weight, if there is one."""
        self._entries.pop(id(weight), None)

    def clear(self) -> None:
        """Free every packed copy: weights are read as they are, until they are kept again."""
        self._entries.clear()

    def num_bytes(self) -> int:
        """Bytes in all packed copies."""
        return sum(
            int(torch.ops.mkldnn._nbytes(part)) for entry in self._entries.values() for part in entry.parts
        )


def can_pack(weight: Tensor) -> bool:
    """Whether the products of this weight have a packed form: float32 or bfloat16 on a CPU, with oneDNN."""
    if not torch.backends.mkldnn.is_available() or not torch._C._get_mkldnn_enabled():
        return False
    return weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() > 0


def _pack(weight_FD: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_FD.contiguous(), _ROWS)
    return packed


PACKED = PackedWeights()
