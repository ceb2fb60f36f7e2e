"""The source model itself, made sparse by hand: the truth that a compiled program is held to.

Its chosen feed-forwards are replaced by modules that evaluate `moe_oracle`, one token at a time, with
the weights that a program's expert layers start with. Nothing of the program's graph is used: only its
weights, and, where training draws at random, what was drawn.

Legend: B batch, S sequence, T = B·S, D model, E experts, K chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from moec.ir import Origin, Program
from moec.ir.expert_oracle import OracleAnswer, moe_oracle
from moec.plan import LayerSettings
from moec.testing.parts.decoder import Block, Decoder
from moec.testing.recipe import DecoderRecipe

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Draws:
    """What one expert layer drew at random in one run: the `jitter` factors [T, D], the `choices` of each
    token, and the (token, choice) pairs that were `kept`; None where nothing is random."""

    jitter: Tensor | None = None
    choices: list[list[int]] | None = None
    kept: set[tuple[int, int]] | None = None


class ExpertsByHand(nn.Module):
    """What a plan asks of one feed-forward, computed by the oracle; keeps its last `answer`."""

    def __init__(
        self, recipe: DecoderRecipe, dense: Mapping[str, Tensor], leaves: Leaves, states: Sequence[Leaves],
        settings: LayerSettings, draws: Draws,
    ) -> None:  # fmt: skip
        super().__init__()
        plain = replace(recipe.ffn, container="module") if recipe.ffn.container == "inline" else recipe.ffn
        self.ffn = [plain.make(recipe.d_model).double().eval()]  # in a list: its own weights are nobody's
        self.dense, self.leaves, self.states = dense, leaves, states
        self.settings, self.draws = settings, draws
        self.answer: OracleAnswer | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] → [B, S, D]."""
        s, leaves = self.settings, self.leaves
        learned = s.residual == "learned"
        mix = (leaves["coefficient.weight"], leaves["coefficient.bias"]) if learned else None
        self.answer = moe_oracle(
            self.ffn[0], self.states, x, leaves["router.weight"], top_k=s.top_k, gate=s.gate,
            bias=leaves.get("bias"), capacity_factor=s.train_capacity if self.training else s.eval_capacity,
            min_capacity=s.min_capacity, residual=s.residual, mix=mix,
            dense_state=self.dense if s.residual != "none" else None, router_input=self._read(x),
            choices=self.draws.choices, kept=self.draws.kept,
        )  # fmt: skip
        return self.answer.y

    def _read(self, x: Tensor) -> Tensor:
        read = x.detach() if self.settings.gate == "straight-through" else x
        return read if self.draws.jitter is None else read * self.draws.jitter.reshape(x.shape)


@dataclass
class SparseSource:
    """The source model with experts by hand: `model`, its own `parameters` by the user's names, the
    hand-made `layers` by site, and the `leaves` they read, by the name of the program's parameter.
    Feed-forwards that share experts in the program share leaves here."""

    recipe: DecoderRecipe
    model: Decoder
    parameters: Leaves
    layers: dict[int, ExpertsByHand]
    leaves: Leaves

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        return self.recipe.logits(self.model, tokens)

    def terms(self) -> dict[str, Tensor]:
        """The weighted loss terms of the last run."""
        balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for layer in self.layers.values():
            assert layer.answer is not None
            weight = layer.settings.balance_loss if layer.settings.balance == "loss" else 0.0
            balance = balance + weight * layer.answer.balance
            z = z + layer.settings.z_loss * layer.answer.z
        return {"balance": balance, "z": z}


def sparse_source(
    recipe: DecoderRecipe, program: Program, settings: Mapping[int, LayerSettings],
    draws: Mapping[int, Draws] | None = None,
) -> SparseSource:  # fmt: skip
    """The model of `recipe` (seed 0, fp64) with the feed-forwards of `settings` replaced, weights from
    `program`."""
    model = recipe.build(0, torch.float64)
    parameters = Leaves(model.named_parameters())
    blocks = cast(nn.ModuleList, model.get_submodule(recipe.names.blocks))
    made: dict[int, Tensor] = {}
    layers, leaves = {}, Leaves()
    answer = recipe.answer()
    for site, chosen in settings.items():
        prefixes = (f"moe_{site}.", f"mix_{site}.")
        own = {n: _leaf(v, made) for n, v in _weights(program).items() if n.startswith(prefixes)}
        leaves |= own
        states = _expert_states(recipe, site, program, own, chosen)
        dense = _dense_state(recipe, parameters, answer.sites[site].path)
        short = {name.partition(".")[2]: value for name, value in own.items()}
        layers[site] = ExpertsByHand(recipe, dense, short, states, chosen, (draws or {}).get(site, Draws()))
        blocks[site] = _with_feed_forward(cast(Block, blocks[site]), recipe, layers[site])
    return SparseSource(recipe, model, parameters, layers, leaves)


