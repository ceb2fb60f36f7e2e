"""Whole sparse models that transformers has too: the dense model moec starts from, and transformers' twin.

mixtral     the shape of Mixtral: every feed-forward 8 experts, top-2, renormalised, rotary GQA attention
qwen2-moe   the shape of Qwen2-MoE: 60 small experts, top-4, not renormalised, beside a shared expert that a
            sigmoid of its own weighs

A twin is transformers' model class with the weights of our program, so that both compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import moec
from benchmarks.peers_ranks import expert_layers
from moec.program import Program


@dataclass(frozen=True)
class Size:
    """The sizes of a model. `hidden`: of one expert; `shared`: of the shared one, 0 where there is none."""

    layers: int
    width: int
    hidden: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocab: int
    shared: int = 0

    def __str__(self) -> str:
        beside = f" beside a shared expert of {self.shared}" if self.shared else ""
        experts = f"n{self.hidden} E{self.experts} K{self.top_k}{beside}"
        return f"{self.layers} layers, d{self.width} {experts}, vocabulary {self.vocab}"


@dataclass(frozen=True)
class Case:
    """One model. `dense(size)` is the user's; `twin(size)` transformers' empty sparse one; `layers`
    and `gate` are the plan's."""

    name: str
    size: Size
    dense: Callable[[Size], PreTrainedModel]
    twin: Callable[[Size], PreTrainedModel]
    gate: str
    layers: str = "all"

    def plan(self) -> dict[str, Any]:
        """Experts drawn anew, so that it matters which are chosen; a router that prefers some to others."""
        fresh = {"init": "fresh", "router_std": 0.1, "balance_loss": 0.0}
        experts = {"experts": self.size.experts, "top_k": self.size.top_k, "gate": self.gate}
        return {"moe": {"layers": self.layers, **experts, **fresh}}


class BesideSharedExpert(nn.Module):
    """A feed-forward `experts`, to become sparse, beside one that every token goes through, weighed by a
    sigmoid; in the place of transformers' Qwen2 feed-forward."""

    def __init__(self, experts: nn.Module, shared: nn.Module, width: int) -> None:
        super().__init__()
        self.experts, self.shared_expert = experts, shared
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        weight = F.sigmoid(self.shared_expert_gate(x))
        out: Tensor = self.experts(x) + weight * self.shared_expert(x)
        return out


def _common(size: Size) -> dict[str, Any]:
    """What both configurations of a pair are made with. No token ends a text: all generate to the end."""
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.width,
        "intermediate_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def mistral(size: Size) -> PreTrainedModel:
    """Mistral: what Mixtral is with one expert."""
    return MistralForCausalLM(MistralConfig(**_common(size), sliding_window=None)).eval()


def mixtral(size: Size) -> PreTrainedModel:
    """Mixtral of the same sizes."""
    sparse: dict[str, Any] = {"num_local_experts": size.experts, "num_experts_per_tok": size.top_k}
    return MixtralForCausalLM(MixtralConfig(**_common(size), **sparse)).eval()


def qwen2(size: Size) -> PreTrainedModel:
    """Qwen2 with a second, shared feed-forward in every block."""
    model = Qwen2ForCausalLM(Qwen2Config(**_common(size))).eval()
    wide = Qwen2ForCausalLM(
        Qwen2Config(**_common(size) | {"intermediate_size": size.shared, "vocab_size": 1})
    )
    for block, other in zip(model.model.layers, wide.model.layers, strict=True):
        block.mlp = BesideSharedExpert(block.mlp, other.mlp, size.width)
    return model


def qwen2_moe(size: Size) -> PreTrainedModel:
    """Qwen2-MoE of the same sizes."""
    sparse: dict[str, Any] = {
        "moe_intermediate_size": size.hidden,
        "shared_expert_intermediate_size": size.shared,
        "num_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "norm_topk_prob": False,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_common(size), **sparse)).eval()


def compiled(case: Case) -> tuple[Program, PreTrainedModel]:
    """Our program of a case, and its twin in transformers, with the same weights (copies)."""
    torch.manual_seed(0)
    dense = case.dense(case.size)
    program = moec.compile(dense, case.plan(), verify="off").eval()
    return program, with_weights_of(program, case.twin(case.size))


def with_weights_of(program: Program, twin: PreTrainedModel) -> PreTrainedModel:
    """`twin`, filled with all weights of `program`; strictly: nothing is left over on either side."""
    layers = expert_layers(program)
    kept = {name for name, _ in program.named_parameters()} & set(twin.state_dict())
    state = {name: value for name, value in program.state_dict().items() if name in kept}
    for layer in layers:
        path = layer.path.removesuffix(".experts")
        fused = torch.cat([layer.stacks["gate_proj.weight"], layer.stacks["up_proj.weight"]], 1)
        state[f"{path}.gate.weight"] = layer.router
        state[f"{path}.experts.gate_up_proj"] = fused
        state[f"{path}.experts.down_proj"] = layer.stacks["down_proj.weight"]
    twin.load_state_dict(state)
    held, given = (sum(p.numel() for p in of.parameters()) for of in (twin, program))
    if held != given:
        raise ValueError(f"the twin holds {held} parameters, the program {given}")
    return twin


@torch.no_grad()
def difference(logits: Tensor, others: Tensor) -> float:
    """The largest difference, relative to the largest of `logits`."""
    return float((logits - others).abs().max() / logits.abs().max())


def prompts(case: Case, rows: int, length: int) -> Tensor:
    """Random tokens i64 [rows, length], the same every time; no padding among them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, case.size.vocab, (rows, length), generator=generator)


CASES: dict[str, Case] = {
    "mixtral": Case("Mixtral shape", Size(8, 512, 1792, 8, 2, 8, 2, 32000), mistral, mixtral, "normalized"),
    "qwen2-moe": Case(
        "Qwen2-MoE shape",
        Size(8, 512, 352, 60, 4, 8, 8, 32000, shared=1408),
        qwen2,
        qwen2_moe,
        "probability",
        "*.mlp.experts",
    ),
}
