"""Weights of a checkpoint: dense ones into the model, experts located for reading from disk.

Which tensor becomes which parameter is transformers' own knowledge: its weight renamings and
converters, applied to names first. No expert weight is read here.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from ..offload.disk import Source
from ..offload.float8 import SCALE_SUFFIX, dequantize, scale_of
from ..offload.shards import CheckpointError, Shards
from .families import MoEBlock


@dataclass
class _Origin:
    """The tensors of a checkpoint that become one parameter (or several, by a converter)."""

    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)  # by pattern, in natural order

    def names(self, name: str) -> list[str]:
        """Return all the parameters, of which ``name`` is the first."""
        if self.converter is None:
            return [name]
        first, *_ = targets = self.converter.target_patterns
        return [name.replace(first, target) for target in targets]

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


class _Origins:
    """Origins of the parameters and buffers of a model, by name, and what has no place in it."""

    def __init__(self, model: PreTrainedModel, shards: Shards):
        self.transforms = get_model_conversion_mapping(model)
        converters = [t for t in self.transforms if isinstance(t, WeightConverter)]
        renamings = [t for t in self.transforms if not isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        expected, prefix = model.state_dict(), model.base_model_prefix
        self.found: dict[str, _Origin] = {}
        self.unexpected: list[str] = []
        for key in sorted(shards.tensors, key=dot_natural_key):
            if _is_scale(key, shards):
                continue
            name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if name not in expected and key in expected:
                name, pattern = rename_source_key(key, [], [], prefix, expected)
            if name not in expected:
                self.unexpected.append(key)
                continue
            converter = by_pattern.get(pattern)
            origin = self.found.setdefault(name, _Origin(converter))
            if origin.converter is not converter or (converter is None and origin.keys):
                raise CheckpointError(f"{origin.all_keys()[0]} and {key} both become {name}")
            origin.keys.setdefault(pattern or key, []).append(key)


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
    origins = _Origins(model, shards)
    expected = model.state_dict()
    experts = set(_expert_names(blocks))
    dense = {name: origin for name, origin in origins.found.items() if name not in experts}
    missing = set(expected) - experts
    missing -= {n for name, origin in dense.items() for n in origin.names(name)}
    _check_complete(model, missing, shards)
    for name, origin in dense.items():
        if origin.converter is None:
            (key,) = origin.all_keys()
            _check_shape(name, key, shards.tensors[key].shape, expected[name].shape)
    _warn_unexpected(model, origins.unexpected)

    for name, origin in dense.items():
        for target, value in _realize(model, name, origin, shards, block_size).items():
            if target in expected:
                keys = ", ".join(origin.all_keys())
                _check_shape(target, keys, value.shape, expected[target].shape)
                value = value.to(device=device, dtype=expected[target].dtype)
                _put(model, target, value)
                if progress is not None:
                    progress(value.nbytes)
    _compute_buffers(model, device)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    # as from_pretrained does, so that save_pretrained writes the layout that was read
    model._weight_conversions = [t for t in origins.transforms if t.was_used()]


def locate_experts(
    model: PreTrainedModel, blocks: Sequence[MoEBlock], shards: Shards
) -> list[list[dict[str, tuple[Source, ...]]]]:
    """Return the sources of every expert parameter, ``[layer][expert][parameter]``.

    Experts are rows of packed tensors, or tensors of their own that transformers would stack and
    join along their first dimension (Mixtral's w1 and w3, or gate_proj and up_proj elsewhere).

    Raises:
        CheckpointError: Experts that are missing, or stored in another way.
    """
    found = _Origins(model, shards).found
    layers = []
    for block in blocks:
        parameters = dict(block.experts.named_parameters())
        experts = [{} for _ in range(len(next(iter(parameters.values()))))]
        for name, parameter in parameters.items():
            target = f"{block.name}.experts.{name}"
            sources = _sources(target, parameter.shape, found.get(target), shards)
            for expert, of_expert in zip(experts, sources, strict=True):
                expert[name] = of_expert
        layers.append(experts)
    return layers


def _sources(
    name: str, shape: Sequence[int], origin: _Origin | None, shards: Shards
) -> list[tuple[Source, ...]]:
    """Return the sources of one parameter ``(E, ...)`` by expert."""
    if origin is None:
        raise CheckpointError(f"the checkpoint lacks expert weights: nothing becomes {name}")
    if origin.converter is None:
        (key,) = origin.all_keys()
        _check_shape(name, key, shards.tensors[key].shape, shape)
        return [(Source(key, expert),) for expert in range(shape[0])]
    operations = [(type(op), getattr(op, "dim", None)) for op in origin.converter.operations]
    patterns = origin.converter.source_patterns
    stacked = [(MergeModulelist, 0)] + [(Concatenate, 1)] * (len(patterns) > 1)
    if operations != stacked:
        raise CheckpointError(
            f"{name} is made of {origin.all_keys()[0]} by {origin.converter.operations}: such "
            "experts cannot be read from the files one by one"
        )
    columns = [_by_expert(name, p, origin.keys.get(p, []), shape[0]) for p in patterns]
    return [tuple(Source(key) for key in row) for row in zip(*columns, strict=True)]


def _by_expert(name: str, pattern: str, keys: list[str], num_experts: int) -> list[str]:
    """Return the keys in order of the number that tells them apart, one for each expert."""
    varying = [set(parts) for parts in zip(*(key.split(".") for key in keys), strict=False)]
    varying = [parts for parts in varying if len(parts) > 1]
    numbers = {int(part) for part in varying[0] if part.isdigit()} if varying else {0}
    if len(varying) > 1 or len(keys) != num_experts or numbers != set(range(num_experts)):
        lost = sorted(set(range(num_experts)) - numbers) if keys else range(num_experts)
        raise CheckpointError(
            f"{name} needs {num_experts} experts, 0 to {num_experts - 1}, the checkpoint has "
            f"{len(keys)} of {pattern}; missing: {', '.join(map(str, lost)) or 'none'}"
        )
    return keys  # sorted already


def _expert_names(blocks: Sequence[MoEBlock]) -> list[str]:
    return [f"{b.name}.experts.{name}" for b in blocks for name, _ in b.experts.named_parameters()]


def _is_scale(key: str, shards: Shards) -> bool:
    scaled = shards.tensors.get(key.removesuffix(SCALE_SUFFIX))
    return key.endswith(SCALE_SUFFIX) and scaled is not None and scaled.dtype.itemsize == 1


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
    lost = missing - given - {name for name, source in tied if source in given}
    if lost:
        raise CheckpointError(
            f"the checkpoint in {shards.folder} lacks {len(lost)} weights of "
            f"{type(model).__name__}: {_some(lost)}"
        )


def _check_shape(name: str, keys: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{keys} has shape {tuple(found)}, expected {tuple(expected)} for {name}"
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
