"""A hypothesis strategy for ordinary decoders of every shape and spelling.

    @given(decoders())
    def test_capture_is_exact(recipe):
        model, tokens = recipe.build(seed=0, dtype=torch.float64), recipe.tokens()
        ...

Examples shrink towards a plain two-layer GPT; the failing recipe prints as an expression that rebuilds it.
"""

from __future__ import annotations

import math

from hypothesis import strategies as st

from .parts.attention import ATTENTION_KINDS, AttentionRecipe, Qkv, Repeat
from .parts.feed_forward import ACTIVATIONS, FUSED, Container, FeedForwardRecipe, Gating
from .parts.norms import NORM_KINDS, NormRecipe
from .parts.positions import MASK_SPELLINGS, POSITIONS, Positions
from .parts.projections import SPELLINGS
from .recipe import BlockForm, DecoderRecipe, Interface, Names, Share, Tied

BLOCKS: tuple[BlockForm, ...] = ("pre", "post", "sandwich", "parallel_one_norm", "parallel_two_norms")
INTERFACES: tuple[Interface, ...] = ("logits", "targets", "tuple", "dataclass")
GATINGS: tuple[Gating, ...] = ("none", "separate", "fused")
QKV: tuple[Qkv, ...] = ("separate", "split", "groups", "chunk", "view", "heads")  # from the fourth: no groups
REPEATS: tuple[Repeat, ...] = ("expand", "repeat_interleave", "enable_gqa")
SHARES: tuple[Share, ...] = ("none", "ffn", "block")
TIES: tuple[Tied, ...] = ("no", "module", "functional")
FLOAT64_POSITIONS: tuple[Positions, ...] = tuple(p for p in POSITIONS if p != "rotary_complex")
WIDTHS = (8, 5, 7, 4, 11, 12, 16, 19, 24, 31, 40)
HIDDENS = (16, 6, 7, 10, 13, 24, 33, 37, 48)
NAMINGS = (
    Names(),
    Names("embed_tokens", "layers", "self_attn", "feed_forward", "output"),
    Names("a", "b", "c", "d", "e"),
    Names("lm_head", "experts", "mlp", "attn", "wte"),
)
FFN_NAMES = (("up", "gate", "down", "gate_up"), ("fc1", "fc3", "fc2", "fc13"), ("q", "out", "k", "v"))


@st.composite
def norms(draw: st.DrawFn, *, float32: bool = True) -> NormRecipe:
    """Any normalisation; `float32=False` leaves out those that cast to fp32 and back."""
    kind = draw(st.sampled_from(NORM_KINDS))
    by_hand = kind not in ("layer", "rms")
    weight = draw(st.booleans())
    return NormRecipe(
        kind,
        weight=weight,
        bias=kind in ("layer", "layer_by_hand") and weight and draw(st.booleans()),
        one_plus=by_hand and weight and draw(st.booleans()),
        float32=by_hand and float32 and draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 1e-6))),
    )


@st.composite
def attentions(draw: st.DrawFn, positions: Positions = "learned", *, float32: bool = True) -> AttentionRecipe:
    """Any attention that can be used with `positions`."""
    num_kv, times = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3)))
    rotary = positions.startswith("rotary")
    head_dim = draw(st.sampled_from((4, 2, 6, 8) if rotary else (4, 1, 3, 5, 8)))
    kinds = ATTENTION_KINDS if positions != "alibi" else ATTENTION_KINDS[2:]
    kind = draw(st.sampled_from(kinds))
    eager, masked = not kind.startswith("sdpa"), kind != "sdpa_causal"
    fused = QKV if times == 1 else QKV[:3]
    return AttentionRecipe(
        num_heads=num_kv * times,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        rotary_dim=draw(st.sampled_from([r for r in (head_dim, 2, 4) if r <= head_dim])) if rotary else 4,
        kind=kind,
        mask=draw(st.sampled_from(MASK_SPELLINGS)) if masked else "tril",
        fill=draw(st.sampled_from((-math.inf, -1e30, -1e9))) if masked else -math.inf,
        qkv=draw(st.sampled_from(fused)),
        repeat=draw(st.sampled_from(REPEATS if times > 1 else REPEATS[:1])),
        bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        spelling=draw(st.sampled_from(SPELLINGS)),
        scale=draw(st.sampled_from((None, 0.3))),
        softcap=draw(st.sampled_from((None, 5.0))) if eager else None,
        qk_norm=draw(st.none() | norms(float32=float32)),
        softmax_float32=eager and float32 and draw(st.booleans()),
        stored_tables=rotary and draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.1))),
        window=draw(st.sampled_from((None, 3))) if masked else None,
    )


