"""Which pass first breaks its contract, where, and in which value.

`bisect` runs a pipeline pass by pass and proves every one; `examine` looks at a single pass on a single
program.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moec.api import DTYPES
from moec.capture import capture
from moec.capture.signature import Adapted, adaptations
from moec.difference import Difference, first_difference
from moec.errors import CaptureError, MoecError, VerifyError
from moec.ir import Certificate, Check, Pass, Program
from moec.ir.compare import error_of
from moec.ir.shapes import propagate
from moec.ir.stages import check_stage
from moec.passes.pipeline import pipeline
from moec.passes.runner import Runner, proof_tokens
from moec.plan import Plan

__all__ = ["Bisection", "Difference", "Finding", "bisect", "examine", "first_difference", "program_before"]


@dataclass(frozen=True)
class Finding:
    """The first pass that breaks its contract, and where; `without` says how it goes on without the pass."""

    rewrite: str
    contract: str
    difference: Difference
    without: str = ""


@dataclass(frozen=True)
class Bisection:
    """A certificate for each step that held, the first that did not, and the program as far as it came."""

    certificates: tuple[Certificate, ...]
    finding: Finding | None
    program: Program

    def to_json(self) -> dict[str, Any]:
        """Plain data, for machines; an error without a number is null."""
        held = [{"pass": c.rewrite, "contract": c.contract, "verdict": c.verdict} for c in self.certificates]
        finding = asdict(self.finding) if self.finding else None
        if finding and not math.isfinite(finding["difference"]["error"]):
            finding["difference"]["error"] = None
        return {"held": held, "finding": finding}


def bisect(
    model: nn.Module,
    plan: Any = None,
    *,
    passes: Sequence[Pass] | None = None,
    disable: Collection[str] = (),
) -> Bisection:
    """Compile `model` by `plan` one pass at a time, each proved in fp64, up to the first that breaks its
    contract.

    `passes`: instead of the plan's own pipeline. `disable`: names of passes to leave out. The capture itself
    is step one, compared with the model. A pass that *refuses* the model is no finding: its error is raised.
    """
    chosen = Plan.resolve(plan)
    rewrites = list(pipeline(chosen) if passes is None else passes)
    Runner(disable=disable).require_names(rewrites)
    program = _captured(model, chosen)
    fault = _capture_fault(model, program)
    if fault is not None:
        return Bisection((), Finding("capture", "exact", fault), program)
    for position, rewrite in enumerate(rewrites):
        try:
            program = _step(program, rewrite, skipped=rewrite.name in disable)
        except _BrokenError as broken:
            without = _without(program, rewrites[position:], disable)
            finding = Finding(rewrite.name, rewrite.contract_for(program), broken.difference, without)
            return Bisection(program.certificates, finding, program)
    return Bisection(program.certificates, None, program)


class _BrokenError(Exception):
    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def _step(program: Program, rewrite: Pass, *, skipped: bool = False) -> Program:
    """The next program; `_BrokenError` when the pass breaks. What it refuses comes through."""
    runner = Runner(verify="full", disable=[rewrite.name] if skipped else [])
    try:
        return runner.run(program, [rewrite])
    except VerifyError as error:
        raise _BrokenError(examine(program, rewrite) or _in_words(error)) from error
    except MoecError:
        raise
    except Exception as error:
        raise _BrokenError(_crash(error, rewrite)) from error


def _without(program: Program, rewrites: Sequence[Pass], disable: Collection[str]) -> str:
    """Whether the pipeline holds when the first of `rewrites` is left out as well."""
    guilty = rewrites[0].name
    left_out = {rewrite.name for rewrite in rewrites} & {guilty, *disable}
    try:
        Runner(verify="full", disable=left_out).run(program, rewrites)
    except MoecError as error:
        return f"without {guilty} it fails later: {error.where}: {error.found}"
    except Exception as error:
        return f"without {guilty} it fails later: {type(error).__name__}: {error}"
    return f"without {guilty} the rest of the pipeline holds"


# one pass


def examine(before: Program, rewrite: Pass, tokens: Tensor | None = None) -> Difference | None:
    """Apply `rewrite` to `before` and say where it breaks its contract; None when it keeps it.

    Looks at shapes, the pass's own checks, values and gradients (contract `exact`), and the stage it
    completes. Exceptions of the pass itself come through; `before` is not changed.
    """
    contract = rewrite.contract_for(before)
    after = rewrite.apply(before.fork())
    try:
        propagate(after.graph)
    except VerifyError as error:
        return _in_words(error)
    broken = [check for check in rewrite.ensures(before, after) if not check.holds]
    named = [check for check in broken if ": " in check.what]  # of a region: `moe_1: gradients`
    if named:
        return _of_check(named[0])
    found = first_difference(before, after, tokens) if contract == "exact" else None
    return found or (_of_check(broken[0]) if broken else _stage_fault(after, rewrite))


def _of_check(check: Check) -> Difference:
    """A check of the pass's own; its site is the region it names, or that of its worst tensor."""
    region, _, what = check.what.rpartition(": ")
    return Difference(
        "check", region or check.worst.split(".")[0], check.worst or what, check.error, after=what
    )


