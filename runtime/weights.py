"""The tensors of a saved program: safetensors files, tied tensors once, large programs in several files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from moec.errors import ArtifactError

from .manifest import REBUILD, WeightRecord

LARGEST_FILE = 2 * 10**9


def weights_of(root: fx.GraphModule) -> dict[str, Tensor]:
    """Every parameter and buffer below `root` under each of its names, tied and transient ones included."""
    named = dict(root.named_parameters(remove_duplicate=False))
    return named | dict(root.named_buffers(remove_duplicate=False))


def transient_names(root: fx.GraphModule) -> set[str]:
    """Names of the buffers that a state dict leaves out."""
    return {
        f"{owner}.{name}".lstrip(".")
        for owner, module in root.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def describe_weights(root: fx.GraphModule) -> list[WeightRecord]:
    """One record a name, in program order; tied names point to the tensor of the first."""
    _refuse_shared_memory(root)
    first: dict[int, str] = {}
    transient = transient_names(root)
    return [
        WeightRecord(
            name=name, tensor=first.setdefault(id(value), name), dtype=dtype_name(value.dtype),
            shape=list(value.shape), parameter=isinstance(value, nn.Parameter), trainable=value.requires_grad,
            persistent=name not in transient,
        )
        for name, value in weights_of(root).items()
    ]  # fmt: skip


def _refuse_shared_memory(root: fx.GraphModule) -> None:
    """Parameters over one memory would be saved as two; training would no longer move them together."""
    held = [(*_bytes_of(value), name) for name, value in root.named_parameters()
            if value.device.type != "meta" and value.numel()]  # fmt: skip
    held.sort()
    for (_, end, other), (start, _, name) in pairwise(held):
        if start < end:
            found = f"{name} and {other} are different parameters over the same memory"
            raise ArtifactError("save", found, "parameters that are one tensor, or that share no memory")


def _bytes_of(value: Tensor) -> tuple[int, int]:
    """Where a tensor begins in memory, and where it ends: parts of one block may lie side by side."""
    spanned = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return value.data_ptr(), value.data_ptr() + spanned * value.element_size()


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], largest: int = LARGEST_FILE
) -> dict[str, list[str]]:
    """Write `tensors` in files of at most `largest` bytes (a bigger one alone); gives file → its tensors."""
    groups = grouped({name: tensor.nbytes for name, tensor in tensors.items()}, largest)
    files: dict[str, list[str]] = {}
    for number, names in enumerate(groups, 1):
        part = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        file = f"weights{part}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names})
        files[file] = names
    return files


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; everyone may read it who may read its folder."""
    save_file({name: _alone(tensor) for name, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read its files


def grouped(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """The names in order, in groups whose `sizes` add up to at most `largest`, or of one; one group at
    least."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > largest:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def _alone(tensor: Tensor) -> Tensor:
    """The tensor where it owns its whole memory, else a copy: safetensors takes no shared memory."""
    plain = tensor.detach()
    whole = plain.is_contiguous() and plain.untyped_storage().nbytes() == plain.nbytes
    return plain if whole else plain.clone(memory_format=torch.contiguous_format)


def read_tensors(path: Path, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The tensors of one file, on `device`; `ArtifactError` when it does not hold exactly `names`.

    Each is copied to memory of its own: tensors in a file are aligned anyhow, and matrix products of the same
    numbers can differ in the last bit with the alignment of their operands.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(str(path), f"{error}", "a safetensors file", REBUILD) from None
    odd = set(names) ^ set(tensors)
    if odd:
        found = f"it and the manifest differ on {min(odd)!r}"
        raise ArtifactError(str(path), found, "the tensors listed", REBUILD)
    return tensors


def rebuild_weights(
    records: Iterable[WeightRecord], tensors: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Name → Parameter or buffer; tied names get one object. Without `tensors` all are on `meta`."""
    made: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for record in records:
        if record.tensor not in made:
            made[record.tensor] = _weight(record, tensors)
        weights[record.name] = made[record.tensor]
    return weights


def _weight(record: WeightRecord, tensors: Mapping[str, Tensor] | None) -> Tensor:
    dtype = dtype_named(record.dtype)
    if tensors is None:
        value = torch.empty(record.shape, dtype=dtype, device="meta")
    elif record.tensor in tensors:
        value = tensors[record.tensor]
    else:
        raise ArtifactError(record.name, f"no tensor {record.tensor!r}", "a tensor for every weight", REBUILD)
    if list(value.shape) != record.shape or value.dtype != dtype:
        found = f"{dtype_name(value.dtype)} {list(value.shape)}"
        raise ArtifactError(record.name, found, f"{record.dtype} {record.shape}", REBUILD)
    return nn.Parameter(value, requires_grad=record.trainable) if record.parameter else value


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The inverse of `dtype_name`; `ArtifactError` for a name that is no dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError("manifest.json", f"dtype {name!r}", "the name of a torch dtype", REBUILD)
    return dtype
