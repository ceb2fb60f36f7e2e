"""Which teacher it is: a few words that differ for teachers that say other things.

A run that was stopped goes on with the same teacher, or it would be another run. The identity of a program is
the same in one process and for its parts on any mesh; that of a saved one is read without its weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.ir.placement import Piece
from moec.runtime.holding import Holding, Part
from moec.runtime.manifest import read_manifest
from moec.runtime.ranks import Ranks
from moec.runtime.trainable import Trainable

#: Elements that are looked at together, a row at least: what bounds the memory that this takes.
STRETCH = 1 << 18
_ODD = 0x9E3779B97F4A7C15 - 2**64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identity_of(program: Trainable, ranks: Ranks) -> dict[str, Any]:
    """That of a program in memory: its fingerprint, and a digest of its weights and buffers.

    Reads every weight once; every rank of a job calls it.
    """
    return {"program": program.fingerprint(), "weights": weights_digest(program, ranks)}


def identity_of_saved(directory: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """That of a program saved in `directory`, read off its manifest: nothing is loaded.

    It is not that of the same program in memory, and changes where the program is saved in other parts.
    Raises `ArtifactError` as `moec.load` does for a manifest that is missing or not whole.
    """
    manifest = read_manifest(Path(directory), trust=trust)
    digests = {name: file.sha256 for name, file in manifest.files.items() if name.endswith(".safetensors")}
    told = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return {"program": manifest.fingerprint, "files": hashlib.sha256(told.encode()).hexdigest()}


def weights_digest(program: Trainable, ranks: Ranks) -> str:
    """16 hex digits of the weights and buffers, by their names in the whole program.

    It is a sum over all elements, of a mixture of bits, place in the whole tensor, and name: a sum does not
    ask which rank held what. It tells teachers apart, and is no protection from forgery.
    """
    holding, total = Holding(program, ranks), 0
    for name, tensor in [*program.named_parameters(), *program.named_buffers()]:
        if holding.is_saved_here(name):
            total += _sum_of(name, holding.part(name, tensor.detach()))
    return f"{sum(ranks.gather(total)) % 2**64:016x}"


def _sum_of(name: str, part: Part) -> int:
    told = f"{name} {part.tensor.dtype} {list(part.shape)}"
    salt = int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big", signed=True)
    total = 0
    for piece in part.pieces:
        for box, place in _stretches(part, piece):
            bits = box.contiguous().view(_WORDS[box.element_size()]).long()
            total += int(_mixed(place.mul_(_ODD).add_(salt).add_(bits)).sum())
    return total


def _stretches(part: Part, piece: Piece) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a box, and the places of their elements in the whole tensor, i64 of the same shape."""
    box = part.box(piece)
    if not box.numel():
        return
    if not box.dim():
        yield box, torch.zeros((), dtype=torch.long, device=box.device)
        return
    rows = max(1, STRETCH // math.prod(box.shape[1:]))
    for first in range(0, len(box), rows):
        cut = box[first : first + rows]
        place = torch.zeros((), dtype=torch.long, device=box.device)
        for dim, size in enumerate(cut.shape):
            at = piece.whole[dim] + (first if dim == 0 else 0)
            along = torch.arange(at, at + size, device=box.device)
            place = place.unsqueeze(-1) * part.shape[dim] + along
        yield cut, place


def _mixed(x: Tensor) -> Tensor:
    """One to one, in place, i64: every bit from all bits (SplitMix64, Steele et al. 2014)."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x.bitwise_xor_(_shifted(x, 27)).mul_(0x94D049BB133111EB - 2**64)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x >> bits`, zeros coming in."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
