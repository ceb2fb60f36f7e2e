"""Which parameters decay, and which belong to experts.

Experts have groups of their own: across ranks their gradients are summed over other ranks than the rest,
and a rate or a decay of their own is one assignment away.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moec.runtime.trainable import Trainable


def parameter_groups(program: Trainable, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: `params`, `names`, `name`, `experts` and `weight_decay`; empty ones left
    out.

    Matrices decay, vectors do not: biases and norms have nothing to gain from being small. An expert
    parameter has one dim more, the expert's, which does not count. Frozen parameters are in no group.
    """
    experts = program.expert_parameter_names()
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in program.named_parameters():
        if parameter.requires_grad:
            expert = name in experts
            decays = parameter.dim() - expert >= 2
            groups.setdefault((expert, decays), []).append((name, parameter))
    return [
        {
            "name": f"{'expert' if expert else 'dense'}/{'decay' if decays else 'no_decay'}",
            "names": [name for name, _ in members],
            "params": [parameter for _, parameter in members],
            "experts": expert,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (expert, decays), members in sorted(groups.items())
    ]
