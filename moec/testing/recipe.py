"""A decoder as data: what it is made of, how to build it, and what is true of it.

A `DecoderRecipe` prints as the expression that makes it, so a failing property test shows a decoder one can
paste into a file. `answer()` is the ground truth for anything that claims to find structure in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .parts.attention import AttentionRecipe
from .parts.decoder import DECODERS, Decoder, MakeFeedForward, TargetsDecoder
from .parts.feed_forward import FeedForwardRecipe
from .parts.norms import NormRecipe
from .parts.positions import Positions
from .parts.projections import ProjectionNames

BlockForm = Literal["pre", "post", "sandwich", "parallel_one_norm", "parallel_two_norms"]
Share = Literal["none", "ffn", "block"]
Tied = Literal["no", "module", "functional"]
Interface = Literal["logits", "targets", "tuple", "dataclass"]


@dataclass(frozen=True)
class Names:
    """Attribute names of the model's parts; a structure finder must not care about them."""

    embedding: str = "wte"
    blocks: str = "blocks"
    attention: str = "attn"
    ffn: str = "mlp"
    head: str = "lm_head"


@dataclass(frozen=True)
class Site:
    """One use of a feed-forward: the `layer` it runs in, the path of the module that owns its parameters, and
    its parameters by role (`up`, `down`, and `gate`, or `gate_up` for a fused pair)."""

    layer: int
    path: str
    roles: Mapping[str, ProjectionNames]

    @property
    def weights(self) -> dict[str, str]:
        """Role → name in `model.named_parameters()`."""
        return {role: names.weight for role, names in self.roles.items()}


@dataclass(frozen=True)
class Answer:
    """What is true of a recipe's model: every parameterised matrix product has exactly one place here."""

    sites: tuple[Site, ...]
    attention: tuple[str, ...]
    head: str

    @property
    def feed_forward_weights(self) -> tuple[str, ...]:
        """Names of all feed-forward weights, each once, in program order."""
        return tuple(dict.fromkeys(name for site in self.sites for name in site.weights.values()))


@dataclass(frozen=True)
class DecoderRecipe:
    """An ordinary dense decoder: tokens i64 [B, S] → logits [B, S, V], S ≤ `max_positions`.

    `tables_once`: masks and rotary tables are made once by the model, not by each layer. `in_place_adds`:
    residual sums are written with `+=`. `interface`: what `forward` takes and returns (see `logits`).
    """

    vocab: int = 23
    d_model: int = 8
    num_layers: int = 2
    max_positions: int = 64
    positions: Positions = "learned"
    attention: AttentionRecipe = field(default_factory=AttentionRecipe)
    ffn: FeedForwardRecipe = field(default_factory=FeedForwardRecipe)
    norm: NormRecipe = field(default_factory=NormRecipe)
    block: BlockForm = "pre"
    share: Share = "none"
    tied: Tied = "no"
    head_bias: bool = False
    final_norm: bool = True
    tables_once: bool = False
    dropout: float = 0.0
    embedding_scale: float | None = None
    logit_softcap: float | None = None
    in_place_adds: bool = False
    interface: Interface = "logits"
    names: Names = field(default_factory=Names)

    def __repr__(self) -> str:
        return _expression(self)

    @property
    def computes_in_float32(self) -> bool:
        """Whether some part casts token values to fp32 and back, so that fp64 answers carry fp32 rounding."""
        complex_positions = self.positions == "rotary_complex"
        norms = (self.norm, self.attention.qk_norm)
        casts = any(norm is not None and norm.by_hand and norm.float32 for norm in norms)
        eager = not self.attention.kind.startswith("sdpa")
        return casts or complex_positions or (eager and self.attention.softmax_float32)

    @property
    def num_sites(self) -> int:
        """How many feed-forwards run in one forward pass (shared ones count every time)."""
        return self.num_layers

    def without_dropout(self) -> DecoderRecipe:
        """The same decoder with every dropout probability at zero."""
        attention, ffn = (
            replace(self.attention, dropout=0.0),
            replace(self.ffn, dropout=0.0, hidden_dropout=0.0),
        )
        return replace(self, attention=attention, ffn=ffn, dropout=0.0)

    def build(
        self,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        substitutes: Mapping[int, MakeFeedForward] | None = None,
    ) -> Decoder:
        """The model, in train mode, every parameter drawn from `seed` (the same values in every dtype).

        On `meta` nothing is drawn. `substitutes`: layer → what makes a module to stand in place of its
        feed-forward.
        """
        where = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
        with torch.random.fork_rng(devices=[]), where:
            torch.manual_seed(seed)  # biases start from torch's own draws
            model = DECODERS[self.interface](self, substitutes)
        if torch.device(device).type != "meta":
            fill_parameters(model, seed)
        return model.to(device=device, dtype=dtype)

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Run a model this recipe built: logits [B, S, V] of every position, whatever the interface."""
        out = model(tokens, tokens) if isinstance(model, TargetsDecoder) else model(tokens)
        if isinstance(out, Tensor):
            return out
        return out[0] if isinstance(out, tuple) else out.logits

    def tokens(self, seed: int = 0, batch: int = 2, length: int = 9) -> Tensor:
        """Random tokens i64 [batch, length] of this vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab, (batch, length), generator=generator)

    def answer(self, replaced: frozenset[int] = frozenset()) -> Answer:
        """The ground truth; `replaced` are layers whose feed-forward `build` was told to replace."""
        layers = [i for i in range(self.num_layers) if i not in replaced]
        blocks = 1 if self.share == "block" else self.num_layers
        attention = [self.attention.names(f"{self._block(i)}.{self.names.attention}") for i in range(blocks)]
        head = self.names.embedding if self.tied != "no" else self.names.head
        return Answer(
            tuple(self._site(i) for i in layers),
            tuple(names.weight for table in attention for names in table.values()),
            f"{head}.weight",
        )

    def site_paths(self) -> list[str]:
        """The module path that each feed-forward runs under, which plans select by: that of its layer, also
        where the layers share one module."""
        inline = self.ffn.container == "inline"
        return [self._block(i) + ("" if inline else f".{self.names.ffn}") for i in range(self.num_layers)]

    def _block(self, layer: int) -> str:
        return f"{self.names.blocks}.{layer}"

    def _site(self, layer: int) -> Site:
        block = self._block(0 if self.share != "none" else layer)
        path = block if self.ffn.container == "inline" else f"{block}.{self.names.ffn}"
        return Site(layer, path, self.ffn.parameter_names(path))


class LogitsOnly(nn.Module):
    """A recipe's model as a module from tokens to logits [B, S, V], whatever its interface."""

    def __init__(self, recipe: DecoderRecipe, model: nn.Module) -> None:
        super().__init__()
        self.recipe, self.model = recipe, model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position."""
        return self.recipe.logits(self.model, tokens)


def fill_parameters(model: nn.Module, seed: int) -> None:
    """Draw every parameter of `model` from `seed`, in place: matrices scaled by their rows, vectors near
    their initial value, so that nothing is zero, one, or the same by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def _expression(value: Any) -> str:
    """`value` as Python, fields at their default left out."""
    if not hasattr(value, "__dataclass_fields__"):
        return repr(value) if value not in (float("inf"), float("-inf")) else f"float('{value}')"
    plain = type(value)()
    shown = [f for f in fields(value) if getattr(value, f.name) != getattr(plain, f.name)]
    inner = ", ".join(f"{f.name}={_expression(getattr(value, f.name))}" for f in shown)
    return f"{type(value).__name__}({inner})"
