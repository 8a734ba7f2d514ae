"""A routing trace: what the routers said about a text, to replay without the model.

Shape suffixes: L MoE layers, N rows of text, T tokens, E experts, K experts per token.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import save_whole
from ..huggingface.attached import AttachedMoE
from ..kernels.route_ref import rank_experts
from .quality import Evaluation

FORMAT = "moe_gpu routing trace 1"


@dataclass(frozen=True)
class RoutingTrace:
    """Router logits of exact routing; each row is a sequence of its own.

    Attributes:
        logits_LNTE: In the dtype in which the routers gave them: near-ties go as they went.
        top_k: K.
        renormalize: Mixing weights are a softmax over the executed experts.
        expert_bytes: Of one expert, for megabytes per token; 0 if it is not known.
        text: SHA-256 of the token ids and their shape.
    """

    logits_LNTE: torch.Tensor
    top_k: int
    renormalize: bool
    expert_bytes: int
    text: str

    @property
    def num_layers(self) -> int:
        """Return L."""
        return self.logits_LNTE.shape[0]

    @property
    def rows(self) -> int:
        """Return N."""
        return self.logits_LNTE.shape[1]

    @property
    def tokens(self) -> int:
        """Return the tokens of each row, T."""
        return self.logits_LNTE.shape[2]

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.logits_LNTE.shape[3]

    def demand(self) -> torch.Tensor:
        """Return the router's own choices, best first, int64 ``(N, T, L, K)``."""
        return torch.stack(
            [
                rank_experts(logits_NTE.flatten(0, 1).float())[:, : self.top_k]
                for logits_NTE in self.logits_LNTE
            ],
            1,
        ).unflatten(0, (self.rows, self.tokens))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that appears whole or not at all.

        Raises:
            FileNotFoundError: No folder to write it to.
        """
        described = {
            "format": FORMAT,
            "top_k": str(self.top_k),
            "renormalize": str(int(self.renormalize)),
            "expert_bytes": str(self.expert_bytes),
            "text": self.text,
        }
        save_whole({"logits": self.logits_LNTE.contiguous()}, path, described)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read a file of :meth:`save`.

        Raises:
            OSError: No such file, or one that cannot be read.
            ValueError: Not such a file, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                described = file.metadata() or {}
                if described.get("format") != FORMAT:
                    raise ValueError(f"trace={str(path)!r} is not a routing trace")
                logits_LNTE = file.get_tensor("logits")
        except SafetensorError as error:
            raise ValueError(f"trace={str(path)!r} cannot be read: {error}") from error
        try:
            top_k, expert_bytes = int(described["top_k"]), int(described["expert_bytes"])
            renormalize, text = described["renormalize"] == "1", described["text"]
            is_whole = logits_LNTE.ndim == 4 and logits_LNTE.numel() > 0
            is_whole &= logits_LNTE.is_floating_point() and expert_bytes >= 0
            is_whole &= 1 <= top_k <= logits_LNTE.shape[-1]
        except (KeyError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"trace={str(path)!r} is damaged: what it holds makes no sense")
        return cls(logits_LNTE, top_k, renormalize, expert_bytes, text)


def record_trace(
    model: nn.Module | AttachedMoE,
    rows_NT: torch.Tensor,
    *,
    expert_bytes: int = 0,
    batch_rows: int = 256,
) -> RoutingTrace:
    """Record how a model routes rows of text, exactly and token after token.

    Args:
        model: As in :class:`~moe_gpu.tuning.quality.Evaluation`.
        rows_NT: Token ids, ``(N, T + 1)``; the last one of a row is predicted and not routed.
        expert_bytes: Of one expert.
        batch_rows: Rows in one forward pass.

    Raises:
        TypeError, ValueError: As ``Evaluation``.
    """
    return trace_of(Evaluation(model, rows_NT, batch_rows=batch_rows), expert_bytes)


def trace_of(evaluation: Evaluation, expert_bytes: int = 0) -> RoutingTrace:
    """Return the trace of an evaluation's text."""
    rows_NT = evaluation.rows_NT.cpu()
    ids = repr(tuple(rows_NT.shape)).encode() + rows_NT.numpy().tobytes()
    return RoutingTrace(
        torch.stack([logits_NTE.cpu() for logits_NTE in evaluation.router_logits()]),
        evaluation.top_k,
        evaluation.renormalize,
        expert_bytes,
        hashlib.sha256(ids).hexdigest(),
    )
