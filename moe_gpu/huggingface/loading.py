"""Dense weights of a checkpoint, straight into a model on the meta device."""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..offload.float8 import dequantize, scale_of
from ..offload.shards import CheckpointError, Shards
from .blocks import MoEBlock
from .origins import Origins, check_shape, locate_experts

__all__ = ["load_dense", "locate_experts"]


def load_dense(
    model: PreTrainedModel,
    blocks: Sequence[MoEBlock],
    shards: Shards,
    device: torch.device | str,
    *,
    block_size: tuple[int, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Give a model on device meta all its weights and buffers but those of the experts.

    Ends where ``from_pretrained`` does: same values and dtypes, weights tied, computed buffers
    such as ``inv_freq`` computed. Host memory holds the tensors of one parameter at a time. A
    model for which it fails after reading has begun is of no further use.

    Args:
        model: As :func:`meta_model` returns it.
        blocks: Its MoE blocks, whose experts stay on meta.
        shards: The checkpoint.
        device: Where the weights go.
        block_size: See :func:`check_quantization`.
        progress: Called with the bytes of each parameter that was loaded.

    Raises:
        CheckpointError: Weights that the checkpoint lacks, or that are of another shape or
            format than the model's; a file that cannot be read.
    """
    origins = Origins(model, shards)
    expected = model.state_dict()
    experts = {f"{b.name}.experts.{n}" for b in blocks for n, _ in b.experts.named_parameters()}
    dense = {name: origin for name, origin in origins.found.items() if name not in experts}
    missing = set(expected) - experts
    missing -= {n for name, origin in dense.items() for n in origin.names(name)}
    _check_complete(model, missing, shards)
    for name, origin in dense.items():
        if origin.converter is None:
            (key,) = origin.all_keys()
            check_shape(name, key, shards.tensors[key].shape, expected[name].shape)
    _warn_unexpected(model, origins.unexpected)

    for name, origin in dense.items():
        for target, value in _realize(model, name, origin, shards, block_size).items():
            if target in expected:
                keys = ", ".join(origin.all_keys())
                check_shape(target, keys, value.shape, expected[target].shape)
                value = value.to(device=device, dtype=expected[target].dtype)
                _put(model, target, value)
                if progress is not None:
                    progress(value.nbytes)
    _compute_buffers(model, device)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    # as from_pretrained does, so that save_pretrained writes the layout that was read
    model._weight_conversions = [t for t in origins.transforms if t.was_used()]


def _realize(model, name, origin, shards, block_size) -> dict[str, torch.Tensor]:
    """Read the tensors of an origin and convert them; host tensors by parameter name."""
    if origin.converter is None:
        (key,) = origin.all_keys()
        return {name: _load(shards, key, block_size)}
    converter = copy.deepcopy(origin.converter)
    for pattern, keys in origin.keys.items():
        for key in keys:
            converter.add_tensor(name, key, pattern, lambda key=key: _load(shards, key, block_size))
    values = converter.convert(name, model=model, config=model.config)
    return {n: v[0] if isinstance(v, list) else v for n, v in values.items()}


def _load(shards: Shards, key: str, block_size: tuple[int, int] | None) -> torch.Tensor:
    span = shards.tensors[key]
    if span.dtype.itemsize > 1 or not span.dtype.is_floating_point:
        return shards.load(key)
    scale = scale_of(shards, span, block_size)
    return dequantize(shards.load(key), shards.load(scale.name), block_size)


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))


def _compute_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Compute the buffers that no checkpoint holds, by the model's own initialisation."""
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = True  # so that transformers leaves it alone
    computed = list(model.named_non_persistent_buffers(remove_duplicate=False))
    for name, buffer in computed:
        value = torch.empty_like(buffer, device=device)
        _put(model, name, value.fill_(torch.nan) if value.is_floating_point() else value)
    model.initialize_weights()
    for name, _ in computed:
        value = model.get_buffer(name)
        if value.is_floating_point() and value.isnan().any():
            raise RuntimeError(f"{type(model).__name__} does not say how to compute {name}")


def _check_complete(model: PreTrainedModel, missing: set[str], shards: Shards) -> None:
    tied = model.all_tied_weights_keys.items()
    # one of each tied group is enough, whichever it is
    given = {source for name, source in tied if not {name, source} <= missing}
    lost = missing - given - {name for name, _ in tied}
    if lost:
        raise CheckpointError(
            f"the checkpoint in {shards.folder} lacks {len(lost)} weights of "
            f"{type(model).__name__}: {_some(lost)}"
        )


def _warn_unexpected(model: PreTrainedModel, keys: list[str]) -> None:
    # older checkpoints hold these two, which are computed today
    known = {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    known |= set(model._keys_to_ignore_on_load_unexpected or ())
    unknown = [key for key in keys if not any(re.search(pattern, key) for pattern in known)]
    if unknown:
        warnings.warn(
            f"{len(unknown)} tensors of the checkpoint have no place in {type(model).__name__} "
            f"and are left out: {_some(unknown)}",
            RuntimeWarning,
            stacklevel=3,
        )


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    shown = ", ".join([first, *rest[:4]])
    return shown if len(rest) < 5 else f"{shown} and {len(rest) - 4} more"
