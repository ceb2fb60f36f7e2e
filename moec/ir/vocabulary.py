"""The words a program's text is written in: `from moec.ir.vocabulary import gelu, linear, moec`.

`linear` is torch's operator of that name and `softmax.int` one overload of it; `moec` holds the operators of
`moec.runtime.ops`; `float32`, `strided`, `inf` are constants; `sym_max` and its kin work on sizes.

`refusal` says what may stand in a program that has not been trusted: operators that return a new value and
touch nothing but their arguments. No file, no raw memory, no in-place change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from moec.errors import nearest

from .overloads import candidates, kind_of, resolve

CONSTANTS: dict[str, Any] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
} | {"inf": float("inf"), "nan": float("nan")}

SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum")
    if hasattr(torch, name)
}

# Beside every functional pointwise operator (torch tags those), what decoders are made of.
WORDS = frozenset(
    """
    __and__ __or__ __xor__ _assert_tensor_metadata _fused_rms_norm _log_softmax _safe_softmax _softmax
    _to_copy absolute adaptive_avg_pool1d addbmm addmm addmv alias all alpha_dropout amax amin aminmax any
    arange arctan argmax argmin argsort avg_pool1d baddbmm bernoulli bmm broadcast_tensors broadcast_to
    bucketize cat channel_shuffle chunk clone column_stack concat concatenate constant_pad_nd contiguous
    conv1d convolution cosine_similarity count_nonzero cross_entropy_loss cummax cummin cumprod cumsum
    detach diag diag_embed diagonal diff divide dot dropout einsum embedding expand expand_as eye
    feature_dropout fill flatten flip fliplr flipud floor_divide full full_like gather glu greater
    greater_equal group_norm hstack index index_add index_put index_select instance_norm isclose kron
    kthvalue layer_norm less less_equal linalg_norm linalg_vector_norm linear linspace log_sigmoid
    log_softmax logcumsumexp logsumexp masked_fill masked_scatter matmul max max_pool1d mean median min mm
    mode moveaxis movedim multiply mv narrow native_dropout native_group_norm native_layer_norm negative
    new_full new_ones new_zeros nonzero norm not_equal numpy_T one_hot ones ones_like outer pad permute
    pixel_shuffle prelu prod quantile rand rand_like randint randn randn_like randperm ravel repeat
    repeat_interleave reshape reshape_as rms_norm roll rot90 rrelu scalar_tensor
    scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter
    sigmoid size slice slice_scatter softmax sort split split_with_sizes squeeze stack std std_mean
    subtract sum swapaxes swapdims sym_numel sym_size t take_along_dim tanh tensor_split tile to topk
    trace transpose tril tril_indices triu triu_indices type_as unbind unflatten unfold unsafe_split
    unsqueeze var var_mean view view_as vstack zeros zeros_like
    """.split()  # noqa: SIM905
)


class Operator:
    """One word: calls the overload that the arguments mean; `word.overload` names one outright."""

    def __init__(self, packet: OpOverloadPacket) -> None:
        self._packet = packet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kinds = {name: kind_of(value) for name, value in kwargs.items()}
        chosen = resolve(self._packet, [kind_of(value) for value in args], kinds)
        if chosen is None:
            raise TypeError(f"no overload of {self._packet} takes {kind_of(args)} and {kinds}")
        return chosen(*args, **kwargs)

    def __getattr__(self, overload: str) -> OpOverload:
        found = getattr(self._packet, overload, None) if not overload.startswith("_") else None
        if not isinstance(found, OpOverload):
            raise AttributeError(f"{self._packet} has no overload {overload!r}")
        return found

    def __repr__(self) -> str:
        return f"<operator {self._packet}>"


class Namespace:
    """The operators of one library under its name: `moec.route`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Operator:
        found = packet(f"{self._name}.{name}")
        if found is None:
            raise AttributeError(f"no operator {self._name}.{name}; is the module that defines it imported?")
        return Operator(found)


NAMESPACES = {name: Namespace(name) for name in ("moec", "_c10d_functional")}


def packet(word: str) -> OpOverloadPacket | None:
    """The operator a word names: `linear` is aten's, `moec.route` is moec's; None when there is none."""
    library, _, name = word.rpartition(".")
    if library not in ("", *NAMESPACES) or (name.endswith("__") and name.strip("_") not in _DUNDER):
        return None
    found = getattr(getattr(torch.ops, library or "aten"), name, None)
    return found if isinstance(found, OpOverloadPacket) else None


_DUNDER = ("and", "or", "xor", "lshift", "rshift")


def word_of(overload: OpOverload) -> str:
    """The word for an operator: `linear`, `moec.route`; other libraries keep their namespace."""
    return overload._opname if overload.namespace == "aten" else f"{overload.namespace}.{overload._opname}"


@functools.lru_cache(maxsize=4096)
def refusal(overload: OpOverload) -> str:
    """Why this operator may not stand in a program that is not trusted, or '' when it may."""
    if overload._schema.is_mutable:
        return f"{word_of(overload)}, which changes its argument in place"
    if overload.namespace in NAMESPACES:
        return ""
    kin = candidates(overload.overloadpacket)  # torch tags some overloads of an operator and forgets others
    known = overload._opname in WORDS or any(torch.Tag.pointwise in one.tags for one in kin)
    known = known and overload.namespace == "aten"
    return "" if known else f"{word_of(overload)}, which is not in the vocabulary"


def nearest_word(word: str) -> str:
    """The known word that looks most like this one, quoted, or ''."""
    library = word.partition(".")[0]
    if library in NAMESPACES:
        return nearest(word, [f"{library}.{name}" for name in dir(getattr(torch.ops, library))])
    return nearest(word, [*WORDS, *CONSTANTS, *SIZE_FUNCTIONS, "gelu", "silu", "relu", "mul", "add"])


def __getattr__(name: str) -> Any:
    for table in (CONSTANTS, SIZE_FUNCTIONS, NAMESPACES):
        if name in table:
            return table[name]
    found = packet(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Operator(found)
