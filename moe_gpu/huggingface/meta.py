"""A model from its config alone, on the meta device: shapes without weights."""

import os
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..offload import ExpertLayout
from .families import MoEBlock


def read_config(model: str | Path) -> PreTrainedConfig:
    """Return the config of a folder, of a JSON file or of a hub id; runs no remote code.

    Raises:
        ValueError: Neither of these, or a config that transformers cannot read.
    """
    name = str(model)
    local = os.path.exists(name)  # pathlib's raises for a name that is too long
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"model {name}: the folder has no config.json")
    if not local and not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?(?<!\.json)", name):
        raise ValueError(f"model {name}: there is no such folder or file")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # a damaged file raises what its reader happens to raise
        raise ValueError(f"model {name}: {_first_line(error)}") from error


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a causal language model without weights.

    Raises:
        ValueError: A config from which transformers cannot build one.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="eager",  # whatever the config names may not be installed
                trust_remote_code=False,
            )
    except Exception as error:  # sizes that do not go together raise anything
        raise ValueError(
            f"no model can be built from the {config.model_type} config: {_first_line(error)}"
        ) from error


def config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype that a config, or its text part, names."""
    dtype = config.dtype or config.get_text_config().dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def meta_layout(blocks: list[MoEBlock]) -> tuple[ExpertLayout, int, int]:
    """Return the layout of an expert, experts per layer and experts per token of every block.

    Raises:
        ValueError: Blocks that differ.
    """
    found = []
    for block in blocks:
        parameters = dict(block.experts.named_parameters())
        num_experts = len(next(iter(parameters.values())))
        found.append((ExpertLayout.of(parameters), num_experts, block.router.top_k))
        if found[-1] != found[0]:
            raise ValueError(
                f"{block.name}: every MoE layer must have the same experts, got "
                f"{found[-1][1]} of {found[-1][0].expert_bytes:,} bytes, {found[-1][2]} per token"
            )
    return found[0]


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
