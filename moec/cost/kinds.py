"""Which kind of work an operator is; see `operation.KINDS`."""

from __future__ import annotations

_KINDS = {
    "product": "linear mm matmul addmm bmm",
    "attention": "scaled_dot_product_attention",
    "experts": "grouped_linear moe_ffn",
    "routing": "router route assign admit choices dispatch combine regroup gate jitter balance_loss z_loss "
    "balance_share z_share",
    "norm": "layer_norm rms_norm add_layer_norm add_rms_norm",
    "embedding": "embedding embedding_part",
    "memory": "index gather cat remember clone copy_ arange zeros_like",
    "collective": "all_reduce all_gather_into_tensor reduce_scatter_tensor all_to_all_single exchange "
    "gather_rows scatter_rows unshare wait_tensor gather_vocabulary",
    "view": "flatten unflatten transpose chunk split split_with_sizes slice select unsqueeze squeeze expand "
    "view view_as permute t detach reshape sym_size share",
}
_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def kind_of(operator: str, region: str) -> str:
    """The kind of `aten::linear`, in a region of the kind `region`."""
    name = operator.partition("::")[2]
    return _OF.get(name, "pointwise")
