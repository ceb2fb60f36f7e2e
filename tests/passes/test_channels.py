"""Channels of a region, found on ids, against what autograd says depends on what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from moec.ir import Program, regions
from moec.ir.placement import Split
from moec.passes.carry_ids import Meetings
from moec.passes.channels import Channels, find_channels, sample_of
from moec.passes.deal_channels import Deal, blocks_of, deal
from moec.testing import DecoderRecipe, decoders
from moec.testing.parts.attention import AttentionRecipe, Qkv
from moec.testing.parts.feed_forward import FeedForwardRecipe, Fused
from tests.passes.tensor_ranks import program_of, structured

aten = torch.ops.aten


def region_of_kind(program: Program, kind: str) -> fx.GraphModule:
    return next(iter(regions(program.graph, kind).values()))


def attention(**fields: object) -> tuple[fx.GraphModule, Channels | str]:
    program = program_of(DecoderRecipe(num_layers=1, attention=AttentionRecipe(**fields)))
    region = region_of_kind(program, "attention")
    return region, find_channels(region, sample_of(program.graph))


def feed_forward(**fields: object) -> tuple[fx.GraphModule, Channels | str]:
    program = program_of(DecoderRecipe(num_layers=1, ffn=FeedForwardRecipe(**fields)))
    region = region_of_kind(program, "ffn")
    return region, find_channels(region, sample_of(program.graph))


def cuts(found: tuple[fx.GraphModule, Channels | str], ranks: int) -> dict[str, Split]:
    region, channels = found
    assert isinstance(channels, Channels), channels
    dealt = deal(region, channels, ranks)
    assert isinstance(dealt, Deal), dealt
    return dict(dealt.splits)


# against autograd


class Columns(fx.Interpreter):
    """Runs a region from the outputs of its first products to the input of its last."""

    def __init__(self, region: fx.GraphModule, given: dict[fx.Node, Tensor], row: fx.Node) -> None:
        super().__init__(region, garbage_collect_values=False)
        self.given, self.row = given, row

    def run_node(self, node: fx.Node) -> object:
        if node is self.row:
            return self.env[node.args[0]]
        return self.given[node] if node in self.given else super().run_node(node)


def positive(*shape: int) -> Tensor:
    """Numbers where no usual non-linearity is flat."""
    return torch.rand(shape, dtype=torch.float64) + 0.3


def dependences(program: Program, region: fx.GraphModule, channels: Channels) -> Tensor:
    """Whether unit f of the last product's input depends on output c of the first products, bool [F, C]."""
    inputs = seen_inputs(program, region)
    values = {node: positive(1, 3, int(node.meta["val"].shape[-1])) for node in channels.columns}
    leaves = [value.requires_grad_() for value in values.values()]
    units = Columns(region, values, channels.row).run(*inputs).flatten(0, -2)
    rows = []
    for unit in range(units.shape[-1]):
        grads = torch.autograd.grad(units[:, unit].sum(), leaves, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)]
        rows.append(torch.cat([grad.flatten(0, -2).abs().sum(0) for grad in filled]) > 0)
    return torch.stack(rows)


def seen_inputs(program: Program, region: fx.GraphModule) -> list[object]:
    """What the program calls the region with, for three tokens."""
    seen: list[object] = []
    hook = region.register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.no_grad():
        program.graph(torch.tensor([[1, 3, 2]]))
    hook.remove()
    return seen


