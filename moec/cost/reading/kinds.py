"""Which kind of work an operator is; see `operation.KINDS`."""

from __future__ import annotations

import functools

import torch

_KINDS = {
    "product": "linear mm matmul addmm bmm baddbmm einsum conv1d convolution",
    "attention": "scaled_dot_product_attention",
    "experts": "grouped_linear moe_ffn",
    "routing": "router route assign admit choices dispatch combine regroup gate jitter balance_loss z_loss "
    "balance_share z_share",
    "norm": "layer_norm rms_norm group_norm add_layer_norm add_rms_norm",
    "embedding": "embedding embedding_part",
    "memory": "index index_select gather cat concat stack remember clone copy_ contiguous _to_copy repeat "
    "repeat_interleave roll flip tril triu part arange full zeros ones eye scalar_tensor zeros_like "
    "ones_like full_like empty_like rand_like new_zeros new_ones new_full new_empty one_hot "
    "lift_fresh_copy",
    "collective": "all_reduce all_gather_into_tensor reduce_scatter_tensor all_to_all_single exchange "
    "gather_rows scatter_rows unshare wait_tensor gather_vocabulary",
    "view": "flatten unflatten transpose chunk split split_with_sizes slice select unsqueeze squeeze expand "
    "expand_as broadcast_to view view_as view_as_real view_as_complex permute t numpy_T movedim swapaxes "
    "swapdims narrow unfold unbind detach alias reshape reshape_as _unsafe_view to sym_size share",
    # Row by row, but as pointwise operators limited by what they read and write.
    "pointwise": "softmax _softmax _safe_softmax log_softmax logsumexp sum mean var std prod amax amin any "
    "all argmax argmin cumsum topk sort argsort linalg_vector_norm glu dropout feature_dropout outer "
    "hardtanh relu6 prelu complex __and__ __or__ __xor__",
}
_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def kind_of(operator: str, copies: bool = False) -> str:
    """The kind of an operator such as `aten::linear`; `copies`: what it gives is memory of its own.

    An operator that usually gives a view is of the kind `memory` where it copies. What is not known by name
    is taken for pointwise; `is_known` tells.
    """
    kind = _OF.get(operator.partition("::")[2], "pointwise")
    return "memory" if kind == "view" and copies else kind


@functools.cache
def is_known(operator: str) -> bool:
    """Whether the kind of an operator is known by its name, or torch says that it is pointwise."""
    namespace, _, name = operator.partition("::")
    if name in _OF:
        return True
    packet = getattr(getattr(torch.ops, namespace), name)
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
