"""Give every node its symbolic shape by running the graph on fake tensors.

No data is touched: weights become fake tensors of the same shape, tokens are `[B, S]` with symbolic sizes.
Passes change graphs; the runner calls `propagate` after each, so a graph whose shapes do not fit fails at once,
at the node that is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.errors import VerifyError

from .graphs import attribute

# Sample sizes behind the symbols: they must differ from each other, from 1, and fit any position table.
SAMPLE_BATCH, SAMPLE_SEQUENCE = 2, 3


def propagate(root: fx.GraphModule) -> None:
    """Set `node.meta["val"]` on every node of `root` and of its regions; mutates only metadata."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    first = next(node for node in root.graph.nodes if node.op == "placeholder")
    device = _device_of(root)
    tokens = torch.zeros(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long, device=device)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    fake = mode.from_tensor(tokens, symbolic_context=context)
    first.meta["val"] = fake
    with mode, enable_python_dispatcher():
        _Propagate(root, mode, {}).run(fake)


def _device_of(root: fx.GraphModule) -> torch.device:
    some = next(root.parameters(), None)
    return some.device if some is not None else torch.device("cpu")


class _Propagate(fx.Interpreter):
    """Interpret one graph module on fake tensors; regions are interpreted in turn."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, fakes: dict[int, FakeTensor]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.mode, self.fakes = mode, fakes

    def run_node(self, node: fx.Node) -> Any:
        try:
            value = super().run_node(node)
        except VerifyError:
            raise
        except Exception as error:
            where = f"{node.name} = {node.target}{tuple(node.args)}"
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise VerifyError(where, found, "shapes and dtypes that fit") from None
        node.meta["val"] = value
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = attribute(self.module, str(target))
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.fakes:
            self.fakes[id(value)] = self.mode.from_tensor(value, static_shapes=True)
        return self.fakes[id(value)]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.module.get_submodule(str(target))
        assert isinstance(module, fx.GraphModule)
        for node, value in zip((n for n in module.graph.nodes if n.op == "placeholder"), args, strict=True):
            node.meta["val"] = value
        return _Propagate(module, self.mode, self.fakes).run(*args, **kwargs)


def symbols(root: fx.GraphModule) -> dict[str, str]:
    """Names of the two free sizes in printed shapes: {'s12': 'B', 's90': 'S'}."""
    tokens = next(node for node in root.graph.nodes if node.op == "placeholder").meta.get("val")
    if tokens is None:
        return {}
    return {str(size): letter for size, letter in zip(tokens.shape, "BS", strict=True)}
