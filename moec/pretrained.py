"""Hugging Face decoders from files on this machine: a `config.json`, or a folder with one and safetensors."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from moec.errors import ModelError, nearest

NEEDED = "a folder with a config.json, or a config.json"


def open_pretrained(place: str) -> nn.Module:
    """The causal LM of the config at `place`; with the weights beside it, where there are safetensors.

    Offline, and no code of the folder is run. Raises `ModelError` for a missing or odd config, a kind of
    model that is no causal LM, and weights that do not fill the model.
    """
    path = Path(place).expanduser()
    config_file = path / "config.json" if path.is_dir() else path
    values = _read_config(config_file, place)
    if find_spec("transformers") is None:
        raise ModelError(
            f"hf:{place}", "the package `transformers` is not installed", "pip install 'moec[hf]'"
        )
    config = _config(values, config_file)
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    return _with_weights(path) if has_weights else _fresh(config, config_file)


def _read_config(file: Path, place: str) -> dict[str, Any]:
    if not file.is_file():
        around = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        found = "no such file" if file.parent.is_dir() else "no such folder"
        raise ModelError(f"hf:{place}", found, f"{NEEDED}; nothing is downloaded", nearest(file.name, around))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(str(file), f"not JSON: {error}", NEEDED) from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError(str(file), "no model_type", "the config of a Hugging Face model")
    return values


def _config(values: dict[str, Any], file: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, known = values["model_type"], list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if kind not in known:
        found = f"model_type '{kind}'" + (", whose code is in the folder" if "auto_map" in values else "")
        raise ModelError(str(file), found, "a causal LM that transformers itself knows", nearest(kind, known))
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # the library checks fields by raising whatever it likes
        raise ModelError(str(file), f"{type(error).__name__}: {error}", f"a config of {kind}") from error


def _fresh(config: Any, file: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise ModelError(str(file), found, "a config that its model can be built from") from error


def _with_weights(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ModelError(str(folder), found, "safetensors that belong to its config.json") from error
    model: nn.Module = loaded[0]
    info: dict[str, Any] = loaded[1]
    odd = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ModelError(
            str(folder), f"no weights for {odd[0]}{more}", "safetensors that fill the whole model"
        )
    return model
