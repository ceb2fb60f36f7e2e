"""Are two callables the same function, values and gradients?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tolerances import error_of, scale_of, tolerance_of

Names = Mapping[str, str] | Callable[[dict[str, Tensor]], dict[str, Tensor]]


def assert_same_function(
    needed: Callable[..., Any],
    found: Callable[..., Any],
    example_inputs: Sequence[Any],
    *,
    tolerance: float | None = None,
    gradients: bool = True,
    names: Names | None = None,
    seed: int = 0,
) -> None:
    """Both callables give the same outputs and, with `gradients`, the same gradients of a random projection
    of them with respect to every parameter and every floating-point input.

    Errors are relative to scale (`tolerances.error_of`); `tolerance` None takes each tensor's from the
    table. Outputs may be tensors in tuples, lists, dicts and dataclasses. `names` says which parameter of
    `needed` each parameter of `found` stands for: a mapping found → needed name (those left out keep their
    names; several that map to one are added), or a function that turns all of found's gradients into
    needed's. Parameters that only `found` has are free. Both run from the same RNG `seed`, on detached
    inputs; nobody's `.grad` changes. Raises AssertionError naming the first tensor out of tolerance.
    """
    right = evaluate(needed, example_inputs, gradients, seed)
    left = evaluate(found, example_inputs, gradients, seed)
    compare(left.outputs, right.outputs, tolerance)
    if gradients:
        compare_gradients(
            _renamed(left.parameters, names) | left.inputs, right.parameters | right.inputs, tolerance
        )


@dataclass
class Evaluation:
    """Outputs of one call, and gradients by parameter and by input."""

    outputs: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


def evaluate(function: Callable[..., Any], inputs: Sequence[Any], gradients: bool, seed: int) -> Evaluation:
    """Call `function` on detached copies of `inputs`, and pull a fixed random cotangent back if asked to."""
    values = [_leaf(value, gradients) for value in inputs]
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        outputs = dict(_tensors("output", function(*values)))
    result = Evaluation({name: value.detach() for name, value in outputs.items()})
    if gradients:
        parameters = _parameters(function)
        leaves = {f"input {i}": v for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad}
        found = _gradients(outputs, {**parameters, **leaves}, seed)
        result.parameters = {name: found[name] for name in parameters}
        result.inputs = {name: found[name] for name in leaves}
    return result


def _leaf(value: Any, gradients: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(gradients and value.is_floating_point())


def _parameters(function: Callable[..., Any]) -> dict[str, Tensor]:
    named = function.named_parameters() if isinstance(function, nn.Module) else ()
    return {name: value for name, value in named if value.requires_grad}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside `value`, with the path that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _tensors(f"{name}.{f.name}", getattr(value, f.name))


def _gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Gradients of Σ output · (a fixed random tensor); zeros for leaves that nothing depends on."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [value for value in outputs.values() if value.requires_grad]
    if not leaves or not wanted:
        return {name: torch.zeros_like(value) for name, value in leaves.items()}
    draws = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in wanted]
    cotangents = [draw.to(value) for draw, value in zip(draws, wanted, strict=True)]
    found = torch.autograd.grad(wanted, list(leaves.values()), cotangents, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def _renamed(gradients: dict[str, Tensor], names: Names | None) -> dict[str, Tensor]:
    if callable(names):
        return names(gradients)
    table, sums = names or {}, dict[str, Tensor]()
    for name, gradient in gradients.items():
        target = table.get(name, name)
        sums[target] = sums[target] + gradient if target in sums else gradient
    return sums


def compare(
    found: Mapping[str, Tensor], needed: Mapping[str, Tensor], tolerance: float | None, floor: float = 0.0
) -> None:
    """Every tensor of `needed` is in `found` and within tolerance, relative to its scale or `floor` if
    larger."""
    missing = [name for name in needed if name not in found]
    assert not missing, f"no {missing[0]} (found: {', '.join(found) or 'nothing'})"
    for name, value in needed.items():
        _compare_one(name, found[name], value, tolerance, floor)


def compare_gradients(
    found: Mapping[str, Tensor], needed: Mapping[str, Tensor], tolerance: float | None
) -> None:
    """`compare`, with a tenth of the largest gradient as the floor of every scale.

    Some gradients are zero but for rounding (a key's bias moves no softmax): they are made of numbers as
    large as the others, and so is their rounding.
    """
    left, right = ({f"gradient of {name}": value for name, value in side.items()} for side in (found, needed))
    floor = 0.1 * max(map(scale_of, needed.values()), default=0.0)
    compare(left, right, tolerance, floor)


def _compare_one(name: str, found: Tensor, needed: Tensor, tolerance: float | None, floor: float) -> None:
    assert found.shape == needed.shape, f"{name}: shape {list(found.shape)}, needed {list(needed.shape)}"
    assert found.dtype == needed.dtype, f"{name}: {found.dtype}, needed {needed.dtype}"
    allowed = tolerance_of(needed.dtype) if tolerance is None else tolerance
    error = error_of(found, needed, floor)
    if error <= allowed:
        return
    gap = (found.detach().double() - needed.detach().double()).abs()
    index = int(gap.nan_to_num(nan=float("inf"), posinf=float("inf")).flatten().argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(index), needed.shape)]
    values = f"{float(found.flatten()[index])} at {at}, needed {float(needed.flatten()[index])}"
    raise AssertionError(
        f"{name}: error {error:.3e} relative to scale, allowed {allowed:.0e}; found {values}"
    )