@settings(max_examples=settings.default.max_examples // 10)
@given(decoders())
def test_channels_are_what_depends_on_one_another(recipe: DecoderRecipe) -> None:
    recipe = replace(recipe.without_dropout(), num_layers=1)
    program = program_of(recipe)
    for kind in ("attention", "ffn"):
        region = region_of_kind(program, kind)
        channels = find_channels(region, sample_of(program.graph))
        assert isinstance(channels, Channels), channels
        _assert_components(dependences(program, region, channels), channels)


def _assert_components(depends_FC: Tensor, channels: Channels) -> None:
    units, columns = depends_FC.shape
    meetings = Meetings()
    ids = meetings.fresh(units + columns)
    unit, column = depends_FC.nonzero().unbind(1)
    meetings.meet(ids[unit], ids[units + column])
    component = meetings.channels()
    number = torch.cat([channels.channel[channels.ids[node]].flatten(0, -2)[0] for node in channels.columns])
    needed = component[units:]
    assert number.unique().numel() == needed.unique().numel() == channels.count
    for channel in range(channels.count):  # the same outputs lie together, whatever the numbers
        assert needed[number == channel].unique().numel() == 1


# spellings

QKV_BLOCKS: dict[Qkv, int] = {"split": 3, "chunk": 3, "view": 3, "heads": 1, "groups": 1}


@pytest.mark.parametrize("qkv", QKV_BLOCKS)
def test_fused_heads_are_dealt_out_in_their_blocks(qkv: Qkv) -> None:
    splits = cuts(attention(num_heads=4, num_kv_heads=4, qkv=qkv), 2)
    assert len(splits["qkv.weight"].blocks) == QKV_BLOCKS[qkv]
    assert splits["qkv.bias"].blocks == splits["qkv.weight"].blocks
    assert splits["out.weight"] == Split(1, "tensor", 2, (16,))
    assert "out.bias" not in splits


def test_query_heads_go_where_their_keys_are() -> None:
    found = attention(num_heads=6, num_kv_heads=3, qkv="separate")
    assert isinstance(found[1], Channels)
    assert found[1].count == 3
    splits = cuts(found, 3)
    assert {name: split.size(0) for name, split in splits.items() if name.endswith("weight")} == {
        "q.weight": 8, "k.weight": 4, "v.weight": 4, "out.weight": 8,
    }  # fmt: skip


FUSED_BLOCKS: dict[Fused, int] = {"chunk": 2, "split": 2, "view": 2, "narrow": 2, "stride": 1}


@pytest.mark.parametrize("fused", FUSED_BLOCKS)
def test_gate_and_up_are_dealt_out_together(fused: Fused) -> None:
    splits = cuts(feed_forward(hidden=12, gating="fused", fused=fused), 3)
    (both,) = (split for name, split in splits.items() if split.dim == 0 and name.endswith("weight"))
    assert len(both.blocks) == FUSED_BLOCKS[fused]
    assert sum(both.blocks) == 24


def test_blocks() -> None:
    assert blocks_of(torch.tensor([0, 0, 1, 1]), 2) == (4,)
    assert blocks_of(torch.tensor([0, 1, 0, 0, 1, 1]), 2) == (2, 4)
    for ranks in ([0, 1, 1], [1, 0], [0, 1, 0], [0, 2, 1]):
        with pytest.raises(Exception, match="do not lie in blocks"):
            blocks_of(torch.tensor(ranks), 2 if 2 not in ranks else 3)


# refusals


def reason(found: tuple[fx.GraphModule, Channels | str], ranks: int) -> str:
    region, channels = found
    said = channels if isinstance(channels, str) else deal(region, channels, ranks)
    assert isinstance(said, str), said
    return said


def test_ranks_that_do_not_divide_the_heads() -> None:
    assert reason(attention(num_heads=4, num_kv_heads=4), 3) == (
        "3 ranks do not divide its 4 heads, grouped by keys"
    )


def test_one_key_for_all_heads() -> None:
    said = reason(attention(num_heads=4, num_kv_heads=1), 2)
    assert said == "what its first products make is all mixed before the last one"


class Ffn(nn.Module):
    """tokens → embedding → a feed-forward with a change → head."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))
        self.slope = nn.Parameter(torch.randn(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        h = F.relu(F.linear(x, self.up))
        if self.change == "slope":
            h = h * self.slope
        if self.change == "slope read twice":
            h = h * self.slope + self.slope.sum()
        if self.change == "flip":
            h = h + h.flip(-1)
        if self.change == "turned":
            return self.head(x + F.linear(h, self.up.t()))
        return self.head(x + F.linear(h, self.down))


def changed(change: str) -> tuple[fx.GraphModule, Channels | str]:
    program = structured(Ffn(change))
    region = region_of_kind(program, "ffn")
    return region, find_channels(region, sample_of(program.graph))


def test_a_weight_for_each_hidden_unit_is_cut_like_them() -> None:
    assert cuts(changed("slope"), 2)["slope"] == Split(0, "tensor", 2, (6,))


def test_one_weight_up_and_down_is_cut_once() -> None:
    splits = cuts(changed("turned"), 2)
    assert [(split.dim, split.blocks) for split in splits.values()] == [(0, (6,))]


def test_units_that_meet_their_mirror_image_do_not_lie_in_blocks() -> None:
    found = changed("flip")
    assert isinstance(found[1], Channels)
    assert found[1].count == 3
    assert reason(found, 3) == "its channels do not lie in blocks"
