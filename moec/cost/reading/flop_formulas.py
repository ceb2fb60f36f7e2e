"""What torch's flop counter is to know beside its own: attention on a CPU, and the operators of `moec::`.

    with FlopCounterMode(custom_mapping=flop_formulas()) as counter:
        program.loss(tokens).backward()

Torch counts its attention kernels of every device but the CPU's. Nothing of torch's own is changed: the
mapping is this counter's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

import moec.runtime.ops.flop_formulas  # noqa: F401 - registers those of moec::


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Operator → its FLOPs, by shapes: the argument `custom_mapping` of torch's `FlopCounterMode`."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
