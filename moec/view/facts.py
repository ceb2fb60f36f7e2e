"""What is said of a program at the top of a page: its size, its stage, where it lies."""

from __future__ import annotations

from moec.ir import Program


def facts_of(program: Program) -> dict[str, str]:
    """Names and values, in the order in which they are shown."""
    source = program.source
    total, active = program.num_parameters(), program.num_parameters(active=True)
    facts = {"model": source.name, "stage": program.stage, "parameters": f"{total:,}"}
    if active != total:
        facts["active parameters"] = f"{active:,}"
    facts["dtype"] = str(source.dtype).removeprefix("torch.")
    facts["vocabulary"] = f"{source.vocabulary:,}"
    if source.max_positions is not None:
        facts["positions"] = f"{source.max_positions:,}"
    experts = program.expert_layers()
    if experts:
        facts["experts"] = ", ".join(experts)
    if program.layout is not None:
        facts["mesh"] = str(program.layout.mesh)
    return facts
