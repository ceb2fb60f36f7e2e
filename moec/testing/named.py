"""Fixed recipes after well-known families, small enough for fast tests."""

from __future__ import annotations

import math

from .parts.attention import AttentionRecipe
from .parts.feed_forward import FeedForwardRecipe
from .parts.norms import NormRecipe
from .recipe import DecoderRecipe, Names

_RMS_CAST = NormRecipe("rms_rsqrt", bias=False, float32=True, eps=1e-6)
_RMS = NormRecipe("rms_rsqrt", bias=False, eps=1e-6)
_LLAMA_NAMES = Names("embed_tokens", "layers", "self_attn", "mlp", "lm_head")

NAMED: dict[str, DecoderRecipe] = {
    "nano_gpt": DecoderRecipe(
        attention=AttentionRecipe(qkv="split", bias=False, out_bias=False, dropout=0.1),
        ffn=FeedForwardRecipe(32, bias=False, dropout=0.1, names=("c_fc", "gate", "c_proj", "both")),
        norm=NormRecipe("layer", bias=False), tied="module", dropout=0.1, interface="targets",
    ),
    "gpt2_like": DecoderRecipe(
        attention=AttentionRecipe(qkv="split", spelling="addmm", kind="eager_where", mask="buffer"),
        ffn=FeedForwardRecipe(
            32, "gelu_by_hand", spelling="addmm", dropout=0.1, names=("c_fc", "gate", "c_proj", "both")
        ),
        tied="module", dropout=0.1, names=Names("wte", "h", "attn", "mlp", "lm_head"),
    ),
    "llama_like": DecoderRecipe(
        d_model=12, positions="rotary_half", tables_once=True, norm=_RMS, names=_LLAMA_NAMES,
        attention=AttentionRecipe(4, 2, 4, kind="sdpa_bias", bias=False, out_bias=False),
        ffn=FeedForwardRecipe(20, "silu", "separate", bias=False),
    ),
    "llama_cast_like": DecoderRecipe(
        d_model=12, positions="rotary_half", tables_once=True, norm=_RMS_CAST, names=_LLAMA_NAMES,
        attention=AttentionRecipe(
            4, 2, 4, kind="eager_add", fill=-1e30, bias=False, out_bias=False, softmax_float32=True
        ),
        ffn=FeedForwardRecipe(20, "silu", "separate", bias=False),
    ),
    "phi3_like": DecoderRecipe(
        d_model=12, positions="rotary_half", norm=_RMS, names=_LLAMA_NAMES,
        attention=AttentionRecipe(4, 2, 4, qkv="split", bias=False, out_bias=False, stored_tables=True),
        ffn=FeedForwardRecipe(20, "silu", "fused", "chunk", bias=False),
    ),
    "neox_like": DecoderRecipe(
        positions="rotary_half", block="parallel_two_norms",
        attention=AttentionRecipe(2, 2, 4, rotary_dim=2, kind="eager_masked_fill", qkv="heads"),
        ffn=FeedForwardRecipe(32, names=("dense_h_to_4h", "gate", "dense_4h_to_h", "both")),
        names=Names("embed_in", "layers", "attention", "mlp", "embed_out"),
    ),
    "gptj_like": DecoderRecipe(
        positions="rotary_pairs", block="parallel_one_norm", head_bias=True,
        attention=AttentionRecipe(2, 2, 4, rotary_dim=2, kind="eager_where", bias=False, out_bias=False),
        ffn=FeedForwardRecipe(32, "gelu_by_hand", names=("fc_in", "gate", "fc_out", "both")),
    ),
    "falcon_like": DecoderRecipe(
        d_model=16, positions="rotary_half", block="parallel_one_norm", tied="module",
        attention=AttentionRecipe(4, 1, 4, kind="sdpa_mask", qkv="groups", bias=False, out_bias=False),
        ffn=FeedForwardRecipe(24, bias=False),
    ),
    "bloom_like": DecoderRecipe(
        positions="alibi", tied="module",
        attention=AttentionRecipe(2, 2, 4, kind="eager_masked_fill", fill=-math.inf, qkv="heads"),
        ffn=FeedForwardRecipe(32, "gelu_by_hand"),
    ),
    "opt_like": DecoderRecipe(
        tied="module", dropout=0.1, attention=AttentionRecipe(kind="eager_add", fill=-1e30, mask="triu"),
        ffn=FeedForwardRecipe(32, "relu", container="inline", names=("fc1", "gate", "fc2", "both")),
    ),
    "gemma_like": DecoderRecipe(
        positions="rotary_half", block="sandwich", tied="functional", embedding_scale=8.0**0.5,
        logit_softcap=30.0, norm=NormRecipe("rms_rsqrt", bias=False, one_plus=True),
        attention=AttentionRecipe(
            4, 2, 6, 6, kind="eager_where", softcap=50.0, scale=0.3, bias=False, out_bias=False, window=4
        ),
        ffn=FeedForwardRecipe(20, "gelu_tanh", "separate", bias=False),
    ),
    "qwen3_like": DecoderRecipe(
        d_model=12, positions="rotary_half", norm=NormRecipe("rms", bias=False),
        attention=AttentionRecipe(4, 2, 4, bias=False, out_bias=False, qk_norm=_RMS, repeat="enable_gqa"),
        ffn=FeedForwardRecipe(20, "silu", "separate", bias=False),
    ),
    "albert_like": DecoderRecipe(
        num_layers=3, block="post", share="block", final_norm=False, ffn=FeedForwardRecipe(32, "gelu_by_hand")
    ),
    "shared_ffn": DecoderRecipe(
        num_layers=3, share="ffn", ffn=FeedForwardRecipe(17, "silu", "fused", "view")
    ),
    "primer_like": DecoderRecipe(
        d_model=7, norm=NormRecipe("layer", weight=False, bias=False), in_place_adds=True,
        attention=AttentionRecipe(3, 3, 5, qkv="view", spelling="t"),
        ffn=FeedForwardRecipe(13, "relu_squared", spelling="transpose"),
    ),
    "bilinear": DecoderRecipe(ffn=FeedForwardRecipe(19, "identity", "separate", spelling="functional")),
    "misnamed": DecoderRecipe(
        ffn=FeedForwardRecipe(16, "silu", "separate", names=("q", "out", "k", "v")),
        names=Names("lm_head", "experts", "mlp", "attn", "wte"),
    ),
}  # fmt: skip
"""Family → recipe. `misnamed` has the usual names in the wrong places."""
