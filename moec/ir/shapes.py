"""Give every node its symbolic shape by running the graph on fake tensors.

No data is touched: weights become fake tensors of the same shape, tokens are `[B, S]` with symbolic sizes.
Passes change graphs; the runner calls `propagate` after each, so a graph whose shapes do not fit fails at
once, at the node that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.errors import VerifyError

from .graphs import attribute, placeholder
from .inputs import SAMPLES, Input, factors, inputs_of


def propagate(root: fx.GraphModule) -> None:
    """Set `node.meta["val"]` on every node of `root` and of its regions; mutates only metadata.

    Raises `VerifyError`, naming the node, where shapes or dtypes do not fit.
    """
    known = _known_shapes(root)
    with known.mode, enable_python_dispatcher(), torch.no_grad():
        _Propagate(root, known).run(*known.given)


def _known_shapes(root: fx.GraphModule) -> KnownShapes:
    """What was learned about this graph's shapes before; a fresh start when it moved to another device."""
    first, device, inputs = placeholder(root.graph), _device_of(root), inputs_of(root.graph)
    known = first.meta.get("shapes")
    if not isinstance(known, KnownShapes) or (known.device, known.inputs) != (device, inputs):
        shared = _SHARED.get()
        known = first.meta["shapes"] = shared.get((device, inputs)) or KnownShapes(device, inputs)
        shared[device, inputs] = known
    return known


@contextmanager
def shapes_shared(known: Shared) -> Iterator[None]:
    """Inside, graphs that are no forks of each other share what was learned about shapes too, if their inputs
    are alike; it is kept in `known`, for the next time."""
    token = _SHARED.set(known)
    try:
        yield
    finally:
        _SHARED.reset(token)


def _device_of(root: fx.GraphModule) -> torch.device:
    some = next(root.parameters(), None)
    return some.device if some is not None else torch.device("cpu")


class _Forgetful(dict):  # type: ignore[type-arg]
    """Keeps nothing: what holds where nothing is shared."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class KnownShapes:
    """Shapes of the calls seen so far: layers are alike, a pass changes few calls, so most are seen again.

    Tensors that agree in shape, strides and dtype are one fake tensor here; a call is known by its target
    and the identity of its arguments. Forks of a graph share it.
    """

    def __init__(self, device: torch.device, inputs: tuple[Input, ...]) -> None:
        self.device, self.inputs = device, inputs
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
        self._letters: dict[str, Any] = {}
        self._tensors: dict[Any, Tensor] = {}
        self._calls: dict[Any, Any] = {}
        self.given = [self.intern(self._made(given)) for given in inputs]

    def _made(self, given: Input) -> Tensor:
        """The fake tensor of one input; each letter is one symbol."""
        sizes = [self._size(size) for size in given.sizes]
        with self.mode:
            return torch.empty(sizes, dtype=given.dtype, device=self.device)

    def _size(self, size: int | str) -> Any:
        if isinstance(size, int):
            return size
        count, letter = factors(size)
        if letter not in self._letters:
            sample = torch.zeros(SAMPLES[letter], device=self.device)
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            self._letters[letter] = self.mode.from_tensor(sample, symbolic_context=context).shape[0]
        return count * self._letters[letter]

    def intern(self, value: Any) -> Any:
        """The one fake tensor that stands for all that are like `value` (also inside lists and tuples)."""
        if isinstance(value, FakeTensor):
            return self._tensors.setdefault(_likeness(value), value)
        if isinstance(value, list | tuple):
            return type(value)(map(self.intern, value))
        return value

    def weight(self, value: Tensor) -> Tensor:
        """The fake tensor of a weight."""
        key = ("weight", value.dtype, value.device, value.shape, value.stride(), value.storage_offset())
        if key not in self._tensors:
            self._tensors[key] = self.intern(self.mode.from_tensor(value, static_shapes=True))
        return self._tensors[key]

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `target(*args, **kwargs)` gives, computed once; calls that write are computed every time."""
        if not isinstance(target, OpOverload) or target._schema.is_mutable:
            return self.intern(target(*args, **kwargs))
        key = (target, _identity(args), _identity(kwargs))
        if key not in self._calls:
            # The arguments are kept, so that no other tensor can get the identity of one of them.
            self._calls[key] = self.intern(target(*args, **kwargs)), args, kwargs
        return self._calls[key][0]


Shared = dict[tuple[torch.device, tuple[Input, ...]], KnownShapes]
_SHARED: ContextVar[Shared] = ContextVar("shared shapes", default=_Forgetful())  # noqa: B039 - it stays empty


def _likeness(value: Tensor) -> Any:
    strides = value.stride() if value.layout == torch.strided else ()
    sizes = tuple(map(str, (*value.shape, *strides, value.storage_offset())))
    return value.dtype, value.device, value.layout, value.is_conj(), sizes


def _identity(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_identity, value))
    if isinstance(value, dict):
        return tuple((name, _identity(item)) for name, item in value.items())
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return "symbol", str(value)
    if isinstance(value, float):
        return "float", repr(value)  # 0.0 and -0.0 are equal, and nan is not even itself
    return ("tensor", id(value)) if isinstance(value, Tensor) else (type(value), value)


class _Propagate(fx.Interpreter):
    """Interpret one graph module on fake tensors; regions are interpreted in turn."""

    def __init__(self, module: fx.GraphModule, known: KnownShapes) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.known = known

    def run_node(self, node: fx.Node) -> Any:
        try:
            value = super().run_node(node)
        except VerifyError:
            raise
        except Exception as error:
            where = f"{node.name} = {node.target}{tuple(node.args)}"
            found = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            raise VerifyError(where, found, "shapes and dtypes that fit") from None
        node.meta["val"] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.known.call(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = attribute(self.module, str(target))
        return self.known.weight(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.module.get_submodule(str(target))
        assert isinstance(module, fx.GraphModule)
        return _Propagate(module, self.known).run(*args, **kwargs)


def symbols(root: fx.GraphModule) -> dict[str, str]:
    """Names of the free sizes in printed shapes: {'s12': 'B', 's90': 'S'}."""
    places = [node for node in root.graph.nodes if node.op == "placeholder"]
    found: dict[str, str] = {}
    for node, given in zip(places, inputs_of(root.graph), strict=True):
        value = node.meta.get("val")
        sizes = zip(given.sizes, () if value is None else value.shape, strict=False)
        found |= {str(symbol): size for size, symbol in sizes if size in SAMPLES}
    return found
