"""The reference of the plan, made from its schema: every key with its type, default and meaning."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from moec.plan import Plan, layers
from moec.plan.fields import Selector
from moec.plan.moe import LayerSettings, Moe, Override
from moec.plan.section import Section
from moec.plan.shipped import shipped_text

INTRODUCTION = """# The plan

A plan says what is to become of a dense model. It is a TOML file, or `moec.Plan(…)` with the same keys in
Python; all tables may be left out, and all keys that have a default. An unknown key, a value out of range and
a selector that selects nothing are errors that name the line and the nearest valid thing.

```toml
[moe]                      # sparse layers; without this table the model stays dense
layers = "1::2"
experts = 32

[[moe.override]]           # settings of some of these layers; as many of these tables as you like
layers = "-2:"
experts = 64
```

This page is made from the schema, `moec/plan/`.
"""

BOUNDS = {
    "minimum": "{} or more",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
}
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}


def plan_page() -> str:
    """The whole page, in Markdown."""
    tables = {name: _table_of(name) for name in Plan.model_fields}
    sections = [_section(name, table) for name, table in tables.items() if name != "moe"]
    return "\n".join([INTRODUCTION, _moe(), *sections, _selectors(), _shipped()])


def _table_of(name: str) -> type[Section]:
    """The class of the table `[name]`, looked through `| None`."""
    annotation = Plan.model_fields[name].annotation
    parts = getattr(annotation, "__args__", (annotation,))
    return next(part for part in parts if inspect.isclass(part) and issubclass(part, Section))


def _moe() -> str:
    own = {name for name in Moe.model_fields if name not in LayerSettings.model_fields}
    everywhere = [name for name in Override.model_fields if name != "layers"]
    assert set(everywhere) == set(LayerSettings.model_fields), "an override has the keys of a layer"
    said = _paragraph((inspect.getdoc(Override) or "").partition("\n\n")[2])
    return (
        f"## `[moe]`\n\n{Plan.model_fields['moe'].description}\n\n{_rows(Moe, sorted(own))}"
        f"\n### Settings of a layer\n\nThese stand in `[moe]`, and in any `[[moe.override]]`.\n\n"
        f"{_rows(LayerSettings, LayerSettings.model_fields)}\n### `[[moe.override]]`\n\n{said}\n"
    )


def _section(name: str, table: type[Section]) -> str:
    doc = inspect.getdoc(table) or ""
    rest = doc.partition("\n\n")[2]
    said = " ".join([str(Plan.model_fields[name].description), _paragraph(rest)]).strip()
    return f"## `[{name}]`\n\n{said}\n\n{_rows(table, table.model_fields)}"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _rows(table: type[Section], names: Iterable[str]) -> str:
    """A Markdown table of the keys `names`."""
    schema = table.model_json_schema()
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for name in names:
        described = schema["properties"][name]
        required = name in schema.get("required", ())
        selects = table.model_fields[name].annotation == get_args(Selector)[0]
        kind = "a [selector](#layer-selectors)" if selects else kind_of(described, schema)
        cells = [f"`{name}`", kind, _default(described, required), described["description"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(described: Mapping[str, Any], required: bool) -> str:
    if required:
        return "*required*"
    if described.get("default") is None:
        return "–"
    default = described["default"]
    return f"`{json.dumps(default, ensure_ascii=False)}`" if default != [] else "–"


def kind_of(described: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, in words: `whole number, 1 or more`."""
    if "$ref" in described:
        return "table"
    if "anyOf" in described:
        kinds = [kind_of(one, schema) for one in described["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in described or "const" in described:
        return ", ".join(f'`"{word}"`' for word in described.get("enum") or [described["const"]])
    if described["type"] == "array":
        return _list_of(described, schema)
    bounds = [words.format(f"{described[key]:g}") for key, words in BOUNDS.items() if key in described]
    return ", ".join([KINDS[described["type"]], *bounds])


def _list_of(described: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    inner = described.get("prefixItems") or [described["items"]]
    if "$ref" in inner[0]:
        return "tables"
    count = f"{len(inner)} values" if "prefixItems" in described else "list"
    return f"{count}, each a {kind_of(inner[0], schema)}"


def _selectors() -> str:
    """Layer selectors, from the docstring that describes them."""
    said = (inspect.getdoc(layers) or "").partition("\n\n")[2]
    return f"## Layer selectors\n\n{said}\n"


def _shipped() -> str:
    parts = [
        f"### `{name}`\n\n```toml\n{shipped_text(name).rstrip()}\n```\n" for name in Plan.shipped_names()
    ]
    use = '`moec.compile(model, plan="pr_moe")`, or `--plan pr_moe` on the command line.'
    return "\n".join([f"## Shipped plans\n\n{use}\n", *parts])
