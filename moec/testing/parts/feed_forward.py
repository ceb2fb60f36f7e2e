"""Feed-forwards as people spell them: plain, gated, fused; any activation; module, inline, sequential."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projections import ProjectionNames, Spelling, add_projection, project, projection_names

Gating = Literal["none", "separate", "fused"]
Fused = Literal["chunk", "split", "view", "narrow", "stride"]
FUSED: tuple[Fused, ...] = ("chunk", "split", "view", "narrow", "stride")
Container = Literal["module", "inline", "sequential"]


def _gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_by_hand": _gelu_by_hand,
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_in_place": lambda x: F.relu(x, inplace=True),
    "relu_squared": lambda x: F.relu(x).square(),
    "relu_times_relu": lambda x: torch.relu(x) * torch.relu(x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "silu": F.silu,
    "silu_by_hand": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "identity": lambda x: x,
}
"""Every activation by name. `identity` stands in gated feed-forwards only, which are then bilinear."""


class Activation(nn.Module):
    """An activation as a module, for `nn.Sequential`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Pointwise."""
        return ACTIVATIONS[self.name](x)


@dataclass(frozen=True)
class FeedForwardRecipe:
    """One spelling of a feed-forward.

    `gating`: `none` is down(act(up x)); `separate` is down(act(gate x) · up x); `fused` is the same with
    gate and up as one projection, taken apart as `fused` says. `container`: a module of its own, weights
    directly on the block (`inline`), or an `nn.Sequential` (only without gating, with `spelling` `module`).
    `names` are the attribute names for up, gate, down and the fused pair.
    """

    hidden: int = 16
    activation: str = "gelu"
    gating: Gating = "none"
    fused: Fused = "chunk"
    spelling: Spelling = "module"
    bias: bool = True
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    container: Container = "module"
    names: tuple[str, str, str, str] = ("up", "gate", "down", "gate_up")

    def projections(self, d_model: int) -> dict[str, tuple[str, int, int]]:
        """Role → (attribute, in, out). Roles: `up`, `down`, and `gate`, or `gate_up` for a fused pair."""
        up, gate, down, both = self.names
        table = {"gate_up": (both, d_model, 2 * self.hidden)}
        if self.gating != "fused":
            table = {"up": (up, d_model, self.hidden)}
        if self.gating == "separate":
            table["gate"] = (gate, d_model, self.hidden)
        return table | {"down": (down, self.hidden, d_model)}

    def parameter_names(self, prefix: str) -> dict[str, ProjectionNames]:
        """Ground truth: role → the parameters of a feed-forward whose owner is at the path `prefix`."""
        if self.container == "sequential":
            last = 3 if self.hidden_dropout else 2
            return {
                role: projection_names(prefix, str(i), bias=self.bias, spelling="module")
                for role, i in (("up", 0), ("down", last))
            }
        return {
            role: projection_names(prefix, name, bias=self.bias, spelling=self.spelling)
            for role, (name, _, _) in self.projections(1).items()
        }

    def make(self, d_model: int) -> nn.Module:
        """A fresh module, for every container but `inline`."""
        if self.container != "sequential":
            return FeedForward(self, d_model)
        up, down = nn.Linear(d_model, self.hidden, self.bias), nn.Linear(self.hidden, d_model, self.bias)
        middle: list[nn.Module] = [Activation(self.activation)]
        middle += [nn.Dropout(self.hidden_dropout)] if self.hidden_dropout else []
        return nn.Sequential(up, *middle, down, nn.Dropout(self.dropout))


class FeedForward(nn.Module):
    """x [..., D] → [..., D], every row by itself."""

    def __init__(self, recipe: FeedForwardRecipe, d_model: int) -> None:
        super().__init__()
        self.recipe = recipe
        add_feed_forward(self, recipe, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """The function the recipe describes."""
        return feed_forward(self, self.recipe, x)


def add_feed_forward(owner: nn.Module, recipe: FeedForwardRecipe, d_model: int) -> None:
    """Give `owner` the parameters of a feed-forward."""
    for name, num_in, num_out in recipe.projections(d_model).values():
        add_projection(owner, name, num_in, num_out, bias=recipe.bias, spelling=recipe.spelling)


def feed_forward(owner: nn.Module, recipe: FeedForwardRecipe, x: Tensor) -> Tensor:
    """Apply the feed-forward whose parameters `owner` holds to x [..., D]."""
    names = {role: name for role, (name, _, _) in recipe.projections(1).items()}

    def apply(role: str, value: Tensor) -> Tensor:
        return project(owner, names[role], value, bias=recipe.bias, spelling=recipe.spelling)

    act = ACTIVATIONS[recipe.activation]
    if recipe.gating == "none":
        h = act(apply("up", x))
    elif recipe.gating == "separate":
        h = act(apply("gate", x)) * apply("up", x)
    else:
        gate, up = take_apart(apply("gate_up", x), recipe.fused)
        h = act(gate) * up
    h = F.dropout(h, recipe.hidden_dropout, owner.training)
    return F.dropout(apply("down", h), recipe.dropout, owner.training)


def take_apart(both: Tensor, fused: Fused) -> tuple[Tensor, Tensor]:
    """Cut [..., 2·F] into gate and up, [..., F] each."""
    hidden = both.size(-1) // 2
    if fused == "stride":
        return both[..., ::2], both[..., 1::2]
    if fused == "narrow":
        return both[..., :hidden], both[..., hidden:]
    if fused == "view":
        pair = both.view(*both.shape[:-1], 2, hidden)
        return pair[..., 0, :], pair[..., 1, :]
    gate, up = both.chunk(2, dim=-1) if fused == "chunk" else both.split(hidden, dim=-1)
    return gate, up
