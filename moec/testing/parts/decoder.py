"""The decoder a recipe stands for: blocks, embeddings, a head, and the ways a model hands back its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .feed_forward import add_feed_forward, feed_forward
from .positions import PositionTables

if TYPE_CHECKING:
    from ..recipe import DecoderRecipe

Tables = tuple[object, object, object]
MakeFeedForward = Callable[["DecoderRecipe"], nn.Module]


@dataclass
class DecoderOutput:
    """What a decoder with the `dataclass` interface returns."""

    logits: Tensor
    hidden: Tensor | None = None


class Block(nn.Module):
    """One layer: attention and feed-forward, joined as `recipe.block` says."""

    def __init__(self, recipe: DecoderRecipe, ffn: nn.Module | None) -> None:
        super().__init__()
        self.recipe = recipe
        D = recipe.d_model
        names = recipe.names
        self.add_module(
            names.attention, Attention(recipe.attention, D, recipe.positions, recipe.max_positions)
        )
        self.norm_1 = recipe.norm.make(D)
        if recipe.block != "parallel_one_norm":
            self.norm_2 = recipe.norm.make(D)
        if recipe.block == "sandwich":
            self.norm_3, self.norm_4 = recipe.norm.make(D), recipe.norm.make(D)
        if ffn is not None:
            self.add_module(names.ffn, ffn)
        else:
            add_feed_forward(self, recipe.ffn, D)
        self.inline = ffn is None
        self.drop = nn.Dropout(recipe.dropout)

    def _attend(self, x: Tensor, tables: Tables | None) -> Tensor:
        return self.drop(self.get_submodule(self.recipe.names.attention)(x, tables))

    def _feed(self, x: Tensor) -> Tensor:
        if self.inline:
            return feed_forward(self, self.recipe.ffn, x)
        return self.get_submodule(self.recipe.names.ffn)(x)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.recipe.in_place_adds:
            return x + y
        y += x
        return y

    def forward(self, x: Tensor, tables: Tables | None = None) -> Tensor:
        """x [B, S, D] → [B, S, D]."""
        form = self.recipe.block
        if form == "pre":
            x = self._add(x, self._attend(self.norm_1(x), tables))
            return self._add(x, self._feed(self.norm_2(x)))
        if form == "post":
            x = self.norm_1(self._add(x, self._attend(x, tables)))
            return self.norm_2(self._add(x, self._feed(x)))
        if form == "sandwich":
            x = self._add(x, self.norm_2(self._attend(self.norm_1(x), tables)))
            return self._add(x, self.norm_4(self._feed(self.norm_3(x))))
        first = self.norm_1(x)
        second = first if form == "parallel_one_norm" else self.norm_2(x)
        return self._add(x, self._add(self._attend(first, tables), self._feed(second)))


class Decoder(nn.Module):
    """tokens i64 [B, S] → logits [B, S, V]; `substitutes` stand in the place of some feed-forwards."""

    def __init__(
        self, recipe: DecoderRecipe, substitutes: Mapping[int, MakeFeedForward] | None = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        names, D = recipe.names, recipe.d_model
        self.add_module(names.embedding, nn.Embedding(recipe.vocab, D))
        if recipe.positions == "learned":
            self.positions = nn.Embedding(recipe.max_positions, D)
        elif recipe.positions == "learned_parameter":
            self.positions_w = nn.Parameter(torch.zeros(1, recipe.max_positions, D))
        self.drop = nn.Dropout(recipe.dropout)
        self.add_module(names.blocks, nn.ModuleList(self._make_blocks(substitutes or {})))
        if recipe.final_norm:
            self.last_norm = recipe.norm.make(D)
        if recipe.tables_once:
            self.tables = PositionTables(recipe.attention, recipe.positions, recipe.max_positions)
        self._make_head()

    def _make_blocks(self, substitutes: Mapping[int, MakeFeedForward]) -> list[Block]:
        recipe = self.recipe
        if recipe.share == "block":
            return [Block(recipe, self._make_ffn(0, substitutes))] * recipe.num_layers
        shared = self._make_ffn(0, {}) if recipe.share == "ffn" else None
        layers = range(recipe.num_layers)
        return [
            Block(recipe, shared if shared is not None else self._make_ffn(i, substitutes)) for i in layers
        ]

    def _make_ffn(self, layer: int, substitutes: Mapping[int, MakeFeedForward]) -> nn.Module | None:
        if layer in substitutes:
            return substitutes[layer](self.recipe)
        return None if self.recipe.ffn.container == "inline" else self.recipe.ffn.make(self.recipe.d_model)

    def _make_head(self) -> None:
        recipe, names = self.recipe, self.recipe.names
        if recipe.tied == "functional":
            return
        head = nn.Linear(recipe.d_model, recipe.vocab, bias=recipe.head_bias)
        if recipe.tied == "module":
            head.weight = self.get_submodule(names.embedding).weight  # type: ignore[assignment]
        self.add_module(names.head, head)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] → the last layer's output [B, S, D], normalised."""
        recipe = self.recipe
        x = self.drop(self._embed(tokens))
        tables = self.tables(x) if recipe.tables_once else None
        for block in cast(nn.ModuleList, self.get_submodule(recipe.names.blocks)):
            x = block(x, tables)
        return self.last_norm(x) if recipe.final_norm else x

    def _embed(self, tokens: Tensor) -> Tensor:
        recipe, length = self.recipe, tokens.size(1)
        x = self.get_submodule(recipe.names.embedding)(tokens)
        if recipe.embedding_scale is not None:
            x = x * recipe.embedding_scale
        if recipe.positions == "learned":
            x = self._add(x, self.positions(torch.arange(length, device=tokens.device)))
        elif recipe.positions == "learned_parameter":
            x = self._add(x, self.positions_w[:, :length])
        return x

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.recipe.in_place_adds:
            return x + y
        x += y
        return x

    def head(self, x: Tensor) -> Tensor:
        """x [..., D] → logits [..., V]."""
        recipe = self.recipe
        if recipe.tied == "functional":
            logits = F.linear(x, self.get_submodule(recipe.names.embedding).weight)  # type: ignore[arg-type]
        else:
            logits = self.get_submodule(recipe.names.head)(x)
        if recipe.logit_softcap is not None:
            logits = recipe.logit_softcap * torch.tanh(logits / recipe.logit_softcap)
        return logits

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position."""
        return self.head(self.hidden(tokens))


class TargetsDecoder(Decoder):
    """nanoGPT's way: (logits, loss) given targets; without them, only the last position's logits and None."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """tokens, targets i64 [B, S]."""
        x = self.hidden(tokens)
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


class TupleDecoder(Decoder):
    """Returns (logits, hidden)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits and the last layer's output, both of every position."""
        x = self.hidden(tokens)
        return self.head(x), x


class DataclassDecoder(Decoder):
    """Returns an object with `.logits`."""

    def forward(self, tokens: Tensor) -> DecoderOutput:  # type: ignore[override]
        """Logits of every position, in a `DecoderOutput`."""
        x = self.hidden(tokens)
        return DecoderOutput(self.head(x), x)


DECODERS: dict[str, type[Decoder]] = {
    "logits": Decoder, "targets": TargetsDecoder, "tuple": TupleDecoder, "dataclass": DataclassDecoder,
}  # fmt: skip
