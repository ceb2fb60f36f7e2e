"""The feed-forwards of a program, as the plan's selectors count them."""

from __future__ import annotations

from moec.errors import PassError
from moec.ir import Program, region_of, regions
from moec.plan import LayerSettings, Plan


def feed_forward_sites(program: Program) -> list[str]:
    """Names of the dense feed-forward regions, in program order: site i is the i-th."""
    return list(regions(program.graph, "ffn"))


def require_feed_forwards(program: Program, rewrite: str) -> None:
    """Raise `PassError` when there is nothing to make sparse, with the reasons the ledger gives."""
    if feed_forward_sites(program):
        return
    reasons = [f"{entry.weight}: {entry.reason}" for entry in program.ledger if entry.role != "head"]
    shown = "; ".join(dict.fromkeys(reasons[:6])) or "the model has no product with a weight matrix"
    more = f"; and {len(reasons) - 6} more" if len(reasons) > 6 else ""
    raise PassError(
        f"{rewrite}: {program.source.name}", f"no feed-forward ({shown}{more})",
        "up products on one input, pointwise operators, one down product, nothing else read from inside",
        "plan=None compiles the model as it is; print(program.ledger) lists every product",
    )  # fmt: skip


def site_paths(program: Program) -> list[str]:
    """The user's module path of each site (its region's name where the model has no paths)."""
    found = []
    for name, module in regions(program.graph, "ffn").items():
        region = region_of(module)
        assert region is not None
        found.append(region.path or name)
    return found


def settings_by_site(program: Program, plan: Plan) -> dict[int, LayerSettings]:
    """What the plan asks of each site it selects; raises `PlanError` when a selector fits nothing."""
    paths = site_paths(program)
    return plan.layer_settings(len(paths), paths)
