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
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers import Dense, Sparse

DEEPSPEED = "pip install --no-deps --target DIR 'deepspeed==0.19.*' einops hjson msgpack ninja py-cpuinfo"
TUTEL = (
    "NO_CUDA=1 pip install --no-deps --no-build-isolation --target DIR git+https://github.com/microsoft/Tutel"
)
TORCHTITAN = (
    "pip install --no-deps --target DIR torchtitan==0.3.* spmd_types==0.2.3 tyro docstring_parser typeguard"
    " torch_checkpointing torchdata einops"
)


class MissingPeerError(Exception):
    """The peer is not installed, or has no such layer; the message says so."""


def hugging_face(ours: Sparse, experts: str = "grouped_mm") -> nn.Module:
    """Qwen3-MoE's sparse block of transformers v5; `experts`: its implementation, `eager` or `grouped_mm`."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError as error:
        raise MissingPeerError("not installed: pip install 'transformers>=5'") from error
    shape = ours.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = experts
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    weights = {
        "gate.weight": ours.router.detach().to(ours.up.dtype),
        "experts.gate_up_proj": ours.up.detach(),
        "experts.down_proj": ours.down.detach(),
    }
    block.load_state_dict(weights, assign=True)
    return _Rows(block, lambda out: out[0] if isinstance(out, tuple) else out)


def torchtitan(ours: Sparse) -> nn.Module:
    """torchtitan's `MoE` on one device, in bfloat16: it multiplies in nothing else."""
    try:
        from torchtitan.models.common import moe
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    except ImportError as error:
        raise MissingPeerError(f"not installed ({error}): {TORCHTITAN}") from error
    if ours.up.dtype != torch.bfloat16:
        raise MissingPeerError("multiplies in bfloat16 whatever the weights are")
    shape = ours.shape
    sizes = {"num_experts": shape.experts, "top_k": shape.top_k}
    router = moe.TokenChoiceTopKRouter.Config(
        gate=moe.Linear.Config(in_features=shape.width, out_features=shape.experts),
        score_func="softmax", route_norm=True, **sizes,
    )  # fmt: skip
    experts = moe.GroupedExperts.Config(dim=shape.width, hidden_dim=shape.hidden, num_experts=shape.experts)
    routed = moe.RoutedExperts.Config(
        inner_experts=experts, token_dispatcher=LocalTokenDispatcher.Config(**sizes)
    )
    layer = moe.MoE.Config(
        num_experts=shape.experts, routed_experts=routed, router=router, load_balance_coeff=None
    ).build()
    gate, up = ours.up.detach().chunk(2, 1)
    held = layer.routed_experts.inner_experts
    for name, value in (("w1_EFD", gate), ("w3_EFD", up), ("w2_EDF", ours.down.detach())):
        setattr(held, name, nn.Parameter(value.clone()))
    # its router asks autocast for float32, which on a CPU there is none of
    layer.router.gate.weight = nn.Parameter(ours.router.detach().to(ours.up.dtype))
    layer.tokens_per_expert_E.zero_()
    return _Rows(layer, lambda out: out)


def tutel(ours: Sparse) -> nn.Module:
    """Tutel's `moe_layer` without drops; its experts are padded to the fullest."""
    try:
        from tutel import moe
    except ImportError as error:
        raise MissingPeerError(f"not installed: {TUTEL}") from error
    shape = ours.shape
    _join()
    experts = {
        "type": "llama_ffn" if shape.gated else "ffn",
        "num_experts_per_device": shape.experts,
        "hidden_size_per_expert": shape.hidden,
        "activation_fn": F.silu if shape.gated else F.gelu,
    }
    gate = {"type": "top", "k": shape.top_k, "capacity_factor": shape.factor}
    made = moe.moe_layer(gate_type=gate, model_dim=shape.width, experts=experts).to(ours.up.dtype)
    with torch.no_grad():
        made.gates[0].wg.weight.copy_(ours.router)
        for name, value in _tutel_weights(ours).items():
            getattr(made.experts, name).copy_(value)
    return _Rows(made, lambda out: out)


def _tutel_weights(ours: Sparse) -> dict[str, Tensor]:
    if ours.shape.gated:
        gate, up = ours.up.chunk(2, 1)
        # stored flat, [E, in, out]
        return {f"W_fc{i}": w.mT.flatten() for i, w in enumerate((gate, up, ours.down), 1)}
    assert ours.up_bias is not None
    assert ours.down_bias is not None
    return {
        "batched_fc1_w": ours.up, "batched_fc2_w": ours.down.mT,
        "batched_fc1_bias": ours.up_bias, "batched_fc2_bias": ours.down_bias,
    }  # fmt: skip


def deepspeed(ours: Sparse) -> nn.Module:
    """DeepSpeed's `MoE` (top-1, capacity factor 1.0, minimum 4), alone in a one-process gloo group."""
    try:
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        raise MissingPeerError(f"not installed: {DEEPSPEED}") from error
    join_a_group_of_one()
    shape = ours.shape
    factors = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 4}
    with torch.device("meta"):  # its weights are given below
        expert = Dense(shape.width, shape.hidden)
    options = {"k": 1, "use_rts": False, "use_residual": shape.residual}
    layer = MoE(shape.width, expert, shape.experts, **options, **factors)
    layer.set_deepspeed_parallelism()
    layer.load_state_dict(_deepspeed_weights(ours), assign=True)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    return _Rows(layer, lambda out: out[0])


def _deepspeed_weights(ours: Sparse) -> dict[str, Tensor]:
    parts = {"up.weight": ours.up, "up.bias": ours.up_bias}
    parts |= {"down.weight": ours.down, "down.bias": ours.down_bias}
    state = {"deepspeed_moe.gate.wg.weight": ours.router.detach()}
    for expert in range(ours.shape.experts):
        for name, stack in parts.items():
            assert stack is not None
            state[f"deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"] = stack[expert].detach()
    if ours.dense is not None and ours.mix is not None:
        state |= {f"mlp.{name}": value for name, value in ours.dense.state_dict().items()}
        state |= {f"coefficient.{name}": value for name, value in ours.mix.state_dict().items()}
    return state


class _Rows(nn.Module):
    """A peer called on rows [T, D] instead of [1, T, D]."""

    def __init__(self, layer: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.pick = layer, pick

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.pick(self.layer(x_TD.unsqueeze(0))).reshape(x_TD.shape)


def join_a_group_of_one() -> None:
    """What DeepSpeed asks of a single process; takes the process group that there is, if there is one."""
    import deepspeed

    for chatty in ("torch._dynamo", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    _join()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def _join() -> None:
    if not torch.distributed.is_initialized():
        meeting_point = Path(tempfile.mkdtemp()) / "group"
        where = f"file://{meeting_point}"
        torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
