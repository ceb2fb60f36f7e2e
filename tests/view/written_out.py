"""The lines of a program, read off its printed text by Python's own `ast`: what a timeline has to show.

Independent of how timelines are made: no identities, no flows, no templates.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from moec.ir.text import function_name
from moec.view.numbering import filled
from moec.view.timeline import Drawing, Node, Section, Side, Step


def lines_of_text(text: str) -> Counter[str]:
    """Every line of `forward`, with the lines of a region instead of the call that opens it."""
    functions: dict[str, ast.FunctionDef] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.FunctionDef):
            functions[statement.name] = statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            functions |= {
                target.id: functions[statement.value.id]
                for target in statement.targets
                if isinstance(target, ast.Name)
            }
    return Counter(_expanded(functions, "forward", set()))


def _expanded(functions: dict[str, ast.FunctionDef], name: str, opened: set[str]) -> Iterator[str]:
    for statement in functions[name].body:
        called = _called(statement)
        if called in functions and called not in opened:
            opened.add(called)
            yield from _expanded(functions, called, opened)
        elif name == "forward" or not isinstance(statement, ast.Return):
            yield without_variables(ast.unparse(statement))


def _called(statement: ast.stmt) -> str:
    """The function of the region that a line calls, '' for none."""
    call = statement.value if isinstance(statement, ast.Assign) else None
    name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
    return function_name(name.removeprefix("self.")) if name.startswith("self.") else ""


class _Anonymous(ast.NodeTransformer):
    """Variables without their names; what is called keeps its own."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return node if node.id == "self" else ast.Name("v", node.ctx)


def without_variables(code: str) -> str:
    """A line in which every variable is called `v`, spelled as `ast` does."""
    value = code.removeprefix("return ")
    tree = ast.parse(code if value == code else f"given = {value}")
    return ast.unparse(_Anonymous().visit(tree))


def lines_of_step(step: Step, drawings: tuple[Drawing, ...], side: str) -> Counter[str]:
    """Every line that a step shows `before` or `after`, in every layer that its sections stand for."""
    found: Counter[str] = Counter()
    for section in step.sections:
        for layer in numbers_of(section, side):
            codes = (shown(node, side) for node in drawings[section.drawing].nodes)
            found.update(
                without_variables(filled(s.code, layer)) for s in codes if s is not None and is_line(s)
            )
    return found


def numbers_of(section: Section, side: str) -> tuple[int | None, ...]:
    """The layers of a section on one side."""
    layers = section.before if side == "before" and section.before else section.layers
    return layers or (None,)


def shown(node: Node, side: str) -> Side | None:
    """A node on one side."""
    return node.before if side == "before" else node.after


def is_line(side: Side) -> bool:
    """Not a value that crosses the border of a block, nor an input of the program."""
    return side.code != side.name
