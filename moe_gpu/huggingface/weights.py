"""Takes the expert weights of a model into a store, puts slots in their place, and gives them back.

The parameter objects stay the same ones throughout; only their data is exchanged. While attached,
``state_dict`` shows the full weights and ``load_state_dict`` is refused.

Where every expert is resident there is nothing to exchange: the parameters are the slots
(:class:`ResidentWeights`), and training, saving and loading work as without us.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..offload import ExpertLayout, ExpertStore
from ..offload.tiers import Tier
from .blocks import MoEBlock
from .experts import LINE_BYTES


def expert_parameters(block: MoEBlock) -> dict[str, nn.Parameter]:
    """Return the parameters of a block's experts by name."""
    return dict(block.experts.named_parameters())


def common_layout(blocks: list[MoEBlock], on_meta: bool = False) -> tuple[ExpertLayout, int]:
    """Return the layout of an expert and the experts per layer, the same for every block.

    Args:
        blocks: MoE blocks of one model.
        on_meta: Whether the weights are to be loaded yet.

    Raises:
        ValueError: Weights that are not all of one layout, not floating point, not loaded
            (device ``meta``).
    """
    layout, num_experts = None, None
    for block in blocks:
        parameters = expert_parameters(block)
        for name, parameter in parameters.items():
            where = f"{block.name}.experts.{name}"
            if parameter.is_meta and not on_meta:
                raise ValueError(
                    f"{where} is on device meta: load the weights first. A device_map that offloads "
                    "to cpu or disk leaves them there; moe_gpu.load does that part itself"
                )
            if not parameter.is_floating_point():
                raise ValueError(f"{where} must be floating point, got {parameter.dtype}")
        found = ExpertLayout.of(parameters), block.router.num_experts
        if layout is None:
            layout, num_experts = found
        if found != (layout, num_experts) or any(
            parameter.shape[0] != num_experts for parameter in parameters.values()
        ):
            raise ValueError(
                f"{block.name}: every MoE layer must have {num_experts} experts of one shape and "
                f"dtype, got {[tuple(p.shape) for p in parameters.values()]}"
            )
    return layout, num_experts


def refuse_gradients(blocks: list[MoEBlock]) -> None:
    """Raise ``ValueError`` where experts that are to leave the device would leave a gradient."""
    for block in blocks:
        for name, parameter in expert_parameters(block).items():
            if parameter.grad is not None:
                raise ValueError(
                    f"{block.name}.experts.{name} holds a gradient, which would stay behind: "
                    "zero_grad(set_to_none=True) first"
                )


