"""Other people's expert layers on several ranks, with the weights of ours, so that all compute the same.

DeepSpeed's and Tutel's layers stand where the feed-forwards of the dense model stood; transformers brings a
model of its own. Each rank holds its share of every layer's experts, and all of the rest.

Each maker raises `MissingPeerError`, with the way to install the peer, where it is absent. Inside
`torch.distributed` with gloo; every rank calls every maker, in the same order.

Legend: E experts of a layer, D model, F hidden.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import MissingPeerError
from moec.ir import region_of, regions
from moec.program import Program

DEEPSPEED = "pip install --no-deps deepspeed==0.19.* einops hjson msgpack ninja py-cpuinfo"
TUTEL = "NO_CUDA=1 pip install --no-deps --no-build-isolation git+https://github.com/microsoft/Tutel"


@dataclass(frozen=True)
class ExpertLayer:
    """One expert layer of the whole program: what a peer needs to compute the same.

    `path`: the feed-forward it was made from, in the dense model. `router` [E, D]; `stacks`: the experts'
    weights [E, …] by their names in that feed-forward.
    """

    path: str
    top_k: int
    router: Tensor
    stacks: dict[str, Tensor]

    @property
    def experts(self) -> int:
        """How many experts the layer has."""
        return self.router.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.router.shape[1]

    def here(self, name: str) -> Tensor:
        """This rank's stretch of a stack."""
        return self.stacks[name].chunk(dist.get_world_size())[dist.get_rank()]


Make = Callable[[ExpertLayer, nn.Module], nn.Module]


def expert_layers(program: Program) -> list[ExpertLayer]:
    """The expert layers of a whole program, in order."""
    settings, found = program.moe_settings(), []
    for name, module in regions(program.graph, "moe").items():
        region = region_of(module)
        assert region is not None
        weights = {key: value.detach() for key, value in module.named_parameters()}
        router = weights.pop("router.weight")
        sources = {key: program.origins[f"{name}.{key}"].source or "" for key in weights}
        stacks = {sources[key].removeprefix(region.path + "."): value for key, value in weights.items()}
        found.append(ExpertLayer(region.path, settings[name].top_k, router, stacks))
    return found


def in_place_of_feed_forwards(dense: nn.Module, program: Program, make: Make) -> nn.Module:
    """A copy of `dense` with `make(layer, feed_forward)` for every feed-forward that became sparse."""
    model = copy.deepcopy(dense)
    for layer in expert_layers(program):
        model.set_submodule(layer.path, make(layer, dense.get_submodule(layer.path)))
    return model.train()


def deepspeed(drop: bool) -> Make:
    """DeepSpeed's `MoE`: capacity factor 1.0, counted on each rank by itself, or without drops."""
    try:
        from deepspeed import init_distributed
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        raise MissingPeerError(f"not installed: {DEEPSPEED}") from error
    for chatty in ("DeepSpeed", "torch._dynamo"):  # its gate is compiled where it can be, with breaks
        logging.getLogger(chatty).setLevel(logging.ERROR)
    init_distributed("gloo", auto_mpi_discovery=False)  # takes the process group that is there

    def make(layer: ExpertLayer, feed_forward: nn.Module) -> nn.Module:
        moe = MoE(
            layer.width,
            feed_forward,
            layer.experts,
            ep_size=dist.get_world_size(),
            k=layer.top_k,
            use_rts=False,
            drop_tokens=drop,
            top2_2nd_expert_sampling=False,
        )
        moe.set_deepspeed_parallelism()
        fill(moe.deepspeed_moe.gate.wg.weight, layer.router)
        for index, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            for name, parameter in expert.named_parameters():
                fill(parameter, layer.here(name)[index])
        return FirstOutput(moe)

    return make


