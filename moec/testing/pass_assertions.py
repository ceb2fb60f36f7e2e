"""Assertions for anyone's pass: its contract is kept, or its refusal is given and says why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moec.errors import MoecError
from moec.ir import Pass, Program

from .same_function import compare, compare_gradients, evaluate

SHAPES = ((2, 9), (1, 1), (3, 5))
"""Batch and sequence sizes that `assert_preserves` tries: ordinary, degenerate, and another."""


def source_gradients(program: Program, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a program's parameters (structural names) as gradients of the source model's parameters.

    By the chain rule through `program.origins`: copies are added up, split ones put together again,
    transposed ones turned back. Parameters that are new have no place and are left out.
    """
    sums: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        origin = program.origins[name]
        if origin.source is not None:
            dense = origin.pull_back(gradient)
            sums[origin.source] = sums[origin.source] + dense if origin.source in sums else dense
    return sums


def assert_preserves(
    pass_: Pass,
    program: Program,
    *,
    tolerance: float | None = None,
    gradients: bool = True,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    seed: int = 0,
) -> Program:
    """Apply `pass_` the way the runner does and hold it to `exact`; returns the rewritten program.

    Checked in eval mode on random tokens of several `shapes`: logits, and the gradients with respect to the
    source model's parameters. Also: `program` itself is left untouched (graph text and weights), a second
    application gives the same text, the new graph is well-formed, every parameter has an origin, and
    `ensures` holds. A pass whose contract is not `exact` is a ValueError unless a `tolerance` is given.
    """
    contract = pass_.contract_for(program)
    if contract != "exact" and tolerance is None:
        raise ValueError(f"{pass_.name} is declared {contract!r} here; say which tolerance it should keep")
    was_training, before = program.training, _fingerprint(program)
    program.eval()
    try:
        after = _applied(pass_, program).eval()
        assert _code(_applied(pass_, program)) == _code(after), f"{pass_.name}: two applications differ"
        for batch, length in shapes:
            _assert_same_program(program, after, batch, length, tolerance, gradients, seed)
    finally:
        program.train(was_training)
    _assert_untouched(program, before, pass_.name)
    return after.train(was_training)


def _applied(pass_: Pass, program: Program) -> Program:
    pass_.requires(program)
    after = pass_.apply(program.fork())
    after.graph.graph.lint()
    lost = [name for name, _ in after.graph.named_parameters() if name not in after.origins]
    assert not lost, f"{pass_.name}: {lost[0]} has no row in program.origins"
    failed = [check for check in pass_.ensures(program, after) if not check.holds]
    assert not failed, f"{pass_.name}: ensures: {failed[0]}"
    return after


def _assert_same_program(
    before: Program, after: Program, batch: int, length: int, tolerance: float | None, grad: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed + 100 * batch + length)
    tokens = torch.randint(before.source.vocabulary, (batch, length), generator=generator)
    sides = {}
    for name, program in (("found", after), ("needed", before)):
        side = _Logits(program)
        evaluation = evaluate(side, (tokens,), grad, seed)
        structural = {key.removeprefix("graph."): value for key, value in evaluation.parameters.items()}
        sides[name] = (evaluation.outputs, source_gradients(program, structural))
    compare(sides["found"][0], sides["needed"][0], tolerance)
    compare_gradients(sides["found"][1], sides["needed"][1], tolerance)


class _Logits(nn.Module):
    """A program's logits, its parameters under their structural names."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.graph = program.graph
        self._run = program.run

    def forward(self, tokens: Tensor) -> Tensor:
        return self._run(tokens)[0]


def _code(program: Program) -> str:
    modules = [m for m in program.graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return "\n".join(str(module.graph) for module in modules)


def _fingerprint(program: Program) -> tuple[str, dict[str, Tensor], object]:
    state = {name: value.detach().clone() for name, value in program.graph.state_dict().items()}
    return _code(program), state, (program.origins, program.ledger, program.stage)


def _assert_untouched(program: Program, before: tuple[str, dict[str, Tensor], object], who: str) -> None:
    code, state, records = _fingerprint(program)
    assert code == before[0], f"{who}: changed the graph it was given (apply must work on its own fork)"
    assert state.keys() == before[1].keys(), f"{who}: added or removed weights of the program it was given"
    changed = [name for name, value in state.items() if not torch.equal(value, before[1][name])]
    assert not changed, f"{who}: wrote into {changed[0]}, which belongs to the program it was given"
    assert records == before[2], f"{who}: changed the records of the program it was given"


def assert_refuses(pass_: Pass, program: Program, *, match: str) -> MoecError:
    """`pass_` refuses `program` with a moec error whose text matches the regular expression `match`, and
    leaves it as it was; returns the error. Any other exception passes through."""
    before, refusal = _fingerprint(program), _refusal(pass_, program)
    assert refusal is not None, f"{pass_.name} took a program it should refuse with {match!r}"
    assert re.search(match, str(refusal)), f"{pass_.name} refused, but not with {match!r}:\n{refusal}"
    _assert_untouched(program, before, pass_.name)
    return refusal


def _refusal(pass_: Pass, program: Program) -> MoecError | None:
    try:
        pass_.requires(program)
        pass_.apply(program.fork())
    except MoecError as error:
        return error
    return None
