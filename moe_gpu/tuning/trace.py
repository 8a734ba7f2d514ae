"""A routing trace: what the routers said about a text, to replay without the model.

Shape suffixes: L MoE layers, N rows of text, T tokens, E experts, K experts per token.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import save_whole
from ..huggingface.attached import AttachedMoE
from ..kernels.checks import check_groups
from ..kernels.score_ref import ScoreRule, rank_experts, score_ref
from .quality import Evaluation

FORMAT = "moe_gpu routing trace 2"


@dataclass(frozen=True)
class RoutingTrace:
    """Router logits of exact routing; each row is a sequence of its own.

    Attributes:
        logits_LNTE: In the dtype in which the routers gave them: near-ties go as they went.
        top_k: K.
        rule: How the routers score.
        expert_bytes: Of one expert, for megabytes per token; 0 if it is not known.
        text: SHA-256 of the token ids and their shape.
        bias_LE: Correction biases, float32; None where the routers have none.
    """

    logits_LNTE: torch.Tensor
    top_k: int
    rule: ScoreRule
    expert_bytes: int
    text: str
    bias_LE: torch.Tensor | None = None

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
        ids_L = []
        for logits_NTE, bias_E in zip(self.logits_LNTE, self.biases(), strict=True):
            scores = score_ref(logits_NTE.flatten(0, 1).float(), self.rule, bias_E)
            ids_L.append(rank_experts(scores.selection_TE, scores.candidate_TE)[:, : self.top_k])
        return torch.stack(ids_L, 1).unflatten(0, (self.rows, self.tokens))

    def biases(self) -> Sequence[torch.Tensor | None]:
        """Return each layer's correction bias."""
        return [None] * self.num_layers if self.bias_LE is None else self.bias_LE

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that appears whole or not at all.

        Raises:
            FileNotFoundError: No folder to write it to.
        """
        described = {
            "format": FORMAT,
            "top_k": str(self.top_k),
            "score_rule": json.dumps(self.rule.as_dict()),
            "expert_bytes": str(self.expert_bytes),
            "text": self.text,
        }
        tensors = {"logits": self.logits_LNTE.contiguous()}
        if self.bias_LE is not None:
            tensors["correction_bias"] = self.bias_LE.contiguous()
        save_whole(tensors, path, described)

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
                has_bias = "correction_bias" in file.keys()  # noqa: SIM118 - no mapping
                bias_LE = file.get_tensor("correction_bias") if has_bias else None
        except SafetensorError as error:
            raise ValueError(f"trace={str(path)!r} cannot be read: {error}") from error
        try:
            top_k, expert_bytes = int(described["top_k"]), int(described["expert_bytes"])
            rule = ScoreRule.from_dict(json.loads(described["score_rule"]))
            text = described["text"]
            is_whole = logits_LNTE.ndim == 4 and logits_LNTE.numel() > 0
            is_whole &= logits_LNTE.is_floating_point() and expert_bytes >= 0
            is_whole &= 1 <= top_k <= logits_LNTE.shape[-1]
            if is_whole:
                check_groups(rule, logits_LNTE.shape[-1], top_k)
            if bias_LE is not None:
                is_whole &= bias_LE.shape == (logits_LNTE.shape[0], logits_LNTE.shape[-1])
        except (KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"trace={str(path)!r} is damaged: what it holds makes no sense")
        return cls(logits_LNTE, top_k, rule, expert_bytes, text, bias_LE)


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
        evaluation.score_rule,
        expert_bytes,
        hashlib.sha256(ids).hexdigest(),
        evaluation.biases(),
    )
