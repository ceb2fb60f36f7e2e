"""The proof of a decoder: fed in ragged steps, it gives the logits that the whole rows give at once.

The derivation is repeated on the program in fp64, tables included, and must give the same graph; that is run
against recomputing. Two rows of other lengths are fed by prefill, single tokens and a chunk, padded with
tokens that are not theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from moec.ir import Check, Program
from moec.ir.compare import EXACT, error_of
from moec.ir.feed import Remembering, fed
from moec.ir.graphs import fork, graph_modules
from moec.ir.retarget import in_dtype

POSITIONS = 9
STEPS = ((2, 4), (1, 1), (2, 1), (1, 1), (0, 2))
Rewrite = Callable[[fx.GraphModule], None]


def prove_derived(before: Program, after: Program, derive: Rewrite, drop_capacity: Rewrite) -> list[Check]:
    """Checks that `after` is what `derive` makes of `before`, and that this decodes what `before`
    recomputes."""
    wide = in_dtype(before.graph, torch.float64).eval()
    derived = fork(wide)
    derive(derived)
    drop_capacity(wide)
    same = _operators(derived) == _operators(after.graph)
    checks = [Check("operators in fp64", 0.0 if same else float("inf"), 0.0)]
    tokens, steps = proof_rows(before)
    with torch.no_grad():
        out = wide(tokens)
        needed = out[0] if isinstance(out, tuple) else out
        found = fed(Remembering(derived.eval(), 2, tokens.shape[1]), tokens, steps)
    return [*checks, Check("logits", _error(found, list(needed)), EXACT)]


def prove_decoded(before: Program, after: Program) -> list[Check]:
    """The check that two programs that remember give the same logits, both in fp64."""
    tokens, steps = proof_rows(before)
    return [Check("logits", _error(_decoded(after, tokens, steps), _decoded(before, tokens, steps)), EXACT)]


def prove_picked(before: Program, after: Program) -> list[Check]:
    """The check that `after` gives the logits that are wanted, of all that `before` gives, both in fp64."""
    tokens, _ = proof_rows(before)
    wanted = torch.arange(tokens.shape[1], device=tokens.device).flip(0)[::2].repeat(2).expand(2, -1)
    past = torch.zeros(2, dtype=torch.long, device=tokens.device)
    found = []
    for program in (before, after):
        root = in_dtype(program.graph, torch.float64).eval()
        with torch.no_grad():
            memory = Remembering(root, 2, tokens.shape[1], torch.float64)
            found.append(memory(tokens, past, wanted, tokens.shape[1]))
    whole, picked = found
    index = wanted.unsqueeze(-1).expand(-1, -1, whole.shape[-1])
    return [Check("wanted logits", error_of(picked, whole.gather(1, index)), EXACT)]


def _decoded(program: Program, tokens: Tensor, steps: list[tuple[int, ...]]) -> list[Tensor]:
    root = in_dtype(program.graph, torch.float64).eval()
    with torch.no_grad():
        return fed(Remembering(root, 2, tokens.shape[1], torch.float64), tokens, steps)


def _error(found: list[Tensor], needed: list[Tensor]) -> float:
    """Of the rows together, as far as they were fed."""
    rows = [row[: len(given)] for row, given in zip(needed, found, strict=True)]
    return error_of(torch.cat(found), torch.cat(rows))


def proof_length(program: Program) -> int:
    """The positions that are fed: a few, or all that the model has."""
    return min(POSITIONS, program.source.max_positions or POSITIONS)


def proof_rows(program: Program) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Random tokens i64 [2, ≤ 9] and the steps to feed them in, as many as the model has positions for."""
    length = proof_length(program)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, program.source.vocabulary, (2, length), generator=generator)
    past: list[int] = [0, 0]
    steps: list[tuple[int, ...]] = []
    for counts in STEPS:
        if max(past) + max(counts) <= length:
            steps.append(counts)
            past = [held + new for held, new in zip(past, counts, strict=True)]
    device = next((p.device for p in program.parameters()), torch.device("cpu"))
    return tokens.to(device), steps


def _operators(root: fx.GraphModule) -> list[str]:
    """Every call and weight of a graph and its regions, in order, without dtypes."""
    return [
        f"{name}: {node.op} {node.target}"
        for name, module in graph_modules(root)
        for node in module.graph.nodes
        if node.op != "output"
    ]
