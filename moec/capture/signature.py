"""How to call a model so that it maps tokens [B, S] to logits [B, S, V].

Models differ in what they call their input, in how they return the logits, and in whether they need targets
to return more than the last position. `adaptations` lists the ways worth trying, plainest first; each is an
`Adapted` module with the one signature the capture exports.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moec.errors import CaptureError

TARGET_NAMES = ("targets", "target", "labels", "y")


class Adapted(nn.Module):
    """`forward(tokens) -> logits` around a user's model; parameters keep their names below `model.`."""

    def __init__(
        self, model: nn.Module, tokens_as: str | None, targets_as: str | None, fixed: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self._tokens_as, self._targets_as, self._fixed = tokens_as, targets_as, fixed

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, picked out of whatever the model returns."""
        keywords = dict(self._fixed)
        if self._targets_as is not None:
            keywords[self._targets_as] = tokens
        if self._tokens_as is None:
            return logits_of(self.model(tokens, **keywords), tokens)
        return logits_of(self.model(**{self._tokens_as: tokens}, **keywords), tokens)

    @property
    def describe(self) -> str:
        """The call as a person would write it, for messages."""
        extra = [f"{self._targets_as}=tokens"] if self._targets_as else []
        extra += [f"{name}={value!r}" for name, value in self._fixed.items()]
        first = f"{self._tokens_as}=tokens" if self._tokens_as else "tokens"
        return f"model({', '.join([first, *extra])})"


def logits_of(out: Any, tokens: Tensor) -> Tensor:
    """The logits in a model's output: a tensor, the `logits` of a mapping or object, or the first 3-D
    tensor."""
    if isinstance(out, Tensor):
        return out
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = (
        list(out.values()) if isinstance(out, Mapping) else list(out) if isinstance(out, Sequence) else []
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value
    raise CaptureError(
        "capture", f"the model returned {type(out).__name__} without logits", "logits [B, S, V]: a tensor, "
        "the first tensor of a tuple, or something called `logits`",
    )  # fmt: skip


def adaptations(model: nn.Module, example_inputs: Any) -> Iterator[Adapted]:
    """The ways to call `model`, in the order to try them."""
    parameters = _parameters(model)
    fixed = _fixed_keywords(parameters, example_inputs)
    tokens_as = "input_ids" if "input_ids" in parameters else None
    targets_as = next((name for name in TARGET_NAMES if name in parameters), None)
    _require_nothing_else(model, parameters, fixed, targets_as)
    if targets_as is None or parameters[targets_as].default is not inspect.Parameter.empty:
        yield Adapted(model, tokens_as, None, fixed)
    if targets_as is not None:
        yield Adapted(model, tokens_as, targets_as, fixed)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def _fixed_keywords(parameters: Mapping[str, inspect.Parameter], example_inputs: Any) -> dict[str, Any]:
    """Constant keywords: no cache, and whatever the caller's example inputs fix beside the tokens."""
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = dict(zip(names, _as_tuple(example_inputs), strict=False))
    given = example_inputs if isinstance(example_inputs, Mapping) else positional
    for name, value in list(given.items())[1:]:
        if isinstance(value, Tensor) and name not in TARGET_NAMES:
            raise CaptureError(
                f"example_inputs['{name}']", f"a tensor {list(value.shape)}",
                "tokens [B, S], targets, and constants that are not tensors: a program has one input",
            )  # fmt: skip
        if not isinstance(value, Tensor):
            fixed[name] = value
    return fixed


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    if example_inputs is None:
        return ()
    return tuple(example_inputs) if isinstance(example_inputs, Sequence) else (example_inputs,)


def _require_nothing_else(
    model: nn.Module,
    parameters: Mapping[str, inspect.Parameter],
    fixed: Mapping[str, Any],
    targets_as: str | None,
) -> None:
    empty = inspect.Parameter.empty
    ordinary = [
        name
        for name, p in parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is empty
    ]
    unknown = [name for name in ordinary[1:] if name not in fixed and name != targets_as]
    if unknown:
        raise CaptureError(
            f"{type(model).__name__}.forward", f"required arguments {', '.join(unknown)}",
            "their values: compile(model, example_inputs={'tokens': tokens, "
            f"'{unknown[0]}': …}}), constants that are not tensors",
        )  # fmt: skip


def sample_tokens(example_inputs: Any, model: nn.Module) -> Tensor:
    """Tokens to trace with: the caller's, or zeros [2, 9] on the model's device."""
    given = (
        list(example_inputs.values()) if isinstance(example_inputs, Mapping) else _as_tuple(example_inputs)
    )
    if given and isinstance(given[0], Tensor) and given[0].dim() == 2 and min(given[0].shape) > 1:
        return given[0]
    if given and isinstance(given[0], Tensor) and given[0].dim() != 2:
        raise CaptureError("example_inputs", f"tokens {list(given[0].shape)}", "tokens [B, S]")
    weight = next(model.parameters(), None)
    device = weight.device if weight is not None else torch.device("cpu")
    return torch.zeros(2, 9, dtype=torch.long, device=device)