def _weights(program: Program) -> Leaves:
    graph = program.graph
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return dict(named)


def _leaf(value: Tensor, made: dict[int, Tensor]) -> Tensor:
    """One leaf for each tensor, so that shared experts stay shared."""
    if id(value) not in made:
        made[id(value)] = value.detach().clone().requires_grad_(isinstance(value, nn.Parameter))
    return made[id(value)]


def _with_feed_forward(block: Block, recipe: DecoderRecipe, experts: nn.Module) -> Block:
    """A block that shares everything with `block` but its feed-forward."""
    made = copy.copy(block)
    made._modules = dict(block._modules)
    made._modules[recipe.names.ffn] = experts
    made.inline = False
    return made


def _own_names(recipe: DecoderRecipe, path: str) -> dict[str, str]:
    """The user's parameter name → its name inside the feed-forward."""
    return {name: name.removeprefix(f"{path}.") for name in feed_forward_names(recipe, path)}


def feed_forward_names(recipe: DecoderRecipe, path: str) -> list[str]:
    """The user's names of the parameters of the feed-forward at `path`."""
    found = []
    for names in recipe.ffn.parameter_names(path).values():
        found += [names.weight, *([names.bias] if names.bias else [])]
    return found


def _dense_state(recipe: DecoderRecipe, parameters: Leaves, path: str) -> Leaves:
    return {short: parameters[name] for name, short in _own_names(recipe, path).items()}


def _expert_states(
    recipe: DecoderRecipe, site: int, program: Program, leaves: Leaves, settings: LayerSettings
) -> list[Leaves]:
    """Expert e's weights as the user would have stored them."""
    own = _own_names(recipe, recipe.answer().sites[site].path)
    states: list[Leaves] = [{} for _ in range(settings.experts)]
    for name, leaf in leaves.items():
        origin = program.origins[name]
        if not origin.experts:
            continue
        assert origin.source is not None
        for expert, state in enumerate(states):
            matrix = (
                leaf[expert] if origin.how != "split" else _slice_among_zeros(leaf[expert], origin, expert)
            )
            if origin.how == "split" and origin.dim == 1:
                matrix = matrix * settings.experts  # each slice stands for the whole
            state[own[origin.source]] = matrix.t() if origin.transposed else matrix
    assert all(set(state) == set(own.values()) for state in states), "an expert without some of the weights"
    return states


def _slice_among_zeros(piece: Tensor, origin: Origin, expert: int) -> Tensor:
    """The hidden units of one expert back in their places: each of the `blocks` runs is dealt out in
    order."""
    share = piece.shape[origin.dim] // origin.blocks
    shape = list(piece.shape)
    shape[origin.dim] *= origin.experts
    places = [
        block * share * origin.experts + expert * share + unit
        for block in range(origin.blocks)
        for unit in range(share)
    ]
    return piece.new_zeros(shape).index_copy(origin.dim, torch.tensor(places), piece)


def gather(origin: Origin, gradient: Tensor) -> Tensor:
    """The gradient of a source weight, from that of the expert weight made of it; by hand."""
    if not origin.experts:
        return gradient
    pieces = [
        _slice_among_zeros(piece, origin, expert) if origin.how == "split" else piece
        for expert, piece in enumerate(gradient)
    ]
    total = torch.stack(pieces).sum(0)
    return total.t() if origin.transposed else total


class Recorder(fx.Interpreter):
    """Runs a program's graph and keeps what its expert layers drew at random, by site."""

    def __init__(
        self, module: fx.GraphModule, layer: str = "", seen: dict[str, dict[str, Any]] | None = None
    ) -> None:
        super().__init__(module)
        self.layer, self.seen = layer, {} if seen is None else seen

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Regions are interpreted in turn."""
        module = self.module.get_submodule(str(target))
        return Recorder(cast(fx.GraphModule, module), str(target), self.seen).run(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Keep inputs and outputs of the operators that draw."""
        result = super().call_function(target, args, kwargs)
        ops = torch.ops.moec
        names = {ops.jitter.default: "jitter", ops.route.default: "route", ops.assign.default: "assign"}
        if target in names:
            self.seen.setdefault(self.layer, {})[names[target]] = (args, result)
        return result

    def draws(self) -> dict[int, Draws]:
        """What was drawn in the run, by site."""
        return {int(layer.removeprefix("moe_")): _draws(calls) for layer, calls in self.seen.items()}


def _draws(calls: Mapping[str, tuple[Any, Any]]) -> Draws:
    experts_TK = calls["route"][1][1]
    order, counts = calls["assign"][1]
    top_k = experts_TK.shape[1]
    kept = {(int(slot) // top_k, int(slot) % top_k) for slot in order[: int(counts.sum())]}
    factors = None
    if "jitter" in calls:
        (x, _, _), made = calls["jitter"]
        factors = torch.where(x == 0, 1.0, made.detach() / x.detach())
    return Draws(factors, experts_TK.tolist(), kept)