@st.composite
def feed_forwards(draw: st.DrawFn, *, modules_only: bool = False) -> FeedForwardRecipe:
    """Any feed-forward; `modules_only` leaves out those whose parameters stand on the block itself."""
    gating = draw(st.sampled_from(GATINGS))
    taken = {"none": {"identity"}, "separate": set(), "fused": {"relu_in_place"}}[gating]
    sequential: tuple[Container, ...] = ("sequential",) if gating == "none" else ()
    inline: tuple[Container, ...] = () if modules_only else ("inline",)
    plain: tuple[Container, ...] = ("module",)
    containers: tuple[Container, ...] = (*plain, *inline, *sequential)
    container = draw(st.sampled_from(containers))
    return FeedForwardRecipe(
        hidden=draw(st.sampled_from(HIDDENS)),
        activation=draw(st.sampled_from([name for name in ACTIVATIONS if name not in taken])),
        gating=gating,
        fused=draw(st.sampled_from(FUSED)) if gating == "fused" else "chunk",
        spelling=draw(st.sampled_from(SPELLINGS)) if container != "sequential" else "module",
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.1))),
        hidden_dropout=draw(st.sampled_from((0.0, 0.1))),
        container=container,
        names=draw(st.sampled_from(FFN_NAMES)),
    )


@st.composite
def decoders(
    draw: st.DrawFn,
    *,
    min_layers: int = 1,
    max_layers: int = 4,
    float32: bool = True,
    dropout: bool = True,
    interfaces: tuple[Interface, ...] = INTERFACES,
    shares: tuple[Share, ...] = SHARES,
) -> DecoderRecipe:
    """Any decoder recipe.

    `float32=False` leaves out models that cast token values to fp32 and back: in fp64 their answers carry
    fp32 rounding, so nothing can be compared to 1e-10. `dropout=False` leaves dropout out everywhere.
    """
    positions = draw(st.sampled_from(POSITIONS if float32 else FLOAT64_POSITIONS))
    share = draw(st.sampled_from(shares))
    tied = draw(st.sampled_from(TIES))
    recipe = DecoderRecipe(
        vocab=draw(st.sampled_from((23, 11, 32, 47))),
        d_model=draw(st.sampled_from(WIDTHS)),
        num_layers=draw(st.integers(min_layers, max_layers)),
        positions=positions,
        attention=draw(attentions(positions, float32=float32)),
        ffn=draw(feed_forwards(modules_only=share == "ffn")),
        norm=draw(norms(float32=float32)),
        block=draw(st.sampled_from(BLOCKS)),
        share=share,
        tied=tied,
        head_bias=tied != "functional" and draw(st.booleans()),
        final_norm=draw(st.booleans()),
        tables_once=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.1))),
        embedding_scale=draw(st.sampled_from((None, 2.5))),
        logit_softcap=draw(st.sampled_from((None, 10.0))),
        in_place_adds=draw(st.booleans()),
        interface=draw(st.sampled_from(interfaces)),
        names=draw(st.sampled_from(NAMINGS)),
    )
    return recipe if dropout else recipe.without_dropout()
