"""A Hugging Face checkpoint before its weights: folder, config, and the model without memory."""

import copy
import glob
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..offload.headers import INDEX, SINGLE, read_index
from ..offload.shards import Shards

# what a model and its tokenizer need beside the weights, from the top of a repository only
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_FORMAT_KEYS = ("bits", "fmt", "format", "load_in_4bit", "load_in_8bit", "weight_block_size")


def resolve(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a checkpoint, downloading it from the hub if it is not a folder.

    Only JSON, tokenizer files and the safetensors that the checkpoint consists of are downloaded.

    Args:
        path_or_id: A local folder, or an id such as ``"mistralai/Mixtral-8x7B-v0.1"``.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; see ``huggingface_hub``.
        token: Access token for the hub; see ``huggingface_hub``.

    Raises:
        ValueError: Neither a folder nor an id.
        CheckpointError: The repository has no safetensors, or an index that is refused.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path_or_id)) is None:
        raise ValueError(f"path_or_id must be a folder or an id on the hub, got {path_or_id!r}")
    where = {"cache_dir": cache_dir, "token": token, "ignore_patterns": ["*/*"]}
    repository = str(path_or_id)
    folder = Path(
        snapshot_download(repository, revision=revision, allow_patterns=_SMALL_FILES, **where)
    )
    files = set(read_index(folder).values()) if (folder / INDEX).is_file() else {SINGLE}
    # of the same commit; other safetensors of the repository may be the whole model once more
    files = [glob.escape(name) for name in sorted(files)]
    return Path(snapshot_download(repository, revision=folder.name, allow_patterns=files, **where))


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a checkpoint; code that comes with it is not run.

    Raises:
        ValueError: A model type that transformers does not know.
        OSError: No config.json.
    """
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_quantization(
    config: PreTrainedConfig, dequantize: bool = False
) -> tuple[int, int] | None:
    """Return the block size ``(rows, columns)`` of scaled float8 weights, None if not quantised.

    Args:
        config: Of the checkpoint.
        dequantize: Whether weights may be converted while they are loaded, so that they take
            their full size in memory.

    Raises:
        ValueError: Quantised, and either not to be converted or of a format that is not read:
            names the format and the size of the model in bfloat16.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method, block_size = found.get("quant_method"), found.get("weight_block_size")
    convertible = (
        method == "fp8"
        and found.get("fmt", "e4m3") == "e4m3"
        and isinstance(block_size, list | tuple)
        and len(block_size) == 2
        and all(type(n) is int and n >= 1 for n in block_size)
    )
    if convertible and dequantize:
        return tuple(block_size)
    details = [f"{key}={found[key]}" for key in _FORMAT_KEYS if found.get(key)]
    size = weight_bytes(meta_model(config, torch.bfloat16))
    advice = "; dequantize=True converts it while loading" if convertible else ""
    raise ValueError(
        f"the checkpoint is quantized ({', '.join([f'quant_method={method}', *details])}), which "
        f"is not computed with, and in bfloat16 the model takes {size / 1e9:,.1f} GB{advice}"
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all parameters and saved buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in _saved(model).values()}.values())


def checkpoint_dtype(config: PreTrainedConfig, shards: Shards) -> torch.dtype:
    """Return the dtype that a checkpoint is meant for: the config's, else its first float tensor's.

    Raises:
        ValueError: The config does not say and there is none.
    """
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for span in shards.tensors.values():
        if span.dtype.is_floating_point:
            return span.dtype
    raise ValueError(f"dtype must be given: neither config nor weights in {shards.folder} tell")


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on device meta, in eval mode, weights tied as the config says.

    Parameters have the dtype with which ``from_pretrained`` would load them, which for a few is
    float32 whatever ``dtype`` is. The config is copied, without its ``quantization_config``.

    Args:
        config: Of a model for causal language modelling.
        dtype: Of the weights.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    plan = model._get_dtype_plan(dtype)
    for name, tensor in _saved(model).items():
        for pattern, kept in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)
    return model.eval()


def load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Set ``model.generation_config`` as ``from_pretrained`` does."""
    if not model.can_generate():
        return
    read = GenerationConfig.from_pretrained
    try:
        model.generation_config = read(folder, local_files_only=True)
    except OSError:  # no generation_config.json
        model.generation_config = read(
            folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )


def _saved(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers by name, the objects themselves."""
    return model.state_dict(keep_vars=True)
