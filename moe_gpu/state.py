"""Router state on the device: who is resident, who is hot, and what the last call asked for."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .kernels import layout
from .kernels.route_ref import affinity_window

SCRATCH_TOKENS = 4096  # that age the affinity in one call, without reserve()

# names in a runtime_state_dict and the tensors behind them: not the step record, which is the
# mailbox of the last call, and not the scratch, which is zero between calls
_RUNTIME = {
    "slot_of": "slot_of_LE",
    "strength": "strength_L",
    "affinity": "affinity_LE",
    "activations": "activations_LE",
    "counters": "counters_LC",
    "control": "control_LP",
    "control_state": "control_state_LS",
    "meters": "meters_LM",
}


class RouterState(nn.Module):
    """Per-layer router state of one model, at fixed addresses for life.

    The route kernel writes affinity, activations, counters and step records; ``slot_of_LE``
    belongs to the offloader (or to :meth:`MoEGate.set_resident`), ``strength_L`` and ``control_LP``
    to the policy; with an adaptive one the kernel writes ``strength_L`` too.
    Not part of any ``state_dict`` (see :meth:`runtime_state_dict`); ``.to(device)`` moves it and
    never changes a dtype. The meta device keeps no values: after ``to_empty(device=...)`` all is as
    new, under the policies in force. One stream at a time may route with it.

    Attributes (L layers, E experts; columns and record in :mod:`moe_gpu.kernels.layout`):
        slot_of_LE: int32, device slot of each expert, -1 absent.
        strength_L: float32, bonus or budget in force.
        affinity_LE: float32, decayed activation history.
        activations_LE: int64, tokens that executed each expert.
        counters_LC: int64.
        record_LR: int32, the step record of the last call.
        control_LP: float32, the controller's parameters; what is written here counts from the next
            call on, also in a captured CUDA graph.
        control_state_LS: float32, the controller's averages and level.
        meters_LM: int64, quality meters (``meters=True``).

    Args:
        num_layers: MoE layers L, ``>= 1``.
        num_experts: Experts per layer E, ``>= 1``.
        device: Where the tensors live.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str | None = None):
        super().__init__()
        for name, value in (("num_layers", num_layers), ("num_experts", num_experts)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.num_layers, self.num_experts = num_layers, num_experts
        for name, tensor in self._new_tensors(device).items():
            self.register_buffer(name, tensor, persistent=False)
        # by layer, what set_policy() was given: for when the tensors were on the meta device
        self._policies: dict[int, tuple[float, list[float]]] = {}
        # by an offloader, which alone may then write slot_of_LE
        self.is_owned = False
        # a captured CUDA graph keeps the address it saw: outgrown scratch is never freed
        self._outgrown = []

    def _new_tensors(self, device: torch.device | str | None) -> dict[str, torch.Tensor]:
        L, E = self.num_layers, self.num_experts
        return {
            name: torch.full(shape, value, dtype=dtype, device=device)
            for name, shape, dtype, value in (
                ("slot_of_LE", (L, E), torch.int32, -1),
                ("strength_L", (L,), torch.float32, 0),
                ("affinity_LE", (L, E), torch.float32, 0),
                ("activations_LE", (L, E), torch.int64, 0),
                ("counters_LC", (L, layout.NUM_COUNTERS), torch.int64, 0),
                ("record_LR", (L, layout.record_width(E)), torch.int32, 0),
                ("control_LP", (L, layout.NUM_CONTROLS), torch.float32, 0),
                ("control_state_LS", (L, layout.NUM_CONTROL_STATE), torch.float32, 0),
                ("meters_LM", (L, layout.NUM_METERS), torch.int64, 0),
                ("scratch", (layout.scratch_words(E, SCRATCH_TOKENS),), torch.int32, 0),
            )
        }

    def reserve(self, tokens: int, decay: float) -> None:
        """Make room for route calls of ``tokens`` tokens; allocates only when more is needed."""
        words = layout.scratch_words(self.num_experts, min(tokens, affinity_window(decay)))
        if words > self.scratch.numel():
            if self.scratch.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"a call of {tokens} tokens needs more scratch, which a CUDA graph cannot "
                    "allocate: make one such call, or reserve(), before the capture"
                )
            self._outgrown.append(self.scratch)
            self.scratch = self.scratch.new_zeros(words)

    def reset(self) -> None:
        """Forget history and counts. Residency stays, and strength, unless a controller sets it."""
        for tensor in (self.affinity_LE, self.activations_LE, self.counters_LC, self.meters_LM):
            tensor.zero_()
        self.restart_control()

    def set_policy(self, layer: int, strength: float, control_P: list[float]) -> None:
        """Put a policy in force in one layer; a controller begins again, cold.

        Args:
            layer: Row of the state.
            strength: Bonus or budget.
            control_P: The controller's parameters, all zero for none.
        """
        self._policies[layer] = strength, list(control_P)
        self.control_LP[layer] = self.control_LP.new_tensor(control_P)
        self.strength_L[layer] = strength
        self.restart_control(layer)

    def restart_control(self, layer: int | None = None) -> None:
        """Let the controller begin again: cold, at its start strength, without averages.

        Args:
            layer: Of this layer only; None: of all.
        """
        rows = slice(None) if layer is None else slice(layer, layer + 1)
        self.control_state_LS[rows] = 0
        control_LP, strength_L = self.control_LP[rows], self.strength_L[rows]
        is_warm_L = control_LP[:, layout.WARM_TOKENS] <= 0
        start_L = torch.where(is_warm_L, control_LP[:, layout.START], 0.0)
        is_on_L = control_LP[:, layout.MODE] != layout.MODE_OFF
        self.strength_L[rows] = torch.where(is_on_L, start_L, strength_L)

    def runtime_state_dict(self, layer: int | None = None) -> dict[str, torch.Tensor]:
        """Return a copy of residency, history, counts and control, which no ``state_dict`` holds.

        Args:
            layer: Only this layer's rows, without the leading dimension; None: all.

        Returns:
            ``slot_of``, ``strength``, ``affinity``, ``activations``, ``counters``, ``control``,
            ``control_state`` and ``meters``, as under Attributes, on the state's device.
        """
        rows = slice(None) if layer is None else layer
        return {name: getattr(self, tensor)[rows].clone() for name, tensor in _RUNTIME.items()}

    def load_runtime_state_dict(
        self, saved: Mapping[str, torch.Tensor], layer: int | None = None, strict: bool = True
    ) -> None:
        """Continue from what :meth:`runtime_state_dict` returned; on failure nothing has changed.

        Tensors may be on any device. An offloader owns ``slot_of``: leave it out then.

        Args:
            saved: By name.
            layer: The layer that it was saved of; None: all.
            strict: Every name must be there; otherwise what is missing stays as it is.

        Raises:
            TypeError: No mapping, or a value of another type or dtype.
            ValueError: A missing or unknown name, another shape, a state on the meta device, or
                rows that were saved under a policy other than the one in force.
        """
        rows = slice(None) if layer is None else layer
        self._check_saved(saved, rows, strict)
        self._check_policies(saved, range(self.num_layers) if layer is None else [layer])
        for name, tensor in saved.items():
            getattr(self, _RUNTIME[name])[rows] = tensor

    def _check_saved(
        self, saved: Mapping[str, torch.Tensor], rows: slice | int, strict: bool
    ) -> None:
        if not isinstance(saved, Mapping):
            raise TypeError(f"saved must be a mapping of names to tensors, got {saved!r}")
        if self.slot_of_LE.is_meta:
            raise ValueError("the router state is on the meta device: call to_empty() first")
        if unknown := sorted(map(str, saved.keys() - _RUNTIME.keys())):
            raise ValueError(
                f"unknown in saved: {', '.join(unknown)}; known: {', '.join(_RUNTIME)}"
            )
        if self.is_owned and "slot_of" in saved:
            raise ValueError(
                "slot_of cannot be loaded: the offloader of this model owns residency. Leave it out "
                "(del saved['slot_of']); save_residency() and attach(..., residency=...) restore it"
            )
        needed = [name for name in _RUNTIME if not self.is_owned or name != "slot_of"]
        missing = [name for name in needed if name not in saved]
        if strict and missing:
            raise ValueError(f"missing in saved: {', '.join(missing)}; strict=False leaves them")
        for name, tensor in saved.items():
            own = getattr(self, _RUNTIME[name])[rows]
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {tensor!r}")
            if tensor.dtype != own.dtype:
                raise TypeError(f"{name} must be {own.dtype}, got {tensor.dtype}")
            if tensor.shape != own.shape:
                shapes = f"{tuple(own.shape)}, got {tuple(tensor.shape)}"
                raise ValueError(f"{name} must have shape {shapes}")
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device, which keeps no values")

    def _check_policies(self, saved: Mapping[str, torch.Tensor], layers: Sequence[int]) -> None:
        """Refuse rows of another policy: a controller's parameters, or the strength without one."""
        L = len(layers)
        strength_L, control_LP = self.strength_L.cpu(), self.control_LP.cpu()
        for i, layer in enumerate(layers):
            same = True
            if "control" in saved:
                same = torch.equal(saved["control"].reshape(L, -1)[i].cpu(), control_LP[layer])
            if "strength" in saved and control_LP[layer, layout.MODE] == layout.MODE_OFF:
                same = same and saved["strength"].reshape(L)[i].item() == strength_L[layer].item()
            if not same:
                raise ValueError(
                    f"layer {layer} was saved under another policy: set that one first, or leave "
                    "out strength, control and control_state, with strict=False"
                )

    def __getstate__(self):
        # a copy has no captured graph, and no offloader
        return self.__dict__ | {"_outgrown": [], "is_owned": False}

    def _apply(self, fn, recurse=True):
        # .half() and .to(dtype) must not reach counters or affinity: follow the device only
        device = fn(self.scratch.new_empty(0, dtype=torch.float32)).device
        if self.scratch.is_meta:  # no values to keep
            self._buffers.update(self._new_tensors(device))
            for layer, (strength, control_P) in self._policies.items():
                self.set_policy(layer, strength, control_P)
            return self
        for name, tensor in self._buffers.items():
            self._buffers[name] = tensor.to(device)
        return self

    def extra_repr(self) -> str:
        """Show the sizes in ``print(state)``."""
        return f"num_layers={self.num_layers}, num_experts={self.num_experts}"