def tutel(capacity: float) -> Make:
    """Tutel's `moe_layer`: capacity factor `capacity`, counted on each rank by itself; 0.0: without drops."""
    try:
        from tutel import moe
    except ImportError as error:
        raise MissingPeerError(f"not installed: {TUTEL}") from error

    def make(layer: ExpertLayer, feed_forward: nn.Module) -> nn.Module:
        gated = "gate_proj.weight" in layer.stacks
        names = ("gate_proj", "up_proj", "down_proj") if gated else ("up", "down")
        matrices = [layer.here(f"{name}.weight") for name in names]
        experts = {
            "type": "llama_ffn" if gated else "ffn",
            "num_experts_per_device": matrices[0].shape[0],
            "hidden_size_per_expert": matrices[0].shape[1],
            "activation_fn": F.silu if gated else F.gelu,
        }
        gate = {"type": "top", "k": layer.top_k, "capacity_factor": capacity}
        made = moe.moe_layer(gate_type=gate, model_dim=layer.width, experts=experts)
        fill(made.gates[0].wg.weight, layer.router)
        if gated:
            for number, matrix in enumerate(matrices, 1):  # stored flat, [E, in, out]
                fill(getattr(made.experts, f"W_fc{number}"), matrix.mT.flatten())
        else:
            fill(made.experts.batched_fc1_w, matrices[0])
            fill(made.experts.batched_fc2_w, matrices[1].mT)
            fill(made.experts.batched_fc1_bias, layer.here("up.bias"))
            fill(made.experts.batched_fc2_bias, layer.here("down.bias"))
        return made

    return make


def transformers(dense: nn.Module, program: Program, implementation: str) -> nn.Module:
    """Qwen3-MoE of transformers v5, its experts over the ranks by its all-to-all expert parallelism.

    `implementation`: how it computes the experts of a rank, `grouped_mm` or `eager`. It is applied by the
    function that `from_pretrained(distributed_config=…)` calls, without the FSDP2 that goes with it there:
    gradients are reduced as for everybody else, in one piece.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    model = qwen3_moe(dense, program, implementation)
    plan: dict[str, str] = {}
    for layer in expert_layers(program):
        experts = f"{layer.path}.experts"
        plan |= {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
        plan[experts] = "ep_dispatch_experts"
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, "all_to_all")
    return model


def transformers_fsdp(dense: nn.Module, program: Program, directory: str) -> nn.Module:
    """The same as its users write it: `from_pretrained` with expert parallelism over FSDP2.

    `directory`: an empty folder that all ranks see. Gradients come back reduced: means over the ranks.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPeerError("needs accelerate: pip install accelerate")
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    if dist.get_rank() == 0:
        whole: Any = qwen3_moe(dense, program, "grouped_mm")
        whole.save_pretrained(directory)
    dist.barrier()
    ranks = dist.get_world_size()
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="all_to_all")
    model: nn.Module = Qwen3MoeForCausalLM.from_pretrained(directory, distributed_config=config)
    return model.train()


def qwen3_moe(dense: nn.Module, program: Program, implementation: str) -> nn.Module:
    """transformers' whole Qwen3-MoE in one process, with the weights of `program`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers = expert_layers(program)
    stack = layers[0].stacks["gate_proj.weight"]
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings tie_word_embeddings use_cache rms_norm_eps rope_parameters"
    )
    config = Qwen3MoeConfig(
        **{name: getattr(dense.config, name) for name in same.split()},
        moe_intermediate_size=stack.shape[1],
        num_experts=stack.shape[0],
        num_experts_per_tok=layers[0].top_k,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    replaced = tuple(layer.path for layer in layers)
    state = {name: value for name, value in dense.state_dict().items() if not name.startswith(replaced)}
    for layer in layers:
        fused = torch.cat([layer.stacks["gate_proj.weight"], layer.stacks["up_proj.weight"]], 1)
        state[f"{layer.path}.gate.weight"] = layer.router
        state[f"{layer.path}.experts.gate_up_proj"] = fused
        state[f"{layer.path}.experts.down_proj"] = layer.stacks["down_proj.weight"]
    model.load_state_dict(state)
    trained: nn.Module = model.train()
    return trained


class FirstOutput(nn.Module):
    """A layer that gives its output and more, as one that gives its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The first of what the layer gives."""
        out: Tensor = self.layer(x)[0]
        return out


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether a peer's parameter is a rank's own: an expert's, by the mark that its library puts on it."""
    marked = getattr(parameter, "allreduce", True) is False or getattr(parameter, "_tutel_expert", False)
    return marked or hasattr(parameter, "placements")


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Change `parameter` to `value`, which has its shape."""
    if parameter.shape != value.shape:
        raise ValueError(f"a weight {list(value.shape)} for a peer's parameter {list(parameter.shape)}")
    parameter.copy_(value)
