"""The proof of a fusion: everything a program gives, and every gradient, before and after.

Weights are random and no two experts alike, so that experts, branches and their shares cannot be mistaken for
each other. Evaluation and training mode both, from the same seed: a fusion draws what its parts drew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Check, Program
from moec.ir.compare import EXACT, error_of, gradients_of, worst_gradient
from moec.ir.graphs import named_weights
from moec.ir.inputs import SAMPLES, TOKENS, factors, inputs_of

from .by_hand import Pair, randomise

SEED = 11


def prove_fusion(before: Program, after: Program) -> list[Check]:
    """Logits, loss terms and counts, and the gradient of every parameter, in both modes.

    Of a decoder the logits of one step, with memory that holds something. Nothing for the program of a rank,
    which does not run by itself, or one without weights yet.
    """
    if after.rank is not None or any(parameter.is_meta for parameter in after.parameters()):
        return []
    pair = Pair.of(before, after)
    randomise(pair.after)
    _fill_joined(before.graph, after.graph, pair)
    if len(inputs_of(after.graph.graph)) > 1:
        return [_compare_steps(pair, after.source.vocabulary)]
    return [check for training in (False, True) for check in _compare(pair, training)]


def _fill_joined(before: fx.GraphModule, after: fx.GraphModule, pair: Pair) -> None:
    """A weight of `after` that lies over the memory of weights of `before` says here, too, what they say."""
    known = {id(value): value for _, value in named_weights(before)}
    old, new = dict(named_weights(pair.before)), dict(named_weights(pair.after))
    for name, value in named_weights(after):
        for other, part in named_weights(before) if id(value) not in known else ():
            start, size = part.data_ptr() - value.data_ptr(), value.element_size()
            if 0 <= start < value.nbytes and part.numel():
                first = start // size
                new[name].data.view(-1)[first : first + part.numel()] = old[other].data.reshape(-1)


@torch.no_grad()
def _compare_steps(pair: Pair, vocabulary: int) -> Check:
    given = _step_inputs(pair.after.graph, vocabulary)
    needed, found = (graph.eval()(*(value.clone() for value in given)) for graph in (pair.before, pair.after))
    return Check("logits of a step", error_of(found, needed), EXACT)


def _step_inputs(graph: fx.Graph, vocabulary: int) -> list[Tensor]:
    """Tokens, what each row holds already, which positions are wanted, and random memory."""
    generator = torch.Generator().manual_seed(SEED)
    limits = {"tokens": vocabulary, "past": SAMPLES["L"] - SAMPLES["n"] + 1, "wanted": SAMPLES["n"]}
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            sizes = [_sample(size) for size in node.meta.get("input", TOKENS).sizes]
            drawn = torch.randn(sizes, generator=generator, dtype=torch.float64)
            whole = torch.randint(limits.get(node.name, 1), sizes, generator=generator)
            found.append(whole if node.name in limits else drawn)
    return found


def _sample(size: int | str) -> int:
    if isinstance(size, int):
        return size
    count, letter = factors(size)
    return count * SAMPLES[letter]


def _compare(pair: Pair, training: bool) -> list[Check]:
    mode = "training" if training else "evaluation"
    needed, found = (_results(graph.train(training), pair.tokens) for graph in (pair.before, pair.after))
    if needed.keys() != found.keys():
        return [
            Check(f"results in {mode}", float("inf"), EXACT, worst=", ".join(needed.keys() ^ found.keys()))
        ]
    leaves = dict(pair.after.named_parameters())
    right, left = (gradients_of(_smooth(results), leaves) for results in (needed, found))
    errors = {name: error_of(found[name].detach(), value.detach()) for name, value in needed.items()}
    gradient, worst = worst_gradient(right, left)
    return [
        Check(f"results in {mode}", max(errors.values()), EXACT, worst=max(errors, key=errors.__getitem__)),
        Check(f"gradients in {mode}", gradient, EXACT, worst=worst),
    ]


def _results(graph: fx.GraphModule, tokens: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    with torch.enable_grad():
        return _flat("", graph(tokens))


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name or "logits": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: found for part, item in items for key, found in _flat(f"{name}.{part}", item).items()}


def _smooth(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in results.items() if value.is_floating_point()}
