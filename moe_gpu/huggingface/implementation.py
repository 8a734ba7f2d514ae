"""Which experts implementation a model's config selects: ours while attached, its own after.

transformers keeps the choice in the config, which several models may share.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "moe_gpu"


@dataclass
class _Switched:
    """A config object that attached models switched to our implementation."""

    config: Any  # kept alive, and so is its id
    own: str | None  # what it said before
    attached: int  # models that share it


_switched: dict[int, _Switched] = {}


def switch_on(model: nn.Module) -> list:
    """Select our implementation for a model, and return the config objects this concerns.

    Models built from one config object share the setting, so attached ones are counted.
    """
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            configs[id(config)] = config
    for key, config in configs.items():
        own = config._experts_implementation_internal
        if own == NAME and key not in _switched:  # copied from the config of an attached model
            own = model.get_correct_experts_implementation(None)
        _switched.setdefault(key, _Switched(config, own, 0)).attached += 1
    try:
        model.set_experts_implementation(NAME)
    except BaseException:
        switch_off(configs.values())
        raise
    return list(configs.values())


def switch_off(configs: Iterable) -> None:
    """Select what the configs said before, where no other attached model shares them."""
    for config in configs:
        entry = _switched[id(config)]
        entry.attached -= 1
        if not entry.attached:
            # the setter would also reach sub-configs, which are in the list themselves
            config._experts_implementation_internal = entry.own
            del _switched[id(config)]


def own_forward(module: nn.Module) -> Callable:
    """Return what ran a module's experts before a model with its config was attached.

    Args:
        module: Experts, attached or not.

    Raises:
        RuntimeError: No model with its config is attached.
    """
    entry = _switched.get(id(module.config))
    if entry is None:
        raise RuntimeError(
            f"experts implementation {NAME!r} belongs to attached models: call moe_gpu.attach, "
            "or select another one with set_experts_implementation"
        )
    eager = type(module).forward.__wrapped__
    return ALL_EXPERTS_FUNCTIONS.get_interface(entry.own, eager)
