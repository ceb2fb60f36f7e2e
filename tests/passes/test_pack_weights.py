"""Packed weights that other tensors share memory with: no product reads what is no longer there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moec
from moec.decoder import Decoder
from moec.runtime.ops.packed import PACKED
from moec.testing.tolerances import error_of, tolerance_of

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    rows, length = tokens.shape
    past, wanted = (
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(length).expand(rows, length).contiguous(),
    )
    return decoder.step(tokens, past, wanted, decoder.new_cache(rows, 16), 16)


@pytest.mark.parametrize("written", ["q_proj", "v_proj", "up_proj", "down_proj"])
def test_writing_to_one_of_several_fused_weights_is_seen(written: str) -> None:
    torch.manual_seed(0)
    program = moec.compile(LlamaForCausalLM(CONFIG), None, verify="off").eval()
    tokens = torch.randint(0, 64, (2, 5))
    decoder = program.decoder(16, packed=True)
    joined = dict(decoder.fused.graph.named_buffers())
    assert PACKED.find(joined["attention_0.q_proj_k_proj_v_proj.weight"]) is not None
    assert error_of(logits(decoder, tokens), program(tokens)) <= tolerance_of(torch.float32)
    before = program(tokens)
    with torch.no_grad():
        next(value for name, value in program.named_parameters() if written in name).mul_(-3)
    after = program(tokens)
    assert error_of(after, before) > 1e-3
    assert error_of(logits(decoder, tokens), after) <= tolerance_of(torch.float32)
