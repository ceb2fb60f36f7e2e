"""A small script that shows what `moec bisect` found, and needs nothing but moec and the model."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import indent

import tomli_w

from moec.bisect import Finding
from moec.ir import Pass
from moec.models import absolute_name
from moec.plan import Plan

TEMPLATE = '''"""Found by `moec bisect`: {rewrite} does not keep its contract ({contract}).

{difference}

Run it with `python {file}`; it exits with 1 as long as the difference is there.
"""

import sys

{imports}

PLAN = {plan}

model = open_model({model!r})
plan = Plan.from_text(PLAN)
{steps}
sys.exit(difference is not None)
'''
ONE_PASS = """before, rewrite = program_before(model, plan, {name!r}{options})
difference = examine(before, rewrite)
print(difference or f"{{rewrite.name}} keeps its contract")"""
CAPTURE = """found = bisect(model, plan, passes=[]).finding
difference = found and found.difference
print(difference or "the capture computes what the model computes")"""


def write_script(
    finding: Finding,
    model: str,
    plan: Plan,
    folder: str | Path = ".",
    *,
    passes: Sequence[Pass] | None = None,
    disable: Collection[str] = (),
) -> Path:
    """Write `bisect_<pass>.py` in `folder`, which is made where it is missing; gives its path.

    `model`: as `moec.models.open_model` reads it; relative paths are made absolute. `passes` and `disable`:
    those that `bisect` was given; a pass from outside of moec is loaded from its own file, where it has to be
    a class at the top.
    """
    target = Path(folder) / f"bisect_{finding.rewrite}.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = script_text(finding, model, plan, target.name, passes=passes, disable=disable)
    target.write_text(text, encoding="utf-8")
    return target


def script_text(
    finding: Finding,
    model: str,
    plan: Plan,
    file: str,
    *,
    passes: Sequence[Pass] | None = None,
    disable: Collection[str] = (),
) -> str:
    """The text of the script that `write_script` writes to `file`."""
    captured = finding.rewrite == "capture"
    given = [] if captured else _up_to(finding.rewrite, passes or ())
    imports = [
        "from moec import Plan",
        f"from moec.bisect import {'bisect' if captured else 'examine, program_before'}",
        f"from moec.models import {'module_at, ' if _foreign(given) else ''}open_model",
        *_imports(given),
    ]
    options = f", disable={sorted(disable)!r}" if disable else ""
    options += f", passes=[\n{indent(_listed(given, plan), '    ')}]" if given else ""
    return TEMPLATE.format(
        rewrite=finding.rewrite,
        contract=finding.contract,
        difference=indent(str(finding.difference), "    "),
        file=file,
        imports="\n".join(imports),
        plan=_plan_literal(plan),
        model=absolute_name(model),
        steps=CAPTURE if captured else ONE_PASS.format(name=finding.rewrite, options=options),
    )


def _plan_literal(plan: Plan) -> str:
    """What the plan says beside the defaults, as a literal; all of it where that reads back otherwise."""
    short = tomli_w.dumps(plan.model_dump(exclude_none=True, exclude_defaults=True))
    text = short if Plan.from_text(short) == plan else plan.to_toml()
    plain = "'''" not in text and "\\" not in text
    return f"'''\n{text}'''" if plain else repr(text)


# passes that were handed to `bisect`


def _up_to(name: str, passes: Sequence[Pass]) -> list[Pass]:
    names = [rewrite.name for rewrite in passes]
    return list(passes[: names.index(name) + 1]) if names else []


def _foreign(passes: Sequence[Pass]) -> list[type[Pass]]:
    """The kinds of passes that are not moec's own."""
    kinds = dict.fromkeys(type(rewrite) for rewrite in passes)
    return [kind for kind in kinds if not kind.__module__.startswith("moec.")]


def _imports(passes: Sequence[Pass]) -> list[str]:
    foreign = _foreign(passes)
    kinds = dict.fromkeys(type(rewrite) for rewrite in passes if type(rewrite) not in foreign)
    own = [f"from {kind.__module__} import {kind.__name__}" for kind in kinds]
    loaded = [f"{kind.__name__} = module_at({inspect.getfile(kind)!r}).{kind.__name__}" for kind in foreign]
    return [*own, *([""] if loaded else []), *loaded]


def _listed(passes: Sequence[Pass], plan: Plan) -> str:
    return "".join(f"{type(rewrite).__name__}({_options(rewrite, plan)}),\n" for rewrite in passes)


def _options(rewrite: Pass, plan: Plan) -> str:
    values = {field.name: getattr(rewrite, field.name) for field in fields(rewrite)}
    return ", ".join(f"{name}={'plan' if value == plan else repr(value)}" for name, value in values.items())
