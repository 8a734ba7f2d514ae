"""Which tensors of a checkpoint become which parameters of a model, by name.

That is transformers' own knowledge: its weight renamings and converters, applied to names only.
Nothing is read here but names, dtypes and shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
from ..offload.float8 import SCALE_SUFFIX
from ..offload.shards import CheckpointError, Shards
from .blocks import MoEBlock


@dataclass
class Origin:
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
        """Return the tensors by name, in the order of their patterns."""
        return [key for keys in self.keys.values() for key in keys]


class Origins:
    """Origins of the parameters and buffers of a model, by name, and what has no place in it."""

    def __init__(self, model: PreTrainedModel, shards: Shards):
        self.transforms = get_model_conversion_mapping(model)
        converters = [t for t in self.transforms if isinstance(t, WeightConverter)]
        renamings = [t for t in self.transforms if not isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        expected, prefix = model.state_dict(), model.base_model_prefix
        self.found: dict[str, Origin] = {}
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
            origin = self.found.setdefault(name, Origin(converter))
            if origin.keys and (converter is None or converter is not origin.converter):
                raise CheckpointError(f"{origin.all_keys()[0]} and {key} both become {name}")
            origin.keys.setdefault(pattern or key, []).append(key)


def locate_experts(
    model: PreTrainedModel, blocks: Sequence[MoEBlock], shards: Shards
) -> list[list[dict[str, tuple[Source, ...]]]]:
    """Return the sources of every expert parameter, ``[layer][expert][parameter]``.

    Experts are rows of packed tensors, or tensors of their own that transformers would stack and
    join along their first dimension (Mixtral's w1 and w3, or gate_proj and up_proj elsewhere).

    Raises:
        CheckpointError: Experts that are missing, or stored in another way.
    """
    found = Origins(model, shards).found
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
    name: str, shape: Sequence[int], origin: Origin | None, shards: Shards
) -> list[tuple[Source, ...]]:
    """Return the sources of one parameter ``(E, ...)`` by expert."""
    if origin is None:
        raise CheckpointError(f"the checkpoint lacks expert weights: nothing becomes {name}")
    if origin.converter is None:
        (key,) = origin.all_keys()
        check_shape(name, key, shards.tensors[key].shape, shape)
        return [(Source(key, expert),) for expert in range(shape[0])]
    operations = [(type(op), getattr(op, "dim", None)) for op in origin.converter.operations]
    patterns = origin.converter.source_patterns
    stacked = [(MergeModulelist, 0)] + [(Concatenate, 1)] * (len(patterns) > 1)
    if operations != stacked:
        raise CheckpointError(
            f"{name} is made of {origin.all_keys()[0]} by {_describe(origin.converter)}: such "
            "experts cannot be read from the files one by one, use from_pretrained and attach()"
        )
    columns = [_by_expert(name, p, origin.keys.get(p, []), shape[0]) for p in patterns]
    return [tuple(Source(key) for key in row) for row in zip(*columns, strict=True)]


def _describe(converter: WeightConverter) -> str:
    return ", ".join(type(operation).__name__ for operation in converter.operations)


def _by_expert(name: str, pattern: str, keys: list[str], num_experts: int) -> list[str]:
    """Return the keys in order of the number that tells them apart, one for each expert."""
    varying = [set(parts) for parts in zip(*(key.split(".") for key in keys), strict=False)]
    varying = [parts for parts in varying if len(parts) > 1]
    numbers = {int(part) for part in varying[0] if part.isdigit()} if varying else {0}
    if len(keys) != num_experts or numbers != set(range(num_experts)):
        lost = sorted(set(range(num_experts)) - numbers) if keys else range(num_experts)
        raise CheckpointError(
            f"{name} needs {num_experts} experts, 0 to {num_experts - 1}, the checkpoint has "
            f"{len(keys)} of {pattern}; missing: {', '.join(map(str, lost)) or 'none'}"
        )
    return keys  # sorted already


def _is_scale(key: str, shards: Shards) -> bool:
    scaled = shards.tensors.get(key.removesuffix(SCALE_SUFFIX))
    return key.endswith(SCALE_SUFFIX) and scaled is not None and scaled.dtype.itemsize == 1


def check_shape(name: str, keys: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse tensors ``keys`` of another shape than the parameter ``name``."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{keys} has shape {tuple(found)}, expected {tuple(expected)} for {name}"
        )
