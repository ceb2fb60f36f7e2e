"""Memory for large results, kept from one training step to the next.

Fresh memory comes from the operating system page by page: on the machine this was measured on, filling 64 MB
of it took 30 ms, and of kept memory 2 ms. The gradient of an expert weight is the size of all experts and
written once a step: that was most of what a sparse layer cost above a dense one. Here the block behind
such a result is remembered, and handed out again once nobody else can reach it.

*When is that?* A block is idle when the only references to its storage are the ones taken here: torch's count
of tensors (views, detached aliases, NumPy and DLPack exports included) is back to what it was when the block
was made, and so is Python's count of its storage object. Accumulating into `.grad`, `retain_graph`, keeping a
gradient aside, `zero_grad` with or without `set_to_none` all follow from that: whoever holds a result keeps
its block from being reused. A storage moved to shared memory is never reused.

*The price.* Up to the largest set of results alive at once stays allocated, as with `set_to_none=False`.
Blocks that nobody asked for during many requests are freed; `clear()` frees every idle one, and `enabled =
False` turns keeping off. `GRADIENTS` keeps gradients of weights, in storages of exactly their size (they may
be saved); `ROWS` keeps rows and their gradients, and lets a somewhat larger block serve a smaller batch.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import takewhile
from math import prod

import torch
from torch import Tensor


class Block:
    """One storage, and how many references to it there are while idle."""

    def __init__(self, num_bytes: int) -> None:
        self.storage = torch.empty(num_bytes, dtype=torch.uint8).untyped_storage()
        self.num_bytes = num_bytes
        self.last_use = 0
        self._idle = self._references()

    def _references(self) -> tuple[int, int]:
        return torch._C._storage_Use_Count(self.storage._cdata), sys.getrefcount(self.storage)

    def size(self) -> int:
        """Bytes in the block."""
        return self.num_bytes

    def is_idle(self) -> bool:
        """Nobody but this object can reach the memory."""
        return self._references() == self._idle and not self.storage.is_shared()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new contiguous tensor over the memory, holding whatever was there."""
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(self.storage, 0, tuple(shape), tuple(strides))


class KeptBuffers:
    """Hands out CPU tensors over kept blocks. Safe to call from several threads."""

    def __init__(self, slack: float = 1.0, smallest: int = 1 << 20, patience: int = 1024) -> None:
        """Keep blocks of at least `smallest` bytes until unused for `patience` requests; a request takes a
        block of up to `slack` times its size."""
        self.enabled = True
        self._slack, self._smallest, self._patience = slack, smallest, patience
        self._blocks: list[Block] = []  # by size
        self._lock = threading.Lock()
        self._requests = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor, as `torch.empty`; the caller owns it."""
        num_bytes = prod(shape) * dtype.itemsize
        if not self.enabled or device.type != "cpu" or num_bytes < self._smallest:
            return torch.empty(shape, dtype=dtype, device=device)
        with self._lock:
            return self._take(num_bytes).tensor(shape, dtype)

    def _take(self, num_bytes: int) -> Block:
        self._requests += 1
        block = self._find(num_bytes)
        if block is None:
            self._forget(self._requests - self._patience)
            block = Block(num_bytes)
            insort(self._blocks, block, key=Block.size)
        block.last_use = self._requests
        return block

    def _find(self, num_bytes: int) -> Block | None:
        first = bisect_left(self._blocks, num_bytes, key=Block.size)
        fitting = takewhile(lambda block: block.num_bytes <= self._slack * num_bytes, self._blocks[first:])
        return next((block for block in fitting if block.is_idle()), None)

    def _forget(self, before: int) -> None:
        self._blocks = [block for block in self._blocks if block.last_use >= before]

    def clear(self) -> None:
        """Forget every block: idle ones are freed now, the others when their tensors are."""
        with self._lock:
            self._blocks.clear()

    def num_bytes(self) -> int:
        """Bytes in all blocks, idle or not."""
        with self._lock:
            return sum(block.num_bytes for block in self._blocks)


def _teach_malloc() -> None:
    # glibc hands every freed block above 128 KiB back to the system, until it has seen one as large as this
    # freed: from then on it keeps what is below that size. Products make such blocks by the hundred in a step
    # (25,000 page faults less in one of 16 experts, a quarter of its time). Nothing is written to this one.
    torch.empty(_LARGEST_MALLOC_KEEPS, dtype=torch.uint8)


_LARGEST_MALLOC_KEEPS = 31 << 20
_teach_malloc()

GRADIENTS = KeptBuffers()
ROWS = KeptBuffers(slack=1.25)
