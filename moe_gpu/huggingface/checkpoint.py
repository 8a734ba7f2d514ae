"""A Hugging Face checkpoint before its weights: folder, config, and the model without memory."""

import copy
import glob
import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..offload.headers import INDEX, SINGLE, read_index
from ..offload.shards import Shards
from .quantized import find_quantization, float8_block_size, refuse_quantized

# what a model and its tokenizer need beside the weights, from the top of a repository only
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def resolve(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a checkpoint; of one on the hub, all but the weights is downloaded.

    Args:
        path_or_id: A local folder, or an id such as ``"mistralai/Mixtral-8x7B-v0.1"``.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; see ``huggingface_hub``.
        token: Access token for the hub; see ``huggingface_hub``.

    Raises:
        TypeError: Not a path.
        ValueError: Neither a folder nor an id.
        FileNotFoundError: No such folder, and the hub cannot be reached.
    """
    wanted = "path_or_id must be a folder or an id on the hub"
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(f"{wanted}, got {path_or_id!r}")
    name = str(path_or_id)
    folder = os.path.expanduser(name)  # pathlib's is_dir raises for a name that is too long
    if os.path.isdir(folder):
        return Path(folder)
    if not name or os.path.exists(folder):
        raise ValueError(f"{wanted}, got {name!r}")
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is None:
        raise ValueError(f"{wanted}: there is no folder {name!r}")
    return _look_up(name, _SMALL_FILES, revision, cache_dir=cache_dir, token=token)


def add_weights(
    folder: Path,
    path_or_id: str | Path,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder once it holds the safetensors that the checkpoint consists of.

    Args:
        folder: From :func:`resolve`, as are the arguments.
        path_or_id: See there, as for the two below.
        cache_dir: See there.
        token: See there.

    Raises:
        CheckpointError: The repository has an index that is refused.
    """
    if Path(path_or_id).expanduser().is_dir():
        return folder
    files = set(read_index(folder).values()) if (folder / INDEX).is_file() else {SINGLE}
    # other safetensors of the repository may be the whole model once more
    files = [glob.escape(name) for name in sorted(files)]
    # the folder's name is the commit
    return _download(path_or_id, files, folder.name, cache_dir=cache_dir, token=token)


def _download(path_or_id, files: list[str], revision: str | None, **where) -> Path:
    """Download files from the top of a repository."""
    patterns = {"allow_patterns": files, "ignore_patterns": ["*/*"]}
    return Path(snapshot_download(str(path_or_id), revision=revision, **patterns, **where))


def _look_up(name: str, files: list[str], revision: str | None = None, **where) -> Path:
    """Download files of what may be a folder with a typing error; does not try again and again."""
    try:
        return _download(name, files, revision, **where)
    except LocalEntryNotFoundError as error:
        cause = _first_line(error).removeprefix("Got: ")
        raise FileNotFoundError(
            f"there is no folder {name!r}, and as an id it could not be looked up on the hub: "
            f"{cause}"
        ) from error


def read_config(model: str | Path) -> PreTrainedConfig:
    """Return the config of a folder, of a JSON file or of a hub id; runs no remote code.

    Raises:
        TypeError: Not a path.
        ValueError: Neither of these, or a config that transformers cannot read.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a folder, a JSON file or an id on the hub, got {model!r}")
    name = str(model)
    local = os.path.exists(name)  # pathlib's raises for a name that is too long
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"model {name}: the folder has no config.json")
    if not local and not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?(?<!\.json)", name):
        raise ValueError(f"model {name}: there is no such folder or file")
    try:
        # transformers' own look-up tries for half a minute where there is no network
        place = name if local else _look_up(name, ["config.json"])
        return AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises what its reader happens to raise
        raise ValueError(f"model {name}: {_first_line(error)}") from error


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
    found = find_quantization(config)
    if found is None:
        return None
    block_size = float8_block_size(found)
    if block_size is None or not dequantize:
        size = weight_bytes(meta_model(config, torch.bfloat16, attention="eager"))
        refuse_quantized(config, size, convertible=block_size is not None)
    return block_size


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all parameters and saved buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in _saved(model).values()}.values())


def config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype that a config, or its text part, names."""
    dtype = config.dtype or config.get_text_config().dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def stored_dtype(shards: Shards) -> torch.dtype:
    """Return the dtype of the first floating point tensor of a checkpoint.

    Raises:
        ValueError: There is none.
    """
    for span in shards.tensors.values():
        if span.dtype.is_floating_point:
            return span.dtype
    raise ValueError(f"dtype must be given: neither config nor weights in {shards.folder} tell")


def meta_model(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """Return the model on device meta, in eval mode, weights tied as the config says.

    Parameters have the dtype with which ``from_pretrained`` would load them, which for a few is
    float32 whatever ``dtype`` is. The config is copied, without its ``quantization_config``.

    Args:
        config: Of a model for causal language modelling.
        dtype: Of the weights.
        attention: Implementation of attention. Default: the config's, which may need a package
            that is not installed.

    Raises:
        ValueError: A config from which transformers cannot build a model.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    choice = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, **choice
            )
    except Exception as error:  # sizes that do not go together raise anything
        raise ValueError(
            f"no model can be built from the {config.model_type} config: {_first_line(error)}"
        ) from error
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


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
