"""The `moec::` operators. Importing this package registers all of them under `torch.ops.moec`.

One file a family: schema, shape rule, gradient, kernel. `reference` says what each one means in plain loops.

Legend: T tokens, D model, F hidden, E experts, K chosen, N rows = T*K. Slot n = t*K + k is the k-th choice of
token t.
"""

from __future__ import annotations

from moec.runtime.ops import (
    add_norm,
    admit,
    assign,
    combine,
    cpu_gate,
    cpu_moe_ffn,
    dispatch,
    divergence,
    divergence_top,
    exchange,
    gate,
    grouped_linear,
    jitter,
    linear,
    losses,
    moe_ffn,
    moe_ffn_price,
    part,
    remember,
    route,
    router,
    share,
    vocabulary,
)
from moec.runtime.ops.triton import register

__all__ = [
    "add_norm",
    "admit",
    "assign",
    "combine",
    "cpu_gate",
    "cpu_moe_ffn",
    "dispatch",
    "divergence",
    "divergence_top",
    "exchange",
    "gate",
    "grouped_linear",
    "jitter",
    "linear",
    "losses",
    "moe_ffn",
    "moe_ffn_price",
    "part",
    "register",
    "remember",
    "route",
    "router",
    "share",
    "vocabulary",
]
