"""Let regions return what is read of them, and no more.

before:  m_1, _, _, _ = moe_1(n)         def moe_1(self, x): …;  return y, balance, z, counts
after:   m_1 = moe_1(n)                  def moe_1(self, x): …;  return y

Assumes: a program that remembers (its proof feeds it in steps); a region is called once, or its calls read
the same results.
Contract: exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from moec.ir import Check, Pass, Program, regions
from moec.ir.graphs import drop_unused, output
from moec.ir.identity import take_facts

from .prove_cached import prove_decoded


@dataclass(frozen=True)
class TrimOutputs(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        root = program.graph
        drop_unused(root)
        for name, module in regions(root).items():
            calls = [n for n in root.graph.nodes if n.op == "call_module" and n.target == name]
            if isinstance(output(module.graph).args[0], tuple | list):
                _trim(root, module, calls)
        root.recompile()
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Fed in ragged steps, both give the same logits."""
        return prove_decoded(before, after)


def _trim(root: fx.GraphModule, module: fx.GraphModule, calls: list[fx.Node]) -> None:
    end = output(module.graph)
    values: tuple[fx.Node, ...] = tuple(end.args[0])  # type: ignore[arg-type]
    items = [user for call in calls for user in call.users if user.target is operator.getitem]
    read = sorted({item.args[1] for item in items})  # type: ignore[type-var]
    if not read or len(read) == len(values):
        return
    kept = tuple(values[i] for i in read)  # type: ignore[index]
    end.args = (kept[0] if len(kept) == 1 else kept,)
    for item in items:
        if len(kept) == 1:
            item.replace_all_uses_with(item.args[0], propagate_meta=False)  # type: ignore[arg-type]
            take_facts(item.args[0], item)  # type: ignore[arg-type]
            root.graph.erase_node(item)
        else:
            item.update_arg(1, read.index(item.args[1]))
    drop_unused(module)
