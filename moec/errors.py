"""Every error a user of moec can meet.

An error answers four questions, in this order: *where* it happened, what was *found* there, what was
*needed* instead, and the *nearest* valid thing. The command line prints the same four lines and exits with
status 2; it never shows a traceback for a `MoecError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoecError(Exception):
    """Base of every user-visible error; `where`, `found`, `needed` and `nearest` are plain strings."""

    def __init__(self, where: str, found: str, needed: str, nearest: str = "") -> None:
        self.where, self.found, self.needed, self.nearest = where, found, needed, nearest
        super().__init__(self._message())

    def _message(self) -> str:
        rows = [("found", self.found), ("needed", self.needed), ("nearest", self.nearest)]
        lines = [f"  {label:<8}{text}" for label, text in rows if text]
        return "\n".join([self.where, *lines])

    def __str__(self) -> str:
        return self._message()  # not `args`: torch.fx appends its own trace to those

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.found, self.needed, self.nearest)


class PlanError(MoecError):
    """The plan is not valid, or does not fit the model."""


class ModelError(MoecError):
    """The model that a command line names is not there, or cannot be built."""


class CaptureError(MoecError):
    """The model cannot be turned into a graph over `tokens [B, S]`."""


class PassError(MoecError):
    """A pass refuses the program it was given, naming the node."""


class VerifyError(MoecError):
    """A rewrite broke its contract, or a graph broke the specification of its stage."""


class ArtifactError(MoecError):
    """A saved program is missing, truncated, edited, or of another version."""


class DataError(MoecError):
    """Training text or tokens are missing, empty, or outside the vocabulary."""


class TrainError(MoecError):
    """Training cannot go on (for example: the loss is not a number)."""


class MeshError(MoecError):
    """The ranks of a job do not fit the mesh, cannot meet, or do not do the same thing."""


class RankError(MeshError):
    """A rank of the job hangs, or was lost: nobody's mistake, and starting again may help."""


class OperatorError(MoecError):
    """A `moec::` operator was called with arguments that mean nothing (top_k above the number of experts,
    …)."""


class CostError(MoecError):
    """What was asked about the cost of a program cannot be told, or a letter has no number."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like `name`, quoted, or '' when nothing does."""
    names = list(valid)
    alike = [one for one in names if one.casefold() == name.casefold()]
    close = alike or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"'{close[0]}'" if close else ""
