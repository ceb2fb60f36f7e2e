"""Things that look like feed-forwards and are not; a structure finder must leave them alone, and say why.

Each takes x [B, S, D] and returns [B, S, D], and stands where a block's feed-forward would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .decoders import decoders
from .parts.decoder import Decoder
from .recipe import Answer, DecoderRecipe


class _Decoy(nn.Module):
    """Two projections D → H → D and a place for something between them that does not belong there."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__()
        D, H, bias = recipe.d_model, recipe.ffn.hidden, recipe.ffn.bias
        self.up, self.down = nn.Linear(D, H, bias=bias), nn.Linear(H, D, bias=bias)


class LowRankPair(_Decoy):
    """A LoRA: two matrix products and nothing non-linear between them."""

    def forward(self, x: Tensor) -> Tensor:
        """down(up x) · ½."""
        return self.down(self.up(x)) * 0.5


class EscapingHidden(_Decoy):
    """The hidden activations are used outside as well, so the region is not closed."""

    def forward(self, x: Tensor) -> Tensor:
        """down h + mean h."""
        h = F.gelu(self.up(x))
        return self.down(h) + h.mean(-1, keepdim=True)


class TwoRoots(_Decoy):
    """Gate and up read different values."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__(recipe)
        self.gate = nn.Linear(recipe.d_model, recipe.ffn.hidden, bias=recipe.ffn.bias)
        self.norm = nn.LayerNorm(recipe.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate (norm x)) · up x)."""
        return self.down(F.silu(self.gate(self.norm(x))) * self.up(x))


class NormInside(_Decoy):
    """A normalisation of the hidden activations."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__(recipe)
        self.norm = nn.LayerNorm(recipe.ffn.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """down(norm(gelu(up x)))."""
        return self.down(self.norm(F.gelu(self.up(x))))


class SoftmaxInside(_Decoy):
    """A softmax over the hidden activations: attention over learned memory slots."""

    def forward(self, x: Tensor) -> Tensor:
        """down(softmax(up x))."""
        return self.down(torch.softmax(self.up(x), dim=-1))


class CumulativeSum(_Decoy):
    """Hidden activations are summed over the sequence: tokens are no longer independent."""

    def forward(self, x: Tensor) -> Tensor:
        """down(gelu(up x) summed up to each position, halved)."""
        return self.down(0.5 * torch.cumsum(F.gelu(self.up(x)), dim=1))


class TimeShift(_Decoy):
    """Hidden activations are moved one position back: views and a pad only, and yet tokens mix."""

    def forward(self, x: Tensor) -> Tensor:
        """down(h + h of the token before)."""
        h = F.relu(self.up(x))
        before = F.pad(h, (0, 0, 1, 0))[:, :-1]
        return self.down(h + before)


class ConvMixer(_Decoy):
    """A causal depthwise convolution over the sequence in the middle."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__(recipe)
        hidden = recipe.ffn.hidden
        self.mix = nn.Conv1d(hidden, hidden, 3, groups=hidden, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """down(gelu(conv(up x)))."""
        h = self.mix(self.up(x).transpose(1, 2))[..., : x.size(1)]
        return self.down(F.gelu(h.transpose(1, 2)))


class SequenceSqueeze(_Decoy):
    """Squeeze-and-excite over the sequence: what goes in is one mean per sequence, not a token."""

    def forward(self, x: Tensor) -> Tensor:
        """x · sigmoid(down(relu(up(mean over the sequence))))."""
        squeezed = x.mean(dim=1, keepdim=True)
        return x * torch.sigmoid(self.down(F.relu(self.up(squeezed))))


class GatedAttention(_Decoy):
    """Attention whose output is gated before the last projection: a gated feed-forward but for its root."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__(recipe)
        self.qkv = nn.Linear(recipe.d_model, 3 * recipe.ffn.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """down(attention(x) · sigmoid(up x))."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.down(mixed * torch.sigmoid(self.up(x)))


@dataclass(frozen=True)
class DecoyKind:
    """A decoy: what makes it, words of which at least one must stand in the reason, and whether it is
    causal."""

    make: Callable[[DecoderRecipe], nn.Module]
    reason: tuple[str, ...]
    causal: bool = True


DECOYS: dict[str, DecoyKind] = {
    "low_rank_pair": DecoyKind(LowRankPair, ("non-linear", "nonlinear", "linear map")),
    "escaping_hidden": DecoyKind(EscapingHidden, ("also used", "escapes")),
    "two_roots": DecoyKind(TwoRoots, ("root", "different inputs")),
    "norm_inside": DecoyKind(NormInside, ("norm",)),
    "softmax_inside": DecoyKind(SoftmaxInside, ("softmax",)),
    "cumulative_sum": DecoyKind(CumulativeSum, ("cumsum",)),
    "time_shift": DecoyKind(TimeShift, ("pad", "slice", "sequence", "position")),
    "conv_mixer": DecoyKind(ConvMixer, ("conv",)),
    "sequence_squeeze": DecoyKind(SequenceSqueeze, ("mean", "sequence", "token", "position"), causal=False),
    "gated_attention": DecoyKind(GatedAttention, ("attention", "softmax", "root")),
}
"""Kind → decoy."""


@dataclass(frozen=True)
class DecoyRecipe:
    """A decoder in which the feed-forwards of `layers` are decoys of one `kind`; the others are real."""

    kind: str
    recipe: DecoderRecipe
    layers: tuple[int, ...]

    @property
    def reason(self) -> tuple[str, ...]:
        """Words, at least one of which must stand in the reason that is given."""
        return DECOYS[self.kind].reason

    def build(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Decoder:
        """The model, as `DecoderRecipe.build`."""
        return self.recipe.build(seed, dtype, device, dict.fromkeys(self.layers, DECOYS[self.kind].make))

    def answer(self) -> Answer:
        """The feed-forwards that are real."""
        return self.recipe.answer(frozenset(self.layers))

    def weights(self) -> tuple[str, ...]:
        """Names of the decoys' matrices: none of them may be taken for a feed-forward's."""
        names = self.recipe.names
        prefixes = tuple(f"{names.blocks}.{layer}.{names.ffn}." for layer in self.layers)
        named = self.build(device="meta").named_parameters()
        return tuple(name for name, value in named if value.ndim > 1 and name.startswith(prefixes))


@st.composite
def decoys(
    draw: st.DrawFn, *, kinds: tuple[str, ...] = tuple(DECOYS), max_layers: int = 3, float32: bool = True
) -> DecoyRecipe:
    """Random decoders in which some feed-forwards are decoys."""
    kind = draw(st.sampled_from(kinds))
    recipe = draw(decoders(max_layers=max_layers, float32=float32, shares=("none",)))
    layers = draw(st.sets(st.integers(0, recipe.num_layers - 1), min_size=1))
    return DecoyRecipe(kind, recipe, tuple(sorted(layers)))
