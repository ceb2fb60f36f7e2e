"""The one place where lists of passes are made."""

from __future__ import annotations

from moec.ir import Pass
from moec.plan import Plan
from moec.plan.depth import unmeasured

from .arrange_ranks import ArrangeRanks
from .branch_experts import BranchExperts
from .choose_products import ChooseProducts
from .collect_terms import CollectTerms
from .complete_canonical import CompleteCanonical
from .complete_fused import CompleteFused
from .derive_cache import DeriveCache
from .drop_noops import DropNoops
from .functionalize_writes import FunctionalizeWrites
from .fuse_gate import FuseGate
from .fuse_mix import FuseMix
from .fuse_moe_ffn import FuseMoeFfn
from .fuse_qkv import FuseQkv
from .group_heads import GroupHeads
from .keep_layers import KeepLayers
from .lift_experts import LiftExperts
from .lower_dense import LowerDense
from .lower_experts import LowerExperts
from .merge_equal_values import MergeEqualValues
from .name_values import NameValues
from .normalize_views import NormalizeViews
from .outline_attention import OutlineAttention
from .outline_feed_forwards import OutlineFeedForwards
from .outline_positions import OutlinePositions
from .overlap_exchanges import OverlapExchanges
from .pack_weights import PackWeights
from .pick_positions import PickPositions
from .place_dense import PlaceDense
from .place_experts import PlaceExperts
from .renew_weights import RenewWeights
from .settle_training import SettleTraining
from .spell_activations import SpellActivations
from .spell_attention import SpellAttention
from .spell_linears import SpellLinears
from .spell_masks import SpellMasks
from .spell_norms import SpellNorms
from .spell_products import SpellProducts
from .trim_outputs import TrimOutputs
from .write_sizes import WriteSizes


def canonical() -> list[Pass]:
    """captured → canonical: few operators, one spelling each."""
    return [
        FunctionalizeWrites(),
        DropNoops(),
        NormalizeViews(),
        SpellLinears(),
        SpellNorms(),
        SpellActivations(),
        SpellProducts(),
        SpellAttention(),
        SpellMasks(),
        GroupHeads(),
        MergeEqualValues(),
        CompleteCanonical(),
    ]


def structured() -> list[Pass]:
    """canonical → structured: regions, by dataflow."""
    return [OutlineFeedForwards(), OutlineAttention(), OutlinePositions(), NameValues()]


def student(plan: Plan) -> list[Pass]:
    """structured or sparse → the same with fewer layers, and fresh weights where the plan asks for them.

    Raises `PlanError` for layers by importance, which is measured on text: `program.student(…, tokens=…)`.
    """
    if plan.student is None:
        return []
    if plan.student.by == "importance":
        raise unmeasured()
    keeping = KeepLayers(plan.student.keep, plan.student.depth)
    return [keeping, RenewWeights(plan.student.seed)] if plan.student.init == "fresh" else [keeping]


def sparse(plan: Plan) -> list[Pass]:
    """structured → sparse: what the plan asks for; nothing for a dense plan."""
    if plan.moe is None:
        return []
    return [BranchExperts(plan), LiftExperts(plan), CollectTerms()]


def pipeline(plan: Plan, world: int = 1) -> list[Pass]:
    """Everything that `moec.compile` runs for `plan` on `world` ranks, in order."""
    return [*canonical(), *structured(), *student(plan), *sparse(plan), *placed(plan, world)]


def placed(plan: Plan, world: int) -> list[Pass]:
    """sparse → placed: where everything lies on `world` ranks; nothing for a single rank."""
    return [ArrangeRanks(plan, world), PlaceDense(), PlaceExperts()] if world > 1 else []


def partitioned(rank: int) -> list[Pass]:
    """placed → partitioned: the program of one rank, its communication spelled out."""
    return [LowerDense(rank), LowerExperts(rank), WriteSizes(), OverlapExchanges()]


def cached(length: int) -> list[Pass]:
    """structured, sparse or partitioned → cached: the program that decodes rows of `length` positions."""
    return [DeriveCache(length), TrimOutputs(), PickPositions()]


def fused() -> list[Pass]:
    """structured, sparse or partitioned → fused: fewer, larger operators, for training and for use."""
    return [FuseGate(), FuseMoeFfn(), FuseMix(), ChooseProducts(), CompleteFused()]


def fused_decoder(packed: bool = False) -> list[Pass]:
    """cached → fused: as `fused`, and what a program that is never trained can leave out.

    `packed`: weights are held a second time, as a CPU reads them fastest.
    """
    *fusions, _, complete = fused()
    packing: list[Pass] = [ChooseProducts(packed=True), PackWeights()] if packed else [ChooseProducts()]
    return [SettleTraining(), FuseQkv(), *fusions, *packing, complete]
