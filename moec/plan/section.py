"""The base of every table of a plan: unknown keys refused, types strict, values frozen, errors in our words.

Two doors lead into a plan. Python (`Moe(experts=8)`) goes through the metaclass, which rewords pydantic's
complaint at once. A file goes through `Plan.from_text`, which rewords with the line of the key. Nested tables
are built by pydantic itself and pass through neither, so a complaint is worded exactly once.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from moec.errors import PlanError, nearest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

Path = tuple[str | int, ...]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class _Reworded(ModelMetaclass):
    if not TYPE_CHECKING:  # so that checkers see the constructor's own parameters

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (a metaclass)
            try:
                return super().__call__(*args, **kwargs)
            except ValidationError as error:
                raise plan_error(error, cls, Source(cls.__name__)) from None


class Section(BaseModel, metaclass=_Reworded):
    """One table of a plan; building one from bad values raises PlanError."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Source:
    """Where a plan was written: a name to show, and the line of each key when it came from a file."""

    name: str
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """Line of the key, or of the nearest table around it; 0 when there is none."""
        return self.lines.get(path) or (self.line(path[:-1]) if path else 0)

    def where(self, path: Path) -> str:
        """`plan.toml:7: moe.experts`, or `Plan: moe.experts` without a file."""
        line = self.line(path)
        place = f"{self.name}:{line}" if line else self.name
        return f"{place}: {dotted(path)}" if path else place


def complaint(found: str, needed: str, nearest: str = "", at: Path = ()) -> PydanticCustomError:
    """What validators raise; `at` leads from the table being checked to the key at fault."""
    told: dict[str, Any] = {"found": found, "needed": needed, "nearest": nearest, "at": list(at)}
    return PydanticCustomError("plan", "{needed}", told)


def plan_error(error: ValidationError, section: type[Section], source: Source) -> PlanError:
    """Pydantic's complaint in our words: the first one in the file, and how many there are."""
    # A default that could not be computed only echoes the field it is computed from.
    problems = [row for row in error.errors() if row["type"] != "default_factory_not_called"]
    # A misspelt key is often a missing one too: the spelling is the better news.
    problem = min(problems, key=lambda row: (row["type"] == "missing", source.line(_path(row))))
    count = f" (first of {len(problems)} problems)" if len(problems) > 1 else ""
    found, needed, near = _words(problem, section)
    return PlanError(source.where(_path(problem)) + count, found, needed, near)


def dotted(path: Path) -> str:
    """`moe.override[1].experts`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).lstrip(".")


def spelled(value: object) -> str:
    """A value as TOML spells it, shortened; tables only by name."""
    if isinstance(value, Mapping | BaseModel):
        return "a table"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _path(problem: ErrorDetails) -> Path:
    return (*problem["loc"], *problem.get("ctx", {}).get("at", ()))


def _key(path: Path) -> Path:
    """The last name in a path, with the list positions after it."""
    names = [index for index, part in enumerate(path) if isinstance(part, str)]
    return path[names[-1] :] if names else path


def _words(problem: ErrorDetails, section: type[Section]) -> tuple[str, str, str]:
    """(found, needed, nearest) of one complaint."""
    kind, context, path = problem["type"], problem.get("ctx", {}), _path(problem)
    key = dotted(_key(path)) or section.__name__
    if kind == "plan":
        return context["found"], context["needed"], context["nearest"]
    if kind == "extra_forbidden":
        keys = list(_section_at(section, path[:-1]).model_fields)
        return f"unknown key '{key}'", f"one of {', '.join(keys)}", nearest(key, keys)
    if kind == "missing" and isinstance(path[-1], int):
        return f"no {key}", f"{path[-1] + 1} or more values", ""
    if kind == "missing":
        described = _section_at(section, path[:-1]).model_fields[key].description
        return f"no '{key}'", f"{key} = … ({described})", ""
    found = f"{key} = {spelled(problem['input'])}"
    if kind == "literal_error":
        choices = [str(choice) for choice in typing.get_args(_annotation(section, path))]
        return found, f"one of {context['expected']}", nearest(str(problem["input"]), choices)
    return found, _needed(problem), ""


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list",
    "model_type": "a table",
    "dict_type": "a table",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "{} or less"),
}


def _needed(problem: ErrorDetails) -> str:
    kind = problem["type"]
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return words.format(problem.get("ctx", {})[bound])
    return _TYPES.get(kind) or problem["msg"]


def _annotation(section: type[Section], path: Path) -> Any:
    """The literal type of the field at `path`, looked through `| None`."""
    annotation = _section_at(section, path[:-1]).model_fields[str(path[-1])].annotation
    literals = [part for part in _parts(annotation) if typing.get_origin(part) is typing.Literal]
    return literals[0] if literals else annotation


def _section_at(section: type[Section], path: Path) -> type[Section]:
    """The table type that `path` leads to; list positions are stepped over."""
    for key in path:
        if isinstance(key, str):
            parts = _parts(section.model_fields[key].annotation)
            section = next(part for part in parts if isinstance(part, type) and issubclass(part, Section))
    return section


def _parts(annotation: Any) -> list[Any]:
    """The annotation and everything inside it, outermost first."""
    return [annotation, *(part for inner in typing.get_args(annotation) for part in _parts(inner))]
