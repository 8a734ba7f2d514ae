"""Router state on the device: who is resident, who is hot, and what the last call asked for."""

import torch
from torch import nn

from .kernels import layout
from .kernels.route_ref import affinity_window


class RouterState(nn.Module):
    """Per-layer router state of one model, at fixed addresses for life.

    The route kernel writes affinity, activations, counters and step records; ``slot_of_LE``
    belongs to the offloader (or to :meth:`MoEGate.set_resident`), ``strength_L`` and ``control_LP``
    to the policy; with an adaptive one the kernel writes ``strength_L`` too.
    Not part of any ``state_dict``; ``.to(device)`` moves it and never changes a dtype. One
    stream at a time may route with it.

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
        L, E = num_layers, num_experts
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
            ("scratch", (layout.scratch_words(E, 4096),), torch.int32, 0),
        ):
            tensor = torch.full(shape, value, dtype=dtype, device=device)
            self.register_buffer(name, tensor, persistent=False)
        # a captured CUDA graph keeps the address it saw: outgrown scratch is never freed
        self._outgrown = []

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

    def _apply(self, fn, recurse=True):
        # .half() and .to(dtype) must not reach counters or affinity: follow the device only
        for name, tensor in self._buffers.items():
            self._buffers[name] = tensor.to(fn(tensor.new_empty(0, dtype=torch.float32)).device)
        return self

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"num_layers={self.num_layers}, num_experts={self.num_experts}"
