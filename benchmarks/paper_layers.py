"""The expert layers that the paper holds itself against, and a GPT that decodes with any of them.

Top-1, weighed by the probability, without drops: the capacity of an expert is the load of the fullest one,
which is less than the paper's own minimum of four, and in favour of whoever computes all slots.

Legend: T tokens, D model, F hidden, E experts, C slots of an expert; B rows, n new positions, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers_ranks import DEEPSPEED, ExpertLayer, FirstOutput, expert_layers
from examples.gpt import GPT, MLP, GPTConfig
from moec.program import Program

Layer = TypeVar("Layer", bound=nn.Module)


class OneHotEinsum(nn.Module):
    """The paper's baseline (and GShard's): tables of tokens × experts × slots, and products with them.

    Every slot of every expert is computed, empty or not; the experts in one batched product.
    """

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BnD: Tensor) -> Tensor:
        """[B, n, D] to the same."""
        x_TD, w = x_BnD.flatten(0, -2), self.layer.stacks
        combine_TEC = self._table(F.linear(x_TD, self.layer.router))
        slots_ECD = torch.einsum("tec,td->ecd", combine_TEC.bool().to(x_TD), x_TD)
        h_ECF = F.gelu(torch.baddbmm(w["up.bias"][:, None], slots_ECD, w["up.weight"].mT))
        out_ECD = torch.baddbmm(w["down.bias"][:, None], h_ECF, w["down.weight"].mT)
        return torch.einsum("tec,ecd->td", combine_TEC, out_ECD).view_as(x_BnD)

    def _table(self, scores_TE: Tensor) -> Tensor:
        """[T, E, C]: the probability of a token's expert, at the slot it has there."""
        gates_TE = scores_TE.softmax(-1)
        mask_TE = F.one_hot(gates_TE.argmax(-1), self.layer.experts)
        place_T = ((mask_TE.cumsum(0) - 1) * mask_TE).sum(-1)
        slots_TC = F.one_hot(place_T, int(mask_TE.sum(0).max())).to(gates_TE)
        return torch.einsum("te,tc->tec", gates_TE * mask_TE, slots_TC)


class ExpertsInUse(nn.Module):
    """What one writes in PyTorch without tables: a loop over the experts that were chosen.

    `used`: how many they were, call after call.
    """

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.layer = layer
        self.used: list[int] = []

    def forward(self, x_BnD: Tensor) -> Tensor:
        """[B, n, D] to the same."""
        x_TD, w = x_BnD.flatten(0, -2), self.layer.stacks
        weight_T, expert_T = F.linear(x_TD, self.layer.router).softmax(-1).max(-1)
        y_TD = torch.empty_like(x_TD)
        experts = expert_T.unique().tolist()
        self.used.append(len(experts))
        for expert in experts:
            chosen = (expert_T == expert).nonzero().squeeze(1)
            h = F.gelu(F.linear(x_TD[chosen], w["up.weight"][expert], w["up.bias"][expert]))
            out = F.linear(h, w["down.weight"][expert], w["down.bias"][expert])
            y_TD[chosen] = out * weight_T[chosen, None]
        return y_TD.view_as(x_BnD)


def deepspeed(layer: ExpertLayer) -> nn.Module:
    """DeepSpeed's own `MoE`, its experts views of our stacks."""
    try:
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        raise peers.MissingPeerError(f"not installed: {DEEPSPEED}") from error
    peers.join_a_group_of_one()
    with torch.device("meta"):
        expert = MLP(GPTConfig(vocab=1, seq=1, layers=1, width=layer.width, heads=1))
    options = {"min_capacity": 1, "drop_tokens": False, "use_rts": False}
    made = MoE(layer.width, expert, layer.experts, k=1, **options)
    made.set_deepspeed_parallelism()
    state = {"deepspeed_moe.gate.wg.weight": layer.router}
    for number in range(layer.experts):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{number}."
        state |= {prefix + name: stack[number] for name, stack in layer.stacks.items()}
    made.load_state_dict(state, assign=True)
    return FirstOutput(made)


class CachedGPT:
    """The GPT of the examples, decoding with a memory of keys and values, as one writes it by hand.

    `model` is the dense one with expert layers in it, in eval mode; it shares the weights of `program`.
    """

    def __init__(self, model: GPT) -> None:
        self.model: Any = model
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @classmethod
    def of(cls, program: Program, config: GPTConfig, make: Callable[[ExpertLayer], nn.Module]) -> CachedGPT:
        """`program`'s model with `make(layer)` for each of its expert layers; nothing is copied."""
        with torch.device("meta"):
            model = GPT(config)
        for layer in expert_layers(program):
            model.set_submodule(layer.path, make(layer))
        wanted = set(model.state_dict())
        state = {name: value for name, value in program.state_dict().items() if name in wanted}
        state["head.weight"] = state["token_embedding.weight"]  # tied, which `assign` would undo
        missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
        made_by_peers = [name for name in missing if "deepspeed_moe" not in name]
        if made_by_peers:
            raise ValueError(f"weights that the program does not have: {made_by_peers}")
        return cls(model.eval())

    def of_type(self, kind: type[Layer]) -> list[Layer]:
        """Its expert layers of a kind."""
        return [module for module in self.model.modules() if isinstance(module, kind)]

    def new_cache(self, rows: int, length: int) -> None:
        """Memory for so many rows and positions, zeros."""
        config = self.model.config
        shape = (rows, config.heads, length, config.width // config.heads)
        self.keys = [torch.zeros(shape) for _ in range(config.layers)]
        self.values = [torch.zeros(shape) for _ in range(config.layers)]

    @torch.no_grad()
    def step(self, tokens_Bn: Tensor, past: int) -> Tensor:
        """Logits [B, 1, V] of the last of the new tokens, at positions from `past` on."""
        model = self.model
        positions = torch.arange(past, past + tokens_Bn.shape[1])
        x_BnD = model.token_embedding(tokens_Bn) + model.position_embedding(positions)
        for number, block in enumerate(model.blocks):
            x_BnD = x_BnD + self._attend(number, block.norm_1(x_BnD), past)
            x_BnD = x_BnD + block.mlp(block.norm_2(x_BnD))
        logits: Tensor = model.head(model.norm(x_BnD[:, -1:]))
        return logits

    def _attend(self, number: int, x_BnD: Tensor, past: int) -> Tensor:
        attention = self.model.blocks[number].attention
        B, n, D = x_BnD.shape
        heads = attention.heads
        qkv = attention.qkv(x_BnD).view(B, n, 3 * heads, D // heads).transpose(1, 2)
        q_BHnd, k_BHnd, v_BHnd = qkv.chunk(3, 1)
        keys, values = (memory[number].narrow(2, 0, past + n) for memory in (self.keys, self.values))
        keys[:, :, past:], values[:, :, past:] = k_BHnd, v_BHnd
        y_BHnd = F.scaled_dot_product_attention(q_BHnd, keys, values, is_causal=n > 1)
        out: Tensor = attention.out(y_BHnd.transpose(1, 2).reshape(B, n, D))
        return out
