"""Tiny Hugging Face causal LMs, one for every family that must work: two layers, width 32, vocabulary 96."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

VOCABULARY = 96
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32}
COMMON: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4}
OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GATED: dict[str, Any] = {**COMMON, "intermediate_size": 56, "num_key_value_heads": 2}
GEMMA: dict[str, Any] = {**GATED, "head_dim": 8, "sliding_window": 4}
FALCON: dict[str, Any] = {**COMMON, "new_decoder_architecture": False}


def _model(kind: str, config: str, **fields: Any) -> Callable[..., hf.PreTrainedModel]:
    """What makes a randomly initialised model; its keywords change the config (`attn_implementation`)."""

    def make(**more: Any) -> hf.PreTrainedModel:
        made = getattr(hf, config)(**{**fields, **TOKENS, **more})
        model: hf.PreTrainedModel = getattr(hf, kind)(made)
        return model

    return make


FAMILIES: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "gpt2": _model("GPT2LMHeadModel", "GPT2Config", **OLD),
    "llama": _model("LlamaForCausalLM", "LlamaConfig", **GATED),
    "gpt_neox": _model("GPTNeoXForCausalLM", "GPTNeoXConfig", **COMMON, intermediate_size=64),
    "opt": _model(
        "OPTForCausalLM", "OPTConfig", **COMMON,
        ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64,
    ),
    "qwen3": _model("Qwen3ForCausalLM", "Qwen3Config", **GATED, head_dim=8),
    "gemma2": _model("Gemma2ForCausalLM", "Gemma2Config", **GEMMA),
    "gemma3": _model("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA),
    "phi": _model("PhiForCausalLM", "PhiConfig", **COMMON, intermediate_size=64),
    "phi3": _model("Phi3ForCausalLM", "Phi3Config", **GATED),
    "bloom": _model("BloomForCausalLM", "BloomConfig", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _model("FalconForCausalLM", "FalconConfig", **FALCON),
    "falcon_alibi": _model("FalconForCausalLM", "FalconConfig", **FALCON, alibi=True, multi_query=False),
    "falcon_new": _model(
        "FalconForCausalLM", "FalconConfig", **COMMON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "gptj": _model("GPTJForCausalLM", "GPTJConfig", **OLD, rotary_dim=4),
    "stablelm": _model("StableLmForCausalLM", "StableLmConfig", **GATED),
    "olmo2": _model("Olmo2ForCausalLM", "Olmo2Config", **GATED),
    "mistral": _model("MistralForCausalLM", "MistralConfig", **GATED, sliding_window=4),
    "cohere": _model("CohereForCausalLM", "CohereConfig", **GATED),
    "starcoder2": _model("Starcoder2ForCausalLM", "Starcoder2Config", **GATED),
    "granite": _model("GraniteForCausalLM", "GraniteConfig", **GATED),
}  # fmt: skip

MIXTRAL = _model("MixtralForCausalLM", "MixtralConfig", **GATED, num_local_experts=4)
MAMBA = _model(
    "MambaForCausalLM", "MambaConfig", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8
)
