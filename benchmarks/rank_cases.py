"""What is measured on two ranks: dense models, what makes them sparse, and who else computes the same.

qwen3     the shape of Qwen3-MoE, small: every feed-forward SwiGLU, 8 experts, top-2, normalised, dropless
top-1     the layer of DeepSpeed-MoE: GELU with biases, 8 experts, top-1, weighed by its probability
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import peers_ranks
from benchmarks.peers import MissingPeerError
from benchmarks.rank_steps import Batch, Step, step_of_model
from examples.gpt import GPT, GPTConfig
from moec.program import Program


@dataclass(frozen=True)
class Size:
    """The sizes of a case: of the model, and of the batch of one rank."""

    layers: int
    width: int
    hidden: int
    experts: int
    vocab: int
    sequence: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Case:
    """One comparison. `dense(size, hidden)` makes the model; `moe`: the `[moe]` tables of our programs, by
    name, the first one the reference; `peers(dense, program, batch)` the steps of the others.

    `loose`: those that drop tokens by a rule of their own, so that their gradients are not compared.
    """

    name: str
    size: Size
    top_k: int
    dense: Callable[[Size, int], nn.Module]
    moe: dict[str, dict[str, Any]]
    peers: Callable[[nn.Module, Program, Batch], dict[str, Callable[[], Step]]]
    loose: frozenset[str] = frozenset()


def batch_of(size: Size) -> Batch:
    """Random tokens of all ranks, the same on each."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch * dist.get_world_size(), size.sequence + 1)
    stream = torch.randint(size.vocab, shape, generator=generator)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous())


def qwen3(size: Size, hidden: int) -> nn.Module:
    """Qwen3, dense, with feed-forwards `hidden` wide."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        raise MissingPeerError("not installed: pip install 'transformers>=5'") from error
    heads = size.width // 64
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=size.sequence,
        use_cache=False,
    )
    model: nn.Module = Qwen3ForCausalLM(config).train()
    return model


def gpt(size: Size, hidden: int) -> nn.Module:
    """The GPT of the examples, whose feed-forwards are four times as wide as the model."""
    if hidden != 4 * size.width:
        raise ValueError(f"a feed-forward of {hidden} in a GPT of width {size.width}")
    return GPT(GPTConfig(size.vocab, size.sequence, size.layers, size.width, size.width // 64, dropout=0.0))


def _qwen3_peers(dense: nn.Module, program: Program, batch: Batch) -> dict[str, Callable[[], Step]]:
    def expert_parallel(implementation: str) -> Callable[[], Step]:
        return lambda: step_of_model(peers_ranks.transformers(dense, program, implementation), batch)

    def sharded() -> Step:
        with tempfile.TemporaryDirectory() as own:
            folder = [own]
            dist.broadcast_object_list(folder)
            model = peers_ranks.transformers_fsdp(dense, program, folder[0])
            dist.barrier()
        return step_of_model(model, batch, reduced=True)

    return {
        "transformers, grouped_mm": expert_parallel("grouped_mm"),
        "transformers, eager": expert_parallel("eager"),
        "transformers, with its FSDP2": sharded,
        "DeepSpeed, no drops": _in_place(dense, program, batch, lambda: peers_ranks.deepspeed(drop=False)),
        "Tutel, no drops": _in_place(dense, program, batch, lambda: peers_ranks.tutel(0.0)),
    }


def _top_one_peers(dense: nn.Module, program: Program, batch: Batch) -> dict[str, Callable[[], Step]]:
    makers: dict[str, Callable[[], peers_ranks.Make]] = {
        "DeepSpeed, no drops": lambda: peers_ranks.deepspeed(drop=False),
        "DeepSpeed, capacity 1.0": lambda: peers_ranks.deepspeed(drop=True),
        "Tutel, no drops": lambda: peers_ranks.tutel(0.0),
        "Tutel, capacity 1.0": lambda: peers_ranks.tutel(1.0),
    }
    return {name: _in_place(dense, program, batch, maker) for name, maker in makers.items()}


def _in_place(
    dense: nn.Module, program: Program, batch: Batch, maker: Callable[[], peers_ranks.Make]
) -> Callable[[], Step]:
    return lambda: step_of_model(peers_ranks.in_place_of_feed_forwards(dense, program, maker()), batch)


_MOE = {"layers": "all", "experts": 8, "init": "fresh", "router_std": 0.1, "balance_loss": 0.0}

CASES = {
    "qwen3": Case(
        "Qwen3-MoE shape: 4 layers, d256 n256 E8 K2 SwiGLU, vocabulary 2048",
        Size(layers=4, width=256, hidden=256, experts=8, vocab=2048, sequence=256, batch=4),
        2,
        qwen3,
        {"moec": {**_MOE, "top_k": 2, "gate": "normalized"}},
        _qwen3_peers,
    ),
    "top-1": Case(
        "GPT of 2 layers, d512 f2048 E8 K1 GELU, vocabulary 512",
        Size(layers=2, width=512, hidden=2048, experts=8, vocab=512, sequence=256, batch=4),
        1,
        gpt,
        {
            "moec, no drops": {**_MOE, "gate": "probability"},
            "moec, capacity 1.0": {**_MOE, "gate": "probability", "capacity_factor": 1.0},
        },
        _top_one_peers,
        frozenset({"moec, capacity 1.0", "DeepSpeed, capacity 1.0", "Tutel, capacity 1.0"}),
    ),
}
