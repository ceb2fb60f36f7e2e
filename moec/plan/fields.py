"""The kinds of value a plan holds, each with its range; a table and its overrides share these definitions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from moec.errors import PlanError
from moec.plan.layers import Layers
from moec.plan.section import complaint, spelled


def _listed(value: Any) -> Any:
    # TOML has lists only; frozen tables hold tuples. Anything else is left for pydantic to refuse.
    return tuple(value) if isinstance(value, list) else value


def _selector(value: Any) -> Any:
    """A layer selector in its normal spelling: text, or a tuple of indices."""
    try:
        return Layers.parse(value).spec
    except PlanError as error:
        raise complaint(f"layers = {spelled(value)}", error.needed) from None


def _capacity(*words: str) -> BeforeValidator:
    """A positive number or one of `words`; checked in one step so that one mistake is one complaint."""

    def check(value: Any, info: ValidationInfo) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value in words if isinstance(value, str) else number and 0 < value < float("inf"):
            return value if isinstance(value, str) else float(value)
        quoted = " or ".join(f'"{word}"' for word in words)
        raise complaint(f"{info.field_name} = {spelled(value)}", f"a number more than 0, or {quoted}")

    return BeforeValidator(check)


def _auto_count(value: Any, info: ValidationInfo) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    if value == "auto" or (number and value >= 1):
        return value
    raise complaint(f"{info.field_name} = {spelled(value)}", 'a whole number, 1 or more, or "auto"')


Listed = BeforeValidator(_listed)
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]

Selector = Annotated[str | tuple[int, ...] | int | list[int], BeforeValidator(_selector)]
Capacity = Annotated[float | Literal["dropless"], _capacity("dropless")]
EvalCapacity = Annotated[float | Literal["train", "dropless"], _capacity("train", "dropless")]
Residual = Literal["none", "sum", "learned"]
Gate = Literal["straight-through", "probability", "normalized", "sigmoid"]
Noise = Literal["none", "jitter", "rsample"]
Balance = Literal["loss", "bias"]
Init = Literal["copy", "noise", "partial", "split", "fresh"]
Keeping = Literal["even", "importance"]
StudentInit = Literal["teacher", "fresh"]
Direction = Literal["forward", "reverse"]
TrainDtype = Literal["fp32", "bf16"]
CaptureDtype = Literal["auto", "fp32", "bf16", "fp64"]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_count)]
AllToAll = Literal["auto", "flat", "hierarchical", "coordinated"]
