"""Memory for large gradients, kept from one training step to the next.

The gradient of an expert weight is the size of all experts, and is written once a step. Fresh memory of that
size comes from the operating system page by page: on the machine this was measured on, filling 64 MB of fresh
memory took 30 ms, and of kept memory 2 ms. So the block behind a gradient is remembered, and handed out again
once nobody else can reach it.

*When is that?* A block is idle when the only references to its storage are the ones taken here: torch's count
of tensors (views, detached aliases, NumPy and DLPack exports included) is back to what it was when the block
was made, and so is Python's count of its storage object. Accumulating into `.grad`, `retain_graph`, keeping a
gradient aside, `zero_grad` with or without `set_to_none` all follow from that: whoever holds a gradient
keeps its block from being reused. A storage moved to shared memory is never reused.

*The price.* Up to the largest set of gradients alive at once stays allocated (as with `set_to_none=False`).
`GRADIENTS.clear()` gives idle blocks back, `GRADIENTS.enabled = False` turns keeping off.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
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

    def is_idle(self) -> bool:
        """Nobody but this object can reach the memory."""
        return self._references() == self._idle and not self.storage.is_shared()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new contiguous tensor over the memory, holding whatever was there."""
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(self.storage, 0, tuple(shape), tuple(strides))


class KeptBuffers:
    """Hands out CPU tensors over kept blocks, by size in bytes. Safe to call from several threads."""

    def __init__(self, smallest: int = 1 << 20, patience: int = 1024) -> None:
        """Keep blocks of at least `smallest` bytes, until idle for `patience` requests."""
        self.enabled = True
        self._smallest, self._patience = smallest, patience
        self._blocks: defaultdict[int, list[Block]] = defaultdict(list)
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
        block = next((block for block in self._blocks[num_bytes] if block.is_idle()), None)
        if block is None:
            self._forget(self._requests - self._patience)
            block = Block(num_bytes)
            self._blocks[num_bytes].append(block)
        block.last_use = self._requests
        return block

    def _forget(self, before: int) -> None:
        for num_bytes, blocks in list(self._blocks.items()):
            kept = [block for block in blocks if block.last_use >= before]
            self._blocks[num_bytes] = kept

    def clear(self) -> None:
        """Forget every block: idle ones are freed now, the others when their tensors are."""
        with self._lock:
            self._blocks.clear()

    def num_bytes(self) -> int:
        """Bytes in all blocks, idle or not."""
        with self._lock:
            return sum(block.num_bytes for blocks in self._blocks.values() for block in blocks)


GRADIENTS = KeptBuffers()