class ExpertWeights:
    """The expert weights of a model while they are in a store.

    Attributes:
        all_resident: The parameters hold all experts; False here.
        store: Where the weights are.
        loaded: They came from files, not out of the model: giving them back needs new memory.

    Args:
        model: The model; its state-dict hooks are set here.
        blocks: Its MoE blocks, layer by layer.
        store: Where the weights go, or where they are.
        loaded: See above; the model's expert parameters are on the meta device then.
    """

    all_resident = False

    def __init__(
        self, model: nn.Module, blocks: list[MoEBlock], store: ExpertStore, loaded: bool = False
    ):
        self.store, self.loaded = store, loaded
        self._model, self._blocks = model, blocks
        self._taken: list[dict[str, tuple[torch.device, bool]]] = []
        self._hooks = []

    def read(self, progress: Callable[[int], None]) -> None:
        """Read what a loaded model keeps in memory; ``progress`` is told of each expert's bytes."""
        for layer in range(self.store.num_layers):
            self.store.read(layer, progress)

    def take(self, device: torch.device) -> None:
        """Move the weights into the store, layer by layer: one layer exists twice at a time.

        Args:
            device: Where the model is to compute.
        """
        if self.loaded:
            for block in self._blocks:
                for name, parameter in expert_parameters(block).items():
                    # data on the meta device cannot be exchanged
                    empty = torch.empty(0, dtype=parameter.dtype)
                    block.experts._parameters[name] = nn.Parameter(empty, requires_grad=False)
                # as from_pretrained would have made them
                self._taken.append(
                    {n: (torch.device("cpu"), True) for n in block.experts._parameters}
                )
            return
        for layer, block in enumerate(self._blocks):
            parameters = expert_parameters(block)
            self.store.put(layer, {name: p.detach() for name, p in parameters.items()})
            self._taken.append({n: (p.device, p.requires_grad) for n, p in parameters.items()})
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.data = parameter.data.new_empty(0)

    def show_slots(self, views_L: list[dict[str, torch.Tensor]]) -> None:
        """Make the device slots the parameters' data, and set the state-dict hooks."""
        for block, views in zip(self._blocks, views_L, strict=True):
            for name, parameter in expert_parameters(block).items():
                parameter.data = views[name]
        for layer, block in enumerate(self._blocks):
            hook = self._full_weights(layer)
            self._hooks.append(block.experts.register_state_dict_post_hook(hook))
        # every module above the experts refuses, so that nothing is loaded before the refusal
        for name in sorted({name for block in self._blocks for name in _path_to_experts(block)}):
            module = self._model.get_submodule(name)
            self._hooks.append(module.register_load_state_dict_pre_hook(_refuse_load))

    def slots(self) -> list[dict[str, torch.Tensor]] | None:
        """Return the parameters that are the slots, by layer and name; None: there are none."""
        return None

    def host_bytes_to_give_back(self) -> int:
        """Return the bytes of host memory that :meth:`give_back` needs for a loaded model."""
        # layer by layer: what a layer has there goes when the whole layer has been copied
        on_disk = self.store.home_bytes()[Tier.DISK.value]
        return on_disk + self.store.num_experts * self.store.layout.expert_bytes

    def give_back(self) -> None:
        """Undo :meth:`take` and :meth:`show_slots`, as far as they got; can be called again."""
        for block in self._blocks[: len(self._taken)]:  # the slots go before the weights come
            for parameter in expert_parameters(block).values():
                parameter.data = parameter.data.new_empty(0)
        while self._taken:
            layer = len(self._taken) - 1
            for name, parameter in expert_parameters(self._blocks[layer]).items():
                device, requires_grad = self._taken[layer][name]
                dtype, shape, _ = self.store.layout.fields[name]
                full = torch.empty(self.store.num_experts, *shape, dtype=dtype, device=device)
                parameter.data = self.store.parameter(layer, name, out=full)
                parameter.requires_grad_(requires_grad)
            self.store.drop(layer)
            self._taken.pop()
        self.store.close()
        self._remove_hooks()

    def give_up(self) -> None:
        """Free the weights and close their files; the parameters end up on the meta device."""
        self._remove_hooks()
        fields = self.store.layout.fields
        for block in self._blocks:
            for name in expert_parameters(block):
                dtype, shape, _ = fields[name]
                full = torch.empty(self.store.num_experts, *shape, dtype=dtype, device="meta")
                block.experts._parameters[name] = nn.Parameter(full, requires_grad=False)
            block.experts.register_state_dict_pre_hook(_refuse_save)
        self._taken.clear()
        self.store.close()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _full_weights(self, layer: int) -> Callable:
        def put_full_weights(module, state_dict, prefix, local_metadata):
            for name in self.store.layout.fields:
                state_dict[prefix + name] = self.store.parameter(layer, name)

        return put_full_weights


