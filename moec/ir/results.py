"""What a program returns: logits, and by name the terms and hidden states beside them."""

from __future__ import annotations

from typing import Any

from torch import fx

from .graphs import output


def results_of(returned: Any) -> tuple[Any, dict[str, Any]]:
    """Logits and what is beside them, of what a graph returns, nodes or values; a dense program has nothing
    beside its logits."""
    return (returned[0], dict(returned[1])) if isinstance(returned, tuple | list) else (returned, {})


def tapped_layers(root: fx.GraphModule) -> tuple[int, ...]:
    """The layers whose hidden states a program returns; none but for one that `tap_hidden` made."""
    return tuple(results_of(output(root.graph).args[0])[1].get("hidden", ()))