def _stage_fault(after: Program, rewrite: Pass) -> Difference | None:
    if not rewrite.makes:
        return None
    try:
        check_stage(after.graph, rewrite.makes)
    except VerifyError as error:
        return _in_words(error)
    return None


def _in_words(error: VerifyError) -> Difference:
    return Difference("check", error.where, error.found, after=f"needed: {error.needed}")


def _crash(error: Exception, rewrite: Pass) -> Difference:
    """The exception, with the innermost line of the pass's own file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getfile(type(rewrite))]
    frame = (own or frames)[-1]
    at = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return Difference("crash", at, f"{type(error).__name__}: {error}", source=frame.line or "")


def program_before(
    model: nn.Module,
    plan: Any,
    name: str,
    *,
    passes: Sequence[Pass] | None = None,
    disable: Collection[str] = (),
) -> tuple[Program, Pass]:
    """The program that the pass called `name` is given, and the pass; nothing is proved on the way."""
    chosen = Plan.resolve(plan)
    rewrites = list(pipeline(chosen) if passes is None else passes)
    position = [rewrite.name for rewrite in rewrites].index(name)
    earlier = rewrites[:position]
    left_out = {rewrite.name for rewrite in earlier} & set(disable)
    program = Runner(verify="off", disable=left_out).run(_captured(model, chosen), earlier)
    return program, rewrites[position]


# the capture


def _captured(model: nn.Module, plan: Plan) -> Program:
    program = capture(model, dtype=DTYPES[plan.compile.dtype])
    program.plan = plan
    if any(parameter.is_meta for parameter in program.parameters()):
        raise CaptureError(
            "bisect", "weights on meta", "weights with values: contracts are proved by running"
        )
    return program


def _capture_fault(model: nn.Module, program: Program) -> Difference | None:
    """The captured graph against the model, in the model's dtype: fp64 would change a model's own casts."""
    tokens = proof_tokens(program)
    modes = [(module, module.training) for module in (*model.modules(), *program.modules())]
    try:
        for module, _ in modes:
            module.training = False  # `.eval()` is refused by modules that were exported
        with torch.no_grad():
            found, needed = program(tokens), _logits(model, tokens)
    finally:
        for module, mode in modes:
            module.training = mode
    error = math.inf if needed is None else error_of(found.double(), needed.double())
    tolerance = math.sqrt(torch.finfo(found.dtype).eps)
    return None if error <= tolerance else Difference("value", "root", "logits", error, type(model).__name__)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """What the model itself returns for every position, called in the way the capture would call it."""
    calls: list[Adapted] = list(adaptations(model, None))
    outs = (call(tokens) for call in calls)
    return next((out for out in outs if out.dim() == 3 and out.shape[1] == tokens.shape[1]), None)