class ResidentWeights(ExpertWeights):
    """The expert weights of a model that has a slot for each: they stay where they are.

    The parameters are the slots. So they keep ``requires_grad`` and are saved, loaded and stepped
    by optimizers as usual, and :meth:`give_back` returns what they hold by then.

    Args:
        model: As of :class:`ExpertWeights`.
        blocks: Likewise.
        store: Knows the layout, and the files of a loaded model; it is given up in
            :meth:`take` for an empty one.
        loaded: As of :class:`ExpertWeights`.
    """

    all_resident = True

    def read(self, progress: Callable[[int], None]) -> None:
        """Read all experts from the files, straight to the store's device."""
        store, E = self.store, self.store.num_experts
        row_B = torch.empty(store.layout.expert_bytes, dtype=torch.uint8)
        rows = store.layout.views(row_B.unsqueeze(0))
        for layer, block in enumerate(self._blocks):
            full = {
                name: _empty(E, *field.shape, dtype=field.dtype, device=store.device)
                for name, field in store.layout.fields.items()
            }
            for expert in range(E):
                store.files.read_into(layer, expert, 0, len(row_B), row_B)
                store.files.drop_cache(layer, expert)
                for name, row in rows.items():
                    full[name][expert].copy_(row[0])
                progress(len(row_B))
            for name, weight in full.items():  # data on the meta device cannot be exchanged
                block.experts._parameters[name] = nn.Parameter(weight)

    def take(self, device: torch.device) -> None:
        """Move the weights to the device, parameter by parameter.

        Raises:
            MemoryError: They do not fit there.
        """
        for block in self._blocks:
            parameters = expert_parameters(block)
            self._taken.append({n: (p.device, p.requires_grad) for n, p in parameters.items()})
            for parameter in parameters.values():
                parameter.data = _moved(parameter.data, device)
        self.store.close()
        L, E = self.store.num_layers, self.store.num_experts
        self.store = ExpertStore(self.store.layout, L, E, device, tiers_LE=[[]] * L)

    def show_slots(self, views_L: list[dict[str, torch.Tensor]]) -> None:
        """Leave the parameters as they are."""

    def slots(self) -> list[dict[str, torch.Tensor]]:
        """Return the parameters that are the slots, by layer and name, without their gradients."""
        return [
            {name: parameter.detach() for name, parameter in expert_parameters(block).items()}
            for block in self._blocks
        ]

    def host_bytes_to_give_back(self) -> int:
        """Return the bytes of host memory that :meth:`give_back` needs for a loaded model."""
        parameters = [p for block in self._blocks for p in expert_parameters(block).values()]
        return sum(p.nbytes for p in parameters if p.device.type != "cpu")

    def give_back(self) -> None:
        """Undo :meth:`take`, as far as it got: what the parameters hold now goes home."""
        while self._taken:
            for name, parameter in expert_parameters(self._blocks[len(self._taken) - 1]).items():
                device = torch.device("cpu") if self.loaded else self._taken[-1][name][0]
                parameter.data = parameter.data.to(device)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(device)
            self._taken.pop()
        self.store.close()


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return new memory for a parameter; what does not fit is a ``MemoryError``."""
    try:
        return torch.empty(*shape, dtype=dtype, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU has no class for it
        if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
            raise
        raise MemoryError(
            f"the experts do not all fit on {device}: ask for fewer slots or a smaller "
            f"gpu_memory ({str(error).strip().splitlines()[0]})"
        ) from error


def _moved(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a weight on the device, contiguous, at the start of a line of memory."""
    is_aligned = weight.is_contiguous() and weight.data_ptr() % LINE_BYTES == 0
    if weight.device == device and is_aligned:
        return weight
    return _empty(*weight.shape, dtype=weight.dtype, device=device).copy_(weight)


def _path_to_experts(block: MoEBlock) -> list[str]:
    """Return the names of the modules from the model, "", down to the experts."""
    parts = f"{block.name}.experts".lstrip(".").split(".")
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _refuse_load(module, state_dict, prefix, *_):
    raise RuntimeError(
        "an attached model cannot load a state dict: detach() first, or attach(..., resident=1.0)"
    )


def _refuse_save(module, prefix, keep_vars):
    raise RuntimeError("this model was closed and its expert weights freed: load it again")
