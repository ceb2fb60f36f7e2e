"""Small timelines made by hand, for what draws them: a GPT of any depth in which every other layer gets experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moec.view.timeline import (
    Check,
    Drawing,
    LedgerRow,
    Node,
    RegionBox,
    Section,
    Side,
    Status,
    Step,
    Timeline,
    Weight,
)

VALUE = "bf16 [B, S, 96]"
PATH = "blocks.{layer}.mlp"
LIFT_DOC = """Put an expert axis under each selected feed-forward.

before:  y = ffn_3(x)
after:   y, … = moe_3(x)
"""
PLAN = ("[moe]", 'layers = "1::2"', "experts = 64", "", "[parallel]", "expert = 8")


def weight(name: str, *shape: int, origin: str = "") -> Weight:
    """A float32 weight."""
    parameters = 1
    for size in shape:
        parameters *= size
    return Weight(name, shape, "float32", origin or name, parameters)


def side(name: str, operator: str, **facts: Any) -> Side:
    """An operator that reads `x`, as it stands on one side."""
    code = f"{name} = {operator}(x)  # {VALUE}"
    return Side(name, facts.pop("code", code), operator, **{"value": VALUE, **facts})


def node(status: Status, name: str, operator: str, **facts: Any) -> Node:
    """The same on both sides, or on the one where it is."""
    made_from, fused_by = facts.pop("made_from", ()), facts.pop("fused_by", "")
    before_region = facts.pop("before_region", facts.get("region"))
    seen = side(name, operator, **facts)
    before = None if status == "created" else replace(seen, region=before_region)
    return Node(status, before, None if status == "removed" else seen, made_from, fused_by)


def dense_block() -> Drawing:
    """A block that nothing happened to: attention and feed-forward as regions."""
    nodes = (
        node("kept", "x", "input"),
        node("kept", "n", "aten.layer_norm", path="blocks.{layer}.norm_1", source="gpt.py:65"),
        node("kept", "a", "aten.scaled_dot_product_attention", region=0, flops=2e6, bytes=3e5),
        node("kept", "h", "aten.linear", region=1, weights=(weight("ffn_{layer}.up.weight", 384, 96),), flops=7e6),
        node("kept", "g", "aten.gelu", region=1, path=PATH, source="gpt.py:52"),
        node("kept", "f", "aten.linear", region=1, weights=(weight("ffn_{layer}.down.weight", 96, 384),), flops=7e6),
        node("kept", "y", "aten.add"),
        node("kept", "out", "output"),
    )  # fmt: skip
    regions = (
        RegionBox("attention_{layer}", "attention", "blocks.{layer}.attention", "gpt.py:38", "kept"),
        RegionBox("ffn_{layer}", "ffn", PATH, "gpt.py:52", "kept"),
    )
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (0, 6), (6, 7)]
    return Drawing(nodes, regions, tuple((a, b, 0) for a, b in edges))


def lifted_block() -> Drawing:
    """A block whose feed-forward got experts: nodes of every status, an exchange, a fused operator."""
    expert = (weight("moe_{layer}.up.weight", 64, 384, 96, origin="blocks.{layer}.mlp.up.weight"),)
    nodes = (
        node("kept", "x", "input"),
        node("kept", "n", "aten.layer_norm", path="blocks.{layer}.norm_1", source="gpt.py:65"),
        node("removed", "h", "aten.linear", region=0, path=PATH, source="gpt.py:52"),
        node("moved", "g", "aten.gelu", region=1, before_region=0, path=PATH, source="gpt.py:52"),
        node("created", "scores", "moec.router", region=1, weights=(weight("moe_{layer}.router.weight", 64, 96),), flops=1e6),
        node("created", "up", "moec.grouped_linear", region=1, made_from=(2,), weights=expert, path=PATH,
             source="gpt.py:52", flops=7e6, flops_text="2*B*S*36864", placement="dim 0 over expert", bytes=9e6),
        node("created", "all", "c10d.all_to_all_single", region=1, collective="all_to_all", axis="expert", bytes=4e5),
        node("created", "c", "moec.combine", region=1, fused_by="fuse_moe_ffn"),
        node("rewired", "y", "aten.add"),
        node("kept", "out", "output"),
    )  # fmt: skip
    regions = (
        RegionBox("ffn_{layer}", "ffn", PATH, "gpt.py:52", "removed"),
        RegionBox(
            "moe_{layer}", "moe", PATH, "gpt.py:52", "created", {"experts": "64", "top_k": "1"}, (0, 1, 2)
        ),
    )
    edges = [(0, 1, 0), (1, 2, 1), (2, 3, 1), (3, 8, 1), (1, 4, 2), (4, 5, 2), (5, 3, 2), (3, 6, 2), (6, 7, 2),
             (7, 8, 2), (0, 8, 0), (8, 9, 0)]  # fmt: skip
    return Drawing(nodes, regions, tuple(edges))


def outside(name: str, status: Status = "kept") -> Drawing:
    """What stands outside of blocks: one operator."""
    nodes = (node(status, "tokens", "input"), node(status, name, "aten.embedding"))
    return Drawing(nodes, (), ((0, 1, 0 if status == "kept" else 2),))


def created(drawing: Drawing) -> Drawing:
    """The same as it came to be: nothing before."""
    nodes = tuple(
        Node("created", None, each.after or each.before)
        for each in drawing.nodes
        if each.after or each.before
    )
    regions = tuple(replace(region, status="created") for region in drawing.regions)
    return Drawing(nodes, regions, tuple((a, b, 2) for a, b, _ in drawing.edges))


def timeline(layers: int = 4, **changes: Any) -> Timeline:
    """Captured, a pass that changes nothing, the experts, and the stage that sums it up."""
    drawings = (outside("e"), dense_block(), lifted_block(), created(dense_block()), outside("e", "created"))
    odd, even = tuple(range(1, layers, 2)), tuple(range(0, layers, 2))
    every = tuple(range(layers))
    same = (
        Section("embedding", (), 0, False),
        Section("block", every, 1, False),
        Section("head", (), 0, False),
    )
    lifted = (
        Section("embedding", (), 0, False),
        Section("block", even, 1, False),
        Section("block", odd, 2, True),
        Section("head", (), 0, False),
    )
    first = (
        Section("embedding", (), 4, True),
        Section("block", every, 3, True),
        Section("head", (), 4, True),
    )
    counts = {"kept": 30, "created": 8, "removed": 2, "moved": 2, "rewired": 2}
    diff = "--- canonical\n+++ sparse\n# appeared: moe 1, 3 (×2)\n\n@@ moe_1 is new\n- h = linear(x)\n+ scores = moec.router(x)\n"
    proved = Check("changes-model", "proved", 1.25e-15, 1e-10, "moe_1 against the dense layer", "")
    stated = Check("exact", "stated", None, None, "", "too large to compare")
    steps = (
        Step("captured", "capture", "", "captured", "", None, 1.2, {"created": 44}, first, ""),
        Step("drop_noops", "pass", "captured", "canonical", "Drop operators that do nothing.", stated, 0.01, {"kept": 40}, same, ""),
        Step("lift_experts", "pass", "structured", "sparse", LIFT_DOC, proved, 0.25, counts, lifted, diff),
        Step("captured → sparse", "stage", "captured", "sparse", "", None, 1.5, counts, lifted, diff),
    )  # fmt: skip
    ledger = tuple(
        LedgerRow(
            f"blocks.{layer}.mlp.{name}.weight",
            (384, 96) if name == "up" else (96, 384),
            "ffn",
            "rewritten" if layer % 2 else "kept",
            "a copy in each of 64 experts" if layer % 2 else "the plan leaves it dense",
            "lift_experts" if layer % 2 else "",
            "gpt.py:52",
        )
        for layer in every
        for name in ("up", "down")
    )
    whole = Timeline(
        name="GPT",
        stage="sparse",
        version="0.1",
        facts={"parameters": "9,989,572", "active": "639,364"},
        sizes={"B": 8, "S": 64},
        plan_lines=PLAN,
        steps=steps,
        drawings=drawings,
        ledger=ledger,
        notes=("layer 2 was left dense",),
        sources={
            "gpt.py:52": "        return self.down(F.gelu(self.up(x_BSD)))",
            "gpt.py:65": "x = self.norm_1(x)",
        },
        text="# GPT · sparse\n\ndef forward(self, tokens):\n    e = embedding(tokens)  # [B, S, 96]\n    return e\n",
    )
    return replace(whole, **changes)
