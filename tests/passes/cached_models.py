"""Decoders by hand, each with one thing that a cache can follow (`CACHED`), or that it must refuse
(`REFUSED`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D, H, N = 13, 8, 2, 32  # vocabulary, width, heads, most positions
CACHED: dict[str, type[nn.Module]] = {}
REFUSED: dict[str, tuple[type[nn.Module], str]] = {}


def cached(model: type[nn.Module]) -> type[nn.Module]:
    """A model that must be decoded exactly."""
    CACHED[model.__name__] = model
    return model


def refused(words: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A model that must be refused with these words."""

    def note(model: type[nn.Module]) -> type[nn.Module]:
        REFUSED[model.__name__] = (model, words)
        return model

    return note


def causal(length: int) -> Tensor:
    """True where a position may be seen."""
    return torch.ones(length, length, dtype=torch.bool).tril()


class Plain(nn.Module):
    """One attention, written out, and a head; every step can be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V, D), nn.Embedding(N, D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, V)

    def start(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            part.view(x.shape[0], x.shape[1], H, D // H).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        return q, k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) / math.sqrt(D // H)

    def masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~causal(scores.shape[-1]), -math.inf)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mixed = self.masked(self.scores(q, k)).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(x.shape)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.start(tokens)
        return self.head(x + self.out(self.attention(x)))


# what can be followed


@cached
class OldGpt2(Plain):
    """Masks by multiplying, with a buffer and -1e4."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(N, N).tril().view(1, 1, N, N))

    def masked(self, scores: Tensor) -> Tensor:
        b = self.seen[:, :, : scores.shape[-1], : scores.shape[-1]]
        return scores * b - 1e4 * (1 - b)


