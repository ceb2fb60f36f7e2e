"""Other people's expert layers, with the weights of ours, so that both compute the same function.

Each function raises `MissingPeerError`, with the command that installs the peer, where it is absent.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers import Dense, Sparse


class MissingPeerError(Exception):
    """The peer is not installed; the message says how to install it."""


def hugging_face(ours: Sparse) -> nn.Module:
    """Qwen3-MoE's sparse block of transformers v5, experts by `grouped_mm`."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError as error:
        raise MissingPeerError("not installed: pip install 'transformers>=5'") from error
    experts, width, hidden = ours.down.shape
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=ours.options[0],
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    block.load_state_dict(
        {
            "gate.weight": ours.router.detach(),
            "experts.gate_up_proj": ours.up.detach(),
            "experts.down_proj": ours.down.detach(),
        }
    )
    return _Rows(block, lambda out: out[0] if isinstance(out, tuple) else out)


def deepspeed(ours: Sparse) -> nn.Module:
    """DeepSpeed's `MoE` (top-1, capacity factor 1.0, minimum 4), alone in a one-process gloo group."""
    try:
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        command = "pip install --no-deps deepspeed==0.19.* einops hjson msgpack ninja py-cpuinfo"
        raise MissingPeerError(f"not installed: {command}") from error
    join_a_group_of_one()
    experts, width, hidden = ours.down.shape
    factors = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 4}
    layer = MoE(width, Dense(width, hidden), experts, k=1, use_rts=False, **factors)
    layer.set_deepspeed_parallelism()
    state = layer.state_dict()
    state["deepspeed_moe.gate.wg.weight"] = ours.router.detach()
    parts = {"up.weight": ours.up, "up.bias": ours.up_bias}
    parts |= {"down.weight": ours.down, "down.bias": ours.down_bias}
    for expert in range(experts):
        for name, stack in parts.items():
            assert stack is not None
            state[f"deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"] = stack[expert].detach()
    layer.load_state_dict(state, assign=True)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    return _Rows(layer, lambda out: out[0])


class _Rows(nn.Module):
    """A peer called on rows [T, D] instead of [1, T, D]."""

    def __init__(self, layer: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.pick = layer, pick

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.pick(self.layer(x_TD.unsqueeze(0))).reshape(x_TD.shape)


def join_a_group_of_one() -> None:
    """What DeepSpeed asks of a single process; does nothing where there is a process group already."""
    import deepspeed

    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    if torch.distributed.is_initialized():
        return
    meeting_point = Path(tempfile.mkdtemp()) / "group"
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{meeting_point}", rank=0, world_size=1
    )