@cached
class BiasFromTheEnd(Plain):
    """ALiBi whose bias is 0 for the last position, whatever the length."""

    def masked(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        slopes = torch.tensor([0.5, 0.25], dtype=scores.dtype).view(1, H, 1, 1)
        bias = slopes * torch.arange(1 - length, 1, dtype=scores.dtype).view(1, 1, 1, length)
        return super().masked(scores + bias)


@cached
class Retention(Plain):
    """No softmax: later positions are worth nothing."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        i = torch.arange(x.shape[1], dtype=x.dtype)
        decay = torch.where(i[:, None] >= i, 0.9 ** (i[:, None] - i), 0.0)
        return ((q @ k.transpose(-2, -1) * decay) @ v).transpose(1, 2).reshape(x.shape)


@cached
class SoftmaxByHand(Plain):
    """exp over its sum, after the largest score was taken off."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.masked(self.scores(q, k))
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return ((e / e.sum(-1, keepdim=True)) @ v).transpose(1, 2).reshape(x.shape)


@cached
class TokensHidden(Plain):
    """Positions of one token are seen by themselves alone: a mask that depends on tokens, and is
    remembered."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.start(tokens)
        q, k, v = self.heads(x)
        length = tokens.shape[1]
        own = torch.eye(length, dtype=torch.bool)
        seen = ((tokens != 0)[:, None, None, :] & causal(length)) | own
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(x + self.out(y.transpose(1, 2).reshape(x.shape)))


@cached
class RotatedByMatrices(Plain):
    """Rotary positions as one small matrix for each position."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        cos, sin = angle.cos(), angle.sin()
        turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # [S, 2, 2, 2]
        return self._turned(q, turns), self._turned(k, turns), v

    def _turned(self, x: Tensor, turns: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (D // H // 2, 1, 2))
        return (pairs @ turns).flatten(-3)


@cached
class ComplexRotary(Plain):
    """Rotary positions as complex numbers."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(p.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(
                -2
            )
            for p in (q, k)
        )
        return q, k, v


@cached
class SharedKeys(Plain):
    """Two attentions of one pair of keys and values, the second of a short window."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        i = torch.arange(x.shape[1])
        near = (i <= i[:, None]) & (i > i[:, None] - 3)
        far = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        both = F.scaled_dot_product_attention(q + far, k, v, attn_mask=near) + far
        return both.transpose(1, 2).reshape(x.shape)


@cached
class HeadsInTheBatch(Plain):
    """Rank 3: heads and rows of the batch in one dim, and a mask for them."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.heads(x))
        weights = self.masked(torch.bmm(q, k.transpose(1, 2)) / 2).softmax(-1)
        return torch.bmm(weights, v).unflatten(0, (x.shape[0], H)).transpose(1, 2).reshape(x.shape)


@cached
class PositionsFirst(Plain):
    """x is [S, B, D] inside the block."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (H, D // H)).permute(1, 2, 0, 3)
            for part in self.qkv(x.transpose(0, 1)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2).transpose(0, 1)


@cached
class Latent(Plain):
    """Keys and values from a narrow value of each position, and one rotary key for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(D, 3), nn.Linear(3, 2 * D)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, shared, _ = super().heads(x)
        wide = self.wide(self.narrow(x)).unflatten(-1, (2, H, D // H))
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        key = wide[..., 0, :, :].transpose(1, 2)
        turned = (shared[:, :1] * angle.cos()).expand(-1, H, -1, -1)
        return torch.cat([q, q], -1), torch.cat([key, turned], -1), wide[..., 1, :, :].transpose(1, 2)


@cached
class NoPositions(Plain):
    """Nothing but the mask knows of positions; the mask is clamped at the least number."""

    def start(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)

    def masked(self, scores: Tensor) -> Tensor:
        least = torch.finfo(torch.float32).min
        return torch.clamp(scores.masked_fill(~causal(scores.shape[-1]), -math.inf), min=least)


@cached
class BiasByPair(Plain):
    """A learned bias by how far back, capped, as in T5; the mask apart from it."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Embedding(N, H)

    def masked(self, scores: Tensor) -> Tensor:
        i = torch.arange(scores.shape[-1])
        bias = self.near((i[:, None] - i).clamp(0, 4)).permute(2, 0, 1)
        return super().masked(scores + bias)


# what must be refused


@refused("differs between")
class ScaledByLength(Plain):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q * torch.arange(q.shape[2]).sum().log1p().to(q.dtype), k)


@refused("differs between")
class CountedBackwards(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.places(torch.arange(tokens.shape[1]).flip(0))


@refused("aten.slice.Tensor, which reorders, cuts or mixes positions")
class TokenShift(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        x = super().start(tokens)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) + x


@refused("reorders, cuts or mixes positions")
class Rolled(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        return super().start(tokens).roll(1, 1)


@refused("reorders, cuts or mixes positions")
class Flipped(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        return super().start(tokens).flip(1)


@refused("cumsum.default along the positions")
class Summed(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        return super().start(tokens).cumsum(1)


@refused("mean.dim along the positions")
class Averaged(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        x = super().start(tokens)
        return x - x.mean(1, keepdim=True)


@refused("mean.dim along the rows of the batch")
class BatchAveraged(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        x = super().start(tokens)
        return x - x.mean(0, keepdim=True)


@refused("reorders, cuts or mixes rows of the batch")
class BatchFlipped(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        x = super().start(tokens)
        return x + x.flip(0)


@refused("rows of the batch")
class HeadsBeforeRows(Plain):
    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1).flatten(0, 1) for part in self.heads(x))
        weights = self.masked(torch.bmm(q, k.transpose(1, 2))).softmax(-1)
        return torch.bmm(weights, v).unflatten(0, (H, x.shape[0])).permute(1, 2, 0, 3).reshape(x.shape)


@refused("not known to keep positions apart")
class Convolved(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(D, D, 3, padding=2)

    def start(self, tokens: Tensor) -> Tensor:
        x = super().start(tokens)
        return self.mix(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]


@refused("sort.default along the positions")
class Sorted(Plain):
    def start(self, tokens: Tensor) -> Tensor:
        return super().start(tokens).sort(1).values


@refused("sees positions after its own")
class Bidirectional(Plain):
    def masked(self, scores: Tensor) -> Tensor:
        return scores


@refused("sees positions after its own")
class BidirectionalOperator(Plain):
    def attention(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).reshape(x.shape)


@refused("sees positions after its own")
class Prefix(Plain):
    """The first positions are seen by all."""

    def masked(self, scores: Tensor) -> Tensor:
        i = torch.arange(scores.shape[-1])
        return scores.masked_fill((i > i[:, None]) & (i >= 2), -math.inf)


@refused("sees positions after its own")
class LaterOnly(Plain):
    """The mask the wrong way round."""

    def attention(self, x: Tensor) -> Tensor:
        seen = causal(x.shape[1]).logical_not() | torch.eye(x.shape[1], dtype=torch.bool)
        y = F.scaled_dot_product_attention(*self.heads(x), attn_mask=seen)
        return y.transpose(1, 2).reshape(x.shape)


@refused("sees positions after its own")
class MaskedThenCapped(Plain):
    def masked(self, scores: Tensor) -> Tensor:
        return 5.0 * torch.tanh(super().masked(scores) / 5.0)


@refused("sees positions after its own")
class MultipliedMask(Plain):
    """A score of 0 is not hidden from a softmax."""

    def masked(self, scores: Tensor) -> Tensor:
        return scores * causal(scores.shape[-1])


@refused("those after its own count")
class NoMaskNoSoftmax(Plain):
    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return ((q @ k.transpose(-2, -1)) @ v).transpose(1, 2).reshape(x.shape)


@refused("sums over positions")
class LinearAttention(Plain):
    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return (q @ (k.transpose(-2, -1) @ v)).transpose(1, 2).reshape(x.shape)


@refused("paired")
class SameTokens(Plain):
    """Sees positions of its own token only: pairs of tokens' values, outside an attention."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.start(tokens)
        same = (tokens[:, None, :, None] == tokens[:, None, None, :]) & causal(tokens.shape[1])
        y = F.scaled_dot_product_attention(*self.heads(x), attn_mask=same)
        return self.head(x + self.out(y.transpose(1, 2).reshape(x.shape)))
